"""Strategies and decompositions of one's own, as objects and classes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates.pool import pack
from rankopt.core.errors import RankoptError
from rankopt.decompositions.conformance import code_of
from rankopt.decompositions.svd import SvdOut
from rankopt.strategies.allocation import allocate

SPACE = rankopt.SearchSpace(points=4, steps=5)


class Own(SvdOut):
    """An SVD by another name."""

    name = "own_svd"


class Numbered(SvdOut):
    """Objects with a setting."""

    def __init__(self, number, name="numbered"):
        self.number, self.name = number, name


class Exact(rankopt.Strategy):
    """The exact allocation."""

    name = "own_exact"
    one_shot = True

    def propose(self, number):
        return allocate(self.problem).proposal if number == 0 else None


@pytest.fixture(autouse=True)
def _nothing_registered():
    yield
    for registry in (rankopt.DECOMPOSITIONS, rankopt.STRATEGIES):
        registry.registered.clear()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(0)
    return [torch.randn(64, 16)]


@pytest.mark.parametrize(
    "families", [[Own()], [Own], Own, ["own_svd", "tt"], {"0": [Own()], "2": Own}, [Own(), "svd_out"]]
)
def test_families_as_objects_and_classes(model, batches, families, tmp_path):
    if families == ["own_svd", "tt"]:
        rankopt.register(Own())
    result = rankopt.compress(model, batches, {"params": 0.6}, families=families, space=SPACE, progress=False)
    assert "own_svd" in {c.method for layer in ("0", "2") for c in result.frontier(layer)}
    result.save(tmp_path / "small")
    x = torch.randn(3, 16)
    torch.testing.assert_close(rankopt.load(model, tmp_path / "small")(x), result.model(x))


def test_a_space_takes_objects():
    space = rankopt.SearchSpace(families=(Own(), "tt"))
    assert space.families == ("own_svd", "tt")
    assert rankopt.DECOMPOSITIONS["own_svd"].name == "own_svd"


@pytest.mark.parametrize("registered", [True, False])
def test_strategies_as_classes(model, batches, registered):
    strategy = rankopt.register(Exact).name if registered else Exact
    result = rankopt.compress(
        model, batches, {"params": 0.6}, strategy=strategy, families=["svd_out"], space=SPACE, progress=False
    )
    assert result.plan.cost.params <= result.limits[0].target


class Weighted(Exact):
    """The exact allocation under the losses of an object."""

    name = "own_weighted"

    def __init__(self, problem, seed=0, *, weigh=None, power=1.0):
        super().__init__(problem, seed)
        self.weigh, self.power = weigh, power

    def propose(self, number):
        return allocate(self.problem, self.weigh(self.problem, self.power)).proposal if number == 0 else None


class Weigh:
    """What an option may be."""

    def __call__(self, problem, power):
        self.seen = problem, power
        return [[c.loss**power for c in frontier] for frontier in problem.frontiers]


def test_a_strategy_with_objects_as_its_options(model, batches, tmp_path):
    """Without a problem it waits; each search makes one of its own, and a stopped one goes on."""
    prepared = rankopt.prepare(model, batches, families=["svd_out"], space=SPACE, progress=False)
    weigh = Weigh()
    strategy = Weighted(weigh=weigh, power="2")
    for share in (0.6, 0.8):
        result = prepared.compress(params=share, strategy=strategy, out=tmp_path / str(share))
        assert weigh.seen == (result.problem, 2.0)
        assert result.info["strategy"] == f"{__name__}:Weighted"
        assert result.info["options"] == {"power": "2.0", "weigh": f"{__name__}:Weigh"}
    prepared.compress(params=0.8, strategy=strategy, out=tmp_path / "0.8", resume=True)
    with pytest.raises(RankoptError, match=r"no option 'depth'; its options: weigh=None, power=1\.0"):
        prepared.compress(params=0.6, strategy=Weighted(depth=3))
    with pytest.raises(RankoptError, match="options power are given beside a strategy that has its own"):
        prepared.compress(params=0.6, strategy=strategy, options={"power": 3})
    assert list(inspect.signature(Weighted).parameters) == ["problem", "seed", "weigh", "power"]


class Unfinished(rankopt.Strategy):
    name = "unfinished"


class Free(Exact):
    def __init__(self, depth=3):
        self.depth = depth


def test_classes_that_make_no_strategy(model, batches):
    for strategy, message in (
        (Unfinished, "Unfinished' lacks propose: write it"),
        (Free, r"Free' cannot be made \(.*\): begin __init__\(self, problem, seed=0, "),
    ):
        with pytest.raises(RankoptError, match=message):
            rankopt.compress(
                model, batches, {"params": 0.6}, strategy=strategy, families=["svd_out"], space=SPACE, progress=False
            )


def test_a_class_within_a_function(model, batches):
    class Inner(Exact):
        name = "inner"

    search = {"strategy": Inner, "families": ["svd_out"], "space": SPACE, "progress": False}
    with pytest.raises(RankoptError, match=r"Inner' lies within a function .*: make it known by rankopt.register"):
        rankopt.compress(model, batches, {"params": 0.6}, **search)
    rankopt.register(Inner)
    result = rankopt.compress(model, batches, {"params": 0.6}, **search)
    assert result.info["strategy"] == "inner"


def test_register_is_a_decorator_and_may_be_repeated():
    assert rankopt.register(Own) is Own
    one = Own()
    assert rankopt.register(one) is one
    assert rankopt.DECOMPOSITIONS["own_svd"] is one
    assert list(rankopt.DECOMPOSITIONS)[-1] == "own_svd"
    assert len(rankopt.DECOMPOSITIONS) == len(list(rankopt.DECOMPOSITIONS))
    assert rankopt.register(Exact) is Exact
    assert rankopt.register(Exact) is Exact
    assert rankopt.STRATEGIES["own_exact"] is Exact


def test_rankopts_own_are_taken_as_they_are():
    assert rankopt.SearchSpace(families=(SvdOut(), SvdOut)).families == ("svd_out", "svd_out")
    assert not rankopt.DECOMPOSITIONS.registered


class Taken(rankopt.Strategy):
    name = "knapsack"

    def propose(self, number):
        return None


class Nameless(rankopt.Strategy):
    def propose(self, number):
        return None


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Taken, "the strategy 'knapsack' is rankopt's own: give yours another name"),
        (Nameless, "the strategy Nameless has no name"),
        (Numbered(1, "svd_out"), "the decomposition 'svd_out' is rankopt's own"),
        (Numbered, r"makes no object without arguments \(.*number.*\): give one"),
        (Numbered(1, None), "the decomposition Numbered has no name"),
        (rankopt.Decomposition, "makes no object without arguments"),
        (nn.Linear, "is neither a Strategy class nor a Decomposition"),
        ("svd_out", "is neither a Strategy class nor a Decomposition"),
    ],
)
def test_what_cannot_be_registered(plugin, message):
    with pytest.raises(RankoptError, match=message):
        rankopt.register(plugin)


def test_two_objects_of_one_name_are_not_mixed_up():
    rankopt.register(Numbered(1))
    rankopt.register(Numbered(1))
    with pytest.raises(RankoptError, match=r"'numbered' is .* already: give .* another name"):
        rankopt.register(Numbered(2))
    rankopt.register(Numbered(2, "numbered_2"))
    assert code_of("numbered") != code_of("numbered_2")  # their fits are kept apart


def test_what_is_no_family_or_strategy(model, batches):
    for families in ([nn.Linear], [3], [nn.Linear(2, 2)]):
        with pytest.raises(RankoptError, match="is no decomposition: give a name"):
            rankopt.compress(model, batches, {"params": 0.6}, families=families)
    for strategy in (3, Exact.__new__(Exact), nn.Linear):
        with pytest.raises(RankoptError, match="is no class: give a subclass"):
            rankopt.compress(model, batches, {"params": 0.6}, strategy=strategy)


def test_a_model_with_a_decomposition_that_is_not_registered_says_so(model, batches, tmp_path):
    rankopt.compress(model, batches, {"params": 0.4}, families=[Own], space=SPACE, progress=False, out=tmp_path / "run")
    rankopt.DECOMPOSITIONS.registered.clear()
    with pytest.raises(RankoptError, match=r"own_svd"):
        rankopt.load(model, tmp_path / "run")
    rankopt.register(Own)
    rankopt.load(model, tmp_path / "run")


def test_what_cannot_be_pickled_is_named():
    broken = Own()
    broken.lock = (x for x in "abc")
    rankopt.register(broken)
    with pytest.raises(RankoptError, match="own_svd cannot be sent to the processes that fit"):
        pack(None, other_machines=False)


NOTEBOOK = """
import os, sys, torch, rankopt
from torch import nn
from rankopt.decompositions.svd import SvdOut
import rankopt.candidates.fit as fit

fit.START_UP = -1e9  # every fit in another process

class Cell(SvdOut):
    name = "cell"
    def fit(self, layer, weight, *args, **kwargs):
        open(f"{os.environ['RAN']}/{os.getpid()}", "a").write("x")
        yield from super().fit(layer, weight, *args, **kwargs)

if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    space = rankopt.SearchSpace(points=4, steps=5)
    own = {"families": [Cell()], "space": space, "cache": os.environ["RAN"] + "/cache"}
    prepared = rankopt.prepare(model, [torch.randn(32, 16)], **own)
    print(os.getpid(), prepared.compress(params=0.6).plan.choices[0].method)
"""


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core fits in this process")
def test_workers_know_what_the_program_defines(tmp_path):
    """A class of `__main__`, fitted in processes that do not run the program."""
    (tmp_path / "ran").mkdir()
    environment = {**os.environ, "RAN": str(tmp_path / "ran")}
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    parent, _ = done.stdout.split()
    others = {p.name for p in (tmp_path / "ran").iterdir() if p.is_file()} - {parent}
    assert others, json.dumps(sorted(p.name for p in (tmp_path / "ran").iterdir()))
