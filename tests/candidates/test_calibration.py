"""Calibration statistics measured block by block, in this process and in others."""

import dataclasses
import threading

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates import calibration, fit, input_moments
from rankopt.candidates.cache import Cache
from rankopt.candidates.calibration import Statistics
from rankopt.candidates.input_moments import Sample, add_gram, columns, moments
from rankopt.candidates.prepare import prepare
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


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (5, 3, 40)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 16, 16)),
    "dilated": (nn.Conv2d(3, 4, 3, padding=2, dilation=2, padding_mode="circular"), (5, 3, 12, 12)),
    "3d": (nn.Conv3d(2, 3, (1, 3, 3)), (3, 2, 4, 8, 8)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (5, 3, 8, 8)),
    "linear": (nn.Linear(6, 4), (50, 6)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_sample_holds_vectors_that_the_layer_sees(kind):
    module, shape = CONVOLUTIONS[kind]
    (layer,) = rankopt.inventory(nn.Sequential(module), torch.zeros(1, *shape[1:]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (every,), (some,) = columns(layer, module, x), columns(layer, module, x, Sample(0.2))
    assert every.shape[2] / 6 < some.shape[2] < every.shape[2] / 2
    assert torch.equal(some, next(iter(columns(layer, module, x, Sample(0.2)))))  # always the same ones
    apart = torch.cdist(some.flatten(0, 1).T, every.flatten(0, 1).T, compute_mode="donot_use_mm_for_euclid_dist")
    assert (apart.min(1).values == 0).all()
    assert apart.argmin(1).unique().numel() > some.shape[2] / 2  # and not one of them again and again


def test_a_moment_of_many_vectors_is_that_of_a_sample_of_them(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    batches = torch.randn(256, 2, 20, 20).split(64)
    layers = rankopt.inventory(model, batches[0][:1])
    whole = moments(model, layers, batches)
    for constant in ("ROWS", "ROWS_EACH"):
        monkeypatch.setattr(input_moments, constant, 200)
    assert not any(torch.equal(s, whole[name]) for name, s in moments(model, layers, batches).items())
    rows: dict[str, int] = {}
    some = moments(model, layers, batches, rows=rows)
    for layer in layers:
        assert rows[layer.name] == 256 * layer.positions
        assert torch.linalg.matrix_norm(some[layer.name] - whole[layer.name]) < 0.15 * torch.linalg.matrix_norm(
            whole[layer.name]
        )


def test_damaged_statistics_are_measured_again_before_workers_fit(tmp_path, monkeypatch):
    """Not while calls are sent: joblib does that in a thread of its own, which may not run the model."""
    monkeypatch.setattr(calibration, "BLOCK_BYTES", 1)  # a block for each layer
    for name in ("START_UP", "IDLE"):
        monkeypatch.setattr(fit, name, 0.0)  # everything in workers
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    task = rankopt.Task(nn.Sequential(*(nn.Linear(16, 16) for _ in range(12))).eval(), x[:1], [x])
    space = rankopt.SearchSpace(families=("svd_out",), points=2)
    prepare(task, space, tmp_path, workers=1)
    files = [*tmp_path.rglob("statistics-*.safetensors")]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = []
    again = dataclasses.replace(space, families=("svd_out", "tt_matrix"))
    thread = threading.Thread(target=lambda: found.append(prepare(task, again, tmp_path, workers=2)), daemon=True)
    thread.start()
    thread.join(180)
    assert len(files) == 12 and found, "prepare does not end"


def test_a_backward_that_takes_more_than_the_gpus_memory_is_no_missing_gradient(model, tmp_path):
    class Full(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

    with pytest.raises(rankopt.TaskError, match="smaller calibration batches"):
        statistics(nn.Sequential(*model, Full()), tmp_path)


def test_gradients_and_whether_they_are_taken_are_left_as_they_were(model, tmp_path):
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].weight.requires_grad = False
    statistics(model, tmp_path)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[4].weight.grad is None


@pytest.mark.parametrize(("size", "rows"), [(5, 7), (256, 300), (600, 90), (1500, 40)])
def test_a_gram_matrix_in_blocks_is_the_product(size, rows):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, size, rows, generator=generator)
    total = torch.ones(2, size, size, dtype=torch.float64)
    add_gram(total, a)
    torch.testing.assert_close(total - 1, a.double() @ a.double().mT, rtol=1e-4, atol=1e-4)
