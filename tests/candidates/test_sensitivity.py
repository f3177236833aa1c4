"""Sensitivities: what they cost in forward passes, and that cheaper runs measure the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.candidates.pool import Pool
from rankopt.candidates.prepare import prepare
from rankopt.candidates.probing import Prober, ProbeRuns, Sample
from rankopt.candidates.sensitivity import PASSES, Curve
from rankopt.core.progress import silent
from rankopt.core.records import Candidate, Cost, Layer
from rankopt.model import objective
from rankopt.model.objective import Divergence
from tests.helpers.pools import Elsewhere

ERRORS = [2.0**-k for k in range(1, 10)]


class Chain(nn.Module):
    """Linears one after the other; counts the examples that go through."""

    def __init__(self, depth: int, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.seen = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += len(x)
        for layer in self.layers:
            x = x + 0.3 * torch.relu(layer(x))
        return x


def noisy(module: nn.Module, _layer: Layer, candidate: Candidate) -> nn.Module:
    """A replacement with a given relative error."""
    new = copy.deepcopy(module)
    noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        new.weight += candidate.error**0.5 * module.weight.norm() / noise.norm() * noise
    return new


def probed(model: nn.Module, x: Tensor, batch: int, pool: Pool | None = None) -> tuple[dict[str, Curve], Prober]:
    """The curves of a model's layers, and what measured them."""
    layers = rankopt.inventory(model.eval(), x[:2])
    candidates = {
        layer.name: [Candidate("svd_out", (k,), Cost(k, k, k), e) for k, e in enumerate(ERRORS, 1)] for layer in layers
    }
    prober = Prober(Divergence(model, x.split(batch)), model, layers, noisy, silent, pool)
    return prober.curves(candidates), prober


def whole_runs(model: nn.Module, layers, curves, objective: Divergence) -> dict[str, list[float]]:
    """The rises at the curves' errors, each of a whole model on all examples."""
    found = {}
    for layer in layers:
        own = []
        for error, _ in curves[layer.name]:
            changed = copy.deepcopy(model)
            new = noisy(model.get_submodule(layer.name), layer, Candidate("svd_out", (1,), Cost(1, 1, 1), error))
            if layer.name:
                changed.set_submodule(layer.name, new)
            own.append(objective(changed if layer.name else new))
        found[layer.name] = own
    return found


# --- the bound on forward passes -----------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, 60, 150])
def test_all_layers_together_take_at_most_60_forward_passes(depth):
    torch.manual_seed(0)
    model, x = Chain(depth), torch.randn(512, 6)
    divergence = Divergence(model, [x])
    layers = rankopt.inventory(model, x[:2])
    candidates = {
        layer.name: [Candidate("svd_out", (k,), Cost(k, k, k), e) for k, e in enumerate(ERRORS, 1)] for layer in layers
    }
    model.seen[0] = 0
    prober = Prober(divergence, model, layers, noisy, silent)
    curves = prober.curves(candidates)
    assert 0 < model.seen[0] <= PASSES * len(x)
    assert model.seen[0] == prober.passes * len(x), "what is reported is what went through the model"
    assert all(len(curve) >= 2 for curve in curves.values())


@pytest.mark.parametrize(("depth", "most"), [(4, 4 * 5 + 1), (20, 61), (70, 71)])
def test_an_objective_of_the_tasks_own_is_called_60_times_or_once_for_each_of_more_layers(depth, most, tmp_path):
    calls = []

    def objective(model):
        calls.append(model)
        return float(model(x).square().mean())

    x = torch.randn(32, 6)
    space = rankopt.SearchSpace(families=("svd_out",), points=6, steps=0)
    task = rankopt.Task(Chain(depth).eval(), x[:1], calibration=[x], objective=objective)
    found = prepare(task, space, tmp_path, workers=1)
    assert len(calls) == found.passes <= most


