"""Estimated errors of ranks that were not fitted yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rankopt.core.records import Rank

FLOOR = 1e-12  # smallest error, so that its logarithm exists


LOW = 0.95
"""Estimates are lower than interpolation by this factor, so that a rank is not passed over for its error."""


def spread(ranks: Sequence[Rank], count: int) -> list[Rank]:
    """Choose ranks that cover all: the first and the last, then always the one farthest from those chosen.

    Args:
        ranks: Ranks of one family.
        count: How many to choose; of families of several bonds three more for each further one.

    Returns:
        The ranks chosen, in their order.
    """
    count += 3 * (len(ranks[0]) - 1)
    if len(ranks) <= count:
        return list(ranks)
    from scipy.spatial.distance import cdist  # takes half a second: not at `import rankopt`

    points = np.log(ranks)
    chosen = [0, len(ranks) - 1]
    while len(chosen) < count:
        chosen.append(int(cdist(points, points[chosen]).min(axis=1).argmax()))
    return [ranks[i] for i in sorted(chosen)]


def cells(ranks: Sequence[Rank], centers: Sequence[Rank]) -> list[tuple[Rank, ...]]:
    """Group ranks by the nearest of those that `spread` chose.

    Args:
        ranks: All ranks of one family.
        centers: Those chosen, which are in no group.

    Returns:
        The groups that are not empty, each in the order of the ranks.
    """
    from scipy.spatial.distance import cdist

    nearest = cdist(np.log(ranks), np.log(centers)).argmin(axis=1)
    left = [(int(i), rank) for i, rank in zip(nearest, ranks, strict=True) if rank not in centers]
    return [tuple(rank for j, rank in left if j == i) for i in sorted({i for i, _ in left})]


def estimated_errors(ranks: Sequence[Rank], known: Mapping[Rank, float]) -> NDArray[np.float64]:
    """Estimate errors by those of other ranks, linearly in the logarithms of error and ranks.

    Args:
        ranks: All ranks of one family on one layer.
        known: Errors of some.

    Returns:
        An error for each rank: its own where it is known, else a low estimate.
    """
    from scipy.interpolate import RBFInterpolator  # takes half a second: not at `import rankopt`

    points = np.log(ranks)
    index = {rank: i for i, rank in enumerate(ranks)}
    at = [index[rank] for rank in known]
    values = np.log(np.maximum(list(known.values()), FLOOR))
    if len(at) > 1:
        found = LOW * np.exp(RBFInterpolator(points[at], values, kernel="linear", degree=0)(points))
    else:
        found = np.full(len(ranks), LOW * np.exp(values[0]))
    found[at] = list(known.values())
    return found
