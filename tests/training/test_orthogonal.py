"""Cores of generators that are kept orthogonal in training: through stops, saving, loading and exporting."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankopt
from rankopt.core.errors import TaskError
from rankopt.decompositions import plan as plans
from rankopt.decompositions.orthogonal import keep_orthogonal, make_ordinary, residual
from rankopt.decompositions.registry import DECOMPOSITIONS, GENERATORS
from tests.helpers.models import compressed

RECIPE = rankopt.Recipe(epochs=4, optimizer="adamw", rate=1e-2, weight_decay=0.1, distill=0.5, orthogonal=True)


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 12, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12 * 4, 6)).eval()


@pytest.fixture
def task(dense):
    torch.manual_seed(1)
    x, y = torch.randn(64, 8, 4, 4), torch.randint(0, 6, (64,))
    data = list(zip(x.split(16), y.split(16), strict=True))
    return rankopt.Task(model=dense, example_input=x[:1], calibration=x.split(16), train=data, loss=F.cross_entropy)


def small(dense, family, steps=5):
    return compressed(dense, [torch.randn(8, 8, 4, 4)], family, "reconstructed", 0.4, steps, least=500)


@pytest.mark.parametrize("family", GENERATORS)
def test_cores_start_at_their_nearest_isometries_and_stay_there(dense, task, family):
    model, _ = small(dense, family)
    assert residual(model) > 0.1
    trained = rankopt.finetune(model, task, RECIPE).model
    assert residual(trained) < 1e-5
    free = rankopt.finetune(model, task, rankopt.Recipe(**RECIPE.changed() | {"orthogonal": False})).model
    assert residual(free) > 0.1
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert [p.shape for p in trained.parameters()] == [p.shape for p in model.parameters()]
    moved = zip(trained[0].cores, model[0].cores, strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


@pytest.mark.parametrize("family", ["mera", "brick_wall-linear"])
def test_what_is_already_isometric_does_not_change(family):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3)
    layer = rankopt.inventory(conv, torch.zeros(1, 8, 4, 4))[0]
    module = DECOMPOSITIONS[family].build(conv, layer, (3,))
    for core, into in zip(module.cores, module.family.isometries(layer, (3,)), strict=True):
        matrix = torch.randn(core.shape).reshape(*(core.shape[:into].numel(), -1) if into else (1, -1))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        core.data.copy_((0.7 * left @ right).reshape(core.shape))
    before = module.eval().weight.detach().clone()
    assert keep_orthogonal(module) == sum(into > 0 for into in module.family.isometries(layer, (3,)))
    torch.testing.assert_close(module.eval().weight.detach(), before)
    make_ordinary(module)
    torch.testing.assert_close(module.eval().weight.detach(), before)
    assert residual(module) < 1e-5


@pytest.mark.parametrize("extra", [{}, {"ema": 0.8, "layerwise": 3}, {"precision": "bfloat16", "channels_last": True}])
def test_a_stop_changes_nothing(dense, task, tmp_path, extra):
    model, _ = small(dense, "mera")
    recipe = rankopt.Recipe(**RECIPE.changed() | extra)
    whole = rankopt.finetune(model, task, recipe).model
    count = itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(model, task, recipe, folder=tmp_path, stop=lambda: next(count) == 7)
    again = rankopt.finetune(model, task, recipe, folder=tmp_path, resume=True).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert residual(again) < 1e-5


def test_what_was_trained_is_saved_loaded_and_exported(dense, task, tmp_path):
    model, plan = small(dense, "mera-silu")
    trained = rankopt.finetune(model, task, RECIPE).model.eval()
    plans.save(tmp_path, trained, plan)
    loaded, x = rankopt.load(dense, tmp_path).eval(), torch.randn(3, 8, 4, 4)
    assert residual(loaded) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), trained(x), rtol=0, atol=0)
        program = torch.export.export(trained, (x,))
        torch.testing.assert_close(program.module()(x), trained(x))


def test_frozen_cores_stay_parameters_that_do_not_train(dense):
    model, _ = small(dense, "ttn")
    model[0].cores.requires_grad_(False)
    keep_orthogonal(model)
    kept = model.eval()(torch.ones(1, 8, 4, 4))
    make_ordinary(model)
    assert len([*model[0].cores.parameters()]) == len(model[0].cores) > 3
    assert not any(core.requires_grad for core in model[0].cores)
    torch.testing.assert_close(model.eval()(torch.ones(1, 8, 4, 4)), kept, rtol=0, atol=0)


class Scaled(nn.Linear):
    """A Linear with a learnt factor, a parameter without dimensions."""

    def __init__(self):
        super().__init__(8, 6)
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.factor * super().forward(x)


def test_a_parameter_without_dimensions_does_not_hinder_going_on(tmp_path):
    """Its moments are numbers, too, and may be negative."""
    torch.manual_seed(0)
    model, x, y = Scaled(), torch.randn(64, 8), torch.randint(0, 6, (64,))
    data = list(zip(x.split(16), y.split(16), strict=True))
    task = rankopt.Task(model=model, example_input=x[:1], calibration=x.split(16), train=data, loss=F.cross_entropy)
    recipe = rankopt.Recipe(epochs=4, optimizer="adamw", distill=0.0)
    whole = rankopt.finetune(model, task, recipe).model
    for step in (3, 5, 7, 9):
        count = itertools.count(1)
        with pytest.raises(KeyboardInterrupt):
            rankopt.finetune(model, task, recipe, folder=tmp_path / str(step), stop=lambda: next(count) == step)  # noqa: B023
        again = rankopt.finetune(model, task, recipe, folder=tmp_path / str(step), resume=True).model
        assert torch.equal(again.factor, whole.factor)


def test_a_model_without_generators_is_refused(dense, task):
    with pytest.raises(TaskError, match="no weight of the model is generated"):
        rankopt.finetune(dense, task, RECIPE)
    with pytest.raises(rankopt.RankoptError, match="orthogonal is 1: give true or false"):
        rankopt.Recipe(orthogonal=1)
