"""Successive halving within a layer (Jamieson and Talwalkar 2016): few steps for all candidates, more for good ones.

What error a search will reach is read off its own curve: what is left to gain is a power of what its last steps have
gained. The powers were measured on fits of ResNet-20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rankopt.core.dual import Array
from rankopt.core.records import Candidate, Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Aspect

LIKELY, PER_DECADE = 0.05, 0.35
"""What a search has yet to gain is a power of what its last steps gained: the first of these, and the second for each
power of ten by which its error is below 1.

From 5 over 25 steps to the end, the power was 0.2, 0.6, 0.9, 1.2 with `cp_merged` and 0.3, 0.6, 0.8, 1.1 with `cp` at
errors of 0.1 to 0.3, 0.01 to 0.1, 0.001 to 0.01 and below (medians)."""

BEST, SURE = 0.6, 0.3
"""What is added to that power for the most that a search may still gain, and what is taken off for what it will at
least; in 90 % of these cases 0.3 was enough for both."""

LEAST_GAIN = 0.1
"""What the steps to come gain at best, at least: the power says nothing of a search that started slowly."""


class Reached(NamedTuple):
    """What a search has reached.

    Attributes:
        before: Its error some steps ago; None where it is not known.
        error: Its error now.
        ended: Whether it takes no further steps.
    """

    before: float | None
    error: float
    ended: bool

    @property
    def best(self) -> float:
        """The smallest error that it may still reach."""
        if self.ended:
            return self.error
        return 0.0 if self.before is None else self.error * min(1 - LEAST_GAIN, self._gained ** (self._power + BEST))

    @property
    def likely(self) -> float:
        """The error that it is likely to reach, or a slightly smaller one, so that it is not passed over."""
        return self.error if self.ended else self.error * self._gained**self._power

    @property
    def sure(self) -> float:
        """An error that it will hardly fail to reach."""
        return self.error if self.ended else self.error * self._gained ** max(0.0, self._power - SURE)

    @property
    def _power(self) -> float:
        return LIKELY - PER_DECADE * min(0.0, math.log10(max(self.error, 1e-12)))

    @property
    def _gained(self) -> float:
        """Its error as a share of that before."""
        return min(1.0, self.error / self.before) if self.before else 1.0


UNKNOWN = Reached(None, math.inf, ended=False)
"""Of a search that did not start."""


def paths(layer: Layer, family: str, ranks: Sequence[Rank]) -> list[list[Rank]]:
    """Divide ranks by the direction in which they grow (`Decomposition.directions`), along which errors are smooth.

    Args:
        layer: Layer to decompose.
        family: Name of the decomposition.
        ranks: Some of its ranks, in ascending number of weights.
    """
    decomposition = DECOMPOSITIONS[family]
    directions, full = decomposition.directions(layer), decomposition.full_rank(layer)
    if full is None or len(full) == 1 or any(len(x) != len(full) for x in (*ranks, *directions)):
        return [[*ranks]]

    def off(rank: Rank, aspect: Aspect) -> float:
        fixed = [abs(math.log(r / a)) for r, a in zip(rank, aspect, strict=True) if isinstance(a, int)]
        scales = [math.log(r / (a * f)) for r, a, f in zip(rank, aspect, full, strict=True) if not isinstance(a, int)]
        return sum(fixed) + (max(scales) - min(scales) if scales else 0.0)

    found: dict[Aspect, list[Rank]] = {}
    for rank in ranks:
        found.setdefault(min(directions, key=lambda aspect: off(rank, aspect)), []).append(rank)
    return [*found.values()]


def segments(
    path: Sequence[Rank], stride: int, pieces: int, cheap: Callable[[Rank], bool] = lambda _: True
) -> list[tuple[Rank, ...]]:
    """Cut a path into pieces, each of which begins with the last rank of the one before.

    Args:
        path: Ranks.
        stride: How far the ends of a piece are apart at most.
        pieces: The least pieces, if there are more ranks: errors in a coarse grid are not as smooth.
        cheap: Whether a rank may be the end of a piece. If there are two such ranks, those beyond stand between the
            ends of the last piece once more, for their errors to be extrapolated.
    """
    beyond = [rank for rank in path if not cheap(rank)]
    path = [rank for rank in path if cheap(rank)] if len(path) - len(beyond) > 1 else path
    last, stride = len(path) - 1, max(1, min(stride, (len(path) - 1) // pieces))
    found = [tuple(path[i : min(i + stride, last) + 1]) for i in range(0, last, stride)] or [(r, r) for r in path]
    if beyond and path[-1] not in beyond:
        found.append((found[-1][0], *beyond, found[-1][-1]))
    return found


def between(errors: Sequence[float], weights: Sequence[int], at: int) -> float:
    """Interpolate an error between two ranks, or extrapolate it, as a power of the number of weights.

    Args:
        errors: Errors of the smaller and the larger rank.
        weights: Their weights.
        at: Weights of the rank between or beyond.
    """
    (low, high), (first, second) = np.log(np.maximum(errors, 1e-300)), np.log(weights)
    share = (math.log(at) - first) / (second - first) if second > first else 0.0
    return math.exp(float(low + share * (high - low)))


def beaten(candidates: Sequence[Candidate], best: Sequence[float], metrics: Sequence[str]) -> list[bool]:
    """Find the candidates of a layer that can be part of no good plan, whatever the budget.

    Args:
        candidates: Candidates of the layer, with the errors that they will reach.
        best: The smallest error that each may still reach.
        metrics: Metrics that a budget may limit.

    Returns:
        For each candidate whether another one will have a smaller error than this one may reach, and costs no more in
        any metric.
    """
    costs: Array = np.array([[c.cost[m] for m in metrics] for c in candidates], float)
    errors = np.array([c.error for c in candidates])
    smaller = errors < np.array(best)[:, None]
    return [bool(np.any(s & (costs <= own).all(axis=1))) for s, own in zip(smaller, costs, strict=True)]
