"""Estimated errors of ranks that were not fitted yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rankopt.core.records import Rank

FLOOR = 1e-12  # smallest error, so that its logarithm exists


FIRST = 0.7
"""Error of a fit with all its steps over that with few, before one of the family's is known: a lower bound."""


NEXT = 0.97
"""The same relative to what the family's nearest fit with all its steps gained."""


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


def estimated_errors(
    ranks: Sequence[Rank],
    first: Mapping[Rank, float],
    final: Mapping[Rank, float],
    gains: bool,
) -> NDArray[np.float64]:
    """Estimate the errors that fits with all their steps have.

    The errors of the fits with few steps are interpolated linearly in the logarithms of error and ranks; what all
    steps gain is taken from the nearest rank where it is known.

    Args:
        ranks: All ranks of one family on one layer.
        first: Errors of some ranks, fitted with few steps.
        final: Errors of some ranks, fitted with all steps.
        gains: Whether more steps gain anything.

    Returns:
        An error for each rank: its own where it is known, else a low estimate.
    """
    from scipy.interpolate import RBFInterpolator  # takes half a second: not at `import rankopt`
    from scipy.spatial.distance import cdist

    points = np.log(ranks)
    index = {rank: i for i, rank in enumerate(ranks)}
    known = [index[rank] for rank in first]
    values = np.log(np.maximum(list(first.values()), FLOOR))
    base = (
        RBFInterpolator(points[known], values, kernel="linear", degree=0)(points)
        if len(known) > 1
        else values[[0] * len(ranks)]
    )
    if not gains:
        found = np.exp(base)
    elif final:
        at = [index[rank] for rank in final]
        gain = np.log(np.maximum(list(final.values()), FLOOR)) - base[at]
        nearest = cdist(points, points[at]).argmin(axis=1)
        found = NEXT * np.exp(base + np.minimum(gain[nearest], 0))
    else:
        found = FIRST * np.exp(base)
    for rank, error in {**(first if not gains else {}), **final}.items():
        found[index[rank]] = error
    return found
