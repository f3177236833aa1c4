"""The records that everything else passes around, and the errors. Imports nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rankopt.core.errors import TaskError

if TYPE_CHECKING:
    from torch import nn

Rank = tuple[int, ...]


METRICS = ("params", "macs", "bytes")
"""What is counted."""


BUDGETS = (*METRICS, "latency", "memory", "disk")
"""What a budget may limit."""


INPUT_FIRST = ("ConvTranspose", "Embedding")
"""How kinds of layers begin whose weight is kept (in, out // groups, *kernel)."""


FACTORISED, RECONSTRUCTED = "factorised", "reconstructed"
"""The forms of a layer: its input contracted with the factors, or with the weight that was built from them."""


DENSE = "dense"
"""The method of a layer that keeps its one weight."""


SAME, INT8, BFLOAT16, FLOAT16 = "same", "int8", "bfloat16", "float16"


PRECISIONS = (SAME, INT8, BFLOAT16, FLOAT16)
"""What a layer's weights are stored in; "same": as the model has them. precision.py says how."""


@dataclass(frozen=True)
class Cost:
    """What a layer or a model costs.

    params: elements of unique parameters. macs: multiply-accumulates for one example.
    bytes: parameters (for a whole model: and buffers) as stored. latency: nanoseconds of a forward pass under the
    conditions of a latency budget. memory: bytes of weights and activations that live at once, at most; of a layer
    those of its weights. disk: bytes of model.safetensors. The last three are 0 where no budget names them, and not
    compared.
    """

    params: int
    macs: int
    bytes: int
    latency: int = field(default=0, compare=False)
    memory: int = field(default=0, compare=False)
    disk: int = field(default=0, compare=False)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(self[m] + other[m] for m in BUDGETS))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(self[m] - other[m] for m in BUDGETS))

    def __getitem__(self, metric: str) -> int:
        return int(getattr(self, metric))


class Call(NamedTuple):
    """One use of a layer in a forward pass of one example.

    maps: how many maps (of a convolution) or vectors (of size 1x1) pass; sizes are (height, width), see kinds.py.
    An Embedding reads indices: size_in is (0, 0).
    """

    maps: int
    size_in: tuple[int, int]
    size_out: tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, as the inventory found it. `reason` says why it must stay dense, if it must.

    shape: of the weight as families see it, (out, in // groups, height, width) or (out, in); kinds.py says what
    these are for every kind. stored: of the weight itself, where it is another.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    bias: bool = False
    calls: tuple[Call, ...] = ()
    cost: Cost = Cost(0, 0, 0)
    element_size: int = 4
    reason: str | None = None
    aliases: tuple[str, ...] = ()  # further names of the same module
    stored: tuple[int, ...] = ()

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of the weight as the module keeps it."""
        return self.stored or self.shape

    @property
    def input_first(self) -> bool:
        """Whether the weight is kept (in, out // groups, *kernel), and costs MACs for each position of the input."""
        return self.kind.startswith(INPUT_FIRST)

    @property
    def positions(self) -> int:
        """How often the whole weight is applied for one example, as torch's flop counter counts."""
        return sum(c.maps * math.prod(c.size_in if self.input_first else c.size_out) for c in self.calls)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layer itself for one example."""
        return self.weights * self.positions

    @property
    def out_channels(self) -> int:
        """Output channels of one group."""
        return self.shape[0] // self.groups

    @property
    def in_channels(self) -> int:
        """Input channels of one group."""
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, int]:
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)

    @property
    def patch(self) -> int:
        """Inputs that one output of one group sees: in_channels * height * width."""
        return self.in_channels * math.prod(self.kernel)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Candidate:
    """One way to realise one layer. `error` is relative: 0 is exact, 1 is no better than a zero weight."""

    method: str
    rank: Rank
    cost: Cost
    error: float
    loss: float = 0.0  # predicted rise of the objective when this layer alone uses the candidate
    key: str | None = None  # where the factors are kept, encoded if in another precision; None for dense
    form: str = FACTORISED  # or RECONSTRUCTED; "dense" for dense
    precision: str = SAME

    @property
    def unchanged(self) -> bool:
        """The layer as it is."""
        return (self.method, self.precision) == (DENSE, SAME)


@dataclass(frozen=True)
class Choice:
    """What a plan says of one layer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    method: str
    rank: Rank
    params: int
    macs: int
    error: float
    reason: str
    form: str = FACTORISED  # as of Candidate
    precision: str = SAME

    @property
    def unchanged(self) -> bool:
        """The layer as it is."""
        return (self.method, self.precision) == (DENSE, SAME)


@dataclass(frozen=True)
class Plan:
    """A decision for every layer, and the whole model's cost under it.

    latency_on: the conditions of a latency budget, as hardware.Conditions reads them.
    """

    choices: tuple[Choice, ...]
    cost: Cost
    dense: Cost
    latency_on: str = ""


Proposal = tuple[int, ...]
"""One frontier index per free layer, in the problem's order; 0 is the cheapest candidate's position."""


@dataclass(frozen=True)
class Trial:
    """One evaluated proposal. state: "finished", "failed" or "stopped" (at a low fidelity); objective is minimised.

    objective, score: of full fidelity only. rungs: the objective at each lower fidelity that was measured.
    note: the strategy's own numbers on where the proposal came from, kept so that a resumed strategy learns the same.
    """

    number: int
    proposal: Proposal
    state: str
    cost: Cost
    objective: float | None = None
    score: float | None = None
    predicted: float | None = None
    seconds: float = 0.0
    error: str | None = None
    note: tuple[float, ...] = ()
    rungs: tuple[float, ...] = ()


@dataclass
class Task:
    """A model with what is needed to compress it. See the README for a complete example.

    model: any nn.Module. example_input: a tensor, or a tuple or dict of the forward's arguments.
    calibration: an iterable of batches; a batch is a tensor, a tuple or list whose first item is the
    input (as a DataLoader gives), or a dict of keyword arguments.
    score: model -> float on validation data, a fraction, higher is better.
    objective: model -> float, minimised by searches; default: KL divergence to the dense model's
    predictions on the calibration batches. train: batches (input, target), an iterable with a length that is gone
    through anew every epoch and may augment; loss: (output, target) -> scalar. test: as score, on test data, read
    once at the end. examples, test_examples: how many examples score and test average over; scores then
    carry confidence intervals. Raises TaskError if they are not positive integers.
    """

    model: nn.Module
    example_input: Any
    calibration: Iterable[Any]
    score: Callable[[nn.Module], float] | None = None
    objective: Callable[[nn.Module], float] | None = None
    train: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    test: Callable[[nn.Module], float] | None = None
    name: str = field(default="")
    examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        for what in ("examples", "test_examples"):
            value = getattr(self, what)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise TaskError(f"{what} is {value!r}: give the number of examples that the score averages over")
