"""What channels do: predicted against algebra, and measured against models that are changed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankopt
from rankopt.decompositions.channels import components, factors_of
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.inventory import inventory, unfolded
from rankopt.model.quantization import quantize_
from rankopt.report import bond_effects
from rankopt.report.bond_effects import ABLATED, PATCHED, main_output
from rankopt.report.bond_latents import Effort, analyse, class_means, follow, selectivity, spread

ALL = Effort(measured=None)


def compressed(dense, example, plans):
    """A copy of a model with layers replaced as {name: (family, rank)}, and its layers."""
    layers = inventory(dense, example)
    small = copy.deepcopy(dense)
    for layer in layers:
        if layer.name in plans:
            family, rank = plans[layer.name]
            module = dense.get_submodule(layer.name)
            (fit,) = DECOMPOSITIONS[family].fit(layer, module.weight, [rank], steps=2)
            new = DECOMPOSITIONS[family].build(module, layer, rank)
            load_factors(new, fit.factors)
            small.set_submodule(layer.name, new)
    return small.eval(), layers


def analysed(dense, batches, plans, effort=ALL, change=lambda small: None):
    dense = unfolded(dense, batches[0][:1])
    small, layers = compressed(dense, batches[0][:1], plans)
    change(small)
    statistics = dict.fromkeys(plans, (None, None))
    return small, analyse(dense, small, layers, plans, statistics, batches, effort)


class Regression(nn.Module):
    """Outputs that are no classes, so that the objective is a squared error."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, 8), nn.Linear(8, 6)

    def forward(self, x):
        return {"features": self.last(self.first(x))}


def test_of_a_linear_model_and_a_squared_error_the_prediction_is_exact_but_for_its_random_directions(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bond_effects, "PROBES", 400)
    x = torch.randn(32, 10)
    _, latents = analysed(Regression().eval(), [x[:20], x[20:]], {"first": ("svd_out", (5,))})
    (bond,) = latents.bonds
    torch.testing.assert_close(bond.effects.predicted, bond.effects.measured, rtol=0.1, atol=1e-4)
    assert bond.measured == tuple(range(5)) and latents.labels is None
    for control in bond.controls.values():
        torch.testing.assert_close(control.predicted[0], control.measured[0], rtol=0.1, atol=1e-4)


def test_what_is_measured_is_the_objective_of_the_model_without_the_channel():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(24, 3, 6, 6)
    small, latents = analysed(dense, [x], {"0": ("tucker2", (2, 3))})
    objective = rankopt.model.objective.Divergence(dense, [x])
    for bond, stage in zip(latents.bonds, (0, 1), strict=True):
        for r in range(bond.effects.count):
            without = copy.deepcopy(small)
            without[0][stage].weight.data[r] = 0
            rise = objective(without) - objective(small)
            assert bond.effects.measured[ABLATED, r].item() == pytest.approx(rise, rel=1e-3, abs=1e-7)


def test_a_patched_channel_is_what_it_is_for_another_example():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    x = torch.randn(12, 5)
    small, latents = analysed(dense, [x], {"0": ("svd_out", (2,))})
    a, b = (f.float() for f in factors_of(small[0]))
    h = x @ a.T
    other = h.clone()
    other[:, 1] = h[:, 1].roll(1)
    y = dense[2](torch.tanh(other @ b.T + dense[0].bias)).log_softmax(1)
    changed = nn.functional.kl_div(y, dense(x).log_softmax(1), log_target=True, reduction="batchmean").item()
    rise = latents.bonds[0].effects.measured[PATCHED, 1].item()
    assert latents.objective + rise == pytest.approx(changed, rel=1e-4)


def test_each_classs_loss_and_its_driver_are_those_of_its_own_examples():
    """Two inputs, each seen by one channel of its own, each for one class."""
    dense = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        dense[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        dense[1].weight.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 0], [2.0, 0], [0, 3.0], [0, 2.5]]).repeat(4, 1)
    _, latents = analysed(dense, [x], {"0": ("svd_out", (2,))}, Effort(controls=False))
    (bond,) = latents.bonds
    assert latents.labels.tolist() == [0, 0, 1, 1] * 4
    effects = bond.effects.class_measured
    # The model is linear, so that linearising it changes nothing.
    torch.testing.assert_close(bond.effects.predicted, bond.effects.measured, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bond.effects.class_predicted, effects, rtol=1e-4, atol=1e-6)
    first = 0 if effects[0, 0] > effects[0, 1] else 1
    assert effects[first, 0] > 0.5 and abs(effects[first, 1]) < 1e-5
    assert effects[1 - first, 1] > 0.5 and abs(effects[1 - first, 0]) < 1e-5
    assert (bond.effects.class_predicted[first].abs().argmax(), bond.effects.class_predicted[first, 1]) == (0, 0)
    assert class_means(latents, bond)[first].abs().argmax() == 0 and selectivity(latents, bond).min() > 0.8
    assert bond.shares.sum().item() == pytest.approx(1) and bond.shares.min() >= 0