def test_outputs_of_the_dense_model_that_are_not_kept_count(monkeypatch):
    monkeypatch.setattr(objective, "KEPT", 0)
    model, x = Chain(3), torch.randn(96, 6)
    divergence, layers = Divergence(model, x.split(40)), rankopt.inventory(model, x[:2])
    model.seen[0] = 0
    candidates = {x.name: [Candidate("svd_out", (1,), Cost(1, 1, 1), 0.1)] for x in layers}
    prober = Prober(divergence, model, layers, noisy, silent)
    prober.curves(candidates)
    assert model.seen[0] == pytest.approx(prober.passes * len(x))


def test_curves_from_the_cache_cost_no_pass(tmp_path):
    x = torch.randn(32, 6)
    space = rankopt.SearchSpace(families=("svd_out",), points=3, steps=0)
    task = rankopt.Task(Chain(2).eval(), x[:1], calibration=[x])
    first, second = (prepare(task, space, tmp_path, workers=1) for _ in range(2))
    assert first.curves == second.curves and first.passes > 0 == second.passes


# --- cheaper runs give the same ------------------------------------------------------------------------


class Residual(nn.Module):
    """A network with a shortcut whose sum is formed in place, as torchvision's ResNets form it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.a, self.b, self.short = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.b(self.act(self.a(x)))
        out += self.short(x)
        return self.head(self.act(out).mean((2, 3)))


class Twice(nn.Module):
    """A layer that is called twice, and an activation that works in place on what the forward uses further."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.act(y)
        y = self.b(self.a(y)) + y
        return self.head(y)


class Stateful(nn.Module):
    """A module's output depends on how often it was called: only whole runs are right."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(6, 6), nn.Linear(6, 5), []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.a(x)]
        hidden = nn.Identity()(self.kept[0])
        return self.b(torch.tanh(hidden) + torch.rand(6, device=x.device))


class BatchNormed(nn.Module):
    """Examples depend on their batch, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.relu(y - y.mean(0)))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Chain(5), torch.randn(60, 6)),
        (Residual(), torch.randn(60, 3, 6, 6)),
        (Twice(), torch.randn(60, 6)),
        (Stateful(), torch.randn(60, 6)),
        (BatchNormed(), torch.randn(60, 6)),
        (nn.Linear(6, 5), torch.randn(60, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_curves_are_those_of_whole_runs(model, x):
    curves, prober = probed(model, x, 40)
    expected = whole_runs(model, prober.layers, curves, Divergence(model, x.split(40)))
    for name, curve in curves.items():
        assert len(curve) >= 3
        assert [rise for _, rise in curve] == pytest.approx(expected[name], rel=1e-4), name


def test_a_sample_of_the_examples_gives_nearly_the_same_curves():
    torch.manual_seed(0)
    model, x = Chain(12), 2 * torch.randn(1600, 6)
    curves, prober = probed(model, x, 400)
    expected = whole_runs(model, prober.layers, curves, Divergence(model, x.split(400)))
    assert prober.passes < 30
    for name, curve in curves.items():
        assert [rise for _, rise in curve] == pytest.approx(expected[name], rel=0.25), name


def test_no_run_is_larger_than_the_batches_of_the_task():
    """A task's batches may be as large as memory allows."""
    torch.manual_seed(0)
    model, x, sizes = Chain(4), torch.randn(1600, 6), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    probed(model, x, 50)
    assert max(sizes) == 50 and sizes.count(50) > len(sizes) / 2


def test_runs_begin_at_the_layer():
    """The last layer's probes do not call the first layer."""
    model, x = Chain(3), torch.randn(96, 6)
    calls = []
    model.layers[0].register_forward_hook(lambda module, *_: calls.append("forward" in vars(module)))
    _, prober = probed(model, x, 96)
    assert prober.runs.replay.before["layers.2"] == ["layers.0", "layers.1"]
    assert sum(calls) >= 8, "three probes of each of the other layers, and one comparison"


def test_the_model_is_left_as_it_was():
    model = Residual()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    probed(model, torch.randn(64, 3, 6, 6), 64)
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name])


