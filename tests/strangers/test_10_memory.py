"""Kind 10: memory that grew with the outputs, the inputs of the widest layer or the calibration data."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates import calibration, input_moments, prepare
from rankopt.candidates.cache import Cache
from rankopt.candidates.calibration import statistics_bytes
from rankopt.candidates.input_moments import Sketch, moments, shrunk, sketch_rows
from rankopt.core.files import available_memory
from rankopt.core.progress import silent
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model import objective
from rankopt.model.layer_kinds import describe
from rankopt.model.objective import Divergence
from rankopt.training import refine
from tests.strangers.models import SPACE, compress, example_batch, net, reasons, sequential

X = example_batch()


# --- measured ----------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from torch import nn
import rankopt
from rankopt.model.objective import Divergence

torch.set_num_threads(1)
taken = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""


def peak(code: str) -> int:
    """Bytes by which `code` raises the peak of a fresh process; it sets `before` at its start."""
    command = [sys.executable, "-c", f"{PEAK}{code}\nprint(taken() - before)"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_the_objective_takes_its_outputs_and_little_more():
    """One example with logits of 128 MiB: the kept ones, those of a compressed model, and pieces."""
    size = 16 * 2048 * 1024 * 4
    code = """
model, x = nn.Conv2d(3, 16, 1), [torch.randn(1, 3, 2048, 1024)]
before = taken()
divergence = Divergence(model, x)
divergence(model)
"""
    assert peak(code) < 4.5 * size  # what the convolution itself takes included


@pytest.mark.slow
def test_a_layer_with_27648_inputs_takes_no_matrix_of_all_its_inputs():
    code = """
