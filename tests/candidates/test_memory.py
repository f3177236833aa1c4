"""Budgets on memory and on the size of the file: plans stay below the bounds, counted again on the rebuilt model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import BudgetError
from rankopt.core.records import Task
from rankopt.decompositions.plan import assemble
from rankopt.model.memory import file_size, peak_memory

SPACE = SearchSpace(families=("svd_out", "cp", "tucker2"), points=5, steps=0, precisions=("same", "int8"))


class Residual(nn.Module):
    """Two convolutions beside which their input lives on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.third, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x):
        x = self.first(x).relu()
        x = x + self.third(self.second(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def prepared(_cache):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 10)
    task = Task(Residual().eval(), x[:1], x.split(8), name="residual")
    return prepare(task, SPACE, workers=1, budget={"memory": 0.9, "disk": 0.9})


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_takes_more_than_its_cost(prepared, seed):
    """Whatever is chosen: the peak and the file are within the sum, which is close to them."""
    problem = prepared.problem({"memory": 0.999, "disk": 0.999})
    generator = torch.Generator().manual_seed(seed)
    proposal = tuple(int(torch.randint(len(f), (), generator=generator)) for f in problem.frontiers)
    model, cost = prepared.apply(problem, proposal), problem.cost(proposal)
    assert file_size(model) <= cost.disk <= file_size(model) + 2000
    assert peak_memory(model, prepared.task.example_input) <= cost.memory


def test_exactly_the_candidates_that_would_raise_the_peak_are_not_offered(prepared):
    """CP at a large rank holds more maps between its stages than the layer has before and after."""
    task = prepared.task
    space = SearchSpace(families=("cp",), points=8, steps=0)
    offered = prepare(task, space, workers=1, budget={"memory": 0.95}).candidates
    every = prepare(task, space, workers=1)
    peak = peak_memory(task.model, task.example_input) - every.dense.bytes
    raising = 0
    for layer in every.free:
        for c in every.candidates[layer.name]:
            small = assemble(task.model, [layer], [c], lambda new, _: new)
            raises = (
                peak_memory(small, task.example_input) - (every.dense.bytes - layer.cost.bytes + c.cost.bytes) > peak
            )
            assert raises == ((c.rank, c.form) not in [(x.rank, x.form) for x in offered[layer.name]])
            raising += raises
    assert 0 < raising < sum(map(len, every.candidates.values()))


@pytest.mark.parametrize("metric", ["memory", "disk"])
def test_the_budget_is_kept_and_reported(prepared, metric, tmp_path):
    task = prepared.task
    result = rankopt.compress(
        task.model, task.calibration, {metric: 0.8}, example_input=task.example_input, space=SPACE
    )
    count = {"memory": peak_memory(result.model, task.example_input), "disk": file_size(result.model)}
    told = result.info["budget"][metric]
    assert told["achieved"] == count[metric] <= told["target"] < told["dense"]
    result.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == count["disk"]
    assert rankopt.read_plan(tmp_path)[0].cost[metric] == count[metric]


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_the_file_of_a_model_whose_composites_are_expanded_keeps_its_budget(share):
    """Each part of a fused Linear has entries of its own in the file, also those that stay dense."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.head = nn.Linear(24, 72), nn.Linear(72, 36), nn.Linear(36, 8)

        def forward(self, x):
            return self.head(self.proj(self.qkv(x).tanh()).tanh())

    torch.manual_seed(0)
    space = SearchSpace(families=("svd_out",), points=12, steps=0)
    result = rankopt.compress(Fused().eval(), [torch.randn(256, 24)], {"disk": share}, space=space)
    told = result.info["budget"]["disk"]
    assert told["achieved"] == file_size(result.model) <= told["target"]
    assert any(c.name.startswith("qkv.") and c.method != "dense" for c in result.plan.choices)


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_possible(prepared):
    task = prepared.task
    with pytest.raises(BudgetError, match="least achievable"):
        rankopt.compress(task.model, task.calibration, {"memory": "1KB"}, example_input=task.example_input, space=SPACE)
    with pytest.raises(BudgetError, match="was not measured here"):
        prepare(task, SPACE, workers=1).problem({"disk": 0.5})
