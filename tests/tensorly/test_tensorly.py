"""Factorised layers as tensors of tensorly, and back."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import tensorly
import torch
from torch import nn

import rankopt
from rankopt.core.errors import RankoptError
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.layer_kinds import as_matrix, describe
from rankopt.tensorly import FORMATS, from_tensorly, to_tensorly
from tests.helpers.layers import MODULES, inputs


@pytest.fixture(autouse=True)
def _torch_backend():
    with tensorly.backend_context("pytorch"):
        yield


def replaced(module, method, fraction=0.6):
    """A module with random factors in place of a layer, at a rank with several numbers above 1."""
    layer, family = describe(module), DECOMPOSITIONS[method]
    rank = family.valid(layer, tuple(max(2, int(fraction * r)) for r in family.full_rank(layer)))
    built = family.build(module, layer, rank)
    load_factors(built, tuple(torch.randn(s, dtype=module.weight.dtype) for s in family.shapes(layer, rank)))
    return built.eval()


PAIRS = [
    (method, name)
    for name, make in MODULES.items()
    for method in FORMATS
    if describe(make()).groups == 1 and DECOMPOSITIONS[method].full_rank(describe(make())) is not None
]


def test_every_format_is_tested_on_several_layers():
    assert {method for method, _ in PAIRS} == set(FORMATS)


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_round_trip(method, name):
    """The same outputs, from the tensor and the dense layer, and from the tensor and the factorised one."""
    torch.manual_seed(0)
    module = MODULES[name]().double().eval()
    one = replaced(module, method)
    x = inputs(module)[0]
    tensor = to_tensorly(one)
    assert type(tensor).__name__ == FORMATS[method].kind
    for given in (module, one):
        other = from_tensorly(given, tensor)
        assert (other.method, tuple(other.rank)) == (method, tuple(one.rank))
        torch.testing.assert_close(other(x), one(x), rtol=1e-12, atol=1e-12)
        assert not other.training


@pytest.mark.parametrize(("method", "name"), [p for p in PAIRS if p[1] in ("conv3x3", "linear", "embedding")])
def test_the_tensor_is_the_layers_weight(method, name):
    torch.manual_seed(1)
    module = replaced(MODULES[name]().double(), method)
    layer = module.layer
    weight = as_matrix(layer, module.weight).reshape(layer.out_channels, layer.in_channels, *layer.kernel)
    tensor = to_tensorly(module)
    if method == "tt_matrix":
        shown = tensor.to_matrix()[: layer.out_channels, : layer.in_channels]
        torch.testing.assert_close(shown, weight.flatten(1))
        return
    whole = tensor.to_tensor()
    if method == "tt_conv":  # (kh kw, J, J, J, 1, I, I, I)
        outputs, ins = DECOMPOSITIONS[method].channels(layer)
        by_position = whole.reshape(-1, torch.Size(outputs).numel(), torch.Size(ins).numel())
        shown = by_position[:, : layer.out_channels, : layer.in_channels].permute(1, 2, 0).reshape(weight.shape)
    elif method in ("tt", "tr"):  # input first
        at = 1 if name == "conv3x3" else 2
        order = (3, 0, 1, 2) if at == 1 else (2, 3, 0, 1)
        shown = whole.permute(order).reshape(weight.shape)
    elif method == "svd_in":  # (T kh kw, C)
        shown = whole.unflatten(0, (layer.out_channels, *layer.kernel)).permute(0, 3, 1, 2)
    elif method == "svd_spatial":  # (T kw, C kh)
        (height, width), (t, c) = layer.kernel, (layer.out_channels, layer.in_channels)
        shown = whole.reshape(t, width, c, height).permute(0, 2, 3, 1)
    else:
        shown = whole.reshape(weight.shape)
    torch.testing.assert_close(shown, weight)


def test_the_factors_are_copies():
    one = replaced(nn.Linear(12, 20), "svd_out")
    before = one.weight.detach().clone()
    for factor in to_tensorly(one).factors:
        factor.zero_()
    assert torch.equal(one.weight, before)


def test_what_tensorly_fits_can_be_used():
    """parafac with weights of its components, partial_tucker, and a train; all near full rank."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    x, decompose = torch.randn(2, 4, 8, 8), tensorly.decomposition
    weight = conv.weight.detach()
    cp = decompose.parafac(weight, 4, normalize_factors=True, n_iter_max=5, init="random", random_state=0)
    expected = nn.functional.conv2d(x, tensorly.cp_to_tensor(cp), conv.bias, padding=1)
    torch.testing.assert_close(from_tensorly(conv, cp)(x), expected, rtol=1e-4, atol=1e-5)
    tucker = decompose.tucker(weight, (4, 3, 3, 3), n_iter_max=5)
    expected = nn.functional.conv2d(x, tensorly.tucker_to_tensor(tucker), conv.bias, padding=1)
    found = from_tensorly(conv, tucker)
    assert (found.method, found.rank) == ("tucker2", (3, 4))
    torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
    assert from_tensorly(conv, decompose.tucker(weight, (4, 3, 2, 2), n_iter_max=5)).method == "tucker"
    train = decompose.tensor_train(weight.permute(1, 2, 3, 0), [1, 3, 5, 4, 1])
    whole = tensorly.tt_to_tensor(train).permute(3, 0, 1, 2)
    expected = nn.functional.conv2d(x, whole, conv.bias, padding=1)
    torch.testing.assert_close(from_tensorly(conv, train)(x), expected, rtol=1e-4, atol=1e-5)


