"""The Pareto frontier of a layer's candidates over costs and error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    same. Quantized candidates are considered only if a metric depends on precision.

    Args:
        layer: The layer.
        candidates: Its candidates, without dense.
        metrics: Metrics that the budget limits.

    Returns:
        Candidates by falling error: cheapest first; dense last, unless one is exact.
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
