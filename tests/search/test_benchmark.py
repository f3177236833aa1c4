"""Benchmarks: equal numbers of evaluations, every plan measured once, nothing repeated after a stop, correct ranks."""

from __future__ import annotations

import csv
import dataclasses
import json
from statistics import fmean, median

import pytest

import rankopt.search.benchmark as benchmarks
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.run_folder import folder_lock
from rankopt.report.benchmark import against, overall, problem_rows, text, verdict, write
from rankopt.search.benchmark import FILE, benchmark, curve, ranks, read_strategies, results
from rankopt.search.loop import plan_key, search
from rankopt.strategies.baselines import Random
from rankopt.strategies.registry import STRATEGIES
from tests.helpers.command import run

BUDGETS, NAMES = ["params=0.3", "params=0.4,macs=0.5"], ["knapsack", "uniform", "random", "optuna"]


class Counting:
    """A function of models that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, model):
        self.calls += 1
        return self.function(model)


@pytest.fixture
def counted(digits):
    """digits whose objective and test score count their calls."""
    task = dataclasses.replace(digits.task, test=Counting(digits.task.test), score=Counting(digits.task.score))
    return dataclasses.replace(digits, objective=Counting(digits.objective), task=task)


@pytest.fixture(scope="module")
def data(digits):
    return benchmark(digits, BUDGETS, NAMES, trials=4, seeds=3)


def plans(digits, data):
    """Every evaluated plan as its candidates."""
    for cell in data["cells"]:
        problem = digits.problem(cell["budget"].split(","))
        yield from ([(c.method, c.rank) for c in problem.candidates(t["proposal"])] for t in cell["trials"])


def test_every_strategy_has_as_many_evaluations_and_stays_within_the_budgets(digits, data):
    assert [(c["seed"], c["budget"], c["strategy"]) for c in data["cells"]] == [
        (s, b, n) for s in range(3) for b in BUDGETS for n in NAMES
    ]
    for cell in data["cells"]:
        assert len(cell["trials"]) == (1 if cell["strategy"] in ("knapsack", "uniform") else 4)
        problem = digits.problem(cell["budget"].split(","))
        assert all(problem.fits(t["proposal"]) and t["error"] is None for t in cell["trials"])
        assert len({tuple(t["proposal"]) for t in cell["trials"]}) == len(cell["trials"])
        evaluation = sum(t["seconds"] for t in cell["trials"])
        assert cell["seconds"]["evaluation"] == pytest.approx(evaluation, abs=1e-3) and evaluation > 0


@pytest.mark.slow
def test_another_runner_evaluates_what_is_not_known_and_finds_the_same(digits, data):
    evaluated = []

    def runner(study, evaluate):
        def noted(proposal):
            evaluated.append(plan_key(study.problem, proposal))
            return evaluate(proposal)

        return search(study, noted)

    again = benchmark(digits, BUDGETS, NAMES, trials=4, seeds=3, runner=runner)
    for cell, expected in zip(again["cells"], data["cells"], strict=True):
        keys = ("proposal", "objective", "repeated")
        assert [[t[k] for k in keys] for t in cell["trials"]] == [[t[k] for k in keys] for t in expected["trials"]]
    new = [t for c in again["cells"] if c["copied_from"] is None for t in c["trials"] if not t["repeated"]]
    assert len(evaluated) == len(set(evaluated)) == len(new)


@pytest.mark.slow
def test_a_plan_is_measured_once_and_the_best_ones_tested_once(digits, counted, tmp_path):
    names = [n.replace("knapsack", "knapsack:contenders=1") for n in NAMES]  # else it measures plans of its own
    found = benchmark(counted, BUDGETS, names, trials=4, seeds=2, out=tmp_path)
    distinct = {str(p) for p in plans(digits, found)}
    assert counted.objective.calls == len(distinct) < sum(len(c["trials"]) for c in found["cells"])
    assert counted.task.score.calls == 1  # the dense model, by which a benchmark that goes on is recognised
    best = {(s["budget"], str(s["proposal"])) for s in found["scores"]}
    assert counted.task.test.calls == len(best) + 1  # the dense model
    before = counted.objective.calls, counted.task.test.calls
    again = benchmark(counted, BUDGETS, names, trials=4, seeds=2, out=tmp_path, resume=True)
    assert (counted.objective.calls, counted.task.test.calls) == before
    assert json.dumps(again) == json.dumps(found)


def test_seeds_that_do_not_matter_are_said(data):
    copied = {(c["strategy"], c["seed"]) for c in data["cells"] if c["copied_from"] is not None}
    assert copied == {("knapsack", 2), ("uniform", 2)}
    assert "The seed does not matter to knapsack, uniform" in " ".join(text(data).split())


def test_ranks_and_curves(data):
    cell = {"trials": [{"objective": x} for x in (None, 3.0, 5.0, 2.0)]}
    assert curve(cell, 6) == [float("inf"), 3.0, 3.0, 2.0, 2.0, 2.0]
    found = ranks(data)
    groups = len(BUDGETS) * 3
    assert all(len(r) == groups for r in found.values())
    assert sum(map(sum, found.values())) == pytest.approx(groups * sum(range(1, len(NAMES) + 1)))
    for i, (seed, budget) in enumerate((s, b) for b in BUDGETS for s in range(3)):
        ends = {c["strategy"]: min(t["objective"] for t in c["trials"]) for c in data["cells"]
                if (c["seed"], c["budget"]) == (seed, budget)}  # fmt: skip
        for name in NAMES:
            lower, equal = (sum(f(v, ends[name]) for v in ends.values()) for f in (float.__lt__, float.__eq__))
            assert found[name][i] == lower + (equal + 1) / 2
    assert [float(row[1].split()[0]) for row in overall(data)] == sorted(round(fmean(r), 2) for r in found.values())
    pairs = zip(found["optuna"], found["knapsack"], strict=True)
    assert all(a <= b for a, b in pairs), "optuna's first trial is knapsack's plan"


def test_the_tables_the_csv_and_the_picture(data, tmp_path):
    write(tmp_path, data)
    assert {p.name for p in tmp_path.iterdir()} == {
        "benchmark.md",
        "benchmark.csv",
        "benchmark.png",
        "benchmark_ranks.png",
    }
    assert max(map(len, text(data).splitlines())) <= 100
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").open()))
    assert len(rows) == sum(len(c["trials"]) for c in data["cells"])
    for budget in BUDGETS:
        shown = {row[0]: row for row in problem_rows(data, budget)}
        for name in NAMES:
            mine = [r for r in rows if (r["budget"], r["strategy"]) == (budget, name)]
            ends = [min(float(r["objective"]) for r in mine if r["seed"] == s) for s in "012"]
            assert shown[name][1] == f"{median(ends):.4g}"
            assert shown[name][2] == f"{min(ends):.4g} to {max(ends):.4g}"
            assert all(float(r["best_so_far"]) <= float(r["objective"]) for r in mine)
    page = (tmp_path / "benchmark.md").read_text()
    assert all(f"| {name} |" in page for name in NAMES) and "![best objective so far](benchmark.png)" in page
    assert "(benchmark_ranks.png)" in page and "## Paired with knapsack" in page


def test_what_loses_to_the_exact_allocation_is_said(data):
    means = {name: fmean(r) for name, r in ranks(data).items()}
    behind = sorted((n for n in NAMES if means[n] > means["knapsack"]), key=means.__getitem__)
    assert f"Behind knapsack, which takes one evaluation: {', '.join(behind)}." in verdict(data)[1]
    ends = results(data)
    for name, counts, p, adjusted in against(data, "knapsack"):
        pairs = list(zip(ends[name], ends["knapsack"], strict=True))
        found = [sum(a < b for a, b in pairs), sum(a == b for a, b in pairs), sum(a > b for a, b in pairs)]
        assert counts == " / ".join(map(str, found)) and 0 < float(p) <= float(adjusted) <= 1


@pytest.mark.slow
def test_a_stopped_benchmark_goes_on_where_it_was(digits, data, tmp_path):
    seen = []

    def stop(cell):
        seen.append(cell)
        if len(seen) == 5:
            raise KeyboardInterrupt

    arguments = (digits, BUDGETS, NAMES, 4, 3, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        benchmark(*arguments, report=stop)
    kept = json.loads((tmp_path / FILE).read_text())["cells"]
    assert kept == seen
    resumed = []
    found = benchmark(*arguments, resume=True, report=resumed.append)
    assert found["cells"][:5] == kept and found["cells"][5:] == resumed
    assert json.loads((tmp_path / FILE).read_text()) == json.loads(json.dumps(found))

    def bare(cells):  # without what the clock says
        return [[(t["proposal"], t["objective"], t["repeated"]) for t in c["trials"]] for c in cells]

    assert bare(found["cells"]) == bare(data["cells"])
    with pytest.raises(StudyError, match="trials 4, asked is 5"):
        benchmark(digits, BUDGETS, NAMES, 5, 3, tmp_path, resume=True)
    added = benchmark(digits, BUDGETS[:1], ["energy"], 4, 1, tmp_path, resume=True)
    assert [(c["strategy"], c["seed"], c["budget"]) for c in added["cells"][len(found["cells"]) :]] == [
        ("energy", s, b) for s in range(3) for b in BUDGETS
    ]
    (tmp_path / FILE).write_text('{"half": ')
    with pytest.raises(StudyError, match="damaged"):
        benchmark(*arguments, resume=True)


class Looking(Random):
    """Looks at the model first; fails while `broken`."""

    broken = True

    def measure(self, prepared, progress):
        if self.broken:
            raise RuntimeError("no gradients here")
        prepared.objective(prepared.task.model)


def test_a_strategy_that_fails_is_named_and_run_again(counted, tmp_path, monkeypatch):
    monkeypatch.setitem(STRATEGIES.built_in, "looking", Looking)
    arguments = (counted, ["params=0.3"], ["looking", "random"], 2, 1, tmp_path)
    found = benchmark(*arguments)
    assert found["cells"][0]["error"] == "RuntimeError: no gradients here" and not found["cells"][0]["trials"]
    assert "FAILED params=0.3 looking seed 0: RuntimeError" in text(found)
    assert ranks(found) == {"looking": [2.0], "random": [1.0]}
    write(tmp_path, found)
    monkeypatch.setattr(Looking, "broken", False)
    calls = counted.objective.calls
    found = benchmark(*arguments, resume=True)
    assert found["cells"][0]["error"] is None and len(found["cells"][0]["trials"]) == 2
    assert counted.objective.calls == calls + 1, "measure() looked once; random's plans were known"
    assert found["cells"][0]["seconds"]["measure"] > 0


def test_a_model_that_fails_fails_for_all(digits, tmp_path):
    def broken(model):
        raise ValueError("out of memory")

    found = benchmark(dataclasses.replace(digits, objective=broken), ["params=0.3"], ["knapsack", "random"], 3, 1)
    assert all("out of memory" in c["error"] for c in found["cells"]) and found["scores"] == []
    assert ranks(found) == {"knapsack": [1.5], "random": [1.5]}
    write(tmp_path, found)


def test_a_plan_that_failed_is_tried_again(digits, tmp_path):
    left = [False, True, True]  # whether an evaluation runs out of memory

    def flaky(model):
        if left and left.pop():
            raise MemoryError("for now")
        return digits.objective(model)

    arguments = (dataclasses.replace(digits, objective=flaky), ["params=0.3"], ["random"], 2, 1, tmp_path)
    found = benchmark(*arguments)
    assert [t["error"] for t in found["cells"][0]["trials"]] == [
        "TaskError: the objective raised MemoryError: for now"
    ] * 2
    found = benchmark(*arguments, resume=True)
    assert found["cells"][0]["error"] is None
    assert all(t["error"] is None and t["objective"] > 0 for t in found["cells"][0]["trials"])
    with pytest.raises(StudyError, match="is not empty"):
        benchmark(*arguments)


def test_names_of_strategies():
    assert read_strategies("all") == [*STRATEGIES, "optuna:parametrisation=joint"]
    assert read_strategies("random, knapsack,random") == ["random", "knapsack"]
    for bad, message in [("magic", "unknown strategy"), ("random:x=1", "has no option"), (" , ", "no strategies")]:
        with pytest.raises(RankoptError, match=message):
            read_strategies(bad)
    assert benchmarks.read_strategy("random") == ("random", {})


def test_the_command(tmp_path, quick_space):
    out = tmp_path / "b"
    command = ("benchmark", "digits", "--space", quick_space, "--out", out, "--budget", "params=0.3")
    command += ("--strategies", "knapsack,random", "--trials", 2)
    stdout, stderr = run(*command, "--seeds", 1)
    assert "mean rank" in stdout and "params=0.3 random seed 0: best objective" in stderr
    assert max(map(len, stdout.splitlines()[:-1])) <= 100
    files = {f"benchmark.{x}" for x in ("json", "md", "csv", "png")}
    assert {p.name for p in out.iterdir()} == files | {"benchmark_ranks.png"}
    assert "is not empty" in run(*command, "--seeds", 1, code=2)[1]
    _, stderr = run(*command, "--seeds", 2, "--resume")
    assert "seed 1" in stderr and "seed 0" not in stderr
    assert "unknown strategy" in run(*command[:-3], "magic", code=2)[1]
    assert "give 1 or more" in run(*command, "--seeds", 0, "--resume", code=2)[1]


def test_two_benchmarks_do_not_write_into_one_folder(tmp_path, quick_space):
    command = ("benchmark", "digits", "--space", quick_space, "--budget", "params=0.5", "--strategies", "uniform")
    (out := tmp_path / "out").mkdir()
    with folder_lock(out):
        said = run(*command, "--out", out, code=2)[1]
    assert "another process is at work" in said and not list(out.iterdir())
