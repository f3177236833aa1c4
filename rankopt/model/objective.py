"""Model -> numbers: the default objective, and guarded calls of a task's own score and objective."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.model.forward import batch_size, class_axis, inference, join, map_tensors, outputs, run, take, to_device

CHUNK = 2**20  # numbers of an output that are compared at once, in float64 (8 MB)
KEPT = 2**30  # bytes of the dense model's outputs that are kept; it is run again for the others


UNNAMED = ("", "0", "out", "output", "scores")
"""Names of a main output that say nothing of what it holds: it is then read as classes."""


class Part(NamedTuple):
    """How one of a model's outputs is compared.

    Attributes:
        name: Its place in what the model returns.
        axis: Where its classes lie; None if it holds no classes.
        size: What its distance is divided by, for one example. With classes the number of predictions; else its
            summed squared deviations from its mean (its squares, if it is constant). 0: it is not compared.
    """

    name: str
    axis: int | None
    size: float


class Divergence:
    """The default objective: how far a model's outputs are from the dense model's.

    Predictions count by their mean Kullback-Leibler divergence from the dense model's, in nats:

        D = mean KL(p₀ ‖ p), p₀ = softmax(z₀) of the dense model's logits, p = softmax(z)

    The main output (`forward.main_output`) is read as predictions unless its name says otherwise ("last_hidden_state"),
    and so is every output whose name holds "logits"; `forward.class_axis` says where the classes are. Every other
    floating-point output counts by its squared error, relative to the dense output's variance: ‖y − y₀‖² / ‖y₀ − mean
    y₀‖². Of a model with several outputs the parts are added up, each relative to its own size: divergences are then
    divided by what the predictions say at all, mean KL(p₀ ‖ mean p₀). So every head counts, and 1 is a head's loss of
    all that it says.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[Any]) -> None:
        """Run the dense model once, and keep up to `KEPT` bytes of its outputs on the CPU.

        Args:
            dense: The model to compare with. It is run again with every measurement for outputs that were not kept.
            batches: Inputs, as `forward.run` takes them.

        Raises:
            TaskError: If the model returns no floating-point tensor, or one that is NaN or infinite.
        """
        self.batches = list(batches)
        self.names: tuple[str, ...] = ()
        self.parts: list[Part] = []
        self.examples = sum(batch_size(x) for x in self.batches)
        self.reference: list[list[Tensor] | None] = []
        self.lengths: list[list[int]] = []  # the first dimension of every output, by batch
        sizes: list[_Size] = []
        room = KEPT
        for found in self._outputs(dense):
            zs = list(found.values())
            sizes = sizes or [_Size(name, i, z, len(zs)) for i, (name, z) in enumerate(found.items())]
            if len(zs) != len(sizes):
                raise TaskError("the model returns more outputs on some calibration batches than on others")
            for size, z in zip(sizes, zs, strict=True):
                size.add(z)
            room -= sum(z.numel() * z.element_size() for z in zs)
            self.reference.append([z.cpu() for z in zs] if room >= 0 else None)
            self.lengths.append([len(z) if z.ndim else 0 for z in zs])
        self.dense = None if self.kept else dense
        self.parts = [Part(x.name, x.axis, x.value() / self.examples) for x in sizes]
        self.batch_size = self.examples / max(len(self.batches), 1)  # on average
        rows = [batch_size(x) for x in self.batches]
        self.divisible = all([lengths[i] for lengths in self.lengths] == rows for i in range(len(self.parts)))

    def _outputs(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            with inference(model):
                out = run(model, to_device(batch, model))
            if not (found := outputs(out)):
                raise TaskError(
                    f"the model returns no floating-point tensor ({type(out).__name__}): return one, or give the task "
                    "an objective of its own"
                )
            yield found

    def references(self) -> Iterator[list[Tensor]]:
        """The dense model's outputs on each batch, the main output first."""
        for batch, kept in zip(self.batches, self.reference, strict=True):
            if kept is None:
                assert self.dense is not None
                with inference(self.dense):
                    kept = list(outputs(run(self.dense, to_device(batch, self.dense))).values())  # noqa: PLW2901
            yield kept

    def __call__(self, model: nn.Module) -> float:
        """The divergence of a model from the dense one.

        Args:
            model: The model to measure.
        """
        total, examples = self.sums(model)
        return total / examples

    def sums(self, model: nn.Module) -> tuple[float, float]:
        """Numerator and denominator; those of slices add up to the whole's.

        Args:
            model: The model to measure.
        """
        return sum(map(_total, self._compared(model))), self.examples

    @property
    def units(self) -> int:
        """The number of examples; of batches, where not `divisible`."""
        return self.examples if self.divisible else len(self.batches)

    def by_unit(self, model: nn.Module) -> Tensor:
        """The divergence of each unit, of which the whole's is the mean.

        Args:
            model: The model to measure.

        Returns:
            float64 (units,), on the CPU.
        """
        found = []
        for batch, compared in zip(self.batches, self._compared(model), strict=True):
            if self.divisible:
                none = torch.zeros(batch_size(batch), dtype=torch.float64)
                found.append(
                    sum((_by_example(differences, part.axis, z, z0) / part.size for part, z, z0 in compared), none)
                )
            else:
                found.append(torch.tensor([_total(compared) / self.batch_size], dtype=torch.float64))
        return torch.cat(found)

    def _compared(self, model: nn.Module) -> Iterator[list[tuple[Part, Tensor, Tensor]]]:
        """For each batch the outputs that are compared, and the dense model's."""
        for found, reference in zip(self._outputs(model), self.references(), strict=True):
            if len(found) != len(reference):
                raise TaskError(f"the compressed model returns {len(found)} outputs, the dense one {len(reference)}")
            triples = list(zip(self.parts, found.values(), reference, strict=True))
            for _, z, z0 in triples:
                if z.shape != z0.shape:
                    shapes = f"{tuple(z.shape)}, the dense one's {tuple(z0.shape)}"
                    raise TaskError(f"the compressed model's output has shape {shapes}")
            yield [triple for triple in triples if triple[0].size > 0]

    def slices(self, shares: Sequence[float]) -> list[Divergence]:
        """The same in consecutive slices of the examples.

        Args:
            shares: Where to cut, as shares of the examples: rising, the last one 1.

        Raises:
            TaskError: If a slice would hold no example, or an output's first dimension is not the batch.
        """
        if not self.divisible:
            raise TaskError("the objective cannot be sliced: an output's first dimension is not the batch's")
        ends = [round(share * self.examples) for share in shares]
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            if end <= start:
                raise TaskError(f"a fidelity of {end / self.examples:.2g} holds no example more than the one below it")
            parts.append(self.part(slice(start, end)))
        return parts

    def part(self, which: slice | Tensor) -> Divergence:
        """The same for some of the units.

        Args:
            which: Their numbers, counted through all batches: a slice, or indices in ascending order.
        """
        part, at = copy.copy(self), 0
        part.batches, part.reference, part.lengths = [], [], []
        wanted = torch.arange(self.units)[which]
        for x, zs, lengths in zip(self.batches, self.reference, self.lengths, strict=True):
            n = batch_size(x) if self.divisible else 1
            found = wanted[(wanted >= at) & (wanted < at + n)] - at
            if len(found):
                cut = _slice(found) if self.divisible else slice(None)
                part.batches.append(take(x, cut))
                part.reference.append(None if zs is None else [z[cut] if z.ndim else z for z in zs])
                part.lengths.append([len(found)] * len(self.parts) if self.divisible else lengths)
            at += n
        part.examples = sum(map(batch_size, part.batches))
        return part

    def joined(self) -> Divergence:
        """The same with all batches as one, where they can be: one larger run is faster than several small ones, above
        all on a GPU, which chooses its kernels for every new size of a batch."""
        if not self.divisible or len(self.batches) < 2 or (batch := join(self.batches)) is None:
            return self
        reference = join(self.reference) if self.kept else None
        if self.kept and reference is None:
            return self
        same = copy.copy(self)
        same.batches, same.reference = [batch], [reference]
        same.lengths = [[self.examples] * len(self.parts)]
        return same

    @property
    def kept(self) -> bool:
        """Whether all outputs of the dense model are in memory; it is run for the others."""
        return None not in self.reference

    def keeping(self) -> Divergence:
        """The same with all outputs of the dense model in memory."""
        same = copy.copy(self)
        same.reference, same.dense = list(self.references()), None
        return same

    def beside(self, model: nn.Module) -> Divergence:
        """The same with all that it compares on the device of a model: it is moved once, and not in each run.

        Args:
            model: The model.
        """
        same = copy.copy(self)
        same.batches = [to_device(batch, model) for batch in self.batches]
        same.reference = [None if zs is None else to_device(zs, model) for zs in self.reference]
        return same

    def apart(self) -> Divergence:
        """The same with tensors of its own: pickles of slices hold all that they were cut from."""
        same = copy.copy(self)
        same.batches = [map_tensors(x, Tensor.clone) for x in self.batches]
        same.reference = [None if zs is None else [z.clone() for z in zs] for zs in self.reference]
        return same

    def expected(self) -> Tensor:
        """How much each unit is likely to count, from the dense model alone.

        An example counts the more, the less certain its predictions are: for small changes of the logits the divergence
        is a quadratic form with their covariance under the predicted probabilities. The entropy stands for it, relative
        to its mean, plus 1: certain examples, and outputs without classes, count too.

        Returns:
            float64 (units,), on the CPU.
        """
        total = torch.ones(self.units, dtype=torch.float64)
        if not self.divisible:
            return total
        entropies: dict[str, list[Tensor]] = {part.name: [] for part in self.parts if part.axis is not None}
        for zs in self.references():
            for part, z in zip(self.parts, zs, strict=True):
                if part.axis is not None:
                    entropies[part.name].append(_by_example(_entropies, part.axis, z))
        for found in entropies.values():
            each = torch.cat(found)
            total += each / each.mean().clamp_min(1e-30)
        return total


def _slice(indices: Tensor) -> slice | Tensor:
    """Ascending indices, as a slice where they follow each other: that copies nothing."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


class _Size:
    """Measures, batch by batch, what the distance of one output is divided by; see `Part.size`.

    Args:
        name: The output's place in what the model returns.
        number: Its number; 0 is the main output.
        z: The output of the first batch.
        of: How many outputs there are.
    """

    def __init__(self, name: str, number: int, z: Tensor, of: int) -> None:
        self.name, self.alone, self.scalar = name, of == 1, not z.ndim
        classes = "logits" in name or (number == 0 and name.rpartition(".")[2] in UNNAMED)
        self.axis = class_axis(z) if classes else None
        self.count = self.mean = self.around = self.squares = 0.0
        self.entropy: float = 0.0  # of predictions, negative, summed
        self.predictions: Any = 0.0  # summed

    def add(self, z: Tensor) -> None:
        """Read the output of a batch.

        Raises:
            TaskError: It is NaN or infinite.
        """
        if not torch.isfinite(z).all():
            raise TaskError("the dense model's outputs are NaN or infinite on the calibration data")
        for piece, axis in _pieces(z, self.axis):
            if axis is None:
                self._add_numbers(piece.double())
            elif self.alone:
                self.count += piece.numel() / piece.shape[axis]
            else:
                self._add_predictions(F.log_softmax(piece.double(), axis).movedim(axis, -1).flatten(0, -2))

    def _add_numbers(self, t: Tensor) -> None:
        """Count, mean and squared deviations of both parts together (Chan et al. 1979)."""
        n, mean = t.numel(), t.mean().item()
        total, apart = self.count + n, mean - self.mean
        self.around += (t - mean).square().sum().item() + apart**2 * self.count * n / total
        self.mean += apart * n / total
        self.squares += t.square().sum().item()
        self.count = total

    def _add_predictions(self, log_p: Tensor) -> None:
        self.count += len(log_p)
        self.entropy += (log_p.exp() * log_p).sum().item()
        self.predictions = self.predictions + log_p.exp().sum(0)

    def value(self) -> float:
        """The size, of all examples together."""
        if self.axis is None:
            # Of one number a batch, as an auxiliary loss, how much batches differ says nothing of its size.
            varies = not self.scalar and self.around > 1e-12 * self.count * self.mean**2
            return self.around if varies else self.squares
        return self.count if self.alone else self.count * self._information()

    def _information(self) -> float:
        """Mean KL divergence, in nats, of predictions from their mean: what the predictions say of their inputs."""
        mean = self.predictions / self.count
        return max(self.entropy / self.count - torch.special.xlogy(mean, mean).sum().item(), 1e-12)


def _pieces(z: Tensor, axis: int | None) -> Iterator[tuple[Tensor, int | None]]:
    """An output in pieces of bounded size, in which classes stay together, and where these lie."""
    if axis is None:
        yield from ((piece, None) for piece in z.flatten().split(CHUNK))
        return
    for piece in z.split(max(1, CHUNK * len(z) // max(z.numel(), 1))):
        if piece.numel() <= CHUNK:
            yield piece, axis
            continue
        lines = piece.movedim(axis, -1).flatten(0, -2)  # of a single example
        yield from ((line, 1) for line in lines.split(max(1, CHUNK // lines.shape[1])))


def _chunks(z: Tensor, z0: Tensor, axis: int | None) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Both outputs in pieces, and where their classes lie."""
    for (a, where), (b, _) in zip(_pieces(z, axis), _pieces(z0, axis), strict=True):
        yield a, b, where


def _total(compared: Sequence[tuple[Part, Tensor, Tensor]]) -> float:
    """The summed divergence of a batch."""
    return sum(
        sum(differences(*pieces).sum().item() for pieces in _chunks(z, z0, part.axis)) / part.size
        for part, z, z0 in compared
    )


def differences(z: Tensor, z0: Tensor, axis: int | None) -> Tensor:
    """The terms of the KL divergence over the classes, or squared errors, elementwise in float64.

    Args:
        z: An output of the compressed model.
        z0: That of the dense model.
        axis: Where the classes are; None for an output without classes.
    """
    z, z0 = z.double(), z0.to(z.device).double()
    if axis is None:
        return (z - z0).square()
    log_p, log_p0 = F.log_softmax(z, axis), F.log_softmax(z0, axis)
    return F.kl_div(log_p, log_p0, reduction="none", log_target=True)


def _entropies(z: Tensor, axis: int | None) -> Tensor:
    """The terms of the entropy of predictions, elementwise in float64."""
    assert axis is not None
    log_p = F.log_softmax(z.double(), axis)
    return -log_p.exp() * log_p


def _by_example(terms: Callable[..., Tensor], axis: int | None, *zs: Tensor) -> Tensor:
    """Terms of outputs, which share a shape, summed for each example; on the CPU."""
    found = []
    n = len(zs[0])
    for i in range(0, n, rows := max(1, CHUNK * n // max(zs[0].numel(), 1))):
        some = [z[i : i + rows] for z in zs]
        if len(some[0]) > 1:
            found.append(terms(*some, axis).flatten(1).sum(1))
            continue
        pieces = zip(*(_pieces(z, axis) for z in some), strict=True)
        sums = [terms(*(z for z, _ in each), each[0][1]).sum() for each in pieces]
        found.append(torch.stack(sums).sum(0)[None])
    return torch.cat(found).cpu()


def call(what: str, function: Callable[[nn.Module], float] | None, model: nn.Module) -> float | None:
    """Call a task's score or objective in eval mode, without gradients.

    Args:
        what: Its name, for messages.
        function: The task's function; None gives None.
        model: The model to measure.

    Raises:
        TaskError: If the function raises, or gives no finite number.
    """
    if function is None:
        return None
    try:
        with inference(model):
            value = function(model)
    except Exception as error:  # whatever a user's function raises
        raise TaskError(f"{what} raised {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{what} returned {type(value).__name__}, not a number") from error
    if not math.isfinite(number):
        raise TaskError(f"{what} is {number}")
    return number
