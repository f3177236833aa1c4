"""Sensitivities: how much the objective rises with a layer's error, measured one layer at a time.

A few candidates of each layer are put into the dense model, and the rise of the objective is measured. The losses of
all other candidates are interpolated from these points. Of the default objective, `probing` measures them on as many
examples as it takes; a task's own objective is arbitrary code, which can only be called on whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from rankopt.core.records import Candidate

PASSES = 60
"""The most forward passes of all examples that the probes of all layers take together. A task's own objective is called
as often, or once a layer if there are more layers."""

POINTS = 5  # candidates measured per layer, if the bound on forward passes allows
EXACT = 1e-7  # a candidate below this error is not measured where others are above it
FLOOR = 1e-9  # smallest rise of the objective, so that its logarithm exists

Curve = tuple[tuple[float, float], ...]
"""Measured (relative error, rise of the objective) of one layer, sorted by error."""


def probes(candidates: Sequence[Candidate], points: int = POINTS) -> list[Candidate]:
    """Choose the candidates to measure.

    Args:
        candidates: Candidates of one layer.
        points: How many to choose at most.

    Returns:
        Candidates evenly spread in the logarithm of their error, among those with a smaller error than every
        candidate of fewer parameters.
    """
    best: list[Candidate] = []
    inexact = [c for c in candidates if c.error > EXACT] or list(candidates)  # tiny errors may still cost something
    for candidate in sorted(inexact, key=lambda c: (c.cost.params, c.error)):
        if candidate.error > 0 and (not best or candidate.error < best[-1].error):
            best.append(candidate)
    if not best:
        return []
    logs = np.log([c.error for c in best])
    wanted = np.linspace(logs[0], logs[-1], points) if points > 1 else [logs.mean()]
    return [best[i] for i in sorted({int(np.abs(logs - w).argmin()) for w in wanted})]


def possible_probes(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that `probes` chooses for any number of points.

    Args:
        candidates: Candidates of one layer.
    """
    found = {(c.method, c.rank, c.form): c for points in range(1, POINTS + 1) for c in probes(candidates, points)}
    return [*found.values()]


def measure(
    layers: Sequence[str],
    candidates: dict[str, list[Candidate]],
    rise: Callable[[str, Candidate], float | None],
    progress: Callable[[Iterable[tuple[str, Candidate]], str, int], Iterable[tuple[str, Candidate]]],
) -> dict[str, Curve]:
    """Measure the sensitivity curves of all layers by a task's own objective, in at most `PASSES` calls.

    Args:
        layers: Names of the layers.
        candidates: Candidates by layer name.
        rise: Maps (layer name, candidate) to the rise of the objective with only this layer replaced; None if it
            could not be measured.
        progress: Progress callback.

    Returns:
        Curves by layer name.
    """
    points = max(1, min(POINTS, PASSES // max(len(layers), 1)))
    todo = [(name, candidate) for name in layers for candidate in probes(candidates[name], points)]
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for name, candidate in progress(todo, "measuring sensitivities", len(todo)):
        if (rose := rise(name, candidate)) is not None:
            curves[name].append((candidate.error, rose))
    return {name: tuple(sorted(points)) for name, points in curves.items()}


def predict(curve: Curve, errors: Sequence[float]) -> np.ndarray:
    """Predict the rise of the objective at some relative errors.

    Log-log interpolation of the curve, made monotone; extrapolation is linear in the error.

    Args:
        curve: At least one measured point.
        errors: Relative errors.

    Returns:
        Predicted rises, one per error.
    """
    x = np.log([max(e, 1e-12) for e, _ in curve])
    y = np.maximum.accumulate(np.log([max(rise, FLOOR) for _, rise in curve]))
    at = np.log(np.maximum(errors, 1e-12))
    inside = np.interp(at, x, y)
    return np.exp(inside + np.minimum(at - x[0], 0) + np.maximum(at - x[-1], 0))


def with_losses(candidates: Sequence[Candidate], curve: Curve) -> list[Candidate]:
    """Set the predicted losses of candidates.

    Args:
        candidates: Candidates of one layer.
        curve: The layer's curve; if empty, the relative error itself serves as loss.

    Returns:
        The candidates, with `loss` set.
    """
    errors = [c.error for c in candidates]
    losses = predict(curve, errors) if curve else errors
    return [replace(c, loss=float(loss)) for c, loss in zip(candidates, losses, strict=True)]