class Reader(nn.Module):
    """Reads tokens with an embedding, attention and a Linear; the second output is one for each token."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.out(x.mean(1))


KINDS = {
    "table": ("svd_out", (4,)),
    "attend.v_proj": ("ttn", (4,)),
    "attend.k_proj": ("tt_matrix", (4, 4)),
    "attend.out_proj": ("tr", (2, 2, 2, 2)),
    "out": ("svd_out", (3,)),
}


def test_embeddings_attention_trains_rings_and_generators_have_channels():
    torch.manual_seed(0)
    tokens = torch.randint(40, (48, 6))
    plans = {}
    for layer in inventory(unfolded(Reader().eval(), tokens[:1]), tokens[:1]):
        if layer.name in KINDS:
            family, rank = KINDS[layer.name]
            plans[layer.name] = family, DECOMPOSITIONS[family].valid(layer, rank)
    assert set(plans) == set(KINDS)
    _, latents = analysed(Reader().eval(), [tokens[:30], tokens[30:]], plans, Effort(measured=None, controls=False))
    assert {b.layer for b in latents.bonds} == set(KINDS)
    for bond in latents.bonds:
        effects = bond.effects
        assert effects.predicted.isfinite().all() and effects.measured.isfinite().all()
        assert effects.responses.shape == (48, effects.count)
    far = [(b.effects.predicted[0] - b.effects.measured[0]).abs().max() / b.effects.measured[0].abs().max()
           for b in latents.bonds]  # fmt: skip
    assert max(far) < 0.6


def test_int8_weights_are_analysed_as_they_are_rounded():
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).eval(), torch.randn(16, 12)
    plans = {"0": ("svd_out", (3,))}
    _, plain = analysed(dense, [x], plans)
    small, rounded = analysed(dense, [x], plans, change=lambda m: quantize_(m[0], "int8"))
    assert rounded.bonds[0].effects.measured[0].tolist() == pytest.approx(
        plain.bonds[0].effects.measured[0].tolist(), rel=0.2
    )
    assert rounded.objective != plain.objective and small[0][0].precision == "int8"


def test_the_channels_of_one_feature_are_followed_from_layer_to_layer():
    """Three features pass through two layers, each in another order."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        dense[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        dense[1].weight.copy_(torch.tensor([[0, 0, 9.0], [1.0, 0, 0], [0, 0.5, 0]]))
    x = torch.randn(64, 3)
    _, latents = analysed(dense, [x], {"0": ("svd_out", (3,)), "1": ("svd_out", (3,))}, Effort(controls=False))
    first, second = latents.bonds
    for r in range(3):
        (step,) = follow(latents, first, r)
        feature = first.effects.responses[:, r] @ x
        assert feature.abs().argmax() == (second.effects.responses[:, step.channel] @ x).abs().argmax()
        assert abs(step.correlation) > 0.98 and step.chance < 0.6 and step.layer == "1"


class Experts(nn.Module):
    """Sends batches of positive inputs to one layer and all others to another one."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.one(x) if x.min() > 0 else self.other(x)


def test_a_layer_that_some_batches_do_not_reach_is_analysed_on_those_that_do():
    torch.manual_seed(0)
    x = torch.rand(12, 6) + 0.1
    dense = Experts().eval()
    _, latents = analysed(dense, [x, -x], {"one": ("svd_out", (2,))})
    (bond,) = latents.bonds
    assert bond.effects.responses is None and bond.effects.class_predicted.isnan().all()
    assert (bond.effects.predicted > 0).all() and (bond.effects.measured > 0).all()
    assert list(follow(latents, bond, 0)) == []


class PerToken(nn.Module):
    """Looks at flat tokens, so that a layer's rows are not the examples."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.inner(x.flatten(0, 1)).tanh().view(*x.shape[:2], -1).mean(1))


def test_a_layer_whose_rows_are_not_the_examples_has_effects_but_no_responses():
    torch.manual_seed(0)
    x = torch.randn(200, 5, 6)
    _, latents = analysed(PerToken().eval(), [x[:100], x[100:]], {"inner": ("svd_out", (4,))})
    (bond,) = latents.bonds
    assert bond.effects.responses is None and bond.effects.predicted[PATCHED].isnan().all()
    torch.testing.assert_close(bond.effects.predicted[0], bond.effects.measured[0], rtol=1.5, atol=1e-3)
    assert bond.effects.predicted[0].argmax() == bond.effects.measured[0].argmax()


def test_components_respond_along_their_main_direction():
    torch.manual_seed(0)
    dense = nn.Linear(6, 5)
    small, layers = compressed(nn.Sequential(dense), torch.randn(1, 6), {"0": ("svd_out", (2,))})
    bond = DECOMPOSITIONS["svd_out"].latent_bonds(layers[0], (2,))[0]
    for w in components(layers[0], "svd_out", factors_of(small[0]), bond, torch.eye(2, dtype=torch.float64)):
        u = main_output(layers[0], w)
        assert u.norm().item() == pytest.approx(1)
        torch.testing.assert_close(torch.outer(u, u @ w), w)


def test_measured_channels_are_spread_over_the_order_of_the_predicted_ones():
    values = torch.tensor([5.0, 1.0, 9.0, 2.0, 7.0, 3.0, 0.0, 4.0])
    assert spread(values, 1) == [2] and spread(values, 2) == [2, 6] and spread(values, 8) == list(range(8))
    assert {2, 6} < set(spread(values, 3))
