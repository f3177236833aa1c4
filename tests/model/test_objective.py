"""The default objective against its definition, and guarded calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankopt import TaskError
from rankopt.model.objective import Divergence, call


class Shaped(nn.Module):
    """A linear map whose outputs have any shape (b, *shape)."""

    def __init__(self, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(6, int(torch.tensor(shape).prod()))
        self.shape = shape

    def forward(self, x):
        return self.map(x).unflatten(1, self.shape)


@pytest.mark.parametrize(("shape", "axis"), [((5,), 1), ((5, 3, 2), 1), ((7, 5), 2)])
def test_divergence_is_the_mean_kl_over_examples_and_positions(shape, axis):
    dense = Shaped(*shape).eval()
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.map.weight += 0.1 * torch.randn_like(other.map.weight)
    batches = [torch.randn(n, 6) for n in (4, 9)]
    x = torch.cat(batches)
    p, q = (torch.distributions.Categorical(logits=m(x).double().movedim(axis, -1)) for m in (dense, other))
    expected = torch.distributions.kl_divergence(p, q).mean().item()
    objective = Divergence(dense, batches)
    assert objective(other) == pytest.approx(expected, rel=1e-4)
    assert objective(dense) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape", [(1,), (4, 1)])
def test_single_outputs_are_compared_by_relative_squared_error(shape):
    dense = Shaped(*shape)
    zero = copy.deepcopy(dense)
    nn.init.zeros_(zero.map.weight)
    zero.map.bias.data.fill_(0)
    batches = [torch.randn(400, 6)]
    assert Divergence(dense, batches)(dense) == 0
    assert 0.5 < Divergence(dense, batches)(zero) < 10


def test_calls_say_what_is_wrong():
    model = nn.Linear(2, 2)
    assert call("the score", None, model) is None
    assert call("the score", lambda m: torch.tensor(0.5), model) == 0.5
    assert call("the score", lambda m: float(m.training), model.train()) == 0.0, "called in eval mode"
    assert model.training
    for value, message in ((float("inf"), "the score is inf"), ("good", "returned str"), (None, "returned NoneType")):
        with pytest.raises(TaskError, match=message):
            call("the score", lambda m, v=value: v, model)
    model.bias.data.fill_(float("nan"))
    with pytest.raises(TaskError, match="dense model's outputs are NaN"):
        Divergence(model, [torch.zeros(1, 2)])
