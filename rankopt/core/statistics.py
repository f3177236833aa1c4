"""95 % confidence intervals of scores and of rank correlations, and whether two scores differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rankopt.core.records import Trial
from rankopt.core.result_record import CorrelationEntry, ProxyEntry, TieEntry

Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


MIN_TRIALS = 10
"""With fewer pairs, the interval of a rank correlation is too wide to say anything."""


POOR = 0.5
"""Users are warned of rank correlations below this."""


Interval = tuple[float, float]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the distribution-free 95 % interval of the median: the order statistics n/2 ∓ 1.96 √n / 2.

    Args:
        values: The sample, of n numbers.

    Returns:
        The lower and the upper end.
    """
    ordered, n = sorted(values), len(values)
    k = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[k], ordered[n - 1 - k]


def wilson(score: float | None, examples: int | None) -> Interval | None:
    """Confidence interval of a fraction: Wilson's score interval (Wilson 1927, JASA 22).

        (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n)

    Args:
        score: The fraction p, for example an accuracy.
        examples: The number n of examples that it averages over.

    Returns:
        Lower and upper end; None if the score or the number is unknown, or the score is not within 0 to 1.
    """
    if score is None or examples is None or not 0 <= score <= 1:
        return None
    middle = (score + Z**2 / (2 * examples)) / (1 + Z**2 / examples)
    half = Z * math.sqrt(score * (1 - score) / examples + Z**2 / (4 * examples**2)) / (1 + Z**2 / examples)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(first: float | None, second: float | None, examples: int | None) -> Interval | None:
    """Confidence interval of first − second (Newcombe 1998, Statistics in Medicine 17, method 10).

    The method takes the two as independent. Scores of two models on the same examples are positively correlated, so
    the interval is wider than necessary: it rather calls a difference noise.

    Args:
        first: A fraction.
        second: Another fraction.
        examples: The number of examples that each averages over.

    Returns:
        Lower and upper end; None where `wilson` gives None.
    """
    a, b = wilson(first, examples), wilson(second, examples)
    if a is None or b is None or first is None or second is None:
        return None
    d = first - second
    return d - math.hypot(first - a[0], b[1] - second), d + math.hypot(a[1] - first, second - b[0])


SCORE_RISE = 0.05
"""A compressed model's score is no more than this above the dense model's, up to noise."""


def misread_score(dense: float, small: float, examples: int | None) -> str | None:
    """Say why a score does not look like a fraction where higher is better.

    Args:
        dense: The dense model's score.
        small: A compressed model's score.
        examples: The number of examples that each averages over; None if unknown.

    Returns:
        A sentence with what to do; None if the scores look right.
    """
    outside = next((x for x in (dense, small) if not 0 <= x <= 1), None)
    if outside is not None:
        return f"the score is {outside:.4g}, not within 0 to 1: return a fraction, for example an accuracy of 0.93"
    interval = difference(small, dense, examples)
    if small - dense <= SCORE_RISE or (interval is not None and interval[0] <= 0):
        return None
    return (
        f"the score rises from {dense:.4g} (dense) to {small:.4g} (compressed): if lower is better, as of an error "
        "rate, return 1 - error"
    )


FAR = 10.0  # times the predicted objective: layers that are measured alone add up to within a factor of about two
LEAST_FAR = 1e-2  # of the objective: below it a ratio says little


def is_far(measured: float, predicted: float) -> bool:
    """Whether a measured objective is so far above the predicted one that the prediction failed.

    Args:
        measured: Objective of the rebuilt model.
        predicted: Sum of the layers' predicted losses.
    """
    return measured > LEAST_FAR and measured > FAR * predicted


def correlation(x: Sequence[float], y: Sequence[float]) -> CorrelationEntry:
    """Spearman's rank correlation with the interval of Bonett and Wright (2000, Psychometrika 65), and a verdict.

        tanh(artanh r ± z √((1 + r² / 2) / (n − 3)))

    Args:
        x: Numbers.
        y: As many numbers.

    Returns:
        n, spearman, low, high and verdict: "good" (the whole interval is above POOR), "poor" (the correlation is below
        POOR), "unclear" (neither), "too few" (fewer than MIN_TRIALS pairs) or "constant" (all x or all y are equal).
        In the last two cases the other entries but n are None.
    """
    from scipy.stats import spearmanr  # takes half a second: not at `import rankopt`

    n = len(x)
    if n < MIN_TRIALS:
        return {"n": n, "spearman": None, "low": None, "high": None, "verdict": "too few"}
    if min(x) == max(x) or min(y) == max(y):
        return {"n": n, "spearman": None, "low": None, "high": None, "verdict": "constant"}
    r = float(spearmanr(x, y).statistic)
    # At ±1 the interval would have no width: go half way to the next value that is possible with n ranks.
    most = 1 - 6 / (n**3 - n)
    centre = math.atanh(max(-most, min(most, r)))
    half = Z * math.sqrt((1 + r * r / 2) / (n - 3))
    low, high = min(r, math.tanh(centre - half)), max(r, math.tanh(centre + half))
    return {
        "n": n,
        "spearman": r,
        "low": low,
        "high": high,
        "verdict": "poor" if r < POOR else "good" if low > POOR else "unclear",
    }


def proxy(trials: Sequence[Trial]) -> ProxyEntry:
    """How well a cheap number predicts the order of plans by an expensive one.

    Args:
        trials: Trials of a search.

    Returns:
        The `correlation` of predicted losses with objectives ("predicted_objective"), and of objectives with scores
        ("objective_score"). Signs are such that 1 means the same order of plans. None where there are no numbers.
    """
    return {
        "predicted_objective": _correlation([(t.predicted, t.objective) for t in trials]),
        "objective_score": _correlation([(None if t.objective is None else -t.objective, t.score) for t in trials]),
    }


def _correlation(pairs: Sequence[tuple[float | None, float | None]]) -> CorrelationEntry | None:
    """The correlation of the complete pairs; None if there is none."""
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return correlation(*map(list, zip(*known, strict=True))) if known else None


def tie(trials: Sequence[Trial], chosen: Trial, examples: int | None) -> TieEntry | None:
    """Whether the chosen trial's score differs from the runner-up's by more than noise.

    Args:
        trials: Trials of a search.
        chosen: The trial whose plan is used.
        examples: The number of examples that scores average over.

    Returns:
        runner_up: number of the trial with the next best objective; score: its score; low, high: interval of the
        difference chosen − runner-up; verdict: "better", "worse" or "tie" (the interval holds 0); others: how many
        further trials have a score; tied: how many of these tie with the chosen one. None without a second trial
        that has a score, or without a number of examples.
    """
    others = [t for t in trials if t.number != chosen.number and t.objective is not None and t.score is not None]
    if not others or wilson(chosen.score, examples) is None:
        return None
    intervals = {t.number: difference(chosen.score, t.score, examples) for t in others}
    second = min(others, key=lambda t: (t.objective, t.number))
    low, high = intervals[second.number] or (math.nan, math.nan)
    assert second.score is not None
    return {
        "runner_up": second.number,
        "score": second.score,
        "low": low,
        "high": high,
        "verdict": "better" if low > 0 else "worse" if high < 0 else "tie",
        "tied": sum(x is not None and x[0] <= 0 <= x[1] for x in intervals.values()),
        "others": len(others),
    }
