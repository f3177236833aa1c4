"""Kind 6: raw errors of torch, where one sentence was due, or the right result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import rankopt
from rankopt.candidates.output_metrics import output_metrics
from rankopt.model.inventory import inventory
from tests.strangers.models import compress, example_batch, net, reasons, sequential

X = example_batch()


def within(result: rankopt.Result, x: Tensor = X) -> bool:
    """The budget is met, the model runs, and it is near the dense one."""
    assert result.info["objective"]["best"] < 0.05
    result.model(x)
    return rankopt.count(result.model, x[:1]).params <= result.limits[0].target


# --- parts of a forward that gradients do not pass -------------------------------------------------


def without_gradients(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = s.b(s.a(x)).sin()
    return s.h(x)


def in_inference_mode(s: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        x = s.b(s.a(x)).sin()
    return s.h(x.clone())


@pytest.mark.parametrize("forward", [without_gradients, in_inference_mode, lambda s, x: s.h(s.b(s.a(x)).detach())])
def test_a_part_without_gradients_is_compressed_and_that_is_said(forward, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKOPT_CACHE", str(tmp_path))  # a model with the same outputs has the same key
    result = compress(net(forward), params=0.7)
    assert within(result)
    assert any("no gradient of the model's outputs reaches 2 of 3 layers" in text for text in result.info["warnings"])


def test_an_expert_that_a_batch_gives_no_token_is_compressed():
    def forward(s: Any, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        y = torch.zeros(len(x), 128)
        for expert, mask in ((s.a, chosen), (s.e, ~chosen)):
            y[mask] = expert(x[mask])
        return s.h(s.b(y.relu()))

    model = net(forward)
    model.e = nn.Linear(64, 128)
    some = X[X[:, 0] > 0]
    result = compress(model, [X, some], params=0.7)
    assert within(result) and not result.info["warnings"]


class Routed(nn.Module):
    """Sequences whose vectors go to one of two experts of different sizes, by the output of a layer before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.h, self.small = nn.Linear(64, 64), nn.Linear(64, 10), nn.Linear(64, 64)
        self.large = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        chosen = x[..., 0] > 0
        y = torch.zeros_like(x)
        y[chosen], y[~chosen] = self.small(x[chosen]), self.large(x[~chosen])
        return self.h(y.mean(1))


def test_the_way_that_data_take_through_experts_may_change():
    """A vector that goes to another expert costs other MACs than were planned, which is no bug."""
    batches = [torch.randn(32, 24, 64, generator=torch.Generator().manual_seed(0))]
    result = compress(Routed().eval(), batches, params=0.15)
    assert any("data choose the way through this model" in text for text in result.info["warnings"])
    cost = rankopt.count(result.model, batches[0][:1])
    assert result.info["cost"]["compressed"]["macs"] == cost.macs and cost.params <= result.limits[0].target
    assert result.plan.cost == cost


def test_a_layer_that_sees_nothing_but_zeros_is_named():
    model = net(lambda s, x: s.h(s.b((s.a(x) + s.e(0 * x)).relu())))
    model.e = nn.Linear(64, 128)
    result = compress(model, params=0.7)
    assert any("or nothing but zeros, reaches 'e'" in text for text in result.info["warnings"])


