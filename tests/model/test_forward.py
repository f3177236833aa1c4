"""Hooks that go away again, and batches that are cut."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from rankopt.model.forward import Examples, Undivided, hooked, join, take


class Pair(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_hooks_see_what_they_were_set_on_by_name_and_by_module(model):
    x, seen = torch.randn(5, 3), []
    with hooked(model, ["0", "2"], on_input=lambda name, args: seen.append((name, args[0].shape[1]))):
        model(x)
    with hooked(model, [model[1]], on_output=lambda m, args, kwargs, out: seen.append((m, kwargs, out.shape[1]))):
        model(x)
    model(x)
    assert seen == [("0", 3), ("2", 4), (model[1], {}, 4)]
    assert not hooks(model)


def test_what_a_hook_returns_takes_the_place_of_input_or_output(model):
    x = torch.randn(5, 3)
    with hooked(model, ["2"], on_input=lambda _, args: (torch.zeros_like(args[0]),)):
        assert torch.equal(model(x), model[2].bias.expand(5, 2))
    with hooked(model, [""], on_output=lambda *_: 7):
        assert model(x) == 7


def test_hooks_are_removed_after_an_error_in_the_model_in_a_hook_and_while_they_are_set(model):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooked(model, ["0", "2"], on_input=fail):
        model(torch.randn(5, 3))
    with pytest.raises(RuntimeError), hooked(model, ["0"], on_output=lambda *_: None):
        model(torch.randn(5, 4))
    with pytest.raises(AttributeError), hooked(model, ["0", "nowhere"], on_input=fail):
        pass
    assert not hooks(model)


def test_the_outermost_hooks_come_first_and_also_where_the_forward_fails(model):
    order = []
    inner = model[0].register_forward_pre_hook(lambda *_: order.append("own"))
    with (
        pytest.raises(RuntimeError),
        hooked(
            model,
            ["0"],
            on_input=lambda *_: order.append("in"),
            on_output=lambda *_: order.append("out"),
            outermost=True,
        ),
    ):
        model(torch.randn(5, 4))
    inner.remove()
    assert order == ["in", "own", "out"]


def test_a_batch_is_cut_where_a_tensor_has_its_examples():
    table, scalar = torch.randn(7, 2), torch.tensor(3.0)
    batch = {"pair": Pair(torch.arange(6).view(6, 1), torch.ones(6)), "rest": [table, scalar, "text"]}
    part = take(batch, slice(2, 4))
    assert isinstance(part["pair"], Pair)
    assert part["pair"].x.tolist() == [[2], [3]] and part["pair"].mask.shape == (2,)
    assert part["rest"][0] is table and part["rest"][1] is scalar and part["rest"][2] == "text"


def test_batches_are_joined_where_they_can_be_one():
    x = torch.randn(5, 3)
    joined = join([{"a": Pair(x[:2], x[:2] > 0)}, {"a": Pair(x[2:], x[2:] > 0)}])
    assert torch.equal(joined["a"].x, x) and torch.equal(joined["a"].mask, x > 0)


@pytest.mark.parametrize(
    "batches",
    [
        [torch.zeros(2, 3), torch.zeros(2, 4)],  # padded to the longest of each
        [(torch.zeros(2, 3), torch.zeros(4)), (torch.zeros(2, 3), torch.zeros(4))],  # a table for all examples
        [{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3), "mask": torch.zeros(2, 3)}],
        [(torch.zeros(2, 3), 1), (torch.zeros(2, 3), 2)],
        [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)],
        [Examples([torch.zeros(2)]), Examples([torch.zeros(2)])],
        [Undivided(torch.zeros(2, 3)), Undivided(torch.zeros(2, 3))],
    ],
)
def test_batches_that_cannot_be_one_are_not_joined(batches):
    assert join(batches) is None
