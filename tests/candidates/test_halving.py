"""Successive halving: which candidates are given up, and what the others are taken to reach."""

from __future__ import annotations

import pytest

from rankopt.candidates.halving import LEAST_GAIN, Reached, beaten
from rankopt.core.records import FACTORISED, RECONSTRUCTED, Candidate, Cost

METRICS = ("params", "macs")


def candidate(params: int, macs: int, error: float, form: str = FACTORISED) -> Candidate:
    return Candidate("cp", (params,), Cost(params, macs, 4 * params), error, form=form)


def test_a_search_is_expected_to_gain_a_power_of_what_its_last_steps_gained():
    halved = Reached(before=0.2, error=0.1, ended=False)
    assert halved.best == pytest.approx(0.1 * 0.5**1.5) and halved.likely == pytest.approx(0.1 * 0.5**0.6)


def test_a_search_that_gained_little_may_still_gain_a_tenth():
    slow = Reached(before=0.1, error=0.0999, ended=False)
    assert slow.best == pytest.approx((1 - LEAST_GAIN) * 0.0999) and slow.likely == pytest.approx(0.0999, rel=0.01)


def test_a_search_at_its_end_gains_nothing():
    ended = Reached(before=0.2, error=0.1, ended=True)
    assert ended.best == ended.likely == 0.1


@pytest.mark.parametrize(("before", "error"), [(None, 0.1), (0.0, 0.0), (0.1, 0.2)])
def test_what_is_not_known_is_not_guessed(before, error):
    found = Reached(before, error, ended=False)
    assert found.likely == error and found.best <= 0.9 * error


def test_a_candidate_is_beaten_by_one_that_costs_no_more_in_any_metric():
    menu = [candidate(100, 500, 0.2), candidate(100, 500, 0.1), candidate(90, 600, 0.1), candidate(110, 400, 0.3)]
    assert beaten(menu, [0.15, 0.05, 0.05, 0.05], METRICS) == [True, False, False, False]
    assert beaten(menu, [0.05, 0.05, 0.05, 0.05], METRICS) == [False] * 4  # it may still become better


def test_the_metrics_of_a_budget_decide():
    cheap_to_run, cheap_to_store = candidate(200, 100, 0.1), candidate(100, 200, 0.2)
    assert beaten([cheap_to_run, cheap_to_store], [0.1, 0.15], ("macs",)) == [False, True]
    assert beaten([cheap_to_run, cheap_to_store], [0.1, 0.15], METRICS) == [False, False]


def test_equals_do_not_beat_each_other():
    twins = [candidate(100, 100, 0.1, form) for form in (FACTORISED, RECONSTRUCTED)]
    assert beaten(twins, [0.1, 0.1], METRICS) == [False, False]