def test_inputs_whose_squares_overflow_are_refused():
    with pytest.raises(rankopt.TaskError, match="the squares of the inputs of layer '0' overflow"):
        compress(sequential(), [1e25 * X], params=0.7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_make_no_difference(reentrant):
    plain = net(lambda s, x: s.h(s.b(s.a(x)).relu()))
    model = net(lambda s, x: s.h(checkpoint(lambda y: s.b(s.a(y)).relu(), x, use_reentrant=reentrant)))
    expected, found = (output_metrics(m, inventory(m, X), [X]) for m in (plain, model))
    assert expected.keys() == found.keys() == {"a", "b", "h"}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    result = compress(model, params=0.7)
    assert within(result) and not result.info["warnings"]


# --- tensors of other kinds ------------------------------------------------------------------------


def test_data_and_weights_that_were_made_in_inference_mode():
    with torch.inference_mode():
        data, model = torch.randn(256, 64), sequential()
    assert within(compress(sequential(), [data], params=0.7))
    assert within(compress(model, [X], params=0.7))
    assert all(p.is_inference() for p in model.parameters())


def test_subclasses_of_tensor():
    class Named(Tensor):
        pass

    assert within(compress(sequential(), [X.as_subclass(Named)], params=0.7))
    assert within(compress(sequential(), [nn.Parameter(X)], params=0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(dtype):
    assert within(compress(sequential().to(dtype), [X.to(dtype)], params=0.7), X.to(dtype))


def test_complex_weights_stay_dense():
    model = net(lambda s, x: s.h(s.c(s.a(x).to(torch.cfloat)).abs()))
    model.c = nn.Linear(128, 128, dtype=torch.cfloat)
    assert "complex64" in reasons(compress(model, params=0.9))["c"]


def test_empty_batches_are_passed_over():
    assert within(compress(sequential(), [X[:0], X], params=0.7))
    with pytest.raises(rankopt.TaskError, match="calibration set is empty"):
        compress(sequential(), [X[:0]], params=0.7)


# --- models that must be brought in another form ---------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return sequential()


def wrapped() -> nn.Module:
    class DeepSpeedEngine(nn.Sequential):
        pass

    return DeepSpeedEngine(sequential())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: torch.jit.script(sequential()), "TorchScript program, .* give the nn.Module"),
    "traced": (lambda: torch.jit.trace(sequential(), X), "TorchScript program, .* give the nn.Module"),
    "meta": (on_meta, r"layer '0' \(Linear\) is on the meta device"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(9)),
        r"layer '0' \(LazyLinear\) has no weights yet: run the model",
    ),
    "lazy norm": (lambda: nn.Sequential(nn.Linear(64, 9), nn.LazyBatchNorm1d()), r"layer '1' \(LazyBatchNorm1d\)"),
    "sharded": (wrapped, "spread over processes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused_in_one_sentence(name):
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(rankopt.TaskError, match=message):
        compress(model, params=0.7)
    with pytest.raises(rankopt.TaskError, match=message):
        rankopt.inventory(model, X)
    if name == "lazy":
        assert model[0].has_uninitialized_params()  # it was not touched


def test_a_part_that_is_torchscript_stays_as_it_is():
    model = sequential()
    model[0] = torch.jit.script(model[0])
    result = compress(model, params=0.8)
    assert within(result)
    assert "cannot be factorised" in reasons(result)["0"]


# --- weights that something else computes ----------------------------------------------------------

COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight_norm of old": (weight_norm, r"torch.nn.utils.remove_weight_norm\(layer\)"),
    "spectral_norm of old": (spectral_norm, r"torch.nn.utils.remove_spectral_norm\(layer\)"),
    "weight_norm": (parametrizations.weight_norm, r"remove_parametrizations\(layer, 'weight'\)"),
    "spectral_norm": (parametrizations.spectral_norm, r"remove_parametrizations\(layer, 'weight'\)"),
    "orthogonal": (parametrizations.orthogonal, r"remove_parametrizations\(layer, 'weight'\)"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), r"prune.remove\(layer, 'weight'\)"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_layer_whose_weight_is_computed_names_the_call_that_ends_that(name):
    change, call = COMPUTED[name]
    model = sequential()
    change(model[2])
    (layer,) = (x for x in inventory(model, X) if x.name == "2")
    assert layer.reason
    named = re.search(r"torch\.nn[\w.]*\(layer[^)]*\)", layer.reason)
    assert named and re.search(call, named[0]), layer.reason
    exec(named[0], {"torch": torch, "layer": model[2]})
    (layer,) = (x for x in inventory(model, X) if x.name == "2")
    assert layer.reason is None


# --- outputs ---------------------------------------------------------------------------------------


def test_outputs_that_are_none_are_passed_over():
    assert within(compress(net(lambda s, x: {"loss": None, "logits": s.h(s.b(s.a(x))), "cache": None}), params=0.7))


@pytest.mark.parametrize(
    "forward", [lambda s, x: s.h(s.b(s.a(x))).argmax(-1), lambda s, x: torch.fft.fft(s.h(s.b(s.a(x))))]
)
def test_a_model_without_a_floating_point_output_is_refused(forward):
    with pytest.raises(rankopt.TaskError, match="no floating-point tensor"):
        compress(net(forward), params=0.7)


def test_a_forward_that_takes_gradients_is_refused_in_one_sentence():
    def forces(s: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(s.h(s.b(s.a(x)).tanh()).sum(), x, create_graph=True)
        return gradient

    with pytest.raises(rankopt.TaskError, match="cannot be counted, does the forward take gradients"):
        compress(net(forces), params=0.7)


def test_gradients_that_fail_only_cost_the_metric():
    """A dynamically quantized layer has no backward."""
    model = torch.ao.quantization.quantize_dynamic(
        sequential(), {"2": torch.ao.quantization.default_dynamic_qconfig}, inplace=False
    )
    result = compress(model, params=0.7)
    assert any("no gradient" in text for text in result.info["warnings"])
