"""Per layer, the candidates that no other beats in every cost and in error, dense included, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankopt.core.records import DENSE, SAME, Candidate, Layer

OF_PRECISION = ("bytes", "latency", "memory", "disk")
"""The metrics that what weights are stored in changes."""


def dense_candidate(layer: Layer) -> Candidate:
    """The layer as it is."""
    return Candidate(DENSE, (), layer.cost, error=0.0, form=DENSE)


def frontier(layer: Layer, candidates: Iterable[Candidate], metrics: Sequence[str]) -> tuple[Candidate, ...]:
    """The Pareto set over the budget's metrics and the error, by falling error: dense comes last.

    Of the two forms of a fit it holds the one that costs less in these metrics, factorised if they cost the same.
    Without a metric that counts precision, weights are stored as they are.
    """
    counts = not set(metrics).isdisjoint(OF_PRECISION)
    ordered = sorted(
        [dense_candidate(layer), *(c for c in candidates if counts or c.precision == SAME)],
        key=lambda c: (c.error, *(c.cost[m] for m in metrics), c.method, c.rank, c.form, c.precision),
    )
    kept: list[Candidate] = []
    for candidate in ordered:  # nothing later has a smaller error, so only costs are left to compare
        if not any(all(k.cost[m] <= candidate.cost[m] for m in metrics) for k in kept):
            kept.append(candidate)
    return tuple(reversed(kept))
