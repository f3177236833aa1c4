"""Kind 9: a budget that cannot be met, and the error did not say why."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rankopt
from rankopt.core.records import BUDGETS, MEASURED
from tests.strangers.models import SPACE, compress, example_batch, net, sequential


def refusal(model: nn.Module, batches=None, space=SPACE, **budget) -> list[str]:
    """The lines of the error, whose first gives the least, and which all fit a terminal."""
    with pytest.raises(rankopt.BudgetError, match="cannot be met") as caught:
        compress(model, batches, space, **budget)
    lines = str(caught.value).splitlines()
    assert all(len(line) <= 100 for line in lines), lines
    assert len(lines) <= 7
    return lines


def shares(lines: list[str]) -> dict[str, float]:
    """What is said of a part -> its per cent of the dense model."""
    found = [re.fullmatch(r" *([\d.]+) %  (.*)", line) for line in lines]
    return {m[2]: float(m[1]) for m in found if m}


class Tied(nn.Module):
    """An embedding and a head that share a weight of 32,000 numbers, and a small layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(1000, 32), nn.Linear(32, 32), nn.Linear(32, 1000, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.mid(self.emb(x)))


def test_a_tied_weight_is_named_and_counted_once():
    lines = refusal(Tied().eval(), [torch.arange(512).reshape(64, 8)], params=0.5)
    said = shares(lines)
    (text,) = [t for t in said if "'emb'" in t]
    assert "'head'" in text and "stay dense: its weight or bias is shared: emb.weight, head.weight" in text
    assert said[text] == pytest.approx(100 * 32_000 / (32_000 + 32 * 33), abs=0.1)
    assert sum(said.values()) < 100


def test_the_parts_add_up_to_the_least_and_the_remedy_works():
    space = rankopt.SearchSpace(name="mine", families=("svd_out",), points=4, steps=10, keep_dense=("2",))
    lines = refusal(sequential(), space=space, params=0.2)
    least = float(re.search(r"\(([\d.]+) % of dense\)", lines[1])[1])
    said = shares(lines)
    assert sum(said.values()) == pytest.approx(least, abs=0.25)
    assert max(said, key=said.get) == "'2' stays dense: search space 'mine' keeps 2 dense"
    wanted = int(re.search(r"Give params=(\d+) or more", lines[-1])[1])
    result = compress(sequential(), space=space, params=wanted)
    assert rankopt.count(result.model, example_batch()[:1]).params <= wanted
    with pytest.raises(rankopt.BudgetError):
        compress(sequential(), space=space, params=wanted - 1)


def test_many_layers_of_one_reason_take_one_line():
    model = nn.Sequential(
        *[parametrizations.weight_norm(nn.Linear(64, 64)) for _ in range(6)], nn.Linear(64, 10)
    ).eval()
    said = shares(refusal(model, params=0.5))
    (text,) = [t for t in said if "parametrised" in t]
    assert "and 4 more stay dense" in text and said[text] > 90


def test_what_lies_outside_of_layers_is_said_too():
    def attend(s, x):
        x = s.b(s.a(x)).reshape(-1, 8, 16)
        for _ in range(40):
            x = (x @ x.mT).softmax(-1) @ x
        return s.h(x.flatten(1))

    said = shares(refusal(net(attend), macs=0.2))
    text = max(said, key=said.get)
    assert "outside of layers" in text and said[text] > 40


@pytest.mark.parametrize("metric", [m for m in BUDGETS if m not in MEASURED])
def test_every_counted_metric_explains_itself(metric):
    space = rankopt.SearchSpace(families=("svd_out",), points=4, steps=10, keep_dense=("2",))
    lines = refusal(sequential(), space=space, **{metric: 0.02})
    said = shares(lines)
    assert any("'2' stays dense" in text for text in said)
    least = float(re.search(r"\(([\d.]+) % of dense\)", lines[1])[1])
    assert sum(said.values()) == pytest.approx(least, abs=0.4)


def test_a_latency_that_cannot_be_met_names_what_stays_dense():
    space = rankopt.SearchSpace(families=("svd_out",), points=2, steps=10, keep_dense=("2",))
    lines = refusal(sequential(), space=space, latency="1us")
    assert any("'2'" in line for line in lines) and re.search(r"Give latency=\d+us or more", lines[-1])


def test_limits_that_exclude_each_other_give_the_least_of_each():
    from rankopt.candidates.prepare import prepare
    from rankopt.core.problem import cannot_be_met_together

    x = example_batch()
    problem = prepare(rankopt.Task(sequential(), x[:1], [x]), SPACE).problem({"params": 0.5, "macs": 0.5})
    text = str(cannot_be_met_together(problem))
    assert all(f"{limit.metric}={least:,}" in text for limit, least in zip(problem.limits, problem.least, strict=True))
