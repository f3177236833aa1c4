"""Records that all other modules pass around: costs, layers, candidates, plans, trials and tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rankopt.core.errors import TaskError
from rankopt.core.result_record import Metric, TrialRow

if TYPE_CHECKING:
    from torch import nn

Rank = tuple[int, ...]
"""The rank of a decomposition: as many numbers as its family has bonds."""


METRICS: tuple[Metric, ...] = ("params", "macs", "bytes")
"""Costs that are counted on the model, without running it on data."""


MEASURED: tuple[Metric, ...] = ("latency", "energy")
"""Costs that are measured while the model runs, under given conditions."""


BUDGETS: tuple[Metric, ...] = (*METRICS, "latency", "memory", "disk", "energy")
"""Metrics that a budget may limit; stored trials list costs in this order."""


INPUT_FIRST = ("ConvTranspose", "Embedding", "Conv1D")
"""Prefixes of the kinds of layers that keep their weight as (in, out // groups, *kernel)."""


FACTORISED, RECONSTRUCTED = "factorised", "reconstructed"
"""Forms of a replaced layer: it contracts its input with the factors, or builds the weight from them first."""


DENSE = "dense"
"""The method of a layer that keeps its weight."""


SAME, INT8, BFLOAT16, FLOAT16 = "same", "int8", "bfloat16", "float16"


PRECISIONS = (SAME, INT8, BFLOAT16, FLOAT16)
"""Precisions in which weights may be stored; "same" is the model's own. See `model.quantization`."""


@dataclass(frozen=True)
class Cost:
    """The cost of a layer or a model.

    `latency`, `memory`, `disk` and `energy` are 0 unless a budget limits them; equality ignores them.

    Attributes:
        params: Elements of unique parameters.
        macs: Multiply-accumulates for one example.
        bytes: Size of the parameters as stored; of a whole model, of its buffers, too.
        latency: Nanoseconds of a forward pass under the conditions of the latency budget.
        memory: Peak bytes of weights and activations in a forward pass; of a layer, an estimate of its share.
        disk: Bytes of model.safetensors; of a layer, an estimate of its share.
        energy: Nanojoules for one example under the conditions of the energy budget.
    """

    params: int
    macs: int
    bytes: int
    latency: int = field(default=0, compare=False)
    memory: int = field(default=0, compare=False)
    disk: int = field(default=0, compare=False)
    energy: int = field(default=0, compare=False)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(self[m] + other[m] for m in BUDGETS))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(self[m] - other[m] for m in BUDGETS))

    def __getitem__(self, metric: str) -> int:
        return int(getattr(self, metric))

    def with_metric(self, metric: Metric, value: int) -> Cost:
        """The same cost but for one metric.

        Args:
            metric: The metric.
            value: Its value.
        """
        return replace(self, **{metric: value})


class Call(NamedTuple):
    """One call of a layer in a forward pass of one example. Sizes are (height, width), as in `model.layer_kinds`.

    Attributes:
        maps: How many feature maps (of a convolution) or vectors (of a Linear, sizes 1 x 1) go through.
        size_in: Size of a map before the layer; (0, 0) for an Embedding, which reads indices.
        size_out: Size of a map after the layer.
    """

    maps: int
    size_in: tuple[int, int]
    size_out: tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, as the inventory found it.

    Attributes:
        name: The module's name in the model.
        kind: "Conv2d", "ConvTranspose1d", "Linear", "Embedding", ...; of other modules, the class's name.
        shape: The weight's shape as decompositions see it: (out, in // groups, height, width) or (out, in). See
            `model.layer_kinds` for how the axes of each kind map to these.
        groups: Groups of a convolution.
        bias: Whether it has a bias.
        calls: Its calls in a forward pass of one example.
        cost: Its dense cost.
        element_size: Bytes of one weight.
        reason: Why it must stay dense; None if it may be factorised.
        aliases: Further names of the same module.
        stored: The weight's own shape, if that is not `shape`.
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
    aliases: tuple[str, ...] = ()
    stored: tuple[int, ...] = ()

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of the weight as the module keeps it."""
        return self.stored or self.shape

    @property
    def input_first(self) -> bool:
        """Whether the weight is kept as (in, out // groups, *kernel), and costs MACs at each position of the input."""
        return self.kind.startswith(INPUT_FIRST)

    @property
    def positions(self) -> int:
        """How often the whole weight is applied for one example, as torch's flop counter counts it."""
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
        """Height and width of the kernel; 1 x 1 for matrices."""
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)

    @property
    def patch(self) -> int:
        """How many inputs one output of one group sees: in_channels * height * width."""
        return self.in_channels * math.prod(self.kernel)

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Candidate:
    """One way to realise one layer.

    Attributes:
        method: Name of the decomposition, or DENSE.
        rank: Its rank; empty for dense.
        cost: The layer's cost with it.
        error: Relative error: 0 is exact, 1 is no better than a weight of zeros.
        loss: Predicted rise of the objective if this layer alone uses the candidate.
        key: Cache key of the factors, encoded if `precision` is not SAME; None for dense.
        form: FACTORISED, RECONSTRUCTED or, for dense, "dense".
        precision: One of PRECISIONS.
    """

    method: str
    rank: Rank
    cost: Cost
    error: float
    loss: float = 0.0
    key: str | None = None
    form: str = FACTORISED
    precision: str = SAME

    @property
    def unchanged(self) -> bool:
        """The layer as it is."""
        return (self.method, self.precision) == (DENSE, SAME)

    @property
    def label(self) -> tuple[str, Rank, str, str]:
        """What tells the candidates of a layer apart, also before they are fitted."""
        return self.method, self.rank, self.form, self.precision


