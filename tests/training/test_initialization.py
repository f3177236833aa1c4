"""Training from scratch: initial factors whose weight varies as a dense one does, for every family."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import rankopt
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.inventory import inventory
from rankopt.model.layer_kinds import describe
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.training.initialization import draw, from_scratch, untrained
from tests.helpers.command import run
from tests.helpers.layers import MODULES, PAIRS, make


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_weights_vary_as_dense_ones_at_the_start(family, name):
    """Mean square of the weight that the module's factors multiply to: twice the inverse of the fan-in."""
    torch.manual_seed(0)
    module, decomposition = MODULES[name](), DECOMPOSITIONS[family]
    layer = describe(module)
    for rank in decomposition.ranks(make(name).layer, [0.2, 0.8]):
        new = decomposition.build(module, layer, rank)
        load_factors(new, draw(decomposition, layer, rank, 2 / layer.patch))
        assert new.weight.square().mean().item() * layer.patch / 2 == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    "family", [f for f in DECOMPOSITIONS if getattr(DECOMPOSITIONS[f], "activation", "") != "tanh"]
)
@pytest.mark.parametrize("make_module", [lambda: nn.Conv2d(32, 48, 3), lambda: nn.Linear(256, 240)])
def test_the_variance_is_pans_product(family, make_module):
    """Number of paths through the bonds times the factors' variances; the paths are the weight of factors of ones."""
    torch.manual_seed(0)
    decomposition, module = DECOMPOSITIONS[family], make_module()
    x = torch.zeros(1, 32, 5, 5) if isinstance(module, nn.Conv2d) else torch.zeros(1, 256)
    (layer,) = inventory(module, x)
    if decomposition.full_rank(layer) is None:
        assert isinstance(module, nn.Linear) or family == "tt_matrix"
        return
    rank = decomposition.ranks(layer, [0.5])[-1]
    logs = []
    for _ in range(8):
        factors = draw(decomposition, layer, rank, 2 / layer.patch)
        paths = decomposition.weight(layer, tuple(torch.ones_like(f) for f in factors)).mean()
        product = paths * math.prod(f.square().mean() for f in factors)
        logs.append(math.log(product * layer.patch / 2))
    assert abs(sum(logs) / 8) < math.log(1.3)


@pytest.fixture(scope="module")
def result(digits):
    return run_search(digits, digits.problem({"params": 0.4}), SearchSettings())


def test_a_plan_from_scratch(result, digits):
    model = digits.task.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, again, other = (from_scratch(model, result.plan, seed).state_dict() for seed in (0, 0, 1))
    assert first.keys() == result.model.state_dict().keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key])
        if tensor.is_floating_point() and not key.startswith("bn") and "bias" not in key:
            assert not torch.equal(tensor, other[key]) and not torch.equal(tensor, result.model.state_dict()[key])
        if "bias" in key or "running_mean" in key:
            assert not tensor.any()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert rankopt.count(from_scratch(model, result.plan), digits.task.example_input) == result.plan.cost


def test_recurrent_and_attention_maps_start_as_their_own_modules_do(tmp_path):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.attention = (
                nn.LSTM(24, 32, batch_first=True),
                nn.MultiheadAttention(32, 4, batch_first=True),
            )

        def forward(self, x):
            h = self.lstm(x)[0]
            return self.attention(h, h, h)[0].mean(1)

    batches = [torch.randn(16, 5, 24) for _ in range(4)]
    space = rankopt.SearchSpace(families=("svd_out",), fractions=(0.5,), steps=0)
    made = rankopt.compress(Net(), batches, {"params": 0.6}, space=space, cache=tmp_path)
    small = from_scratch(Net(), made.plan)
    parts = {c.name: small.get_submodule(c.name) for c in made.plan.choices if c.method != "dense"}
    assert any("hh" in n for n in parts) and any("attention" in n for n in parts)
    for name, part in parts.items():
        bound = 1 / 32**0.5 if "lstm" in name else (6 / (4 * 32)) ** 0.5 if "proj" in name[-6:] else None
        if bound and "out_proj" not in name:
            assert part.weight.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.15)


def test_parameters_that_cannot_be_initialized_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))

    with pytest.raises(rankopt.TaskError, match=r"module 'own' \(Own\) holds parameters and has no reset_parameters"):
        untrained(nn.ModuleDict({"own": Own()}))


def test_train_from_scratch(result, tmp_path):
    result.save(tmp_path / "run")
    command = ("train", tmp_path / "run", "--task", "digits", "--from-scratch", "--epochs", 8)
    stdout, _ = run(*command)
    info = json.loads((tmp_path / "run" / "trained" / "result.json").read_text())
    assert info["training"]["before"] < 0.3 < 0.85 < info["score"]["compressed"]["test"]
    assert info["training"]["test_before"] is None and "trained from scratch" in stdout
    assert "as planned" in run("apply", tmp_path / "run" / "trained", "--task", "digits", "--check")[0]
