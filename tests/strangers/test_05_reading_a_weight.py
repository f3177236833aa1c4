"""Kind 5: reading a weight's dtype costs nothing; a layer whose weight's values are read stays dense."""

from __future__ import annotations

import torch

import rankopt
from tests.strangers.models import compress, example_batch, net, reasons

X = example_batch()


def test_asking_for_the_dtype_costs_nothing():
    model = net(lambda s, x: s.h(s.b(s.a(x).to(s.b.weight.dtype)).relu()))
    result = compress(model, macs=0.5)
    assert rankopt.count(result.model, X[:1]).macs <= result.limits[0].target


def test_shape_device_and_size_cost_nothing_either():
    model = net(
        lambda s, x: s.h(s.b(s.a(x).to(s.b.weight.device).reshape(-1, s.b.weight.shape[1])) * s.b.weight.size(0) / 128)
    )
    result = compress(model, macs=0.5)
    assert rankopt.count(result.model, X[:1]).macs <= result.limits[0].target


def test_a_fused_layer_that_is_split_answers_for_its_weight_too():
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.head = torch.nn.Linear(64, 192), torch.nn.Linear(64, 10)

        def forward(self, x):
            q, k, v = self.qkv(x.to(self.qkv.weight.dtype)).chunk(3, -1)
            return self.head(q * k + v)

    result = compress(Fused().eval(), macs=0.6)
    assert sum(c.method == "svd_out" for c in result.plan.choices if c.name.startswith("qkv.")) >= 2
    assert rankopt.count(result.model, X[:1]).macs <= result.limits[0].target


def test_values_that_are_read_keep_the_layer_dense():
    model = net(lambda s, x: s.h((s.b(s.a(x)) @ s.b.weight).relu()))  # a tied autoencoder
    result = compress(model, params=0.8)
    assert "weight's values are read" in reasons(result)["b"]


def test_a_replacements_weight_is_the_product_of_its_factors():
    result = compress(net(lambda s, x: s.h(s.b(s.a(x)))), params=0.5)
    small = next(m for m in result.model.modules() if hasattr(m, "factors"))
    x = torch.randn(3, small.weight.shape[1])
    torch.testing.assert_close(small(x), torch.nn.functional.linear(x, small.weight, small.bias), rtol=1e-4, atol=1e-5)
    small.weight.sum().backward()
    assert all(f.grad is not None for f in small.parameters() if f.ndim == 2)
