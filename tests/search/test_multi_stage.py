"""Multi-stage compression on the digits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.core.records import Task
from rankopt.decompositions.plan import load, multiplied_out
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.model.memory import file_size, peak_memory
from rankopt.search.multi_stage import run_multi_stage
from rankopt.search.settings import SearchSettings
from tests.helpers.spaces import QUICK

ROUNDS = dataclasses.replace(QUICK, name="rounds", rounds=2, round_steps=20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    task, out = load_task("digits"), tmp_path_factory.mktemp("rounds")
    return task, out, run_multi_stage(task, ROUNDS, {"params": 0.15}, SearchSettings(), out, workers=1)


def test_stages_go_down_to_the_budget_and_training_helps(finished):
    task, out, result = finished
    dense = count(task.model, task.example_input).params
    first, last = result.info["rounds"]
    assert last["budget"]["params"] < first["budget"]["params"] < dense
    assert first["budget"]["params"] == pytest.approx((dense * last["budget"]["params"]) ** 0.5, abs=1)
    assert count(result.model, task.example_input).params <= last["budget"]["params"]
    assert first["objective_after_training"] <= first["objective"]  # training is kept where it helps
    assert last["objective_after_training"] < 0.7 * last["objective"]
    assert result.info["score"]["dense"]["test"] == pytest.approx(task.test(task.model))
    assert result.info["score"]["compressed"]["test"] == pytest.approx(task.test(result.model))
    assert json.loads((out / "result.json").read_text())["rounds"] == result.info["rounds"]


def test_results_load_and_finished_stages_are_not_repeated(finished):
    task, out, result = finished
    with torch.no_grad():
        torch.testing.assert_close(load(task.model, out)(task.example_input), result.model(task.example_input))
    before = (out / "round-1" / "result.json").stat().st_mtime_ns
    again = run_multi_stage(task, ROUNDS, {"params": 0.15}, SearchSettings(resume=True), out, workers=1)
    assert (out / "round-1" / "result.json").stat().st_mtime_ns == before
    assert [c.rank for c in again.plan.choices] == [c.rank for c in result.plan.choices]


def test_multiplying_out_keeps_the_function_and_the_dense_model(finished):
    task, _, result = finished
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    model = multiplied_out(task.model, result.model)
    with torch.no_grad():
        x = task.example_input
        torch.testing.assert_close(model.eval()(x), result.model.eval()(x), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())


def test_bad_schedules_and_budgets_are_refused_at_once():
    with pytest.raises(RankoptError, match="rounds is 1 or more"):
        SearchSpace(name="x", rounds=0)
    with pytest.raises(BudgetError, match="cannot be met"):
        run_multi_stage(load_task("digits"), ROUNDS, {"params": 0.001}, SearchSettings())


@pytest.mark.parametrize("metric", ["memory", "disk"])
def test_a_budget_of_memory_or_disk_goes_down_in_stages_too(metric, tmp_path):
    from torch import nn

    torch.manual_seed(0)
    x = torch.randn(64, 24)
    task = Task(nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 8)).eval(), x[:1], [x])
    space = SearchSpace(families=("svd_out",), points=6, steps=0, rounds=2, round_steps=2)
    result = run_multi_stage(task, space, {metric: 0.6}, SearchSettings(), tmp_path, workers=1)
    first, last = result.info["rounds"]
    dense = {"memory": peak_memory, "disk": lambda model, _: file_size(model)}[metric](task.model, x[:1])
    assert last["budget"][metric] == int(0.6 * dense + 1e-9) < first["budget"][metric] < dense
    found = {"memory": peak_memory, "disk": lambda model, _: file_size(model)}[metric](result.model, x[:1])
    assert found <= last["budget"][metric]


def test_a_budget_of_latency_does_not_go_with_stages():
    from rankopt.search.job import Job

    with pytest.raises(RankoptError, match="a budget of latency"):
        Job.parse({"latency": 0.5}, space=ROUNDS)
