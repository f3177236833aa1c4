"""The search of partial plans against brute force, and the prices of one limit against a linear program."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from rankopt.core.dual import maximise_dual, priced
from rankopt.core.problem import ProblemTable
from rankopt.strategies.partial_plans import best_plan
from studies.allocation import random_problem


def brute_force(table):
    layers = [np.flatnonzero(np.isfinite(row)) for row in table.losses]
    rows = np.arange(len(layers))
    plans = (np.array(p) for p in itertools.product(*layers))
    return min(
        (table.losses[rows, p].sum() for p in plans if (table.costs[:, rows, p].sum(axis=1) <= table.room).all()),
        default=math.inf,
    )


@st.composite
def tables(draw):
    layers, candidates, limits = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    losses = rng.integers(0, 6, (layers, candidates)) / 4  # ties
    losses[:, 1:][rng.random((layers, candidates - 1)) < 0.2] = math.inf
    costs = rng.integers(0, 9, (limits, layers, candidates)).astype(float)
    return ProblemTable(losses, costs, rng.integers(0, 4 * layers + 1, limits).astype(float))


@settings(max_examples=300)
@given(tables(), st.integers(1, 1000))
def test_the_best_plan_is_found_and_a_narrow_search_says_that_it_may_have_missed_it(table, width):
    prices = np.full(len(table.room), 0.125)
    reduced = priced(table, prices)
    reduced -= reduced.min(axis=1, keepdims=True)
    plan, complete = best_plan(table, reduced, math.inf, width)
    best = brute_force(table)
    if complete:
        assert (plan is None) == math.isinf(best)
    if plan is not None:
        rows = np.arange(len(plan))
        assert (table.costs[:, rows, plan].sum(axis=1) <= table.room).all()
        loss = table.losses[rows, plan].sum()
        assert loss == pytest.approx(best) if complete else loss >= best - 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_one_limit_is_priced_as_by_the_linear_relaxation(seed):
    table = random_problem(20, candidates=12, share=0.3, seed=seed).table
    layers, candidates = table.losses.shape
    relaxed = linprog(
        table.losses.ravel(),
        A_ub=table.costs.reshape(1, -1),
        b_ub=table.room,
        A_eq=np.repeat(np.eye(layers), candidates, axis=1),
        b_eq=np.ones(layers),
    )
    assert maximise_dual(table)[2] == pytest.approx(relaxed.fun, rel=1e-8)
