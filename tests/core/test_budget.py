"""Reading budgets, and allocation and projection under one against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.candidates.pareto import frontier
from rankopt.core.budget import Limit, amount, at_least, parse_budget
from rankopt.core.errors import BudgetError
from rankopt.core.problem import Problem, check_feasible
from rankopt.core.records import Candidate, Cost, Layer
from rankopt.strategies.allocation import allocate, fill, project

DENSE = Cost(params=200_000, macs=40_000_000, bytes=800_400)


@pytest.mark.parametrize(
    ("text", "requested", "target"),
    [
        ("params=0.5", 0.5, 100_000),
        ("params=50%", 0.5, 100_000),
        ("params=.5", 0.5, 100_000),
        ("params=1.0", 1.0, 200_000),
        ("params=100%", 1.0, 200_000),
        ("params=150000", 150_000, 150_000),
        ("params=100K", 100_000, 100_000),
        ("params=0.1M", 100_000, 100_000),
        ("macs=2M", 2_000_000, 2_000_000),
        ("bytes=500KB", 500_000, 500_000),
        ("bytes=0.5MB", 500_000, 500_000),
        ("bytes=0.333", 0.333, 266_533),
        ("params=1e-1", 0.1, 20_000),
    ],
)
def test_budget_is_read(text, requested, target):
    (limit,) = parse_budget([text], DENSE)
    assert (limit.requested, limit.target) == (pytest.approx(requested), target)
    metric, _, value = text.partition("=")
    assert parse_budget({metric: value}, DENSE) == (limit,)


def test_python_budgets():
    assert parse_budget({"params": 0.5, "macs": 1_000_000}, DENSE) == (
        Limit("params", 0.5, 100_000),
        Limit("macs", 1_000_000, 1_000_000),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params=1", "ambiguous"),
        ("params=0", "not above 0"),
        ("params=-0.5", "not above 0"),
        ("params=0%", "not above 0"),
        ("params=1.5", "a fraction is at most 1"),
        ("params=201000", "above the dense model's 200,000"),
        ("params=150%", "above the dense"),
        ("params=2MB", "counts bytes"),
        ("params=nan", "not understood"),
        ("params=inf", "not understood"),
        ("params=1e999", "not understood"),
        ("params=", "not understood"),
        ("params=five", "not understood"),
        ("params", "not METRIC=VALUE"),
        ("flops=0.5", "unknown budget metric 'flops': choose from params, macs, bytes"),
    ],
)
def test_bad_budgets_say_why(text, message):
    with pytest.raises(BudgetError, match=message):
        parse_budget([text], DENSE)


def test_bad_budget_sets():
    with pytest.raises(BudgetError, match="given twice"):
        parse_budget(["params=0.5", "params=0.4"], DENSE)
    with pytest.raises(BudgetError, match="no budget"):
        parse_budget({}, DENSE)
    with pytest.raises(BudgetError):
        parse_budget({"params": True}, DENSE)


# --- problems drawn by hypothesis --------------------------------------------------------------------


def candidate(params, macs, error):
    return Candidate("svd_out", (1,), Cost(params, macs, 4 * params), error, loss=error)


@st.composite
def problems(draw, metrics=("params",), layers=4):
    """Small problems with true Pareto frontiers; budgets from infeasible to dense."""
    all_layers, frontiers = [], []
    for i in range(draw(st.integers(1, layers))):
        cost = Cost(draw(st.integers(20, 100)), draw(st.integers(20, 100)), 0)
        layer = Layer(f"layer{i}", "Linear", (4, 5), cost=cost)
        drawn = draw(
            st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99), st.floats(0.001, 1)), min_size=0, max_size=5)
        )
        all_layers.append(layer)
        frontiers.append(frontier(layer, [candidate(*d) for d in drawn], metrics))
    dense = Cost(*(sum(x.cost[m] for x in all_layers) + 7 for m in ("params", "macs", "bytes")))
    limits = tuple(Limit(m, 0.5, max(1, int(draw(st.floats(0.2, 1.0)) * dense[m]))) for m in metrics)
    return Problem(tuple(all_layers), tuple(frontiers), dense, limits)


def everything(problem):
    return [p for p in itertools.product(*(range(len(f)) for f in problem.frontiers)) if problem.fits(p)]


@pytest.mark.parametrize("metrics", [("params",), ("params", "macs")])
def test_allocation_is_the_best_there_is(metrics):
    @settings(max_examples=120)
    @given(problems(metrics))
    def check(problem):
        feasible = everything(problem)
        if not feasible:
            with pytest.raises(BudgetError, match="cannot be met"):
                allocate(problem)
            return
        found = allocate(problem)
        assert problem.fits(found.proposal)
        assert found.loss == pytest.approx(min(map(problem.loss, feasible)), abs=1e-6)
        assert found.bound <= found.loss and found.gap <= 1e-3

    check()


@pytest.mark.parametrize("metrics", [("params",), ("params", "macs")])
def test_projection_fits_keeps_what_fits_and_is_nearest(metrics):
    @settings(max_examples=120)
    @given(problems(metrics), st.data())
    def check(problem, data):
        wanted = tuple(data.draw(st.integers(-1, 9)) for _ in problem.layers)
        clipped = tuple(min(max(w, 0), len(f) - 1) for w, f in zip(wanted, problem.frontiers, strict=True))
        feasible = everything(problem)
        if not feasible:
            with pytest.raises(BudgetError):
                project(problem, wanted)
            return
        found = project(problem, wanted)
        assert problem.fits(found)
        if problem.fits(clipped):
            assert found == clipped
        filled = fill(problem, found)
        assert problem.fits(filled) and problem.loss(filled) <= problem.loss(found)
        assert fill(problem, filled) == filled

    check()


@given(problems())
def test_frontier_is_the_pareto_set_and_ends_dense(problem):
    for layer, candidates in zip(problem.layers, problem.frontiers, strict=True):
        assert candidates[-1].method == "dense" and candidates[-1].cost == layer.cost
        for one, other in itertools.combinations(candidates, 2):
            assert one.error > other.error and one.cost.params < other.cost.params


def test_least_achievable_is_named():
    layer = Layer("a", "Linear", (4, 5), cost=Cost(20, 20, 80))
    problem = Problem((layer,), (frontier(layer, [candidate(8, 8, 0.1)], ["params"]),), Cost(30, 30, 120), ())
    tight = Problem(problem.layers, problem.frontiers, problem.dense, (Limit("params", 0.5, 15),))
    with pytest.raises(BudgetError, match=r"least achievable in this search space is 18 \(60.00 % of dense\)"):
        check_feasible(tight)


def test_the_only_plan_that_fits_is_found_where_repairing_ends_beside_it():
    """Two limits that pull apart: giving up what is cheapest to lose passes the one plan by."""

    def layer(number, params, macs):
        return Layer(f"layer{number}", "Linear", (4, 5), cost=Cost(params, macs, 0))

    def candidate(params, macs, error=1.0):
        return Candidate("svd_out" if error else "dense", (1,) * bool(error), Cost(params, macs, 0), error, error)

    problem = Problem(
        (layer(0, 38, 20), layer(1, 28, 20), layer(2, 20, 73), layer(3, 20, 20)),
        (
            (candidate(1, 54), candidate(38, 20, 0.0)),
            (candidate(70, 1), candidate(28, 20, 0.0)),
            (candidate(6, 22), candidate(1, 23), candidate(20, 73, 0.0)),
            (candidate(20, 20, 0.0),),
        ),
        Cost(113, 140, 7),
        (Limit("params", 0.5, 98), Limit("macs", 0.5, 122)),
    )
    assert everything(problem) and project(problem, (0, 0, 0, 0)) == (1, 1, 1, 0)


# --- latency and energy ---

TIMED = Cost(1000, 2000, 4000, latency=10_000_000, energy=30_000_000)


@pytest.mark.parametrize(
    ("value", "target"), [("0.5", 5e6), ("50%", 5e6), ("5ms", 5e6), ("800us", 8e5), ("0.004s", 4e6)]
)
def test_latency_budgets_are_read(value, target):
    assert parse_budget({"latency": value}, TIMED)[0].target == target


@pytest.mark.parametrize(
    ("value", "target"), [("0.5", 15e6), ("50%", 15e6), ("20mJ", 2e7), ("800uJ", 8e5), ("900nJ", 900), ("0.01J", 1e7)]
)
def test_energy_budgets_are_read(value, target):
    assert parse_budget({"energy": value}, TIMED)[0].target == target


def test_an_amount_can_be_asked_for_as_it_is_written():
    for metric, value in (("energy", 1_234_567), ("latency", 1_234_567), ("params", 123)):
        asked = parse_budget({metric: at_least(metric, value)}, TIMED)[0].target
        assert value <= asked < value + 1000
    assert amount("energy", 1_234_567) == "1.235 mJ" and amount("latency", 1_234_567) == "1.235 ms"


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("latency=5", "give a unit"),
        ("latency=5M", "not understood"),
        ("params=5ms", "not understood"),
        ("latency=11ms", "above"),
        ("energy=5", "give a unit .20mJ"),
        ("energy=5M", "not understood"),
        ("energy=5ms", "not understood"),
        ("latency=5mJ", "not understood"),
        ("macs=5J", "not understood"),
        ("energy=31mJ", "above"),
    ],
)
def test_bad_latency_budgets_are_refused(budget, said):
    with pytest.raises(BudgetError, match=said):
        parse_budget([budget], TIMED)


def test_all_of_the_dense_models_time_means_not_slower():
    """Times that differ by 5 % count as equal, here as in reports."""
    timed = DENSE.with_metric("latency", 2_000_000)
    (limit,) = parse_budget(["latency=100%"], timed)
    assert (limit.requested, limit.target) == (1, 2_100_000)
    (limit,) = parse_budget(["latency=99%"], timed)
    assert limit.target == 1_980_000
    with pytest.raises(BudgetError, match="above the dense model"):
        parse_budget(["latency=2.1ms"], timed)
