"""The allocator against brute force and plain milp: plans are feasible, bounds hold, projections are the nearest."""

from __future__ import annotations

import itertools
import math
import runpy
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.core.budget import Limit
from rankopt.core.errors import BudgetError
from rankopt.core.problem import Problem
from rankopt.core.records import METRICS, Candidate, Cost, Layer
from rankopt.strategies.allocation import allocate, fill, project
from studies.allocation import plain_milp, random_problem
from tests.helpers import ROOT

LOSS = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1), st.floats(1e-9, 1e-6))  # ties and small ones too


@st.composite
def problems(draw, limits):
    """Menus in any order, ties included; budgets from infeasible to slack. Losses for allocate beside them."""
    candidate = st.tuples(st.integers(0, 9), st.integers(0, 9), LOSS)
    menus = draw(st.lists(st.lists(candidate, min_size=1, max_size=5), min_size=1, max_size=4))
    frontiers = tuple(
        tuple(Candidate("svd_out", (1,), Cost(a, b, 4 * a), 0.5, loss) for a, b, loss in menu) for menu in menus
    )
    layers = tuple(Layer(f"layer{i}", "Linear", (4, 5), cost=f[-1].cost) for i, f in enumerate(frontiers))
    dense = sum((x.cost for x in layers), Cost(3, 3, 12))
    targets = tuple(Limit(m, 0.5, draw(st.integers(2, 3 + 9 * len(menus)))) for m in METRICS[:limits])
    losses = [[draw(LOSS) for _ in f] for f in frontiers]
    return Problem(layers, frontiers, dense, targets), losses


def feasible(problem):
    return [p for p in itertools.product(*(range(len(f)) for f in problem.frontiers)) if problem.fits(p)]


@pytest.mark.parametrize("limits", [1, 2])
def test_allocation_against_brute_force(limits):
    """With losses of its own, in no order; and what it certifies is a bound."""

    @settings(max_examples=150)
    @given(problems(limits))
    def check(drawn):
        problem, losses = drawn
        plans = feasible(problem)
        if not plans:
            with pytest.raises(BudgetError, match="cannot be met"):
                allocate(problem, losses)
            return
        best = min(sum(row[i] for row, i in zip(losses, p, strict=True)) for p in plans)
        for tolerance in (None, 0.05):
            found = allocate(problem, losses, tolerance)
            assert problem.fits(found.proposal)
            assert found.loss == pytest.approx(sum(r[i] for r, i in zip(losses, found.proposal, strict=True)))
            assert found.bound <= best * (1 + 1e-9) + 1e-15
            assert found.loss <= best / (1 - (tolerance or 1e-9)) + 1e-12

    check()


@pytest.mark.parametrize("limits", [1, 2])
def test_projection_is_nearest_before_it_is_filled(limits):
    @settings(max_examples=80)
    @given(problems(limits), st.data())
    def check(drawn, data):
        problem, _ = drawn
        wanted = tuple(data.draw(st.integers(0, len(f) - 1)) for f in problem.frontiers)
        plans = feasible(problem)
        if not plans:
            return
        assert problem.fits(project(problem, wanted))

        def distance(plan):
            steps = zip(problem.frontiers, plan, wanted, strict=True)
            return sum(((i - w) / max(len(f) - 1, 1)) ** 2 for f, i, w in steps)

        nearest = min(map(distance, plans))
        ties = {fill(problem, p) for p in plans if distance(p) <= nearest * 1.0011}
        assert project(problem, wanted) in (ties if wanted not in plans else {wanted})

    check()


@given(problems(2), st.data())
def test_fill_lowers_the_loss_until_no_step_fits(drawn, data):
    problem, _ = drawn
    plans = feasible(problem)
    if not plans:
        return
    start = data.draw(st.sampled_from(plans))
    end = fill(problem, start)
    assert problem.fits(end) and problem.loss(end) <= problem.loss(start)
    for i, candidates in enumerate(problem.frontiers):
        for j in range(len(candidates)):
            step = (*end[:i], j, *end[i + 1 :])
            assert not problem.fits(step) or candidates[j].loss >= candidates[end[i]].loss


@pytest.mark.parametrize(("layers", "limits"), [(25, 1), (60, 1), (25, 2), (40, 3)])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_middle_sized_problems_against_plain_milp(layers, limits, share):
    problem = random_problem(layers, candidates=16, limits=limits, share=share, seed=layers)
    found, (loss, bound) = allocate(problem), plain_milp(problem, gap=0.0)
    assert problem.fits(found.proposal)
    assert found.loss == pytest.approx(loss, rel=1e-6) and found.bound == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("limits", [1, 3])
def test_a_thousand_layers(limits):
    """Certified to 0.1 %; the plan fits by an independent count, and so does a projected one."""
    problem = random_problem(1000, limits=limits)
    found = allocate(problem)
    assert problem.fits(found.proposal) and found.gap <= 1e-3
    assert found.loss == pytest.approx(problem.loss(found.proposal))
    rng = np.random.default_rng(0)
    wanted = tuple(int(x) for x in rng.integers(40, 64, 1000))
    assert not problem.fits(wanted) and problem.fits(project(problem, wanted))


@pytest.mark.timing
@pytest.mark.parametrize("limits", [1, 3])
def test_a_thousand_layers_take_seconds(limits):
    """0.1 to 1 s of CPU for allocating and for projecting each; plain milp takes several."""
    problem = random_problem(1000, limits=limits)
    start = time.process_time()
    allocate(problem)
    allocated = time.process_time()
    project(problem, (40,) * 1000)
    assert max(allocated - start, time.process_time() - allocated) < 5


def test_no_better_plan_than_the_bound_at_every_budget():
    """A budget's optimum bounds that of every smaller one."""
    problem = random_problem(300, share=1.0)
    losses, bounds = [], []
    for share in (0.1, 0.2, 0.4, 0.8):
        limit = Limit("params", share, int(share * problem.dense.params))
        found = allocate(Problem(problem.layers, problem.frontiers, problem.dense, (limit,)))
        losses.append(found.loss)
        bounds.append(found.bound)
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert all(bound <= loss for bound, loss in zip(bounds, losses, strict=True))
    assert math.isfinite(sum(bounds))


def test_nothing_is_printed(capfd):
    """HiGHS prints a line of its own on this problem, past sys.stdout."""
    study = runpy.run_path(str(ROOT / "studies" / "synthetic.py"))
    allocate(study["Synthetic"](1, 1.0).problem)
    assert capfd.readouterr() == ("", "")
