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


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.idle, self.out = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embedding(x).permute(0, 3, 1, 2)
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))).flatten(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def statistics(model, folder, pool=None):
    layers = rankopt.inventory(model, torch.zeros(1, 8))
    batches = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).split(16)
    found = Statistics(model, layers, batches, "key", Cache(folder), silent)
    found.ensure_cached(pool)
    return found


def test_other_processes_measure_several_blocks_to_the_last_bit(model, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK_BYTES", 1)  # a block for each layer
    pool = Elsewhere()
    here, there = statistics(model, tmp_path / "here"), statistics(model, tmp_path / "there", pool)
    assert pool.calls == 3 * 2, "metrics and moments of each block"
    for name in here:
        assert all(torch.equal(a, b) for a, b in zip(here[name], there[name], strict=True))
        assert here.rows(name) == there.rows(name) == 64


def test_other_processes_measure_shares_of_one_block_to_the_last_bit(tmp_path):
    """Convolutions, groups, an embedding and a layer that no input reaches."""
    torch.manual_seed(0)
    model, pool = Mixed().eval(), Elsewhere()
    batches = torch.randint(16, (24, 5, 5), generator=torch.Generator().manual_seed(0)).split(8)
    here, there = (
        Statistics(model, rankopt.inventory(model, batches[0]), batches, "key", Cache(tmp_path / name), silent)
        for name in ("here", "there")
    )
    here.ensure_cached()
    there.ensure_cached(pool)
    assert pool.calls == 4 and len(here) == 5
    for name in here:
        for a, b in zip(here[name], there[name], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name
        assert here.rows(name) == there.rows(name)
    assert not there.rows("idle") and there.rows("out") == 24


def test_shares_take_about_equally_long():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(9)))
    layers = rankopt.inventory(model, torch.zeros(1, 16))
    found = calibration.shares(layers)
    assert [len(share) for share in found] == [3, 3, 3]
    assert sorted(x.name for share in found for x in share) == [x.name for x in layers]
    assert calibration.shares(layers[:1]) == [[*layers[:1]]]


def test_a_model_that_cannot_be_sent_is_calibrated_here(model, tmp_path):
    pool = Elsewhere()
    model.lock = (number for number in range(3))
    assert statistics(model, tmp_path, pool).rows("0") == 64 and not pool.calls
