"""That the agent of posterior sampling learns."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from rankopt.core.budget import Limit
from rankopt.core.errors import RankoptError
from rankopt.search.loop import Study, best, search
from rankopt.strategies.allocation import allocate, fill, project
from rankopt.strategies.registry import make_strategy
from rankopt.strategies.thompson import Thompson, log_weights
from tests.helpers.problems import coupled, synthetic


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda seed: synthetic(0.3, 12, seed), coupled])
def test_the_agent_learns(make):
    for seed in range(2):
        problem, truth = make(seed)
        trials = search(Study(problem, make_strategy("thompson", problem, seed), 30), truth)
        random = search(Study(problem, make_strategy("random", problem, seed), 6), truth)
        objective = [t.objective for t in trials]
        assert trials[0].proposal == allocate(problem).proposal
        assert np.mean(objective[20:]) < np.mean(objective[1:11])
        assert np.mean(objective[20:]) < min(t.objective for t in random)
        assert min(objective[:20]) < objective[0] == trials[0].objective


def test_open_asks_are_distinct():
    problem, truth = synthetic(0.3, n=60)
    strategy = make_strategy("thompson", problem, 1)
    trials = search(Study(problem, strategy, 3), truth)
    plans = [strategy.ask() for _ in range(8)]
    assert len(set(plans)) == 8 and not set(plans) & {t.proposal for t in trials}
    assert all(project(problem, p) == p for p in plans)


@pytest.mark.timing
def test_an_ask_takes_milliseconds():
    problem, truth = synthetic(0.3, n=60)
    strategy = make_strategy("thompson", problem, 1)
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
    strategy = make_strategy("thompson", problem)
    trials = search(Study(problem, strategy, 25), truth)
    assert all(problem.fits(strategy.propose(number)) for number in range(30, 40))
    assert best(trials).objective < trials[0].objective


def test_a_small_problem_is_exhausted_before_the_agent_stops():
    problem, truth = synthetic(0.5, n=3)
    every = itertools.product(*(range(len(f)) for f in problem.frontiers))
    full = {fill(problem, plan) for plan in every if problem.fits(plan)}
    trials = search(Study(problem, make_strategy("thompson", problem), len(full)), truth)
    assert {t.proposal for t in trials} == full


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_objectives_of_any_sign_are_learned_from(shift):
    problem, truth = synthetic(0.3)
    trials = search(Study(problem, make_strategy("thompson", problem), 20), lambda p: (truth(p)[0] + shift, None))
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
        Thompson(problem, **{option: -1.0})
