"""The layer walk against brute force and gymnasium's checker, and that the agent learns."""

from __future__ import annotations

import itertools
import time
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
from rankopt.search.loop import Study, best, search
from rankopt.strategies import layer_walk as walk_module
from rankopt.strategies.allocation import allocate, fill, project
from rankopt.strategies.gym_environment import LayerWalk
from rankopt.strategies.layer_walk import LayerMdp, pareto_least
from rankopt.strategies.registry import make_strategy
from rankopt.strategies.rl import Agent, log_weights
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
    for make in (LayerMdp, lambda p: LayerWalk(p, len), lambda p: make_strategy("rl", p)):
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


# --- the agent -------------------------------------------------------------------------------------------


def coupled(seed, n=22):
    """Errors of neighbouring layers add up in part, so that no weights on the layers' losses are right."""
    problem, _ = synthetic(0.3, n, seed)
    rng = np.random.default_rng(1000 + seed)
    near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) < 4
    correlation = np.abs(np.corrcoef(rng.normal(size=(n, n))))
    scale = np.exp(rng.normal(0, 0.5, n))
    matrix = (0.6 * np.eye(n) + 0.4 * correlation * near) * np.outer(scale, scale)

    def truth(proposal):
        x = np.sqrt([c.loss for c in problem.candidates(proposal)])
        return float(x @ matrix @ x), None

    return problem, truth


@pytest.mark.parametrize("make", [lambda seed: synthetic(0.3, 12, seed), coupled])
def test_the_agent_learns(make):
    for seed in range(2):
        problem, truth = make(seed)
        trials = search(Study(problem, make_strategy("rl", problem, seed), 30), truth)
        random = search(Study(problem, make_strategy("random", problem, seed), 6), truth)
        objective = [t.objective for t in trials]
        assert trials[0].proposal == allocate(problem).proposal
        assert np.mean(objective[20:]) < np.mean(objective[1:11])
        assert np.mean(objective[20:]) < min(t.objective for t in random)
        assert min(objective[:20]) < objective[0] == trials[0].objective


def test_open_asks_are_distinct():
    problem, truth = synthetic(0.3, n=60)
    strategy = make_strategy("rl", problem, 1)
    trials = search(Study(problem, strategy, 3), truth)
    plans = [strategy.ask() for _ in range(8)]
    assert len(set(plans)) == 8 and not set(plans) & {t.proposal for t in trials}
    assert all(project(problem, p) == p for p in plans)


@pytest.mark.timing
def test_an_ask_takes_milliseconds():
    problem, truth = synthetic(0.3, n=60)
    strategy = make_strategy("rl", problem, 1)
    search(Study(problem, strategy, 3), truth)
    start = time.process_time()
    for _ in range(8):
        strategy.ask()
    assert time.process_time() - start < 8 * 0.2, "50 ms each on an idle machine"


def test_several_limits_are_met_by_the_walk_itself():
    problem, truth = synthetic(0.3)
    rng = np.random.default_rng(0)
    mixed = tuple(  # macs that do not follow params
        tuple(replace(c, cost=replace(c.cost, macs=int(c.cost.macs * rng.uniform(0.5, 1.5)))) for c in f)
        for f in problem.frontiers
    )
    macs = Limit("macs", 0.3, int(0.3 * problem.dense.macs))
    problem = replace(problem, frontiers=mixed, limits=(*problem.limits, macs))
    strategy = make_strategy("rl", problem)
    trials = search(Study(problem, strategy, 25), truth)
    assert all(problem.fits(strategy.propose(number)) for number in range(30, 40))
    assert best(trials).objective < trials[0].objective


def test_a_small_problem_is_exhausted_before_the_agent_stops():
    problem, truth = synthetic(0.5, n=3)
    every = itertools.product(*(range(len(f)) for f in problem.frontiers))
    full = {fill(problem, plan) for plan in every if problem.fits(plan)}
    trials = search(Study(problem, make_strategy("rl", problem), len(full)), truth)
    assert {t.proposal for t in trials} == full


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_objectives_of_any_sign_are_learned_from(shift):
    problem, truth = synthetic(0.3)
    trials = search(Study(problem, make_strategy("rl", problem), 20), lambda p: (truth(p)[0] + shift, None))
    assert best(trials).objective < trials[0].objective


def test_weights_are_found_again():
    rng = np.random.default_rng(0)
    weights, x = np.exp(rng.normal(0, 0.7, 6)), rng.uniform(0.2, 1, (60, 6))
    mean, root = log_weights([(row.tolist(), float(row @ weights)) for row in x], 6, 0.7, 0.03)
    ratio = np.exp(mean[:-1]) / weights
    assert np.allclose(ratio / ratio.mean(), 1, atol=0.05)
    free = np.sqrt(np.diag(log_weights([], 6, 0.7, 0.03)[1] @ log_weights([], 6, 0.7, 0.03)[1].T))
    assert np.allclose(free, [0.7] * 6 + [2.1]) and (np.sqrt(np.diag(root @ root.T)) < free).all()


@pytest.mark.parametrize("option", ["spread", "noise", "temperature"])
def test_options_are_checked(option):
    problem, _ = synthetic(0.3)
    with pytest.raises(RankoptError, match=f"option {option} is -1.0"):
        Agent(problem, **{option: -1.0})
