"""Sensitivities of the default objective within a bounded number of forward passes.

A probe is a candidate in place of its layer, in a model that is dense otherwise; its rise is the mean of the examples'
divergences. Two things keep the cost of all probes below that of `PASSES` forward passes, however many layers there
are: a run begins at the changed layer (`model.replay`), and it is of a sample of the examples, which grows for those
probes whose rise is uncertain.

Most of a divergence comes from the few examples that the model is uncertain of, so examples are drawn with
probabilities proportional to what they are expected to count (`Divergence.expected`), and weighted by the inverse
(Hájek 1971). Samples are nested: the first n by u / expected, u random (sequential Poisson sampling, Ohlsson 1998).
Of 500 images, 125 give the rises of ResNet-20's layers within 15 %; drawn with equal probabilities, within 49 %.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.candidates.pool import WORKER_BYTES, NotSentError, Pool
from rankopt.candidates.sensitivity import PASSES, POINTS, Curve, probes
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.progress import Progress, Work
from rankopt.core.records import Candidate, Layer
from rankopt.decompositions.plan import replace
from rankopt.model.forward import batch_size, device_of
from rankopt.model.objective import Divergence
from rankopt.model.replay import Replay

log = logging.getLogger(__name__)


FIRST = 64
"""Examples that every probe sees first."""

LEAST = 48
"""With fewer examples than this within the bound on forward passes, layers get fewer probes instead."""

SETTLED = 0.1
"""Relative standard error of a rise from which on more examples are not worth their time."""

TRIAL = 2
"""Examples on which a run that begins at a layer is compared with a whole one."""

TRIAL_SHARE = 0.05
"""The most that these comparisons may take of the bound on forward passes; else all runs are whole ones."""

RECORDED = 2**29
"""Bytes of the outputs of modules that are kept for runs that begin at a layer."""

CALLS = 16
"""Calls that a pool gets for each growth of the sample, at least: enough to keep several machines busy."""

Build = Callable[[nn.Module, Layer, Candidate], nn.Module]
"""Makes the replacement of a layer's module."""


@dataclass(eq=False)
class Probe:
    """A candidate whose rise of the objective is measured.

    Attributes:
        layer: The layer that it replaces.
        candidate: The candidate.
        rises: Rises of the examples, in the order of the sample.
    """

    layer: Layer
    candidate: Candidate
    rises: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))


@dataclass
class ProbeRuns:
    """Runs of the dense model with a probe in place: all that a process needs for them.

    Attributes:
        model: The model. Layers are replaced in it and put back.
        build: Builds a candidate's module.
        replay: Lets runs begin at the layer; None where all are whole ones.
    """

    model: nn.Module
    build: Build
    replay: Replay | None = None

    def record(self, piece: Divergence) -> None:
        """Run the dense model on a piece, for runs on it that begin at a layer.

        Args:
            piece: An objective of a single batch.
        """
        if self.replay is not None:
            with self.replay.recording():
                piece.by_unit(self.model)

    def rise(self, piece: Divergence, layer: Layer, candidate: Candidate, whole: bool = False) -> Tensor:
        """Measure the rise of each unit.

        Args:
            piece: What was recorded last.
            layer: The layer to replace.
            candidate: What replaces it.
            whole: Whether not to begin at the layer.

        Raises:
            ValueError: The outputs are not finite.
        """
        module = self.model.get_submodule(layer.name)
        with _replaced(self.model, layer, self.build(module, layer, candidate)) as model:
            if whole or self.replay is None:
                rise = piece.by_unit(model)
            else:
                with self.replay.starting_at(layer.name):
                    rise = piece.by_unit(model)
        if not torch.isfinite(rise).all():
            raise ValueError("the outputs are NaN or infinite")
        return rise


Rise = tuple[int, int, Tensor | str]
"""The numbers of a piece and a probe, and the rises of the piece's units, or why they could not be measured."""


