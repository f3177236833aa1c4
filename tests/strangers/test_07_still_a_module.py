"""Kind 7: the result is as much of an nn.Module as the model was."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.composites import expand_composites, parts
from rankopt.model.layer_kinds import describe
from rankopt.model.quantization import quantize_
from tests.strangers.models import compress, example_batch, sequential

X = example_batch()

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(24, 36), torch.randn(3, 24)),
    "Conv1d": lambda: (nn.Conv1d(8, 12, 3, padding="same"), torch.randn(2, 8, 9)),
    "Conv2d": lambda: (nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=2), torch.randn(2, 8, 9, 9)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(8, 12, 3, stride=2), torch.randn(2, 8, 5, 5)),
    "Embedding": lambda: (nn.Embedding(50, 24), torch.randint(50, (2, 7))),
}


def replacements() -> list[tuple[str, str, str]]:
    found = []
    for family in DECOMPOSITIONS:
        for kind, make in LAYERS.items():
            layer = describe(make()[0])
            if DECOMPOSITIONS[family].full_rank(layer) and DECOMPOSITIONS[family].ranks(layer, [0.5]):
                found += [(family, kind, form) for form in DECOMPOSITIONS[family].forms]
    return found


def replaced(family: str, kind: str, form: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module, x = LAYERS[kind]()
    layer = describe(module)
    rank = DECOMPOSITIONS[family].ranks(layer, [0.5])[-1]
    new = DECOMPOSITIONS[family].build(module, layer, rank, form)
    load_factors(new, [torch.randn(s) / 4 for s in DECOMPOSITIONS[family].shapes(layer, rank)])
    return nn.Sequential(new).eval(), x


def saved_and_loaded(program: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def whole(model: nn.Module, _: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def without_gradients(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        return saved_and_loaded(torch.jit.trace(model, x[:1]))


WAYS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "script": lambda model, _: saved_and_loaded(torch.jit.script(model)),
    "trace": lambda model, x: saved_and_loaded(torch.jit.trace(model, x[:1])),
    "trace without gradients": without_gradients,
    "trace in training mode": lambda model, x: torch.jit.trace(model.train(), x[:1]),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "copy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": whole,
    "to and from double": lambda model, _: model.double().float(),
    "to and from meta": lambda model, _: _materialised(copy.deepcopy(model).to("meta"), model.state_dict()),
}


def _materialised(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.to_empty(device="cpu").load_state_dict(state)
    return model


@pytest.mark.parametrize(("family", "kind", "form"), replacements())
def test_every_family_can_be_scripted_traced_exported_copied_and_saved(family, kind, form):
    model, x = replaced(family, kind, form)
    expected = model(x).detach()
    for name, way in WAYS.items():
        torch.testing.assert_close(
            way(copy.deepcopy(model), x)(x).detach(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", ["tt_conv", "svd_out"])
def test_programs_hold_the_factors_and_not_the_dense_weight(family):
    model, x = replaced(family, "Conv2d", "reconstructed")
    held = sum(p.numel() for p in model.parameters())
    for program in (torch.jit.script(copy.deepcopy(model)), without_gradients(model, x)):
        assert sum(p.numel() for p in program.parameters()) == held


def test_a_scripted_linear_takes_any_number_of_batch_dimensions():
    for family in ("tt_matrix", "tr", "svd_out", "svd_grouped"):
        model, x = replaced(family, "Linear", "factorised")
        program = torch.jit.script(copy.deepcopy(model))
        for y in (x[0], x, x[None], x[:, None, None]):
            torch.testing.assert_close(program(y), model(y), rtol=1e-4, atol=1e-5)


def test_a_compressed_model_can_be_scripted_and_compiled():
    result = compress(sequential(), params=0.5)
    torch._dynamo.reset()
    for program in (torch.jit.script(copy.deepcopy(result.model)), torch.compile(result.model, backend="eager")):
        torch.testing.assert_close(program(X), result.model(X))


@pytest.mark.parametrize("module", [nn.LSTM(8, 8), nn.MultiheadAttention(8, 2)], ids=["LSTM", "attention"])
def test_what_cannot_be_scripted_says_so(module):
    model = expand_composites(nn.Sequential(module), parts(module, "0"))
    with pytest.raises(rankopt.RankoptError, match=r"torch.jit.script cannot compile .* trace it"):
        torch.jit.script(model)


def test_quantized_layers_cannot_be_scripted_and_say_so():
    with pytest.raises(rankopt.RankoptError, match=r"torch.jit.script cannot compile weights .* another precision"):
        torch.jit.script(nn.Sequential(quantize_(nn.Linear(8, 8), "int8")))


# --- compressed once more ------------------------------------------------------------------------


@functools.cache
def compressed_with(family):
    """A dense model, and the result of compressing it."""
    dense = sequential()
    return dense, compress(dense, space=rankopt.SearchSpace(families=(family,), points=4, steps=5), params=0.7)


@pytest.mark.parametrize("first", ["svd_out", "tt", "tr", "tt_matrix"])
@pytest.mark.parametrize("second", ["svd_out", "tt_matrix"])
def test_a_model_that_was_compressed_twice_loads_from_the_dense_one(tmp_path, first, second):
    dense, once = compressed_with(first)
    space = rankopt.SearchSpace(families=(second,), points=4, steps=5, precisions=("int8",))
    twice = compress(once.model, space=space, bytes=0.95)
    twice.save(tmp_path)
    expected = twice.model(X)
    for model in (dense, sequential, once.model):
        assert torch.equal(rankopt.load(model, tmp_path)(X), expected)


def test_a_quantized_model_compressed_again_loads_from_the_dense_one(tmp_path):
    space = rankopt.SearchSpace(families=("svd_out",), points=4, steps=5, precisions=("int8",), keep_dense=("0",))
    once = compress(sequential(), space=space, bytes=0.4)
    assert {c.precision for c in once.plan.choices} == {"int8", "same"}
    twice = compress(once.model, params=0.9)
    twice.save(tmp_path)
    assert torch.equal(rankopt.load(sequential, tmp_path)(X), twice.model(X))
    assert rankopt.read_plan(tmp_path)[0].before


# --- loading into another model ------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = sequential(), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    result = compress(Classifier(), params=0.5)
    folder = tmp_path_factory.mktemp("run")
    result.save(folder)
    return folder, result.model


def test_loading_into_the_body_says_which_layers_it_lacks_and_what_to_do(saved):
    with pytest.raises(rankopt.PlanError, match=r"no layer 'body.0', .*give the whole model .* take 'body'"):
        rankopt.load(sequential(), saved[0])


def test_loading_into_a_model_without_its_head_names_the_head(saved):
    model = Classifier()
    del model.head
    with pytest.raises(rankopt.PlanError, match=r"has no layer 'head'; give the model that was compressed"):
        rankopt.load(model, saved[0])


def test_loading_into_a_model_with_more_names_what_the_file_lacks(saved):
    model = Classifier()
    model.second_head = nn.Linear(10, 3)
    with pytest.raises(rankopt.PlanError, match=r"the file lacks 'second_head.bias', 'second_head.weight'$"):
        rankopt.load(model, saved[0])


def test_loading_into_a_model_on_the_meta_device_fills_it(saved):
    with torch.device("meta"):
        model = Classifier()
    loaded = rankopt.load(model, saved[0])
    assert torch.equal(loaded(X), saved[1](X))
    assert all(p.is_meta for p in model.parameters())


def test_buffers_on_the_meta_device_that_were_not_saved_are_named(saved):
    with torch.device("meta"):
        model = Classifier()
        model.register_buffer("positions", torch.arange(3), persistent=False)
    with pytest.raises(rankopt.PlanError, match=r"meta device, and its buffers 'positions' are not .* on the CPU"):
        rankopt.load(model, saved[0])


def test_tied_weights_on_the_meta_device_stay_tied(tmp_path):
    def tied() -> nn.Module:
        model = Classifier()
        model.body[2].bias = model.body[0].bias
        return model

    torch.manual_seed(0)
    result = compress(tied(), params=0.96)
    result.save(tmp_path)
    with torch.device("meta"):
        model = tied()
    loaded = rankopt.load(model, tmp_path)
    assert loaded.body[2].bias is loaded.body[0].bias
    assert torch.equal(loaded(X), result.model(X))
