"""The layer walk against brute force and gymnasium's checker."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.core.budget import Limit
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Candidate, Cost, Layer
from rankopt.strategies import layer_walk as walk_module
from rankopt.strategies.allocation import allocate
from rankopt.strategies.gym_environment import ContinuousLayerWalk, LayerWalk
from rankopt.strategies.layer_walk import LayerMdp, pareto_least
from rankopt.strategies.registry import make_strategy
from tests.helpers.problems import synthetic


def small(rng, layers=4, metrics=("params", "macs")):
    """Unordered costs in two metrics, and limits that some plan just meets or passes by little."""
    frontiers = tuple(
        tuple(
            Candidate("svd_out", (i,), Cost(int(p), int(m), 0), float(e), float(e))
            for i, (p, m, e) in enumerate(
                zip(rng.integers(1, 20, n), rng.integers(1, 20, n), np.sort(rng.random(n))[::-1], strict=True)
            )
        )
        for n in rng.integers(1, 5, layers)
    )
    free = tuple(Layer(f"l{i}", "Linear", (4, 4), cost=f[-1].cost) for i, f in enumerate(frontiers))
    dense = sum((x.cost for x in free), Cost(0, 0, 0))
    some = sum((f[int(rng.integers(len(f)))].cost for f in frontiers), Cost(0, 0, 0))
    limits = tuple(Limit(m, 1.0, some[m] + int(rng.integers(0, 4))) for m in metrics)
    return Problem(free, frontiers, dense, limits)


def completable(problem, prefix):
    rest = (range(len(f)) for f in problem.frontiers[len(prefix) :])
    return any(problem.fits((*prefix, *tail)) for tail in itertools.product(*rest))


def check_masks(problem, *, exact):
    """Walk every allowed prefix; compare each mask with all completions, one by one."""
    walk, prefixes = LayerMdp(problem), [()]
    for layer, frontier in enumerate(problem.frontiers):
        following = []
        for prefix in prefixes:
            spent = sum((walk.costs[i][at] for i, at in enumerate(prefix)), np.zeros_like(walk.room))
            mask = walk.mask(layer, spent)
            truth = [completable(problem, (*prefix, at)) for at in range(len(frontier))]
            assert mask.any() and (mask.tolist() == truth if exact else not (mask & ~np.array(truth)).any())
            following += [(*prefix, int(at)) for at in np.flatnonzero(mask)]
        prefixes = following
    assert all(problem.fits(p) for p in prefixes)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([("params",), ("params", "macs")]))
def test_masks_allow_exactly_what_can_be_completed(seed, metrics):
    check_masks(small(np.random.default_rng(seed), metrics=metrics), exact=True)


@pytest.mark.parametrize("seed", range(10))
def test_masks_stay_safe_where_completions_are_dropped(seed, monkeypatch):
    monkeypatch.setattr(walk_module, "COMPLETIONS", 1)
    check_masks(small(np.random.default_rng(seed)), exact=False)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20))
def test_pareto_least(points):
    distinct = set(points)
    least = {p for p in distinct if not any(q != p and all(a <= b for a, b in zip(q, p)) for q in distinct)}  # noqa: B905
    found = [tuple(p) for p in pareto_least(np.array(points)).tolist()]
    assert set(found) == least and len(found) == len(least)


def test_limits_that_cannot_be_met_are_refused():
    problem, _ = synthetic(0.001)
    for make in (LayerMdp, lambda p: LayerWalk(p, len), lambda p: make_strategy("thompson", p)):
        with pytest.raises(BudgetError):
            make(problem)


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
def test_the_environment_is_a_gymnasium_environment():
    problem, truth = synthetic(0.3)
    check_env(LayerWalk(problem, lambda p: truth(p)[0]), skip_render_check=True)


def test_an_episode_of_the_environment():
    problem, truth = synthetic(0.3)
    env, start = LayerWalk(problem, lambda p: truth(p)[0]), allocate(problem).proposal
    observation, _ = env.reset(seed=0)
    seen = [observation]
    for at in start:
        assert env.action_masks().shape == (env.action_space.n,) and env.action_masks()[at]
        observation, reward, done, truncated, info = env.step(at)
        seen.append(observation)
        assert not truncated and done == (len(info["proposal"]) == len(start)) and (done or reward == 0)
    assert done and info["proposal"] == start and reward == -truth(start)[0]
    assert all(np.isfinite(x).all() for x in seen) and len({x.tobytes() for x in seen}) == len(seen)
    left = problem.limits[0].target - problem.cost(start).params
    assert seen[-1][4] * problem.table.room[0] == pytest.approx(left, abs=1), "the remaining budget is observed"


def test_forbidden_actions_are_clipped():
    problem, truth = synthetic(0.15)
    env = LayerWalk(problem, lambda p: truth(p)[0])
    env.reset()
    for _ in problem.layers:
        allowed = np.flatnonzero(env.action_masks())
        *_, info = env.step(env.action_space.n - 1)
        assert info["proposal"][-1] == allowed.max()
    assert problem.fits(info["proposal"])
    with pytest.raises(RankoptError, match="0 layers are free"):
        LayerWalk(replace(problem, layers=(), frontiers=()), len)


def test_after_the_last_layer_nothing_is_allowed():
    problem, truth = synthetic(0.3, 3)
    env = LayerWalk(problem, lambda p: truth(p)[0])
    env.reset()
    for at in allocate(problem).proposal:
        env.step(at)
    assert env.action_masks().tolist() == [False] * env.action_space.n


@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
def test_actions_may_be_relative_positions():
    problem, truth = synthetic(0.3)
    check_env(ContinuousLayerWalk(LayerWalk(problem, lambda p: truth(p)[0])), skip_render_check=True)
    env, start = ContinuousLayerWalk(LayerWalk(problem, lambda p: truth(p)[0])), allocate(problem).proposal
    env.reset()
    for at, frontier in zip(start, problem.frontiers, strict=True):
        *_, info = env.step(np.array([at / (len(frontier) - 1)], np.float32))
    assert info["proposal"] == start