# --- samples -------------------------------------------------------------------------------------------


def test_a_sample_estimates_the_mean_without_bias_and_knows_its_error():
    """Of a thousand units, of which few count much, as their expected share says."""
    torch.manual_seed(0)
    expected = 1 + 20 * torch.rand(1000, dtype=torch.float64) ** 8
    off, errors = [], []
    for _ in range(50):
        sample = Sample(expected[torch.randperm(1000)])
        rises = sample.expected * torch.rand(1000, dtype=torch.float64)
        mean, error = sample.mean(rises[sample.order[:100]])
        off.append(mean / rises.mean().item() - 1)
        errors.append(error)
    off = torch.tensor(off)
    assert abs(off.mean()) < 0.03
    assert off.std() == pytest.approx(sum(errors) / len(errors), rel=0.3)
    assert sample.mean(rises[sample.order]) == (pytest.approx(rises.mean().item()), 0.0)


def test_parts_of_the_objective_add_up_to_the_whole():
    model, other, x = Chain(2), Chain(2), torch.randn(50, 6)
    whole = Divergence(model, x.split(16))
    for divisible in (True, False):
        whole.divisible = divisible
        parts = [whole.part(s) for s in (slice(0, None, 2), torch.arange(1, whole.units, 2))]
        values = torch.cat([part.by_unit(other) for part in parts])
        assert len(values) == whole.units == sum(part.units for part in parts)
        assert values.mean().item() == pytest.approx(whole(other), rel=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_a_sample_from_several_batches_is_one_batch(kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(objective, "KEPT", 0)
    model, other, x = Chain(2), Chain(2), torch.randn(50, 6)
    part = Divergence(model, x.split(16)).part(torch.arange(1, 50, 2))
    joined = part.joined()
    assert [len(batch) for batch in joined.batches] == [25] and len(part.batches) == 4
    torch.testing.assert_close(joined.by_unit(other), part.by_unit(other))


def test_sequences_of_several_lengths_stay_in_their_batches():
    class Tagger(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    part = Divergence(Tagger(6, 5), [torch.randn(4, n, 6) for n in (3, 7)]).part(torch.arange(1, 8))
    assert part.joined() is part


# --- other processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [20, 200])
@pytest.mark.parametrize("kept", [True, False])
def test_other_processes_measure_the_same_to_the_last_bit(batch, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(objective, "KEPT", 0)
    model, x, pool = Residual(), torch.randn(400, 3, 6, 6), Elsewhere()
    here, prober = probed(model, x, batch)
    there, other = probed(model, x, batch, pool)
    assert there == here and other.passes == prober.passes and pool.calls >= 6


def test_a_model_that_cannot_be_sent_is_measured_here():
    model, x, pool = Chain(3), torch.randn(96, 6), Elsewhere()
    model.lock = (number for number in range(3))
    assert probed(model, x, 48, pool)[0] == probed(model, x, 48)[0] and not pool.calls


def test_a_gpu_whose_memory_is_out_says_nothing_of_a_candidate(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ProbeRuns, "rise", full)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    task = rankopt.Task(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), x[:1], [x])
    with pytest.raises(rankopt.RankoptError, match="the GPU's memory is out while layer '0' is measured"):
        prepare(task, rankopt.SearchSpace(families=("svd_out",), points=3), tmp_path, workers=1)


def test_outputs_that_compare_the_examples_of_a_batch_are_measured_on_whole_batches(tmp_path):
    """As CLIP's similarities of all pairs."""

    class Similarities(nn.Module):
        def forward(self, x):
            return x @ x.T

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Similarities()).eval()
    space = rankopt.SearchSpace(families=("svd_out",), points=4)
    result = rankopt.compress(model, x.split(16), {"params": 0.8}, space=space, cache=tmp_path)
    assert result.info["cost"]["compressed"]["params"] <= 0.8 * result.info["cost"]["dense"]["params"]
