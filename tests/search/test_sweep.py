"""Many budgets from one run: every budget is met, knees are found, and the CSV agrees with the plans."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from rankopt.core.errors import BudgetError, RankoptError
from rankopt.core.records import Cost
from rankopt.core.run_folder import folder_lock
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.report.sweep import table, write
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import search
from rankopt.search.sweep import knees, read_budgets, sweep
from rankopt.strategies.allocation import allocate
from tests.helpers.command import run

DENSE = Cost(100_000, 10**6, 400_000)


def test_a_range_has_equal_ratios_and_both_ends():
    found = read_budgets("params=0.8:0.1:8", DENSE)
    values = np.array([limit.requested for _, limit in found])
    assert (values[0], values[-1], len(values)) == (0.8, 0.1, 8)
    assert np.diff(np.log(values)) == pytest.approx(np.log(0.1 / 0.8) / 7, abs=0.01)
    assert [limit.target for _, limit in read_budgets("params=40K:10000:3", DENSE)] == [40_000, 20_000, 10_000]
    assert [b for b, _ in read_budgets("bytes=0.5, 30%,100KB", DENSE)] == ["bytes=0.5", "bytes=30%", "bytes=100KB"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params", "are not understood: give METRIC=FROM:TO:HOW_MANY"),
        ("params=0.8:0.1", "are not understood"),
        ("params=0.8:0.1:1", "fewer than 2"),
        ("params=0.8:10000:4", "both ends as fractions"),
        ("speed=0.8:0.1:4", "unknown budget metric 'speed'"),
        ("params=0.8,,0.1", "not understood"),
    ],
)
def test_budgets_that_make_no_sense(text, message):
    with pytest.raises(BudgetError, match=message):
        read_budgets(text, DENSE)


def test_knees_are_where_a_front_bends():
    x = np.arange(21.0)
    bent = np.maximum(20 - 3 * x, 6 - x * 0.3)  # meets at 14 / 2.7
    assert knees(x, bent) == {5}
    assert knees(x, 20 - x) == knees(x[:2], bent[:2]) == knees(x, np.zeros(21)) == set()
    twice = np.maximum(np.maximum(100 - 30 * x, 14 - x), 0.2 * (20 - x))  # bends at 86 / 29 and 12.5
    assert {3} < knees(x, twice) <= {3, 12, 13}


@pytest.fixture(scope="module")
def found(digits):
    return sweep(digits, "params=0.8,0.5,0.3,0.25,0.2,0.1,0.01")


def test_every_plan_is_the_exact_allocation_and_is_measured_itself(digits, found):
    assert [p.kind for p in found.points].count("end") == 2
    assert [(p.budget, p.kind) for p in found.points][-1] == ("params=0.01", "infeasible")
    assert "least achievable" in found.points[-1].reason
    assert any(p.kind == "knee" for p in found.points)
    assert found.evaluated == sum(p.objective is not None for p in found.points) < 6
    for p in found.points[:-1]:
        problem = digits.problem([p.budget])
        exact = allocate(problem)
        assert p.predicted == exact.loss and p.plan.cost == problem.cost(exact.proposal)
        assert p.plan.cost.params <= p.limit.target
        if p.kind == "between":
            assert p.objective is p.score is p.interval is None
        else:
            assert (p.objective, p.score) == Evaluator.of(digits, problem)(exact.proposal)
            assert p.interval[0] < p.score < p.interval[1]


def test_the_csv_says_what_the_plans_are(digits, found, tmp_path):
    """Its sizes, counted again from the layers' methods and ranks alone."""
    write(tmp_path, found)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [r["budget"] for r in rows] == [p.budget for p in found.points]
    layers = {layer.name: layer for layer in digits.layers}
    for row, point in zip(rows[:-1], found.points, strict=False):
        cost = digits.dense
        for entry in row["plan"].split():
            name, method, *rank = entry.split(":")
            if method != "dense":
                ranks = tuple(int(r) for r in rank[0].split("x"))
                cost = cost - layers[name].cost + DECOMPOSITIONS[method].cost(layers[name], ranks)
        assert (int(row["params"]), int(row["macs"]), int(row["bytes"])) == (cost.params, cost.macs, cost.bytes)
        assert int(row["params"]) <= int(row["target"])
        assert float(row["predicted"]) == point.predicted
        assert (float(row["score"]) if row["score"] else None) == point.score
    assert rows[-1]["params"] == rows[-1]["plan"] == "" and "least achievable" in rows[-1]["reason"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, table(found).splitlines())) <= 100


def test_another_runner_measures_the_same(digits, found):
    studies = []

    def runner(study, evaluate):
        studies.append(study)
        return search(study, evaluate)

    again = sweep(digits, "params=0.8,0.5,0.3,0.25,0.2,0.1,0.01", runner=runner)
    assert len(studies) == 1 and len(studies[0].trials) == found.evaluated
    assert [(p.objective, p.score) for p in again.points] == [(p.objective, p.score) for p in found.points]


def test_an_evaluation_that_fails_is_named(digits):
    def failing(study, evaluate):
        def fail(proposal):
            raise ArithmeticError("on purpose")

        return search(study, fail)

    with pytest.raises(RankoptError, match="ArithmeticError: on purpose"):
        sweep(digits, "params=0.5,0.3", runner=failing)


def test_all_or_none_are_evaluated_on_request(digits):
    assert sweep(digits, "params=0.5,0.4,0.3", "all").evaluated == 3
    assert all(p.objective is None for p in sweep(digits, "params=0.5,0.4,0.3", "none").points)
    with pytest.raises(RankoptError, match="choose from knees, all, none"):
        sweep(digits, "params=0.5,0.3", "some")
    with pytest.raises(BudgetError, match="least achievable"):
        sweep(digits, "params=0.01,0.005")


def test_the_command(tmp_path, quick_space):
    out = tmp_path / "front"
    command = ("sweep", "digits", "--space", quick_space, "--out", out, "--budgets")
    stdout, _ = run(*command, "params=0.6:0.04:5")
    assert "infeasible" in stdout and "knee" in stdout and max(map(len, stdout.splitlines()[:-2])) <= 100
    assert {p.name for p in out.iterdir()} == {"sweep.csv", "sweep.png"}
    assert "is not empty" in run(*command, "params=0.6:0.04:5", code=2)[1]
    assert "least achievable" in run(*command[:-3], "--budgets", "params=0.01,0.02", code=2)[1]
    assert "not understood" in run(*command[:-3], "--budgets", "params=0.6:0.04", code=2)[1]


def test_a_sweep_that_was_stopped_goes_on_with_the_same_command(tmp_path, quick_space):
    """Of a killed one, Ray's logs, a half-written file and the picture may be there; the table comes last."""
    out = tmp_path / "front"
    (out / "logs").mkdir(parents=True)
    (out / "logs" / "worker-1.err").write_text("killed")
    (out / "sweep.png").write_bytes(b"")
    (out / ".sweep.csv.abc.part").write_text("budg")
    command = ("sweep", "digits", "--space", quick_space, "--out", out, "--budgets", "params=0.5", "--evaluate", "none")
    with folder_lock(out):
        assert "another process is at work" in run(*command, code=2)[1]
    run(*command)
    assert (out / "sweep.csv").read_text().count("params=0.5") == 1 and (out / "sweep.png").stat().st_size
    assert "--resume" not in run(*command, code=2)[1]