def test_arrays_of_numpy_are_read():
    with tensorly.backend_context("numpy"):
        tensor = tensorly.random.random_cp((20, 12), rank=3, random_state=0)
        dense = tensor.to_tensor()
    small = from_tensorly(nn.Linear(12, 20), tensor)
    torch.testing.assert_close(small.weight.detach(), torch.as_tensor(dense).float())


@pytest.mark.parametrize(
    ("kind", "content", "method"),
    [
        ("CPTensor", lambda: (torch.full((3,), 2.0), [torch.randn(20, 3), torch.randn(12, 3)]), "svd_out"),
        ("BlockTT", lambda: [torch.randn(1, 5, 2, 3), torch.randn(3, 2, 2, 2), torch.randn(2, 2, 3, 1)], "tt_matrix"),
    ],
)
def test_tensors_of_tensorly_torch(kind, content, method):
    """Modules with tensorly's names and a `decomposition`; as tensorly-torch 0.5.0 has them, which is not installed."""
    parts = content()
    tensor = type(kind, (nn.Module,), {"decomposition": property(lambda self: parts)})()
    small = from_tensorly(nn.Linear(12, 20), tensor)
    assert small.method == method
    if kind == "CPTensor":
        torch.testing.assert_close(small.weight, 2 * parts[1][0] @ parts[1][1].T)


def test_a_model_with_such_layers_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    small = copy.deepcopy(model)
    small[0] = from_tensorly(model[0], tensorly.decomposition.parafac(model[0].weight.detach(), 3, n_iter_max=5))
    rankopt.save(small, tmp_path / "small")
    x = torch.randn(5, 12)
    torch.testing.assert_close(rankopt.load(model, tmp_path / "small")(x), small(x))


@pytest.mark.parametrize(
    ("module", "tensor", "message"),
    [
        (nn.ReLU(), ("CPTensor", [(20, 3), (12, 3)]), "a ReLU cannot be factorised"),
        (nn.Linear(12, 21), ("CPTensor", [(20, 3), (12, 3)]), r"modes \(20, 12\) do not fit .* are \(21, 12\)"),
        (nn.Linear(12, 20), ("CPTensor", [(20, 15), (12, 15)]), r"rank \(15,\) of 'svd_out' is redundant, \(12,\) can"),
        (nn.Linear(12, 20), ("TTTensor", [(1, 20, 3), (3, 12, 1)]), r"modes that fit are \(3, 4, 4, 5\)"),
        (nn.Conv2d(4, 4, 3, groups=2), ("CPTensor", [(4, 3), (18, 3)]), "has 2 groups"),
        (nn.Linear(12, 20), ("ndarray", []), "the tensor is a ndarray: give a CPTensor"),
        (
            replaced(nn.Linear(12, 20), "svd_out"),
            ("CPTensor", [(20, 3), (12, 3)]),
            r"has rank \(7,\), the tensor \(3,\)",
        ),
        (replaced(nn.Linear(12, 20), "svd_out"), ("TTTensor", [(1, 20, 3), (3, 12, 1)]), "modes that fit are none"),
    ],
)
def test_what_does_not_fit(module, tensor, message):
    kind, shapes = tensor
    factors = [torch.randn(s) for s in shapes]
    content = (None, factors) if kind == "CPTensor" else factors
    with pytest.raises(RankoptError, match=message):
        from_tensorly(module, type(kind, (SimpleNamespace,), {})(decomposition=content))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 4), "the Linear is not factorised"),
        (replaced(nn.Conv2d(8, 12, 3), "btt"), "factorised as 'btt', for which tensorly has no tensor"),
        (replaced(nn.Conv2d(8, 12, 3, groups=2), "svd_out"), "has 2 groups"),
    ],
)
def test_what_has_no_tensor(module, message):
    with pytest.raises(RankoptError, match=message):
        to_tensorly(module)


def test_tensorly_is_loaded_when_it_is_used():
    assert rankopt.tensorly is sys.modules["rankopt.tensorly"]
