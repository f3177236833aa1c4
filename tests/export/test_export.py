"""Exported programs (ONNX, torch.export) and weights compute what the PyTorch model does, and run without it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rankopt
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.experiments.digits import DigitsNet
from rankopt.export import export as exports
from rankopt.export.export import Parity, compare, export, export_weights
from rankopt.model.composites import take_ordinary_path
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from tests.helpers.command import run
from tests.helpers.layers import MODULES, ONE_EACH, PAIRS, build_forms, inputs, make
from tests.helpers.models import whole

# --- every family, every kind of layer ---------------------------------------------------------------


class SideBySide(nn.Module):
    """Layers, each with an input of its own."""

    def __init__(self, layers: dict[str, list[nn.Module]]) -> None:
        super().__init__()
        self.kinds = list(layers)
        self.layers = nn.ModuleList(nn.ModuleList(x) for x in layers.values())

    def forward(self, *xs):
        return [layer(x) for layers, x in zip(self.layers, xs, strict=True) for layer in layers]


def side_by_side(pairs):
    """(families on kinds of layers, each in all its forms; their inputs, three examples)."""
    layers = {kind: [] for _, kind in pairs}
    for family, kind in pairs:
        case, decomposition = make(kind, torch.float32), DECOMPOSITIONS[family]
        rank = (decomposition.ranks(case.layer, [0.9]) or [decomposition.full_rank(case.layer)])[-1]
        layers[kind] += build_forms(family, case, rank, steps=2)[0]
    torch.manual_seed(1)
    return SideBySide(layers).eval(), tuple(inputs(MODULES[kind](), torch.float32)[0][:3] for kind in layers)


def leaves_with_the_same_outputs(pairs, to, path):
    model, xs = side_by_side(pairs)
    exported = export(model, to, path, xs)
    assert 0 <= exported.parity.relative <= 1e-4
    more = tuple(torch.cat([x, x.flip(0)]) for x in xs)  # another batch size
    with torch.no_grad():
        expected = model(*more)
    assert len(expected) == sum(len(DECOMPOSITIONS[family].forms) for family, _ in pairs)
    for mine, theirs in zip(expected, exported.forward(more), strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * mine.abs().max()


WITH_CORES = [(family, "linear") for family in ("tt", "tr", "ht")]  # on a Linear no chain of Linears


def test_every_family_is_exported_with_the_same_outputs(tmp_path):
    """As ONNX; tests/decompositions/test_contract.py has torch.export."""
    assert {family for family, _ in ONE_EACH} == set(DECOMPOSITIONS)
    leaves_with_the_same_outputs([*ONE_EACH, *WITH_CORES], "onnx", tmp_path / "all.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch.export"])
@pytest.mark.parametrize("family", DECOMPOSITIONS)
def test_every_family_is_exported_from_every_kind_of_layer(family, to, tmp_path):
    leaves_with_the_same_outputs([pair for pair in PAIRS if pair[0] == family], to, tmp_path / "all")


# --- modules that were unfolded ----------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 6, bidirectional=True, batch_first=True), nn.GRU(12, 8, batch_first=True)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, x, mask):
        y = self.gru(self.lstm(x)[0])[0]
        return {"logits": self.body(y, src_key_padding_mask=mask).mean(1), "all": y}


@pytest.mark.parametrize("to", ["onnx", "torch.export"])
def test_recurrent_and_attention_modules_are_exported_expanded(to, tmp_path):
    torch.manual_seed(0)
    model = take_ordinary_path(whole(Encoder())).eval()
    x = {"mask": torch.arange(2) >= torch.tensor([[2], [1], [2], [2]]), "x": torch.randn(4, 2, 8)}  # not in order
    exported = export(model, to, tmp_path / "file", x)
    assert exported.parity.relative <= 1e-4 and exported.parity.examples == 4


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x, lengths):
        return self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0]


class Branches(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


def test_a_failed_export_says_why_and_leaves_no_file(tmp_path):
    path, x = tmp_path / "file.onnx", torch.randn(4, 3, 8)
    for model in (Packs(), whole(Packs())):
        with pytest.raises(rankopt.RankoptError, match="lstm is given packed sequences"):
            export(model, "onnx", path, (x, torch.tensor([3, 2, 1, 3])))
    with pytest.raises(rankopt.RankoptError, match=r"torch\.export cannot trace the model"):
        export(Branches(), "torch.export", path, x)
    with pytest.raises(rankopt.RankoptError, match="give --batch 1"):
        export(nn.Linear(8, 2), "onnx", path, x[:1])
    for size in (8, 16):
        with pytest.raises(rankopt.RankoptError, match="holds 4 examples, too few"):
            export(nn.Linear(8, 2), "onnx", path, x, size)
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    model, path = nn.Linear(8, 2), tmp_path / "file.pt2"
    load = exports.LOADERS["torch.export"]
    monkeypatch.setitem(exports.LOADERS, "torch.export", lambda p: lambda x: load(p)(x) * (1 + 1e-3))
    with pytest.raises(rankopt.RankoptError, match=r"differ .*\(0.001 of the largest, 0.0001 is allowed\)"):
        export(model, "torch.export", path, torch.randn(4, 8))
    monkeypatch.setitem(exports.LOADERS, "torch.export", lambda p: lambda x: 1 / 0)
    with pytest.raises(rankopt.RankoptError, match=r"what was written does not run .*division by zero"):
        export(model, "torch.export", path, torch.randn(4, 8))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(rankopt.RankoptError, match=r"pip install 'rankopt\[export\]'"):
        export(model, "onnx", path, torch.randn(4, 8))
    assert not list(tmp_path.iterdir())


def test_a_fused_program_is_compared_with_the_model_itself(tmp_path, monkeypatch):
    model, x = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 3)), torch.randn(4, 8)
    assert export(model, "torch.export", tmp_path / "a", x, fused=True).parity.relative <= 1e-4
    monkeypatch.setattr(exports, "fuse", lambda model, x: nn.Linear(8, 3))
    with pytest.raises(rankopt.RankoptError, match="was not written"):
        export(model, "torch.export", tmp_path / "b", x, fused=True)


def test_differences_are_of_each_output():
    a, b = torch.tensor([1.0, 100.0]), torch.tensor([1e-3, torch.inf])
    assert compare([a, b], [a, b], 2) == Parity(0.0, 0.0, 2)
    found = compare([a + 1, b], [a, b], 2)
    assert (found.absolute, found.relative) == (1.0, 0.01)
    assert compare([a, b + 1e-3], [a, b], 2).relative == pytest.approx(1)
    for wrong in ([a], [a, b[:1]], [a, torch.tensor([1e-3, 1.0])], [a * torch.nan, b]):
        assert compare(wrong, [a, b], 2).relative == torch.inf


# --- a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    run_search(digits, digits.problem({"params": 0.3}), SearchSettings()).save(path)
    return path


WITHOUT_TORCH = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
(y,) = session.run(None, {session.get_inputs()[0].name: np.load(sys.argv[2])})
np.save(sys.argv[3], y)
assert not any(name.startswith(("torch", "rankopt")) for name in sys.modules), "torch is there"
"""


