"""Recalibrated batch norms: the map that they then compute, and that it is kept only where it helps."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.training.batch_norm import POWER, recalibrate


def test_an_affine_change_before_a_batch_norm_is_half_undone():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    dense[1].running_mean.normal_()
    dense[1].running_var.uniform_(0.5, 2)
    x = torch.randn(192, 3, 8, 8)
    small = copy.deepcopy(dense)
    small[0].weight.data *= 0.7
    small[0].bias.data += 0.3
    assert recalibrate(dense, small, x)
    y = dense[0](x)
    mean = y.mean((0, 2, 3), keepdim=True)
    halfway = dense[1]((y - mean) * 0.7 ** (1 - 2 * POWER) + mean)
    torch.testing.assert_close(small(x), halfway, rtol=1e-3, atol=1e-3)


def test_nothing_moves_where_nothing_changed():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(50, 4)
    small = copy.deepcopy(dense)
    recalibrate(dense, small, x)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_models_without_batch_norms_are_left_alone():
    assert not recalibrate(nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(1, 2))


def test_the_job_keeps_it_only_if_the_objective_falls(digits):
    result = run_search(digits, digits.problem({"params": 0.12}), SearchSettings(refine=True))
    change = result.info["batch_norm"]
    assert run_search(digits, digits.problem({"params": 0.12}), SearchSettings()).info["batch_norm"] is None
    assert change["kept"] == (change["after"] < change["before"])
    best = change["after"] if change["kept"] else change["before"]
    assert abs(digits.objective(result.model) - best) < 1e-6
    assert "batch_norm" in result.info["seconds"]