def _rises(
    runs: ProbeRuns, number: int, piece: Divergence, wanted: Sequence[tuple[int, Layer, Candidate]]
) -> Iterator[Rise]:
    """Measure some probes on a piece."""
    runs.record(piece)
    for probe, layer, candidate in wanted:
        try:
            yield number, probe, runs.rise(piece, layer, candidate)
        except torch.OutOfMemoryError as error:  # says nothing of the candidate
            said = f"the GPU's memory is out while layer {layer.name!r} is measured: give smaller calibration batches"
            raise RankoptError(f"{said} ({error})") from error
        except Exception as error:  # noqa: BLE001  # whatever a forward raises
            yield number, probe, str(error)


def _list_rises(*arguments: Any) -> list[Rise]:
    return list(_rises(*arguments))


class Sample:
    """A growing sample of units.

    Args:
        expected: How much each unit is expected to count, all above 0.

    Attributes:
        order: The units, in the order in which they are drawn.
    """

    def __init__(self, expected: Tensor) -> None:
        self.expected = expected
        u = torch.rand(len(expected), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.order = torch.argsort(u / expected)

    def mean(self, rises: Tensor) -> tuple[float, float]:
        """Estimate the mean of all units.

        Args:
            rises: Those of the first n units.

        Returns:
            The mean, and its relative standard error.
        """
        n = len(rises)
        share = self._probabilities(n)[self.order[:n]]
        weight = 1 / share
        mean = (weight * rises).sum() / weight.sum()
        if n == len(self.order) or mean <= 0:
            return float(mean), 0.0
        off = (1 - share) * (weight * (rises - mean)).square()
        return float(mean), float((off.sum() * n / max(n - 1, 1)).sqrt() / weight.sum() / mean) if n > 1 else math.inf

    def _probabilities(self, n: int) -> Tensor:
        """With which each unit is among the first n: proportional to what it is expected to count, but at most 1."""
        share = n * self.expected / self.expected.sum()
        while (share > 1).any():
            sure = share >= 1
            left = n - int(sure.sum())
            rest = self.expected[~sure].sum()
            share = torch.where(sure, 1.0, left * self.expected / rest if left > 0 else 1.0)
        return share


def examples_are_apart(divergence: Divergence, model: nn.Module) -> bool:
    """Find out whether examples can be measured in other batches than the given ones.

    Args:
        divergence: The objective.
        model: The dense model.
    """
    return divergence.divisible and _trial(divergence, model)[0]


def _trial(divergence: Divergence, model: nn.Module) -> tuple[bool, int]:
    """Whether a few examples alone give what they give in their batch, and how many examples were run for that."""
    tried = min(TRIAL, divergence.units)
    if divergence.kept and device_of(model).type == "cpu":
        return _are_apart(divergence, model), tried
    with torch.backends.cudnn.flags(enabled=False):  # its rounding (to TF32) depends on the size of the batch
        first = Divergence(model, divergence.batches[:1])
        return _are_apart(first.keeping(), model), (1 if first.kept else 2) * first.examples + tried


def _are_apart(divergence: Divergence, model: nn.Module) -> bool:
    try:
        return bool(divergence.part(slice(TRIAL)).by_unit(model).abs().max() < 1e-6)
    except TaskError:  # fewer examples have outputs of another shape: similarities of all pairs in a batch, as CLIP's
        return False


class Prober:
    """Measures the sensitivity curves of a model's layers.

    Args:
        divergence: The default objective of the dense model.
        model: The dense model with its composites expanded. Layers are replaced in it and put back.
        layers: The layers.
        build: Builds a candidate's module. A pool needs one that can be pickled.
        progress: Progress callback.
        pool: Processes that measure, with the same results; None for this one.
        most: The most forward passes of all examples that the probes take together.

    Attributes:
        passes: Forward passes of all examples that were spent so far. A run that begins at a layer counts as a whole
            one.
    """

    def __init__(
        self,
        divergence: Divergence,
        model: nn.Module,
        layers: Sequence[Layer],
        build: Build,
        progress: Progress,
        pool: Pool | None = None,
        most: int = PASSES,
    ) -> None:
        self.most = most
        self.divergence, self.layers, self.progress, self.pool = divergence, layers, progress, pool
        self.runs = ProbeRuns(model, build)
        self._spent = 0  # units of the objective that went through the model
        # As many examples as the model surely takes at once
        self._largest = max(map(batch_size, divergence.batches), default=1)
        self._chunk = 0  # the most units whose outputs of modules are kept
        total = sum(x.macs for x in layers) or 1
        behind = np.cumsum([x.macs for x in reversed(layers)])[::-1] / total
        self._behind = {x.name: float(share) for x, share in zip(layers, behind, strict=True)}

    @property
    def passes(self) -> float:
        return self._spent / self.divergence.units

    def curves(self, candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, Curve]:
        """Measure a curve for each layer.

        Args:
            candidates: Candidates by layer name.

        Returns:
            Curves by layer name; empty for a layer of which no candidate could be measured.
        """
        self._try_replay(candidates)
        sample = Sample(self.divergence.expected())
        self._spent += 0 if self.divergence.kept else self.divergence.units
        points, n = self._first_sample(len(self.layers))
        found = [Probe(x, c) for x in self.layers for c in probes(candidates[x.name], points)]
        unsettled, seen = found, 0
        while unsettled:
            failed = self._measure(unsettled, sample.order[seen:n])
            found = [p for p in found if p not in failed]
            seen, n = n, min(2 * n, self.divergence.units)
            errors = sorted(((sample.mean(p.rises)[1], i, p) for i, p in enumerate(unsettled) if p not in failed))
            affordable = self._left() // (n - seen) - 2 if n > seen else 0  # without the dense model's runs
            unsettled = [p for error, _, p in reversed(errors) if error > SETTLED][: max(affordable, 0)]
        curves: dict[str, list[tuple[float, float]]] = {x.name: [] for x in self.layers}
        for probe in found:
            curves[probe.layer.name].append((probe.candidate.error, sample.mean(probe.rises)[0]))
        return {name: tuple(sorted(points)) for name, points in curves.items()}

    def _left(self) -> int:
        """Units that may still go through the model."""
        return self.most * self.divergence.units - self._spent

    def _first_sample(self, layers: int) -> tuple[int, int]:
        """Probes of each layer, and the units that each of them sees first."""
        for points in range(POINTS, 0, -1):
            n = min(self._left() // (points * layers + 2), FIRST, self.divergence.units)
            if n >= min(LEAST, self.divergence.units):
                return points, n
        return 1, max(n, 1)

    # --- runs ---

    def _measure(self, wanted: Sequence[Probe], units: Tensor) -> set[Probe]:
        """Measure probes on more units; returns those that could not be measured."""
        ascending, place = units.sort()
        pieces = list(self._pieces(self.divergence.part(ascending).joined()))
        of_runs = [piece.units * self._behind[probe.layer.name] for piece in pieces for probe in wanted]
        work = Work(self._run(pieces, wanted), lambda x: of_runs[x[0] * len(wanted) + x[1]], sum(of_runs))
        seen = f"measuring sensitivities on {sum(x.examples for x in pieces):,} examples"
        failed: dict[Probe, str] = {}
        rises: dict[Probe, dict[int, Tensor]] = {probe: {} for probe in wanted}
        for piece, number, rise in self.progress(work, seen, len(of_runs)):
            if isinstance(rise, str):
                failed[wanted[number]] = rise
            else:
                rises[wanted[number]][piece] = rise
        for probe in wanted:
            if probe in failed:
                c = probe.candidate
                log.warning("the objective of layer %r as %s %s: %s", probe.layer.name, c.method, c.rank, failed[probe])
                continue
            drawn = torch.empty(len(units), dtype=torch.float64)
            drawn[place] = torch.cat([rises[probe][piece] for piece in range(len(pieces))])
            probe.rises = torch.cat([probe.rises, drawn])
        return set(failed)

    def _run(self, pieces: Sequence[Divergence], wanted: Sequence[Probe]) -> Iterator[Rise]:
        """Run the model with each probe on each piece, in any order."""
        probes = [(i, probe.layer, probe.candidate) for i, probe in enumerate(wanted)]
        each = len(probes) if self.pool is None else math.ceil(len(probes) * len(pieces) / CALLS)
        groups = [probes[i : i + each] for i in range(0, len(probes), each)]
        self._spent += sum(piece.units * (len(probes) + (self.runs.replay is not None)) for piece in pieces)
        kept = enumerate(map(self._keeping, pieces))
        if self.pool is not None:
            calls = ((number, piece.apart(), group) for number, piece in kept for group in groups)
            try:
                for found in self.pool(_list_rises, calls, self._memory(), self.runs):
                    yield from found
            except NotSentError as error:  # before any call
                log.info("sensitivities are measured in this process: %s", error)
                self.pool = None
            else:
                return
        yield from (rise for number, piece in kept for rise in _rises(self.runs, number, piece, probes))

    def _memory(self) -> int:
        """Bytes that a process takes for its runs."""
        weights = sum(p.numel() * p.element_size() for p in self.runs.model.parameters())
        return WORKER_BYTES + RECORDED + 3 * weights

    def _pieces(self, part: Divergence) -> Iterator[Divergence]:
        """An objective in pieces of a single batch, of which everything that is recorded fits into memory."""
        at, most = 0, min(self._chunk or self._largest, self._largest)
        for batch in part.batches:
            n = batch_size(batch) if part.divisible else 1
            for start in range(at, at + n, most):
                yield part.part(slice(start, min(start + most, at + n)))
            at += n

    def _keeping(self, piece: Divergence) -> Divergence:
        """A piece with the dense model's outputs in memory."""
        self._spent += 0 if piece.kept else piece.units
        return piece.keeping().beside(self.runs.model)

    # --- which shortcuts hold ---

    def _try_replay(self, candidates: Mapping[str, Sequence[Candidate]]) -> None:
        """Find out whether examples can be measured apart, and which layers a run may begin at."""
        runs, piece = self.runs, self._keeping(next(self._pieces(self.divergence.part(slice(TRIAL)))))
        if self.divergence.divisible:
            apart, spent = _trial(self.divergence, runs.model)
            self._spent += spent
            if not apart:
                self.divergence = copy.copy(self.divergence)
                self.divergence.divisible, self._spent = False, 1
                piece = self.divergence.part(slice(1))
        if (2 * len(self.layers) + 2) * piece.units > TRIAL_SHARE * self.most * self.divergence.units:
            return
        try:
            runs.replay = Replay(runs.model, [x.name for x in self.layers], piece.batches[0])
            self._spent += 2 * piece.units
            piece = self._keeping(piece)
            runs.record(piece)
        except Exception as error:  # noqa: BLE001  # modules that cannot be hooked or copied
            log.info("all runs are whole ones: %s", error)
            runs.replay = None
            return
        self._chunk = max(1, RECORDED * piece.units // max(runs.replay.recorded_bytes(), 1))
        before = runs.replay.before
        for layer in self.layers:
            middle = probes(candidates[layer.name], 1)
            if not (middle and before.get(layer.name) and self._agrees(piece, layer, middle[0])):
                before[layer.name] = []
        if not any(before.values()):
            runs.replay, self._chunk = None, 0

    def _agrees(self, piece: Divergence, layer: Layer, candidate: Candidate) -> bool:
        """Whether a run that begins at a layer gives what a whole one does."""
        self._spent += 2 * piece.units
        try:
            whole, part = (self.runs.rise(piece, layer, candidate, whole) for whole in (True, False))
        except Exception:  # noqa: BLE001  # it will be met again, and said
            return False
        return torch.allclose(whole, part, rtol=1e-5, atol=1e-10)


@contextmanager
def _replaced(model: nn.Module, layer: Layer, new: nn.Module) -> Iterator[nn.Module]:
    """Context: a model with one layer replaced, in place."""
    old = model.get_submodule(layer.name)
    try:
        yield replace(model, layer, new)
    finally:
        replace(model, layer, old)
