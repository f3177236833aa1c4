"""How far the strategies of a benchmark differ, after Demšar 2006 (JMLR 7): ranks, critical difference, paired tests.

A problem here is a budget with a seed. Strategies that do not use their seed give the same in all of them: their
problems are fewer than they seem, and p-values against them too small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

RESAMPLES = 10_000  # of the bootstrap


ALPHA = 0.05


@dataclass(frozen=True)
class MeanRank:
    """Where a strategy stands.

    Attributes:
        mean: Mean rank over the problems; 1 is best.
        low: Lower end of its 95 % interval, a bootstrap over problems.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def mean_ranks(ranks: Mapping[str, Sequence[float]]) -> dict[str, MeanRank]:
    """Average ranks.

    Args:
        ranks: Strategy -> its rank on each problem.

    Returns:
        Strategy -> mean rank, best first; without problems, nothing.
    """
    count = max(map(len, ranks.values()), default=0)
    if not count:
        return {}
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    found = {}
    for name, values in ranks.items():
        low, high = np.percentile(np.asarray(values)[drawn].mean(1), [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
        found[name] = MeanRank(fmean(values), float(low), float(high))
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


def critical_difference(strategies: int, problems: int) -> float:
    """The difference of mean ranks beyond which two strategies differ (Nemenyi's test, 5 %).

    Args:
        strategies: Number of strategies.
        problems: Number of problems.
    """
    from scipy.stats import studentized_range

    if strategies < 2 or not problems:
        return math.inf
    quantile = float(studentized_range.ppf(1 - ALPHA, strategies, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(strategies * (strategies + 1) / (6 * problems))


def groups(ranks: Mapping[str, MeanRank], difference: float) -> list[tuple[str, str]]:
    """Find the largest groups of strategies that do not differ.

    Args:
        ranks: Mean ranks, best first.
        difference: The critical difference.

    Returns:
        The best and the worst of each group of two or more.
    """
    names, found = list(ranks), []
    reached = -1
    for i, name in enumerate(names):
        last = max(j for j in range(i, len(names)) if ranks[names[j]].mean - ranks[name].mean <= difference)
        if last > max(reached, i):
            found.append((name, names[last]))
        reached = max(reached, last)
    return found


@dataclass(frozen=True)
class Paired:
    """Two strategies on the same problems.

    Attributes:
        better: On how many the first has the lower objective.
        worse: On how many it has the higher one.
        p: Two-sided p-value of Wilcoxon's signed-rank test.
    """

    better: int
    worse: int
    p: float


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two strategies problem by problem.

    Args:
        first: Objectives of the one, infinite where nothing finished.
        second: Objectives of the other on the same problems.
    """
    from scipy.stats import wilcoxon

    with np.errstate(invalid="ignore"):
        gaps = np.nan_to_num(np.subtract(first, second))  # both infinite: equal
    p = float(wilcoxon(gaps).pvalue) if np.any(gaps) else 1.0
    return Paired(int((gaps < 0).sum()), int((gaps > 0).sum()), p)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number (Holm 1979).

    Args:
        p: Name -> p-value.
    """
    adjusted, largest = {}, 0.0
    for i, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p) - i) * value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}