@dataclass(frozen=True)
class Choice:
    """A plan's decision for one layer.

    Attributes:
        name: The layer's name.
        kind: As of `Layer`.
        shape: `Layer.own_shape`.
        method: Name of the decomposition, or DENSE.
        rank: Its rank; empty for dense.
        params: Parameters of the layer under the plan.
        macs: Multiply-accumulates of the layer under the plan.
        error: As of `Candidate`.
        reason: In words, why the layer stays dense or got this candidate.
        form: As of `Candidate`.
        precision: One of PRECISIONS.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    method: str
    rank: Rank
    params: int
    macs: int
    error: float
    reason: str
    form: str = FACTORISED
    precision: str = SAME

    @property
    def unchanged(self) -> bool:
        """The layer as it is."""
        return (self.method, self.precision) == (DENSE, SAME)


@dataclass(frozen=True)
class Plan:
    """A decision for every layer.

    Attributes:
        choices: One per layer.
        cost: The whole model's cost under the plan.
        dense: The dense model's cost.
        latency_on: Conditions of a latency or energy budget, as `candidates.latency_table.Conditions` reads them; empty
            without one.
        before: What had been replaced already in the model that was compressed, the outer of nested layers first.
    """

    choices: tuple[Choice, ...]
    cost: Cost
    dense: Cost
    latency_on: str = ""
    before: tuple[Choice, ...] = ()


Proposal = tuple[int, ...]
"""One index into the frontier per free layer, in the problem's order; 0 is the cheapest candidate."""


@dataclass(frozen=True)
class Trial:
    """One evaluated proposal.

    Attributes:
        number: Position in the search, from 0.
        proposal: The candidates that were chosen.
        state: "finished", "failed" or "stopped" (at a low fidelity).
        cost: The whole model's cost.
        objective: The objective, which is minimised, at full fidelity; None if it was not reached.
        score: The task's score at full fidelity, if it has one.
        predicted: Sum of the predicted losses.
        seconds: Time that the evaluation took.
        error: What went wrong in a failed trial.
        note: The strategy's own numbers on the proposal, kept so that a resumed strategy learns the same from it.
        rungs: The objective at each lower fidelity that was measured.
        device: The device that it ran on, as "cpu" or "cuda:0 (NVIDIA H200)"; empty if that is not known.
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
    device: str = ""

    @property
    def row(self) -> TrialRow:
        """The trial as reports read it."""
        return {
            "number": self.number,
            "state": self.state,
            "objective": self.objective,
            "rungs": list(self.rungs),
            "score": self.score,
            "predicted": self.predicted,
            "seconds": self.seconds,
            "error": self.error,
            "device": self.device,
            "cost": [self.cost[m] for m in BUDGETS],
        }


WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Modules that only hold another one, and where: torch.nn.DataParallel, torch.compile, ..."""


def unwrapped(model: Any) -> Any:
    """The model inside of DataParallel, DistributedDataParallel or torch.compile; other models as they are.

    Args:
        model: Any module.
    """
    while (inner := WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, inner)
    return model


@dataclass
class Task:
    """A model and what is needed to compress it. See the README for a complete example.

    Attributes:
        model: Any nn.Module.
        example_input: A tensor, or a tuple or dict of the forward's arguments.
        calibration: An iterable of batches. A batch is a tensor, a tuple or list that begins with the input (as a
            DataLoader gives), or a dict of keyword arguments.
        score: Model -> fraction on validation data, 0 to 1; higher is better. Of an error rate give 1 - error.
        objective: Model -> number that searches minimise. Default: the KL divergence of the model's predictions from
            the dense model's on the calibration batches.
        train: Batches (input, target): an iterable with a length. It is iterated once per epoch and may augment.
        loss: (output, target) -> scalar.
        test: Like `score`, on test data; called once at the end.
        name: A name for reports.
        examples: How many examples `score` averages over; scores then have confidence intervals.
        test_examples: How many examples `test` averages over.

    Raises:
        TaskError: `examples` or `test_examples` is not a positive integer.
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
        self.model = unwrapped(self.model)
        for what in ("examples", "test_examples"):
            value = getattr(self, what)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise TaskError(f"{what} is {value!r}: give the number of examples that the score averages over")
