"""Budgets on memory and on the size of the file: plans stay below the bounds, counted again on the rebuilt model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates.pareto import frontier
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.budget import Limit
from rankopt.core.errors import BudgetError
from rankopt.core.problem import Problem
from rankopt.core.records import Candidate, Cost, Layer, Task
from rankopt.decompositions.plan import assemble
from rankopt.model.memory import file_size, peak_memory
from rankopt.strategies.allocation import allocate

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
def test_a_plan_costs_what_its_model_takes(prepared, seed):
    """Whatever is chosen: the peak and the file are the plan's cost; the sum over layers is close to both."""
    problem = prepared.problem({"memory": 0.999, "disk": 0.999})
    generator = torch.Generator().manual_seed(seed)
    proposal = tuple(int(torch.randint(len(f), (), generator=generator)) for f in problem.frontiers)
    model, cost = prepared.apply(problem, proposal), problem.cost(proposal)
    assert (cost.disk, cost.memory) == (file_size(model), peak_memory(model, prepared.task.example_input))
    total = problem.sum(proposal)
    assert cost.disk <= total.disk <= cost.disk + 2000 and cost.memory <= total.memory <= cost.memory + 5000


def test_exactly_the_candidates_that_would_raise_the_peak_cost_more_than_their_weights(prepared):
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
            (priced,) = (x for x in offered[layer.name] if (x.rank, x.form) == (c.rank, c.form))
            assert raises == (priced.cost.memory > priced.cost.bytes)
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


@pytest.mark.parametrize("share", [0.3, 0.5])
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


def test_the_least_does_not_depend_on_errors_or_on_what_else_is_limited():
    """What a refusal states before anything is fitted, when all errors are unknown, can be asked for alone."""
    layer = Layer("a", "Linear", (8, 8), cost=Cost(64, 64, 256, memory=256, disk=400))

    def offered(errors):
        sizes = (("svd_in", 100, 300), ("svd_out", 100, 200), ("tt", 150, 100))
        return [
            Candidate(m, (1,), Cost(30, 30, 120, memory=memory, disk=disk), error)
            for (m, memory, disk), error in zip(sizes, errors, strict=True)
        ]

    def least(errors, metrics):
        found = frontier(layer, offered(errors), metrics)
        limits = tuple(Limit(m, 1.0, 400) for m in metrics)
        counted = {"svd_in": 90, "svd_out": 130, "tt": 150, "dense": 260}
        problem = Problem(
            (layer,), (found,), layer.cost, limits, (), lambda c: dict.fromkeys(metrics, counted[c[0].method])
        )
        return found, problem.least

    for errors in ((0.0, 0.0, 0.0), (0.5, 0.1, 0.3), (0.1, 0.5, 0.2)):
        for metrics in (("memory",), ("memory", "disk"), ("params", "memory")):
            found, lowest = least(errors, metrics)
            assert lowest[metrics.index("memory")] == 90
            assert any(c.unchanged for c in found), "the dense layer, which keeps a composite whole"


def test_what_is_cheapest_in_bytes_is_quantized_though_it_is_not_on_the_frontier_of_params(_cache):
    """int8 has a scale for each row: of two candidates with equal parameters, one may take fewer bytes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    x = torch.randn(64, 24)
    space = SearchSpace(families=("svd_out", "svd_in", "tt_matrix"), points=3, steps=0, precisions=("same", "int8"))
    with pytest.raises(BudgetError) as refused:
        rankopt.compress(model, [x], {"bytes": "100B"}, space=space)
    least = int(re.search(r"Give bytes=(\d+) or more", str(refused.value))[1])
    result = rankopt.compress(model, [x], {"bytes": least}, space=space)
    assert result.info["cost"]["compressed"]["bytes"] == least


class Last(nn.Module):
    """The mean of a recurrent layer's or an encoder's outputs."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 5)

    def forward(self, x):
        y = self.inner(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


COMPOSITES = {
    "lstm": lambda: Last(nn.LSTM(16, 16, batch_first=True), 16),
    "gru": lambda: Last(nn.GRU(16, 8, batch_first=True, bidirectional=True), 16),
    "encoder": lambda: Last(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 16),
}


@pytest.mark.parametrize("metric", ["disk", "memory"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_meet_every_budget_and_the_least_that_is_stated(name, metric, _cache):
    torch.manual_seed(0)
    x = torch.randn(32, 6, 16)
    space = SearchSpace(families=("svd_out", "tt_matrix"), points=4, steps=0)
    prepared = prepare(Task(COMPOSITES[name]().eval(), x[:1], [x]), space, workers=1, budget={metric: 1.0})
    (least,) = prepared.problem({metric: 1.0}).least
    assert least < 0.7 * prepared.dense[metric]
    for target in (least, *(int(s * prepared.dense[metric]) for s in (0.7, 0.95))):
        problem = prepared.problem({metric: target})
        proposal = allocate(problem).proposal
        model, cost = prepared.apply(problem, proposal), problem.cost(proposal)
        assert (cost.disk, cost.memory) == (file_size(model), peak_memory(model, x[:1]))
        assert cost[metric] <= target
    with pytest.raises(BudgetError, match=f"Give {metric}={least} or more"):
        prepared.problem({metric: least - 1})
