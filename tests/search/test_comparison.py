"""Ranks and tests of a comparison, against values from the literature and from first principles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rankopt.search.comparison import MeanRank, critical_difference, groups, holm, mean_ranks, paired


@pytest.mark.parametrize(("strategies", "problems", "quantile"), [(4, 14, 2.569), (10, 10, 3.164), (5, 30, 2.728)])
def test_the_critical_difference_is_that_of_the_literature(strategies, problems, quantile):
    """Table 5 of Demšar 2006 has the quantiles; for the first of these, his example, he finds 1.25."""
    expected = quantile * (strategies * (strategies + 1) / (6 * problems)) ** 0.5
    assert critical_difference(strategies, problems) == pytest.approx(expected, rel=3e-4)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_groups_are_the_largest_that_do_not_differ():
    ranks = {name: MeanRank(x, x, x) for name, x in zip("abcde", (1, 1.5, 2.2, 4, 4.1), strict=True)}
    assert groups(ranks, 1.0) == [("a", "b"), ("b", "c"), ("d", "e")]
    assert groups(ranks, 0.05) == [] and groups(ranks, 9) == [("a", "e")]


def test_intervals_of_mean_ranks():
    found = mean_ranks({"mostly last": [2, 2, 2, 1] * 5, "mostly first": [1, 1, 1, 2] * 5, "same": [3] * 20})
    assert list(found) == ["mostly first", "mostly last", "same"]
    first = found["mostly first"]
    assert first.mean == 1.25 and 1.0 <= first.low < 1.25 < first.high < 1.5
    assert found["same"] == MeanRank(3, 3, 3)
    assert mean_ranks({"none": []}) == {}


def test_the_signed_rank_test_against_all_sign_patterns():
    """Exact: the share of sign patterns whose rank sum is as far from its mean."""
    gaps = np.array([0.3, -0.1, 0.7, 0.9, -0.2, 1.1, 0.45])
    order = np.abs(gaps).argsort().argsort() + 1
    sums = [sum(r for r, s in zip(order, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=7)]
    middle, seen = order.sum() / 2, order[gaps > 0].sum()
    p = np.mean([abs(s - middle) >= abs(seen - middle) for s in sums])
    found = paired(gaps, np.zeros(7))
    assert (found.better, found.worse) == (2, 5) and found.p == pytest.approx(p)


def test_equal_and_failed_runs():
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired([np.inf, np.inf], [np.inf, 1.0]).worse == 1


def test_holm_is_monotone():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
