"""How far numbers can be trusted: intervals of scores, rank correlations, ties. All intervals are of 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rankopt.core.records import Trial

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


MIN_TRIALS = 10  # with fewer, an interval of a rank correlation says next to nothing


POOR = 0.5  # a rank correlation below this is warned of


Interval = tuple[float, float]


def wilson(score: float | None, examples: int | None) -> Interval | None:
    """The score interval of a fraction of so many examples (Wilson 1927); None if it is no fraction, or unknown."""
    if score is None or examples is None or not 0 <= score <= 1:
        return None
    middle = (score + Z**2 / (2 * examples)) / (1 + Z**2 / examples)
    half = Z * math.sqrt(score * (1 - score) / examples + Z**2 / (4 * examples**2)) / (1 + Z**2 / examples)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(first: float | None, second: float | None, examples: int | None) -> Interval | None:
    """The interval of first − second, two fractions of as many examples each (Newcombe 1998, method 10).

    Both are taken as independent. Where two models answer the same examples, as here, their scores rise and fall
    together and the interval is wider than it need be: it errs on the side of calling a difference noise.
    """
    a, b = wilson(first, examples), wilson(second, examples)
    if a is None or b is None or first is None or second is None:
        return None
    d = first - second
    return d - math.hypot(first - a[0], b[1] - second), d + math.hypot(a[1] - first, second - b[0])


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Spearman's rank correlation with the interval of Bonett and Wright (2000), and a verdict.

    verdict: "good" (the whole interval is above 0.5), "poor" (the correlation is below 0.5), "unclear" (between the
    two), "too few" (under 10 pairs) or "constant" (nothing to rank); for the last two there is no number.
    """
    from scipy.stats import spearmanr  # half a second that `import rankopt` need not take

    n = len(x)
    found: dict[str, Any] = {"n": n, "spearman": None, "low": None, "high": None}
    if n < MIN_TRIALS:
        return found | {"verdict": "too few"}
    if min(x) == max(x) or min(y) == max(y):
        return found | {"verdict": "constant"}
    r = float(spearmanr(x, y).statistic)
    # At ±1 the interval would have no width: step half way to the next value that n ranks can have.
    most = 1 - 6 / (n**3 - n)
    centre = math.atanh(max(-most, min(most, r)))
    half = Z * math.sqrt((1 + r * r / 2) / (n - 3))
    low, high = min(r, math.tanh(centre - half)), max(r, math.tanh(centre + half))
    verdict = "poor" if r < POOR else "good" if low > POOR else "unclear"
    return {"n": n, "spearman": r, "low": low, "high": high, "verdict": verdict}


def proxy(trials: Sequence[Trial]) -> dict[str, Any]:
    """How well predicted losses rank the measured objectives of these trials, and objectives their scores.

    Signs are such that 1 means the same order of plans; an entry is None where there are no such numbers.
    """
    pairs = {
        "predicted_objective": [(t.predicted, t.objective) for t in trials],
        "objective_score": [(None if t.objective is None else -t.objective, t.score) for t in trials],
    }
    known = {k: [(a, b) for a, b in v if a is not None and b is not None] for k, v in pairs.items()}
    return {k: correlation(*map(list, zip(*v, strict=True))) if v else None for k, v in known.items()}


def tie(trials: Sequence[Trial], chosen: Trial, examples: int | None) -> dict[str, Any] | None:
    """Whether the chosen trial's score differs from the runner-up's (by objective) by more than the noise.

    verdict: "tie", "better" or "worse" (the chosen one, beyond the interval); tied: how many of the `others` differ
    from the chosen one by no more than the noise. None without a second scored trial or a number of examples.
    """
    others = [t for t in trials if t.number != chosen.number and t.objective is not None and t.score is not None]
    if not others or wilson(chosen.score, examples) is None:
        return None
    intervals = {t.number: difference(chosen.score, t.score, examples) for t in others}
    second = min(others, key=lambda t: (t.objective, t.number))
    low, high = intervals[second.number] or (math.nan, math.nan)
    return {
        "runner_up": second.number,
        "score": second.score,
        "low": low,
        "high": high,
        "verdict": "better" if low > 0 else "worse" if high < 0 else "tie",
        "tied": sum(x is not None and x[0] <= 0 <= x[1] for x in intervals.values()),
        "others": len(others),
    }
