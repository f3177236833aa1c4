"""Which layers are found, which must stay dense and why, and that their counts are right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankopt import TaskError, count, inventory
from rankopt.candidates.input_moments import moments, patches
from rankopt.candidates.output_metrics import output_metrics
from rankopt.model.forward import take
from rankopt.model.layer_kinds import as_matrix
from tests.helpers.layers import MODULES, make
from tests.helpers.models import Odd

REASONS = {
    "conv": None,
    "twice": None,
    "attention": "unfold it first",
    "attention.out_proj": "a subclass of Linear",
    "tied_a": "shared: tied_a.weight, tied_b.weight",
    "tied_b": "shared: tied_a.weight, tied_b.weight",
    "normed": "parametrised",
    "unused": "not called",
    "custom": "a subclass of Linear",
    "one_d": "not called",
    "hooked": "carries hooks",
    "head": None,
    "": "Odd cannot be factorised yet",
}


def test_every_weight_is_listed_with_its_reason():
    model = Odd()
    layers = {layer.name: layer for layer in inventory(model, torch.zeros(2, 3, 8, 8))}
    found = {name: layer.reason for name, layer in layers.items()}
    for name, reason in REASONS.items():
        assert name in found, name
        assert (reason is None) == (found[name] is None), (name, found[name])
        assert reason is None or reason in found[name]
    assert layers["twice"].aliases == ("alias",) and len(layers["twice"].calls) == 2
    assert layers["twice"].cost.macs == 2 * 64 * 8 * 8 * 9
    assert model.training, "the mode is put back"


@pytest.mark.parametrize("name", list(MODULES))
def test_costs_are_what_torch_counts(name):
    case = make(name)
    assert count(case.module, case.x) == case.layer.cost


def test_counting_is_for_one_example_of_any_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(1, 3, 8, 8))
    assert count(model, torch.zeros(1, 3, 8, 8)) == count(model, torch.zeros(7, 3, 8, 8))
    mixed = take({"ids": torch.zeros(7, 3), "flag": True, "table": torch.zeros(2, 5)}, slice(1))
    assert mixed["ids"].shape == (1, 3) and mixed["table"].shape == (2, 5)


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith(("linear", "embedding"))])
def test_patches_are_what_a_convolution_sees(name):
    case = make(name)
    g = case.layer.groups
    columns = patches(case.module, case.x).unflatten(1, (g, case.layer.patch))
    weight = as_matrix(case.layer, case.module.weight)
    out = torch.einsum("gtn,bgnl->bgtl", weight, columns).flatten(1, 2)
    if case.module.bias is not None:
        out = out + case.module.bias[:, None]
    torch.testing.assert_close(out, case.module(case.x).flatten(2))


@pytest.mark.parametrize("name", list(MODULES))
def test_moments_do_not_depend_on_batching(name):
    case = make(name)
    (whole,) = moments(case.module, [case.layer], [case.x]).values()
    (split,) = moments(case.module, [case.layer], [case.x[:1], case.x[1:]]).values()
    torch.testing.assert_close(whole, split)
    square = (case.layer.groups, case.layer.patch, case.layer.patch)
    assert whole.dtype == torch.float64 and whole.shape == ((1, 40) if name == "embedding" else square)
    if name != "embedding":
        torch.testing.assert_close(whole, whole.mT)


def test_output_metric_is_the_gradient_moment():
    """For a linear read-out z = A y the metric is AᵀPA with P the projection off the mean class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).double()
    x = torch.randn(4000, 4, dtype=torch.float64)
    layers = [layer for layer in inventory(model, x) if layer.name == "0"]
    (metric,) = output_metrics(model, layers, [x]).values()
    a = model[1].weight.detach()
    expected = a.T @ (torch.eye(5, dtype=torch.float64) - 1 / 5) @ a
    expected = expected / expected.diagonal().mean()
    assert ((metric[0] - expected).norm() / expected.norm()).item() < 0.1
    assert all(p.grad is None for p in model.parameters())


def test_output_metric_sees_through_in_place_changes():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 6, 6)
    tail = nn.Conv2d(4, 5, 6)
    outcomes = []
    for inplace in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=inplace), tail, nn.Flatten())
        layers = [layer for layer in inventory(model, x) if layer.name == "0"]
        outcomes.append(output_metrics(model, layers, [x])["0"])
    torch.testing.assert_close(*outcomes)


def test_frozen_models_are_calibrated_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).requires_grad_(requires_grad=False)
    x = torch.randn(8, 3, 6, 6)
    metrics = output_metrics(model, inventory(model, x), [x])
    assert set(metrics) == {"0", "2"}
    assert not any(p.requires_grad for p in model.parameters())


def test_bad_models_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TaskError, match="does not run on example_input"):
        inventory(model, torch.zeros(1, 5))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(TaskError, match="layer '1' has NaN"):
        inventory(model, torch.zeros(1, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = 0
    bad = torch.full((2, 4), float("nan"))
    with pytest.raises(TaskError, match="input of layer '0' is NaN"):
        moments(model, inventory(model, torch.zeros(1, 4)), [bad])


@pytest.mark.parametrize("frozen", ["backbone", "all"])
def test_frozen_layers_have_the_same_metric(frozen):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    layers = inventory(model, x)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    free = output_metrics(model, layers, [x])
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)), "the model's gradients are its own"
    for module in model if frozen == "all" else model[:5]:
        module.requires_grad_(requires_grad=False)
    bound = output_metrics(model, layers, [x])
    assert set(bound) == set(free)
    for name in free:
        torch.testing.assert_close(bound[name], free[name])


def test_channels_last_linear_layers_have_the_metric_of_flat_ones():
    torch.manual_seed(0)
    x = torch.randn(16, 5, 3, 6)
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    class Mean(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.body, self.flat = body, flat

        def forward(self, x):
            return self.body(x.flatten(1, 2)).mean(1) if self.flat else self.body(x).mean((1, 2))

    maps, rows = (output_metrics(Mean(f), inventory(Mean(f), x), [x]) for f in (False, True))
    for name in maps:
        torch.testing.assert_close(maps[name], rows[name])


def test_a_layer_with_a_computed_weight_is_listed_by_its_own_kind():
    """weight_norm keeps two parameters in a ParametrizationList inside of the layer."""
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    model = nn.Sequential(weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), spectral_norm(nn.Linear(288, 4)))
    conv, linear = inventory(model.eval(), torch.randn(1, 3, 8, 8))
    assert (conv.name, conv.kind, conv.shape) == ("0", "Conv2d", (8, 3, 3, 3))
    assert (linear.name, linear.kind, linear.shape) == ("3", "Linear", (4, 288))
    assert "weight" in conv.reason and "weight" in linear.reason
    assert conv.cost.params + linear.cost.params == sum(p.numel() for p in model.parameters())
