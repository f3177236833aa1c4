"""rankopt.save writes whatever model has compressed layers; a backbone is loaded without its head."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import rankopt
from rankopt.decompositions.plan import read_plan
from tests.helpers.spaces import QUICK

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, classes=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48))
        self.head = nn.Linear(48, classes) if classes else nn.Identity()

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return rankopt.compress(Net().eval(), [X], {"params": 0.4}, space=QUICK, keep_dense=["head"]).model


def test_a_model_of_ones_own_training_is_saved(small, tmp_path):
    trained = copy.deepcopy(small)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(X).square().mean().backward()
    optimizer.step()
    rankopt.save(nn.DataParallel(trained), tmp_path, X[:1])
    assert torch.equal(rankopt.load(Net, tmp_path).eval()(X), trained.eval()(X))
    plan = read_plan(tmp_path)[0]
    assert plan.cost == rankopt.count(trained, X[:1]) and plan.dense.params == rankopt.count(Net(), X[:1]).params
    assert {c.name for c in plan.choices} <= {"body.0", "body.2"}


def test_a_model_that_was_loaded_and_one_that_is_dense(small, tmp_path):
    rankopt.save(small, tmp_path / "a")
    rankopt.save(rankopt.load(Net, tmp_path / "a"), tmp_path / "b")
    assert torch.equal(rankopt.load(Net, tmp_path / "b").eval()(X), small(X))
    dense = Net()
    rankopt.save(dense, tmp_path / "c")
    assert torch.equal(rankopt.load(Net, tmp_path / "c")(X), dense(X))
    with pytest.raises(rankopt.TaskError, match=r"give an nn\.Module"):
        rankopt.save("small", tmp_path / "d")


def test_a_model_that_was_compressed_twice(small, tmp_path):
    twice = rankopt.compress(small, [X], {"params": 0.8}, space=QUICK).model
    rankopt.save(twice, tmp_path)
    torch.testing.assert_close(rankopt.load(Net, tmp_path).eval()(X), twice.eval()(X))


def test_a_backbone_is_loaded_without_its_head(small, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    rankopt.save(small, tmp_path)
    with pytest.raises(rankopt.PlanError, match="does not fit"):
        rankopt.load(lambda: Net(0), tmp_path)
    backbone = rankopt.load(lambda: Net(0), tmp_path, strict=False).eval()
    assert torch.equal(backbone(X), torch.relu(small.body(X)))
    assert "not in the model: 'head.bias', 'head.weight'" in caplog.text
    other = Net(5)
    loaded = rankopt.load(other, tmp_path, strict=False).eval()
    assert torch.equal(loaded.body(X), small.body(X)) and torch.equal(loaded.head.weight, other.head.weight)
    assert "left as they were: 'head.bias', 'head.weight'" in caplog.text
    with torch.device("meta"):
        meta = Net(5)
    with pytest.raises(rankopt.PlanError, match="does not fit this model"):
        rankopt.load(meta, tmp_path, strict=False)