@pytest.mark.parametrize("options", [(), ("--fuse", "--batch", "2")])
def test_onnx_runs_without_torch(folder, digits, tmp_path, options):
    stdout, _ = run("export", folder, "--task", "digits", "--out", tmp_path / "small.onnx", *options)
    assert "largest difference" in stdout and "onnxruntime" in stdout and "compressed" in stdout
    x = torch.cat([b[:1] for b in digits.statistics.batches[:1]] * 2)
    np.save(tmp_path / "x.npy", x.numpy())
    command = [sys.executable, "-c", WITHOUT_TORCH, *(tmp_path / n for n in ("small.onnx", "x.npy", "y.npy"))]
    subprocess.run(command, check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = rankopt.load(DigitsNet, folder).eval()(x)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-4)


def test_programs_and_weights_of_a_run(folder, digits):
    small, x = rankopt.load(DigitsNet, folder).eval(), digits.statistics.batches[0]
    run("export", folder, "--task", "digits", "--to", "torch.export", "--fuse")
    run("export", folder, "--task", "digits", "--to", "state_dict")
    run("export", folder, "--task", "digits", "--to", "state_dict", "--dense", "--out", folder / "dense.safetensors")
    size = (folder / "export.pt2").stat().st_size
    assert size < 4 * rankopt.count(small, x).params + 60_000, "weights and a graph, no calibration data"
    program = torch.export.load(folder / "export.pt2").module()
    dense = DigitsNet()
    dense.load_state_dict(load_file(folder / "dense.safetensors"))
    with torch.no_grad():
        for again in (program, dense.eval()):
            torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-4)
    weights = load_file(folder / "export.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in small.state_dict().items())


def test_weights_are_compared_as_they_are_read_again(folder, digits, tmp_path, monkeypatch):
    small, x = rankopt.load(DigitsNet, folder), digits.statistics.batches[0]
    monkeypatch.setattr(exports, "multiplied_out", lambda dense, small: dense)
    with pytest.raises(rankopt.RankoptError, match="was not written"):
        export_weights(digits.task.model, small, tmp_path / "dense.safetensors", x, multiply=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "tflite"), "unknown format 'tflite': choose from onnx, torch.export, state_dict"),
        (("--to", "state_dict", "--fuse"), "--fuse goes with onnx and torch.export"),
        (("--dense",), "--dense goes with --to state_dict"),
        (("--batch", "some"), "--batch is 'some': give a number from 1, or dynamic"),
        (("--batch", "0"), "--batch is '0'"),
    ],
)
def test_bad_requests_get_one_clear_line(folder, options, message):
    _, stderr = run("export", folder, "--task", "digits", *options, code=2)
    assert message in stderr
