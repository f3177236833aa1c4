"""Intervals and rank correlations against scipy, published figures and simulation; which differences count as ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr

from rankopt.core.errors import TaskError
from rankopt.core.records import Cost, Task, Trial
from rankopt.core.statistics import correlation, difference, proxy, tie, wilson
from rankopt.search.summary import reliability_notes


def trial(number, objective, score=None, predicted=None):
    return Trial(number, (number,), "finished", Cost(1, 1, 1), objective, score, predicted)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts):
    k, n = counts
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_scores_that_are_no_fractions_have_no_interval():
    assert wilson(None, 10) is wilson(1.5, 10) is wilson(0.5, None) is difference(0.5, None, 10) is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(0.9, 0.3, (0.1705, 0.8090)), (1.0, 0.0, (0.6075, 1.0)), (0.3, 0.9, (-0.8090, -0.1705))],
)
def test_differences_are_newcombes(first, second, expected):
    """Newcombe 1998, table II, examples (b) and (g), 10 against 10."""
    assert difference(first, second, 10) == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=10, max_size=30))
@settings(max_examples=50)
def test_the_correlation_is_scipys_and_lies_within_its_interval(pairs):
    x, y = zip(*pairs, strict=True)
    found = correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found["verdict"] == "constant" and found["spearman"] is None
    else:
        assert found["spearman"] == pytest.approx(spearmanr(x, y).statistic)
        assert -1 <= found["low"] <= found["spearman"] <= found["high"] <= 1
        assert found["low"] < found["high"]


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(rho):
    """Normal pairs: Spearman's coefficient of the population is 6/π asin(ρ/2)."""
    rng, truth = np.random.default_rng(0), 6 / math.pi * math.asin(rho / 2)
    hits = 0
    for _ in range(300):
        x = rng.normal(size=30)
        found = correlation(x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=30))
        hits += found["low"] <= truth <= found["high"]
    assert 0.92 <= hits / 300 <= 0.99


def test_verdicts():
    x = list(range(12))
    assert correlation(x, x)["verdict"] == "good"
    assert correlation(x, x[::-1])["verdict"] == "poor"
    assert correlation(x, [3, 0, 5, 1, 8, 2, 4, 11, 6, 7, 10, 9])["verdict"] == "unclear"
    assert correlation(x[:9], x[:9]) == {"n": 9, "spearman": None, "low": None, "high": None, "verdict": "too few"}


def test_signs_are_such_that_one_is_the_same_order_of_plans():
    """Failed trials count for nothing; a higher score goes with a lower objective."""
    good = [trial(i, objective=i, score=1 - i / 20, predicted=2 * i) for i in range(12)]
    failed = Trial(12, (12,), "failed", Cost(1, 1, 1), predicted=0.0, error="no")
    found = proxy([*good, failed])
    assert found["predicted_objective"]["spearman"] == found["objective_score"]["spearman"] == 1
    assert found["predicted_objective"]["n"] == 12
    assert proxy([trial(0, 1.0)]) == {"predicted_objective": None, "objective_score": None}


def info(trials, examples=100):
    chosen = min(trials, key=lambda t: t.objective)
    return {
        "proxy": proxy(trials),
        "tie": tie(trials, chosen, examples),
        "examples": {"validation": examples},
        "score": {"compressed": {"validation": chosen.score}},
    }


def test_messages_about_ties():
    near = [trial(0, 0.3, 0.90), trial(1, 0.2, 0.89), trial(2, 0.9, 0.20)]
    (text, warns) = reliability_notes(info(near))[-1]
    assert "the chosen plan and the runner-up (trial 0, score 90.00 %) are a tie" in text and not warns
    assert "1 of the 2 other plans score within the noise of 100 examples" in text
    (text, warns) = reliability_notes(info([trial(0, 0.3, 0.5), trial(1, 0.2, 0.9)]))[-1]
    assert "scores above the runner-up (trial 0" in text and not warns
    (text, warns) = reliability_notes(info([trial(0, 0.3, 0.9), trial(1, 0.2, 0.5)]))[-1]
    assert "least objective, but scores below the runner-up (trial 0" in text and warns
    assert "Task(examples=...)" in reliability_notes(info(near, None))[-1][0]


def test_a_poor_proxy_is_warned_of_and_few_trials_tell_nothing():
    rng = np.random.default_rng(0)
    noise = [trial(i, objective=float(rng.normal()), predicted=float(i)) for i in range(30)]
    ((text, warns),) = reliability_notes(info(noise, None))
    assert warns and "poor" in text and f"{proxy(noise)['predicted_objective']['spearman']:.2f}" in text
    ((text, warns),) = reliability_notes(info(noise[:5], None))
    assert not warns and "too few trials to tell (5 plans)" in text


@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_numbers_of_examples_are_counted(value):
    with pytest.raises(TaskError, match="give the number of examples"):
        Task(None, None, [], examples=value)
