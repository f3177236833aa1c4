"""How much a layer's error costs the model's objective: measured, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from rankopt.core.records import Candidate

POINTS = 5  # candidates measured per layer


FLOOR = 1e-9


Curve = tuple[tuple[float, float], ...]
"""Measured (relative error, rise of the objective) of one layer, by rising error."""


def probes(candidates: Sequence[Candidate], points: int = POINTS) -> list[Candidate]:
    """Candidates at which to measure: evenly spread in log error over those that no smaller one beats."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost.params, c.error)):
        if candidate.error > 1e-7 and (not best or candidate.error < best[-1].error):
            best.append(candidate)
    if not best:
        return []
    logs = np.log([c.error for c in best])
    wanted = np.linspace(logs[0], logs[-1], points)
    return [best[i] for i in sorted({int(np.abs(logs - w).argmin()) for w in wanted})]


def measure(
    layers: Sequence[str],
    candidates: dict[str, list[Candidate]],
    rise: Callable[[str, Candidate], float | None],
    progress: Callable[[Iterable[tuple[str, Candidate]], str, int], Iterable[tuple[str, Candidate]]],
) -> dict[str, Curve]:
    """The curve of every layer. rise(name, candidate): the objective's rise with this one layer replaced, or None."""
    todo = [(name, candidate) for name in layers for candidate in probes(candidates[name])]
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for name, candidate in progress(todo, "measuring sensitivities", len(todo)):
        if (rose := rise(name, candidate)) is not None:
            curves[name].append((candidate.error, rose))
    return {name: tuple(sorted(points)) for name, points in curves.items()}


def predict(curve: Curve, errors: Sequence[float]) -> np.ndarray:
    """Rise of the objective at relative errors: log-log interpolation, made monotone; slope 1 beyond the ends."""
    x = np.log([max(e, 1e-12) for e, _ in curve])
    y = np.maximum.accumulate(np.log([max(rise, FLOOR) for _, rise in curve]))
    at = np.log(np.maximum(errors, 1e-12))
    inside = np.interp(at, x, y)
    return np.exp(inside + np.minimum(at - x[0], 0) + np.maximum(at - x[-1], 0))


def with_losses(candidates: Sequence[Candidate], curve: Curve) -> list[Candidate]:
    """The candidates with their predicted losses; without a curve the error itself is the loss."""
    errors = [c.error for c in candidates]
    losses = predict(curve, errors) if curve else errors
    return [replace(c, loss=float(loss)) for c, loss in zip(candidates, losses, strict=True)]
