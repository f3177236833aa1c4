"""Successive halving: which candidates are given up, and what the others are taken to reach."""

from __future__ import annotations

import itertools

import pytest

from rankopt.candidates.halving import BEST, LEAST_GAIN, Reached, beaten, between, paths, segments
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.records import FACTORISED, RECONSTRUCTED, Candidate, Cost, Layer
from rankopt.decompositions.registry import DECOMPOSITIONS

METRICS = ("params", "macs")


def candidate(params: int, macs: int, error: float, form: str = FACTORISED) -> Candidate:
    return Candidate("cp", (params,), Cost(params, macs, 4 * params), error, form=form)


@pytest.mark.parametrize(("error", "power"), [(0.1, 0.4), (0.001, 1.1), (1e-4, 1.45)])
def test_a_search_is_expected_to_gain_a_power_of_what_its_last_steps_gained(error, power):
    halved = Reached(before=2 * error, error=error, ended=False)
    assert halved.likely == pytest.approx(error * 0.5**power)
    assert halved.best == pytest.approx(error * 0.5 ** (power + BEST))


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


LAYERS = (Layer("conv", "Conv2d", (64, 32, 3, 3)), Layer("linear", "Linear", (96, 64)))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: x.name)
@pytest.mark.parametrize("family", sorted(DECOMPOSITIONS))
def test_along_a_path_every_part_of_a_rank_grows(family, layer):
    ranks = SearchSpace(families=(family,), points=20).ranks(family, layer)
    found = paths(layer, family, ranks)
    assert sorted(r for path in found for r in path) == sorted(ranks)
    for path in found:
        pairs = [(a, b) for low, high in itertools.pairwise(path) for a, b in zip(low, high, strict=True)]
        shrinking = [(a, b) for a, b in pairs if b < a]
        assert all(a - b <= 2 for a, b in shrinking) and len(shrinking) <= len(pairs) / 10  # by rounding


def test_a_path_is_cut_into_pieces_that_share_their_ends():
    path = [(r,) for r in range(14)]
    assert segments(path, 3, 4) == [tuple(path[i : i + 4]) for i in (0, 3, 6, 9)] + [((12,), (13,))]
    assert segments(path[:9], 3, 4) == [tuple(path[i : i + 3]) for i in (0, 2, 4, 6)]  # four pieces at least
    assert segments(path[:3], 3, 4) == [((0,), (1,)), ((1,), (2,))]
    assert segments(path[:1], 3, 4) == [((0,), (0,))] and segments([], 3, 4) == []


def test_ranks_that_are_too_dear_stand_beyond_the_last_piece():
    path = [(r,) for r in range(1, 11)]
    cheap = lambda rank: rank[0] <= 5  # noqa: E731
    assert segments(path, 8, 2, cheap) == [((1,), (2,), (3,)), ((3,), (4,), (5,)), ((3,), *path[5:], (5,))]
    assert segments(path, 3, 2, lambda _: True) == segments(path, 3, 2)
    assert segments(path, 3, 2, lambda rank: rank[0] < 2) == segments(path, 3, 2)  # two are needed
    assert between((0.4, 0.2), (100, 200), 400) == pytest.approx(0.1)


def test_what_is_sure_lies_between_what_is_likely_and_what_is_there():
    for error in (0.3, 0.03, 0.003, 1e-5):
        x = Reached(1.5 * error, error, ended=False)
        assert x.best < x.likely <= x.sure <= x.error
    assert Reached(0.2, 0.1, ended=True).sure == 0.1


def test_an_error_between_two_ranks_is_a_power_of_the_weights():
    errors = [w**-1.7 for w in (100, 200, 400)]
    assert between((errors[0], errors[2]), (100, 400), 200) == pytest.approx(errors[1])
    assert between((0.2, 0.1), (100, 400), 100) == pytest.approx(0.2)
    assert between((0.1, 0.0), (100, 400), 300) < 1e-100  # exact at the larger rank
