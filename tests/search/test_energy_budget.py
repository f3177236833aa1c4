"""A budget on energy goes the way of one on latency: measured costs, a table, a check on the rebuilt model."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from rankopt.candidates import instruments
from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.prepare import prepare
from rankopt.core.errors import RankoptError
from rankopt.core.records import BUDGETS
from rankopt.core.run_folder import read_result
from rankopt.model.energy import NotHereError
from rankopt.report.html import write_report
from rankopt.search.compress import run_search
from rankopt.search.latency_check import tightened_problem
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import read_trials
from tests.helpers.command import run as command
from tests.helpers.latency import POWER, SPACE, Net, make_task, modelled_pass, use_modelled_energy, use_modelled_times


@pytest.fixture(scope="module", autouse=True)
def _modelled(_cache):
    with pytest.MonkeyPatch.context() as patch:
        use_modelled_times(patch)
        use_modelled_energy(patch)
        yield


@pytest.fixture(scope="module")
def prepared(_modelled):
    return prepare(make_task(), SPACE, workers=1, budget={"latency": 0.9, "energy": 0.9})


def test_layers_candidates_and_the_model_have_energies(prepared):
    energies, latencies = prepared.measured["energy"], prepared.latencies
    assert prepared.dense.energy == energies.dense == pytest.approx(POWER * latencies.dense, rel=1e-3)
    problem = prepared.problem({"energy": 0.9})
    for layer, frontier in zip(problem.layers, problem.frontiers, strict=True):
        assert all(0 < c.cost.energy <= layer.cost.energy for c in frontier)
    # few ranks are measured, the others lie between them
    assert all(len(e) <= 1 + 4 * len(SPACE.families) for e in energies.entries.values())


def test_the_budget_is_kept_on_the_rebuilt_model(prepared, tmp_path):
    result = run_search(prepared, prepared.problem({"energy": 0.7}), SearchSettings(), tmp_path)
    found = result.info["energy_budget"]
    assert found["met"] and found["low"] <= found["energy"] <= found["high"] <= found["target"]
    dense, small = (
        POWER * modelled_pass(m, prepared.task.example_input, Conditions()).ns
        for m in (prepared.task.model, result.model)
    )
    assert found["energy"] == pytest.approx(small, rel=0.01) and small < 0.7 * dense
    assert "latency" not in result.info
    assert result.plan.cost.energy == found["energy"] == result.info["budget"]["energy"]["achieved"]
    assert found["layers"].keys() == {c.name for c in result.plan.choices if c.method != "dense"}
    assert all(x["energy"] < x["dense"] for x in found["layers"].values())
    costs = {t["cost"][BUDGETS.index("energy")] for t in read_trials(tmp_path)}
    assert found["predicted"] in costs and min(costs) > 0
    assert "energy measured on the rebuilt model: " in result.summary() and " mJ for one example" in result.summary()
    assert "nergy measured on the rebuilt model" in write_report(tmp_path).read_text()
    assert read_result(tmp_path)["energy_budget"] == found


def test_limits_on_both_are_checked_and_the_missed_one_is_tightened(prepared, monkeypatch):
    from rankopt.search import compress as job

    real, seen = job.check, []

    def check(prepared, limit, problem, proposal):
        found = real(prepared, limit, problem, proposal)
        if limit.metric == "energy":
            seen.append({x.metric: x.target for x in problem.limits})
            if len(seen) == 1:
                high = round(1.05 * limit.target)
                found = dataclasses.replace(found, measured=dataclasses.replace(found.measured, high=high), layers={})
        return found

    monkeypatch.setattr(job, "check", check)
    problem = prepared.problem({"latency": 0.85, "energy": 0.7})
    result = run_search(prepared, problem, SearchSettings())
    assert result.info["latency"]["met"] and result.info["energy_budget"]["met"]
    assert result.info["latency"]["attempts"] == result.info["energy_budget"]["attempts"] >= 2
    assert seen[1]["energy"] < seen[0]["energy"] and seen[1]["latency"] == seen[0]["latency"]
    assert result.info["budget"]["energy"]["target"] == seen[0]["energy"]


def test_a_layer_that_takes_more_energy_is_given_up(prepared):
    from rankopt.candidates.latency_table import Timing
    from rankopt.core.budget import Limit
    from rankopt.search.latency_check import Check, Measured

    problem = prepared.problem({"energy": 0.8})
    name = problem.layers[1].name
    limit = Limit("energy", 0.8, problem.limits[0].target)
    failed = Check(limit, 1, Measured(2, 1, 1, 1, 40), {name: (Timing(100, 0.0), Timing(150, 0.0))})
    changed = tightened_problem(problem, failed, tuple(0 for _ in problem.layers))
    assert failed.slower == [name] and changed.frontiers[1][0].cost.energy > problem.dense.energy


@pytest.mark.slow
def test_the_commands_measure_search_and_measure_again(tmp_path):
    """hardware --energy, search with an energy budget and that table, also as another machine's, apply --check."""
    source = f"import torch\nfrom torch import nn\nfrom rankopt import Task\n\n{inspect.getsource(Net)}\n\n"
    (tmp_path / "mine.py").write_text(source + inspect.getsource(make_task))
    (tmp_path / "fast.toml").write_text('families = ["svd_out"]\npoints = 4\nsteps = 0\n')
    task, space, path = tmp_path / "mine.py:make_task", ("--space", tmp_path / "fast.toml"), tmp_path / "table.json"
    where = ("--latency-on", f"cpu,batch=2,table={path}")
    command("hardware", task, *space, "--on", "cpu,batch=2", "--out", path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"machine": "a server"}))
    search = ("search", task, "--budget", "energy=0.8", *where, *space, "--no-html")
    _, stderr = command(*search, "--out", tmp_path / "none", code=2)
    assert "holds no energies of this model's layers on a server: there, run rankopt hardware TASK --on" in stderr
    assert "--energy --out table.json" in stderr
    path.write_text(json.dumps(content))
    stdout, _ = command("hardware", task, *space, "--on", "cpu,batch=2", "--energy", "--out", path)
    assert "latency on cpu" in stdout and "energy on cpu" in stdout and "mJ" in stdout
    stdout, _ = command(*search, "--out", tmp_path / "run")
    assert "energy measured on the rebuilt model" in stdout
    stdout, _ = command("apply", tmp_path / "run", "--task", task, "--check")
    assert "energy measured again" in stdout and "latency measured again" not in stdout
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "a server"}))
    stdout, _ = command(*search, "--out", tmp_path / "elsewhere")
    assert "energy from a table measured on cpu,batch=2" in " ".join(stdout.split())


def test_without_a_counter_it_is_refused_before_anything_is_fitted(monkeypatch):
    def none(gpu):
        raise NotHereError("no RAPL counter of a CPU package")

    def never(*args, **kwargs):
        raise AssertionError("fitted")

    monkeypatch.setattr(instruments, "open_meter", none)
    monkeypatch.setattr("rankopt.candidates.prepare.fit_candidates", never)
    with pytest.raises(RankoptError, match="energy cannot be measured here, nor be a budget: no RAPL counter"):
        prepare(make_task(), SPACE, workers=1, budget={"energy": 0.7})
