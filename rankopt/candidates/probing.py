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

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.candidates.sensitivity import PASSES, POINTS, Curve, probes
from rankopt.core.progress import Progress, Work
from rankopt.core.records import Candidate, Layer
from rankopt.decompositions.plan import replace
from rankopt.model.forward import batch_size
from rankopt.model.objective import Divergence
from rankopt.model.replay import Replay

log = logging.getLogger(__name__)


FIRST = 128
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


class Prober:
    """Measures the sensitivity curves of a model's layers.

    Args:
        divergence: The default objective of the dense model.
        model: The dense model with its composites expanded. Layers are replaced in it and put back.
        layers: The layers.
        build: Builds a candidate's module.
        progress: Progress callback.

    Attributes:
        passes: Forward passes of all examples that were spent so far. A run that begins at a layer counts as a whole
            one.
    """

    def __init__(
        self, divergence: Divergence, model: nn.Module, layers: Sequence[Layer], build: Build, progress: Progress
    ) -> None:
        self.divergence, self.model, self.layers = divergence, model, layers
        self.build, self.progress = build, progress
        self._spent = 0  # units of the objective that went through the model
        self._replay: Replay | None = None
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
        return PASSES * self.divergence.units - self._spent

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
        pieces = list(self._pieces(self.divergence.part(ascending)))
        runs = [(piece, probe) for piece in pieces for probe in wanted]
        failed: set[Probe] = set()
        rises: dict[Probe, list[Tensor]] = {probe: [] for probe in wanted}
        work = Work(runs, self._work, sum(map(self._work, runs)))
        seen = f"measuring sensitivities on {sum(x.units for x in pieces):,} examples"
        current: Divergence | None = None
        kept = self.divergence
        for piece, probe in self.progress(work, seen, len(runs)):
            if piece is not current:
                current, kept = piece, self._record(piece)
            if probe in failed:
                continue
            try:
                rises[probe].append(self._rise(kept, probe))
            except Exception as error:  # noqa: BLE001  # whatever a forward raises
                failed.add(probe)
                c = probe.candidate
                log.warning("the objective of layer %r as %s %s: %s", probe.layer.name, c.method, c.rank, error)
        for probe in set(wanted) - failed:
            drawn = torch.empty(len(units), dtype=torch.float64)
            drawn[place] = torch.cat(rises[probe])
            probe.rises = torch.cat([probe.rises, drawn])
        return failed

    def _pieces(self, part: Divergence) -> Iterator[Divergence]:
        """An objective in pieces of a single batch, of which everything that is recorded fits into memory."""
        at = 0
        for batch in part.batches:
            n = batch_size(batch) if part.divisible else 1
            for start in range(at, at + n, self._chunk or n):
                yield part.part(slice(start, min(start + (self._chunk or n), at + n)))
            at += n

    def _work(self, run: tuple[Divergence, Probe]) -> float:
        """The operations of a run, up to a factor."""
        piece, probe = run
        return piece.units * self._behind[probe.layer.name]

    def _record(self, piece: Divergence) -> Divergence:
        """Run the dense model on a piece, for runs on it that begin at a layer; the piece with the model's outputs."""
        piece = self._keeping(piece)
        if self._replay is not None:
            with self._replay.recording():
                self._run(piece)
        return piece

    def _keeping(self, piece: Divergence) -> Divergence:
        """A piece with the dense model's outputs in memory."""
        self._spent += 0 if piece.kept else piece.units
        return piece.keeping()

    def _rise(self, piece: Divergence, probe: Probe, whole: bool = False) -> Tensor:
        """Rise by unit of a piece, which was recorded last."""
        module = self.model.get_submodule(probe.layer.name)
        with _replaced(self.model, probe.layer, self.build(module, probe.layer, probe.candidate)) as model:
            if whole or self._replay is None:
                rise = self._run(piece, model)
            else:
                with self._replay.starting_at(probe.layer.name):
                    rise = self._run(piece, model)
        if not torch.isfinite(rise).all():
            raise ValueError("the outputs are NaN or infinite")
        return rise

    def _run(self, piece: Divergence, model: nn.Module | None = None) -> Tensor:
        self._spent += piece.units
        return piece.by_unit(model or self.model)

    # --- which shortcuts hold ---

    def _try_replay(self, candidates: Mapping[str, Sequence[Candidate]]) -> None:
        """Find out whether examples can be measured apart, and which layers a run may begin at."""
        piece = self._keeping(next(self._pieces(self.divergence.part(slice(TRIAL)))))
        if self.divergence.divisible and not self._run(piece).abs().max() < 1e-6:  # examples depend on their batch
            self.divergence = copy.copy(self.divergence)
            self.divergence.divisible, self._spent = False, 1
            piece = self.divergence.part(slice(1))
        if (2 * len(self.layers) + 2) * piece.units > TRIAL_SHARE * PASSES * self.divergence.units:
            return
        try:
            self._replay = Replay(self.model, [x.name for x in self.layers], piece.batches[0])
            self._spent += piece.units
            piece = self._record(piece)
        except Exception as error:  # noqa: BLE001  # modules that cannot be hooked or copied
            log.info("all runs are whole ones: %s", error)
            self._replay = None
            return
        self._chunk = max(1, RECORDED * piece.units // max(self._replay.recorded_bytes(), 1))
        for layer in self.layers:
            middle = probes(candidates[layer.name], 1)
            if not (middle and self._replay.before.get(layer.name) and self._agrees(piece, Probe(layer, middle[0]))):
                self._replay.before[layer.name] = []
        if not any(self._replay.before.values()):
            self._replay, self._chunk = None, 0

    def _agrees(self, piece: Divergence, probe: Probe) -> bool:
        """Whether a run that begins at a layer gives what a whole one does."""
        try:
            whole, part = (self._rise(piece, probe, whole) for whole in (True, False))
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
