"""Plans that race: the best is found on few examples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankopt.core.progress import silent
from rankopt.model.objective import Divergence
from rankopt.strategies.race import CLOSE, FIRST, race

PLANS = [(i,) for i in range(8)]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


@pytest.fixture
def divergence():
    torch.manual_seed(1)
    return Divergence(make_model(), [torch.randn(512, 16) for _ in range(4)])


class Builder:
    """Models the farther from the dense one, the larger the plan's number; counts the examples that they see."""

    def __init__(self, scale: float) -> None:
        self.scale, self.seen = scale, 0

    def __call__(self, plan):
        model = make_model()
        generator = torch.Generator().manual_seed(plan[0])
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data += 0.05 * (1 + self.scale * plan[0]) * noise * weight.data.std()
        model.register_forward_pre_hook(self._count)
        return model

    def _count(self, _, args):
        self.seen += len(args[0])


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_the_best_plan_wins_or_one_that_is_hardly_worse(divergence, scale):
    whole = {plan: divergence(Builder(scale)(plan)) for plan in PLANS}
    found = race(divergence, make_model(), Builder(scale), PLANS, silent)
    best = min(found, key=found.__getitem__)
    assert whole[best] <= (1 + 2 * CLOSE) * min(whole.values())
    assert found == pytest.approx({plan: whole[plan] for plan in found}, rel=0.1)


def test_plans_that_are_clearly_behind_are_measured_on_the_first_examples_only(divergence):
    build = Builder(scale=1.0)
    assert list(race(divergence, make_model(), build, PLANS, silent)) == [(0,)]
    assert build.seen == 8 * FIRST


def test_equal_plans_are_not_told_apart(divergence):
    build = Builder(scale=0.0)
    found = race(divergence, make_model(), lambda plan: build((3,)), PLANS, silent)
    assert [*found] == PLANS and len(set(found.values())) == 1
    assert build.seen == 8 * FIRST


def test_plans_that_differ_are_measured_on_all_examples_until_their_order_is_known(divergence, monkeypatch):
    monkeypatch.setattr("rankopt.strategies.race.CLOSE", 0.0)
    monkeypatch.setattr("rankopt.strategies.race.CLEAR", 1e9)
    build = Builder(scale=0.1)
    found = race(divergence, make_model(), build, PLANS, silent)
    assert build.seen == 8 * 2048
    assert found == pytest.approx({plan: divergence(build(plan)) for plan in PLANS}, rel=1e-6)


def test_the_same_race_has_the_same_result(divergence):
    first, second = (race(divergence, make_model(), Builder(0.1), PLANS, silent) for _ in range(2))
    assert first == second


def test_a_plan_that_cannot_be_measured_loses(divergence):
    def build(plan):
        model = copy.deepcopy(Builder(1.0)(plan))
        if plan == (0,):
            raise RuntimeError("no such plan")
        if plan == (1,):
            model[0].weight.data.fill_(float("nan"))
        return model

    assert list(race(divergence, make_model(), build, PLANS, silent)) == [(2,)]
    assert race(divergence, make_model(), build, PLANS[:2], silent) == {}


def test_examples_that_depend_on_their_batch_are_measured_as_they_came():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = make_model()[0]

        def forward(self, x):
            return self.linear(x - x.mean(0))

    torch.manual_seed(2)
    dense = Centred().eval()
    divergence = Divergence(dense, [torch.randn(300, 16), torch.randn(300, 16)])

    def build(plan):
        model = copy.deepcopy(dense)
        model.linear.weight.data *= 1 - 0.1 * (1 + plan[0])
        return model

    found = race(divergence, dense, build, PLANS, silent)
    assert found == pytest.approx({plan: divergence(build(plan)) for plan in PLANS})
