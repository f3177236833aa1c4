"""Refinement: the weight that it fits, and that it helps where a plan is tight."""

from __future__ import annotations

import torch
from torch import nn

from rankopt import count
from rankopt.model.inventory import inventory
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.training.refine import seen_weight


def test_a_layer_with_unchanged_inputs_keeps_its_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, stride=2))
    x = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    for layer in inventory(model, x[0]):
        weight, _ = seen_weight(model, model, layer, x)
        torch.testing.assert_close(weight, model.get_submodule(layer.name).weight, rtol=1e-3, atol=1e-4)


def test_a_layer_makes_up_for_a_loss_before_it():
    """Where the layer before is replaced by an invertible map of it, the seen weight undoes that map."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 4).double()
    nn.init.orthogonal_(first.weight)
    spoilt = nn.Linear(5, 5, bias=False).double()
    mix = torch.eye(5, dtype=torch.float64) + 0.1 * torch.randn(5, 5, dtype=torch.float64)
    spoilt.weight.data = mix @ first.weight.data
    dense, small = nn.Sequential(first, second), nn.Sequential(spoilt, second)
    x = torch.randn(500, 5, dtype=torch.float64)
    layer = next(x for x in inventory(dense, x) if x.name == "1")
    weight, _ = seen_weight(dense, small, layer, [x])
    out = nn.functional.linear(spoilt(x), weight, second.bias)
    assert ((out - dense(x)).norm() / dense(x).norm()).item() < 0.01


def test_refining_lowers_the_objective_at_the_same_cost(digits):
    problem = digits.problem({"params": 0.12})
    plain = run_search(digits, problem, SearchSettings())
    refined = run_search(digits, problem, SearchSettings(refine=True))
    objective = refined.info["refinement"]
    assert objective["kept"] and objective["after"] < 0.9 * objective["before"]
    assert plain.info["refinement"] is None and plain.plan == refined.plan
    example = digits.task.example_input
    assert count(refined.model, example) == count(plain.model, example)
    assert "refinement" in refined.info["seconds"]
    assert digits.objective(refined.model) < digits.objective(plain.model)
