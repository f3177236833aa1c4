"""Peak memory of a forward pass against sums by hand, and file sizes against files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankopt.core.records import Choice, Cost, Plan
from rankopt.decompositions.plan import save
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.inventory import inventory
from rankopt.model.memory import Live, file_size, measured_peak, peak_memory
from rankopt.model.quantization import quantize_

FLOAT = 4


class Residual(nn.Module):
    """x + f(x): x lives until it is added."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(10, 40), nn.Linear(40, 10)

    def forward(self, x):
        return x * 2 + self.narrow(torch.relu_(self.wide(x * 2)))


def weights(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_a_chain_holds_the_input_and_two_neighbours():
    chain = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 10))
    activations = FLOAT * (100 + 300 + 300)  # the input is the caller's: it is never freed
    assert peak_memory(chain, torch.randn(7, 100)) == weights(chain) + activations
    in_place = nn.Sequential(nn.Linear(100, 200), nn.ReLU(inplace=True), nn.Linear(200, 300), nn.ReLU(inplace=True))
    assert peak_memory(in_place, torch.randn(7, 100)) == weights(in_place) + FLOAT * (100 + 200 + 300)


def test_a_residual_holds_its_shortcut():
    model = Residual()
    # The input, x * 2 for the sum, and the larger of (x * 2, 40 wide) and (40 wide, 10 narrow).
    assert peak_memory(model, torch.randn(1, 10)) == weights(model) + FLOAT * (10 + 10 + 40 + 10)


def test_convolutions_views_buffers_and_modes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 4))
    maps = 8 * 64
    assert peak_memory(model.train(), torch.randn(2, 3, 8, 8)) == weights(model) + FLOAT * (3 * 64 + 2 * maps)
    assert model.training and int(model[1].num_batches_tracked) == 0


class Counted:
    """Stands for a GPU's allocator: counts what is alive."""

    def __init__(self, live):
        self.live = live

    def now(self):
        return self.live.now

    def peak(self):
        return self.live.peak

    def reset(self):
        self.live.peak = self.live.now


def test_the_peak_measured_on_a_device_is_the_counted_one():
    """The same code as on a GPU: weights, what .eval() builds and activations count, what was there before does not."""
    dense = nn.Linear(64, 64)
    (layer,) = inventory(dense, torch.zeros(1, 64))
    rebuilt = DECOMPOSITIONS["svd_out"].build(dense, layer, (4,), "reconstructed").eval()
    x = torch.randn(3, 64)
    for model in (dense, rebuilt, nn.Sequential(rebuilt, nn.ReLU(), dense), quantize_(nn.Linear(64, 64), "int8")):
        with Live() as live:
            for tensor in (x, *model.parameters(), *model.buffers()):  # what lies there already
                live.see(tensor)
            assert measured_peak(model, x, Counted(live)) == peak_memory(model, x)


def test_memory_counts_rebuilt_and_dequantized_weights():
    dense = nn.Linear(64, 64)
    (layer,) = inventory(dense, torch.zeros(1, 64))
    x, whole = torch.randn(1, 64), FLOAT * 64 * 64
    svd = DECOMPOSITIONS["svd_out"].build(dense, layer, (4,), "reconstructed")
    assert peak_memory(svd, x) >= weights(svd) + whole + FLOAT * 128
    small = quantize_(nn.Linear(64, 64), "int8")
    assert weights(small) == 64 * 64 + 2 + FLOAT * 64  # one scale
    assert peak_memory(small, x) == weights(small) + whole + FLOAT * (64 + 64)


@pytest.mark.parametrize("precision", ["same", "int8", "float16", "bfloat16"])
def test_the_size_of_a_file_is_known_before_it_is_written(precision, tmp_path):
    shared = nn.Linear(30, 30)
    model = nn.Sequential(nn.Conv2d(3, 30, 3), nn.BatchNorm2d(30), nn.Flatten(), shared, nn.ModuleDict({"ä\n": shared}))
    model.append(nn.Linear(30, 1000).double())
    quantize_(model[0], precision)
    choice = Choice("0", "Conv2d", (30, 3, 3, 3), "dense", (), 1, 1, 0.0, "", "dense", precision)
    save(tmp_path, model, Plan((choice,), Cost(0, 0, 0), Cost(0, 0, 0)))
    assert file_size(model) == (tmp_path / "model.safetensors").stat().st_size
