"""The Pareto frontier of a layer's candidates over costs and error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankopt.core.problem import NOT_ADDITIVE, cheapest
from rankopt.core.records import DENSE, MEASURED, SAME, Candidate, Layer

OF_PRECISION = ("bytes", *MEASURED, "memory", "disk")
"""The metrics that depend on the precision that weights are stored in."""


def dense_candidate(layer: Layer) -> Candidate:
    """Make the candidate that leaves a layer as it is.

    Args:
        layer: The layer.
    """
    return Candidate(DENSE, (), layer.cost, error=0.0, form=DENSE)


def frontier(layer: Layer, candidates: Iterable[Candidate], metrics: Sequence[str]) -> tuple[Candidate, ...]:
    """Find the Pareto frontier over a budget's metrics and the error, the dense layer included.

    Of the two forms of a fit, the one that costs less in these metrics is kept, the factorised one if they cost the
    same. For metrics that do not add up over layers, the dense layer and the candidate that
    seems cheapest are kept in any case: `Problem.cheapest` finds the least from them.

    Args:
        layer: The layer.
        candidates: Its candidates, without dense.
        metrics: Metrics that the budget limits.

    Returns:
        Candidates by falling error: cheapest first; dense last, unless one is exact.
    """
    dense = dense_candidate(layer)
    offered = [dense, *considered(layer, candidates, metrics)]
    ordered = sorted(offered, key=lambda c: (c.error, *(c.cost[m] for m in metrics), *c.label))
    needed = [x for m in metrics if m in NOT_ADDITIVE for x in (dense, cheapest(offered, m))]
    kept: list[Candidate] = []
    for candidate in ordered:  # nothing later has a smaller error, so only costs are left to compare
        if candidate in needed or not any(all(k.cost[m] <= candidate.cost[m] for m in metrics) for k in kept):
            kept.append(candidate)
    return tuple(reversed(kept))


def considered(layer: Layer, candidates: Iterable[Candidate], metrics: Sequence[str]) -> list[Candidate]:
    """The candidates that a budget considers.

    Quantized ones are left out unless a metric depends on precision, and those that take more of a measured metric that
    is limited (latency, energy) than the dense layer.

    Args:
        layer: The layer.
        candidates: Its candidates.
        metrics: Metrics that the budget limits.
    """
    precise, measured = set(metrics).isdisjoint(OF_PRECISION), [m for m in MEASURED if m in metrics]
    return [
        c
        for c in candidates
        if not (precise and c.precision != SAME) and not any(c.cost[m] > layer.cost[m] for m in measured)
    ]
