"""Calibration statistics measured block by block, in this process and in others."""

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates import calibration
from rankopt.candidates.cache import Cache
from rankopt.candidates.calibration import Statistics
from rankopt.core.progress import silent
from tests.helpers.pools import Elsewhere


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK_BYTES", 1)  # a block for each layer
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def statistics(model, folder, pool=None):
    layers = rankopt.inventory(model, torch.zeros(1, 8))
    batches = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).split(16)
    found = Statistics(model, layers, batches, "key", Cache(folder), silent)
    found.ensure_cached(pool)
    assert len([*folder.glob("statistics-key-*")]) == 3
    return found


def test_other_processes_measure_the_blocks_to_the_same_last_bit(model, tmp_path):
    pool = Elsewhere()
    here, there = statistics(model, tmp_path / "here"), statistics(model, tmp_path / "there", pool)
    assert pool.calls == 3
    for name in here:
        assert all(torch.equal(a, b) for a, b in zip(here[name], there[name], strict=True))
        assert here.rows(name) == there.rows(name) == 64


def test_a_model_that_cannot_be_sent_is_calibrated_here(model, tmp_path):
    pool = Elsewhere()
    model.lock = (number for number in range(3))
    assert statistics(model, tmp_path, pool).rows("0") == 64 and not pool.calls
