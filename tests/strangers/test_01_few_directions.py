"""Kind 1: statistics without full rank, where "errors" were negative and weights exploded without a warning."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankopt
from rankopt.candidates.input_moments import shrunk
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.core.records import Task
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from tests.strangers.models import SPACE, compress, example_batch

X = example_batch()


def blind() -> nn.Module:
    """Its second layer always sees the same vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    nn.init.zeros_(model[0].weight)
    return model


def test_weights_do_not_explode_where_nothing_was_seen():
    model = blind()
    space = rankopt.SearchSpace(families=("tt",), points=4, steps=50, keep_dense=("0",))
    result = compress(model, [torch.randn(64, 32)], space, params=1326)
    assert result.plan.choices[1].error >= 0
    assert result.model[1].weight.norm() < 4 * model[1].weight.norm()


@pytest.mark.parametrize("family", [name for name in DECOMPOSITIONS if DECOMPOSITIONS[name].exact])
def test_no_family_declares_a_negative_error_or_inflates_the_weight(family):
    """A convolution of which half of the inputs are dead, and eight examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.Flatten())
    model.append(nn.Linear(16 * 25, 24)).append(nn.Linear(24, 10))
    with torch.no_grad():
        model[0].weight[:6], model[0].bias[:6] = 0, -1
    space = rankopt.SearchSpace(families=(family,), points=4, steps=15)
    result = compress(model, [torch.randn(8, 8, 5, 5)], space, params=0.93)
    for choice in result.plan.choices:
        assert choice.error >= 0
        dense, small = (m.get_submodule(choice.name).weight for m in (model, result.model))
        assert small.norm() < 3 * dense.norm(), choice


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 10))
def test_a_shrunk_moment_is_positive_definite_and_keeps_its_trace(size, rows, seed):
    x = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moment = (x.T @ x / rows)[None]
    found = shrunk(moment, rows)
    assert math.isclose(found.diagonal(dim1=1, dim2=2).sum(), moment.diagonal(dim1=1, dim2=2).sum(), rel_tol=1e-9)
    assert torch.linalg.eigvalsh(found).min() > 0


def test_shrinkage_agrees_with_scikit_learn_towards_the_mean_and_fades():
    """OAS's coefficient, for centred data; with many rows next to nothing is left of it."""
    from sklearn.covariance import OAS

    torch.manual_seed(0)
    x = torch.randn(50, 8, dtype=torch.float64) * torch.arange(1, 9)
    moment = (x.T @ x / 50)[None]
    rho = OAS(assume_centered=True).fit(x.numpy()).shrinkage_
    off = ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(shrunk(moment, 50)[0][off], (1 - rho) * moment[0][off], rtol=0.05, atol=0)
    many = shrunk(moment, 10**9)[0]
    torch.testing.assert_close(many, moment[0], rtol=1e-3, atol=1e-3)


def test_the_report_says_how_few_examples_there_are():
    result = compress(blind(), [torch.randn(16, 32)], params=0.9)
    assert any("fewer vectors than they have inputs" in text for text in result.info["warnings"])
    assert "16 for 32" in result.summary()


def test_a_loss_far_above_its_prediction_is_noticed_and_another_plan_chosen():
    """A layer whose loss was predicted ten thousand times too small is measured alone, and spared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():  # the first layer loses little at a low rank
        model[0].weight.copy_(torch.randn(64, 8) @ torch.randn(8, 64) / 20 + torch.randn(64, 64) / 100)
        model[4].weight.mul_(20)
    prepared = prepare(Task(model, X[:1], [X]), SPACE)
    honest = _searched(prepared)
    losses = [dataclasses.replace(c, loss=c.loss * 1e-4) for c in prepared.candidates["2"]]
    prepared.candidates = {**prepared.candidates, "2": losses}
    naive, measured = _searched(prepared, contenders=1), _searched(prepared)
    assert naive.info["objective"]["best"] > 5 * honest.info["objective"]["best"]
    assert measured.info["objective"]["best"] == honest.info["objective"]["best"]
    assert any("far above the predicted" in text for text in naive.info["warnings"])
    assert not honest.info["warnings"]


def _searched(prepared: Prepared, **options: Any) -> rankopt.Result:
    return run_search(prepared, prepared.problem({"params": 0.8}), SearchSettings(options=options))
