"""Kind 2: the copy, or the replacement, is another function than the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from tests.strangers.models import compress, example_batch, net, reasons, sequential

X = example_batch()


def test_a_hook_that_writes_to_the_original_is_refused_and_named():
    model = net(lambda s, x: s.h(s.i(s.b(s.a(x))) * 0 + s.f))
    model.i.register_forward_hook(lambda *args: setattr(model, "f", args[2]))
    with pytest.raises(rankopt.TaskError, match=r"a copy of the model .* 'i' refers to the original"):
        compress(model, params=0.5)


def test_layers_in_a_plain_list_stay_dense_and_say_so():
    model = net(lambda s, x: s.l[1](s.l[0](x).relu()) + s.b(s.a(x)).mean() * 0 + s.h(s.l[0](x)).sum() * 0)
    model.l = [model.a, model.h]
    model = net(lambda s, x: s.h(s.b(s.l[0](x).relu()).relu()))
    model.l = [model.a]
    result = compress(model, params=0.7)
    assert "nn.ModuleList" in reasons(result)["a"]
    assert rankopt.count(result.model, X[:1]).params <= result.limits[0].target


def test_a_model_of_which_nothing_can_be_replaced_is_refused():
    model = net(lambda s, x: s.l[2](s.l[1](s.l[0](x).relu()).relu()))
    model.l = [model.a, model.b, model.h]
    with pytest.raises(rankopt.TaskError, match=r"no layer that can be factorised .*ModuleList"):
        compress(model, params=0.5)


def test_a_forward_that_asks_for_a_type_keeps_that_layer():
    model = net(lambda s, x: s.h(s.b(s.a(x) if isinstance(s.a, nn.Linear) else s.a(x) * 2)))
    result = compress(model, params=0.7)
    assert "isinstance" in reasons(result)["a"]


def test_a_forward_that_needs_an_attribute_of_the_layer_keeps_it():
    model = net(lambda s, x: s.h(s.b(s.a(x) * s.a._parameters["weight"].norm())))
    assert "does not run with a replacement" in reasons(compress(model, params=0.7))["a"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_are_unwrapped(wrap):
    result = compress(wrap(sequential()), params=0.5)
    assert type(result.model) is nn.Sequential
    assert rankopt.count(result.model, X[:1]).params <= result.limits[0].target


def test_ordinary_models_are_not_held_up():
    result = compress(sequential(), params=0.5)
    assert all(c.method == "svd_out" or c.reason.startswith("dense:") for c in result.plan.choices)


def test_a_cost_that_differs_from_the_plan_is_an_error_that_names_the_layer():
    """Only for a single example does the forward read the weight itself, which calibration batches cannot show."""

    def forward(s, x):
        extra = s.b.weight.sum() if len(x) == 1 else 0
        return s.h(s.b(s.a(x)) + extra)

    message = r"the rebuilt model has .* macs .* layer 'b' is used in another way"
    with pytest.raises(rankopt.RankoptError, match=message):
        compress(net(forward), macs=0.8)


def test_a_forward_that_asks_for_an_attention_keeps_it():
    """Its parts would be called in another way than the attention was."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.mix, self.head = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 64)

        def forward(self, x):
            x = self.mix(x, x, x)[0] if isinstance(self.mix, nn.MultiheadAttention) else self.mix(x)
            return self.head(x)

    result = compress(Asks().eval(), [X[:, None]], params=0.95)
    assert "isinstance" in reasons(result)["mix"]
    assert next(c for c in result.plan.choices if c.name == "head").method == "svd_out"


def test_layers_that_fail_only_together_are_found():
    def forward(s, x):
        return s.h(s.b(s.a(x))) * (1 if isinstance(s.a, nn.Linear) or isinstance(s.b, nn.Linear) else 2)

    result = compress(net(forward), params=0.7)
    assert "isinstance" in reasons(result)["b"]
    assert "isinstance" not in reasons(result)["a"]