model, x = nn.Sequential(nn.Linear(27_648, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 27_648)
before = taken()
space = rankopt.SearchSpace(families=("svd_out",), points=2, steps=3)
result = rankopt.compress(model, [x], {"params": 0.5}, space=space)
assert result.plan.choices[0].method != "dense"
"""
    assert peak(code) < 5e8 < 8 * 27_648**2  # 6 GB


# --- outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.h(s.b(s.a(x))),
        lambda s, x: {"boxes": s.b(s.a(x)), "logits": s.h(s.a(x)), "loss": s.h(s.a(x)).mean()},
        lambda s, x: s.b(s.a(x)).sum(1),
    ],
)
def test_outputs_that_are_not_kept_give_the_same_objective(forward, monkeypatch):
    model, other, batches = net(forward), net(forward), list(X.split(100))
    with torch.no_grad():
        other.a.weight.mul_(0.9)
    kept = Divergence(model, batches)
    expected = kept(other)
    size = sum(z.numel() * z.element_size() for zs in kept.reference for z in zs)
    monkeypatch.setattr(objective, "KEPT", size // 2)
    some = Divergence(model, batches)
    assert None in some.reference
    assert some(other) == expected and some(model) == 0
    monkeypatch.setattr(objective, "CHUNK", 50)  # less than a line of classes times ten
    assert Divergence(model, batches)(other) == pytest.approx(expected, rel=1e-9)


def test_slices_of_outputs_that_are_not_kept_add_up(monkeypatch):
    model, other, batches = sequential(), sequential(), list(X.split(100))
    with torch.no_grad():
        other[0].weight.mul_(0.9)
    expected = Divergence(model, batches)(other)
    monkeypatch.setattr(objective, "KEPT", 0)
    parts = [part.sums(other) for part in Divergence(model, batches).slices([0.3, 0.7, 1.0])]
    assert sum(total for total, _ in parts) / sum(n for _, n in parts) == pytest.approx(expected, rel=1e-6)


# --- wide layers -------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """A limit that small layers exceed."""
    for module in (input_moments, calibration, refine):
        monkeypatch.setattr(module, "WIDEST", 60)


def test_of_a_wide_layer_a_sketch_is_kept(narrow):
    model = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 36, 5))
    layers = rankopt.inventory(model, torch.zeros(1, 8, 8, 8))
    x = torch.randn(50, 8, 8, 8)
    found = moments(model, layers, [x])
    kept = sketch_rows(layers[1])
    assert found["0"].shape == (2, 36, 36) and found["2"].shape == (1, 1 + kept, 216) and kept == 60**2 // 216 - 1
    with torch.no_grad():
        seen = model[1](model[0](x)).double()
    whole = shrunk((seen.T @ seen / 50)[None], 50)
    sketch = as_whole(found["2"])
    assert sketch.trace() == pytest.approx(whole[0].trace().item(), rel=1e-5)
    leading = torch.linalg.eigvalsh(whole[0])[-kept]
    assert torch.linalg.matrix_norm(sketch - whole[0], 2) < 1.5 * leading, "off by what was left out, at most"


def as_whole(sketch: torch.Tensor) -> torch.Tensor:
    """The moment (n, n) that a sketch stands for."""
    return torch.diag(sketch[0, 0]) + sketch[0, 1:].T @ sketch[0, 1:]


@pytest.mark.parametrize("n", [20, 400])
def test_a_sketch_of_few_inputs_is_exact_and_the_error_of_many_is_within_its_bound(n, narrow):
    torch.manual_seed(0)
    layer = describe(nn.Linear(90, 5), "x")
    x = torch.randn(n, 90) @ torch.diag(torch.linspace(0.1, 3, 90) ** 3)
    sketch = Sketch(layer)
    for part in x.split(17):
        sketch.add(part.T[None])
    expected = shrunk((x.double().T @ x.double() / n)[None], n)
    if n == 20:
        assert sketch.error == 0
        torch.testing.assert_close(as_whole(sketch.moment())[None], expected, rtol=1e-4, atol=1e-4)
    found = as_whole(sketch.moment())
    torch.testing.assert_close(found.diagonal(), expected[0].diagonal(), rtol=0.05, atol=1e-3)
    assert torch.linalg.matrix_norm(found - expected[0], 2) <= 2 * sketch.error / n + 1e-3


def layers_to_fit() -> list[nn.Module]:
    return [nn.Conv2d(16, 12, 3, groups=2), nn.Linear(36, 20)]


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("family", list(DECOMPOSITIONS.built_in))
def test_a_fit_to_the_mean_squares_is_the_fit_to_a_diagonal_matrix(family, number):
    torch.manual_seed(0)
    module = layers_to_fit()[number].double()
    layer = describe(module, "x")
    decomposition = DECOMPOSITIONS[family]
    ranks = decomposition.ranks(layer, [0.4, 0.7])[:2]
    diagonal = torch.rand(layer.groups, layer.patch, dtype=torch.float64) + 0.1
    weight = module.weight.detach()
    found, expected = (
        [fit.error for fit in decomposition.fit(layer, weight, ranks, moment, None, 20)]
        for moment in (diagonal, torch.diag_embed(diagonal))
    )
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("family", list(DECOMPOSITIONS.built_in))
def test_a_fit_to_a_sketch_is_the_fit_to_the_matrix_that_it_stands_for(family, number):
    torch.manual_seed(0)
    module = layers_to_fit()[number].double()
    layer = describe(module, "x")
    decomposition = DECOMPOSITIONS[family]
    ranks = decomposition.ranks(layer, [0.5])[:1]
    sketch = torch.rand(layer.groups, 8, layer.patch, dtype=torch.float64) + 0.1
    matrix = torch.diag_embed(sketch[:, 0]) + sketch[:, 1:].mT @ sketch[:, 1:]
    weight = module.weight.detach()
    found, expected = (
        [fit.error for fit in decomposition.fit(layer, weight, ranks, moment, None, 20)] for moment in (sketch, matrix)
    )
    assert found == pytest.approx(expected, rel=0.02)


def test_a_wide_layer_is_replaced_and_the_report_says_what_was_assumed(narrow):
    model = sequential()
    result = compress(model, params=0.6)
    assert any(c.method == "svd_out" for c in result.plan.choices)
    text = " ".join(result.summary().split())
    assert "'0', '2', '4': more than 60 inputs, of whose correlations only" in text
    refined = rankopt.compress(model, [X], {"params": 0.6}, space=SPACE, refine=True)
    assert refined.plan.cost.params <= refined.limits[0].target


@pytest.mark.parametrize("strategy", ["evbmf", "lasso"])
def test_strategies_that_read_statistics_take_a_diagonal(strategy, narrow):
    result = rankopt.compress(sequential(), [X], {"params": 0.6}, space=SPACE, strategy=strategy)
    assert result.plan.cost.params <= result.limits[0].target


def test_a_layer_with_very_many_outputs_stays_dense_and_says_so(monkeypatch):
    monkeypatch.setattr(prepare, "WIDEST", 60)
    result = compress(nn.Sequential(nn.Linear(64, 50), nn.Linear(50, 128)).eval(), params=0.9)
    assert "its 128 outputs are more than 60" in reasons(result)["1"]


# --- estimated and refused ---------------------------------------------------------------------------


def test_too_little_memory_is_said_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "available_memory", lambda: 300_000)
    with pytest.raises(rankopt.RankoptError, match=r"3 layers take .* and 0.3 MB of memory are free: .*'2', '0'"):
        rankopt.compress(sequential(), [X], {"params": 0.5}, space=SPACE, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_what_the_statistics_take(tmp_path):
    compress(sequential(), params=0.5)
    layers = rankopt.inventory(sequential(), X[:1])
    rankopt.compress(sequential(), [X], {"params": 0.5}, space=SPACE, cache=tmp_path)
    (path,) = tmp_path.glob("statistics-*")
    tensors = Cache(tmp_path).read_tensors(path.stem)
    taken = sum(t.numel() * t.element_size() for n, t in tensors.items() if not n.startswith("rows"))
    assert taken == sum(map(statistics_bytes, layers))


@pytest.mark.parametrize("size", [1, 450_000, 2**30])
def test_statistics_in_blocks_are_those_of_all_layers_at_once(size, tmp_path, monkeypatch):
    model = sequential()
    layers = rankopt.inventory(model, X[:1])
    s, h = calibration.calibrate(model, layers, [X], silent)
    monkeypatch.setattr(calibration, "BLOCK_BYTES", size)
    found = calibration.Statistics(model, layers, [X], "key", Cache(tmp_path), silent)
    found.ensure_cached()
    assert (
        len(list(tmp_path.glob("statistics-*")))
        == len(calibration.blocks(layers))
        == {1: 3}.get(size, 1 + (size < 10**6))
    )
    for layer in layers:
        for kept, expected in zip(found[layer.name], (s[layer.name], h[layer.name]), strict=True):
            torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-9)
        assert found.rows(layer.name) == len(X)


def test_a_damaged_block_is_measured_again(tmp_path):
    model = sequential()
    found = calibration.Statistics(model, rankopt.inventory(model, X[:1]), [X], "key", Cache(tmp_path), silent)
    before = found["0"][0]
    next(tmp_path.glob("statistics-*")).write_bytes(b"nothing")
    torch.testing.assert_close(found["0"][0], before)


def test_available_memory_is_a_plausible_number():
    free = available_memory()
    assert free is None or 10**7 < free < 10**14


# --- calibration data --------------------------------------------------------------------------------


def test_large_inputs_are_bounded_and_that_is_said(monkeypatch):
    monkeypatch.setattr(calibration, "CALIBRATION_BYTES", 100 * 64 * 4)
    result = compress(sequential(), X.split(32), params=0.5)
    assert any("only the first 96 calibration examples are used" in text for text in result.info["warnings"])
    result = compress(sequential(), [X], params=0.5)  # a single batch is taken whole
    assert not any("only the first" in text for text in result.info["warnings"])
