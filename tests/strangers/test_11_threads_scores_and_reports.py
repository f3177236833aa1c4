"""Kind 11 (second half): threads that share a model, scores that are no accuracies, reports that contradict themselves,
and plug-ins that misbehave."""

from __future__ import annotations

import dataclasses
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankopt
from rankopt.candidates.prepare import prepare
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.files import write_beside
from rankopt.core.registry import Registry
from rankopt.core.statistics import misread_score
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.svd import SvdOut
from rankopt.decompositions.types import Fit, Stage
from rankopt.search.compress import run_search
from rankopt.search.max_drop import smallest_model
from rankopt.search.settings import SearchSettings
from rankopt.strategies.base import Strategy
from rankopt.strategies.registry import STRATEGIES
from tests.strangers.models import SPACE, compress, example_batch, net, reasons, sequential

X = example_batch()


# --- threads -----------------------------------------------------------------------------------------


def noisy(s, x):
    """Random numbers in the forward, so that threads meet in torch's random state, too."""
    return s.h(nn.functional.dropout(s.b(s.a(x).relu()).relu(), 0.1, training=True))


def contents(folder: Path) -> dict[str, object]:
    """Every entry of a cache."""
    tensors = {p.name: {k: v.clone() for k, v in load_file(p).items()} for p in folder.glob("*.safetensors")}
    return tensors | {p.name: p.read_text() for p in folder.glob("*.json")}


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def test_two_threads_that_compress_one_model_do_not_see_each_other(tmp_path):
    model = net(noisy)
    batches = list(X.split(8))  # many, so that both are in the middle of calibration at once
    settings = SearchSettings("random", trials=4)

    def search(cache: Path) -> tuple[rankopt.Result, dict[str, torch.Tensor]]:
        prepared = prepare(rankopt.Task(model, X[:1], batches), SPACE, cache, workers=1)
        result = run_search(prepared, prepared.problem({"params": 0.5}), settings)
        return result, result.model.state_dict()

    with ThreadPoolExecutor(1) as alone:
        expected, weights = alone.submit(search, tmp_path / "alone").result()
    for shared in (True, False):  # one cold cache for both, and one for each
        folders = [tmp_path / f"{shared}{0 if shared else i}" for i in range(2)]
        with ThreadPoolExecutor(2) as both:
            found = list(both.map(search, folders))
        for (result, its_weights), folder in zip(found, folders, strict=True):
            assert equal(its_weights, weights)
            assert result.info["objective"] == expected.info["objective"]
            assert equal(contents(folder), contents(tmp_path / "alone"))


def test_the_model_that_is_passed_in_gets_no_hook_and_changes_no_mode():
    """Watched from within its own forward, and from a thread beside the search."""
    model = sequential().train()
    seen: list[tuple[int, bool]] = []

    class Spy(nn.Module):
        def forward(self, x):
            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
            seen.append((hooks, model.training))
            return x

    model.append(Spy())
    compress(model, params=0.5)
    assert model.training and len(seen) > 10
    assert all(hooks == 0 for hooks, _ in seen)


def test_a_forward_that_writes_into_its_input_sees_the_same_data_every_time():
    model, x = net(lambda s, x: s.h(s.b(s.a(x.mul_(2))))), X.clone()
    result = compress(model, [x], params=0.5)
    assert torch.equal(x, X)
    pure = compress(net(lambda s, x: s.h(s.b(s.a(x * 2)))), [x], params=0.5)
    assert result.info["objective"]["best"] == pytest.approx(pure.info["objective"]["best"], rel=1e-6)


def test_temporary_files_of_two_threads_are_two(tmp_path):
    path, names = tmp_path / "x.txt", []

    def write(part: Path) -> None:
        names.append(part)
        if len(names) == 1:
            write_beside(path, write)
        part.write_text(str(len(names)))

    write_beside(path, write)
    assert len(set(names)) == 2 and path.read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


# --- scores ------------------------------------------------------------------------------------------


def labelled() -> tuple[nn.Module, torch.Tensor]:
    """A model and the labels that it gives itself: its accuracy is 1."""
    model = sequential()
    with torch.no_grad():
        model[4].weight.mul_(20)
        return model, model(X).argmax(1)


def accuracy(labels: torch.Tensor):
    return lambda model: (model(X).argmax(1) == labels).double().mean().item()


def test_an_error_rate_is_not_minimised_to_nothing():
    model, labels = labelled()
    right = accuracy(labels)
    prepared = prepare(rankopt.Task(model, X[:1], [X], score=lambda m: 1 - right(m)), SPACE)
    with pytest.raises(TaskError, match=r"--max-drop: the score rises from 0 \(dense\) to .* return 1 - error"):
        smallest_model(prepared, 0.05)
    prepared.task.score = right
    answer = smallest_model(prepared, 0.2)
    assert answer.report["score"] >= 0.8


@pytest.mark.parametrize("factor", [100, -1])
def test_a_score_that_is_no_fraction_is_named(factor):
    model, labels = labelled()
    right = accuracy(labels)
    task = rankopt.Task(model, X[:1], [X], score=lambda m: factor * right(m))
    with pytest.raises(TaskError, match="not within 0 to 1: return a fraction"):
        smallest_model(prepare(task, SPACE), 0.05)
    result = rankopt.compress(model, [X], {"params": 0.5}, task.score, space=SPACE)
    assert any("not within 0 to 1" in text for text in result.info["warnings"])
    assert "not within 0 to 1" in " ".join(result.summary().split())


def test_a_search_says_that_a_score_rises_where_the_model_gets_worse():
    model, labels = labelled()
    right = accuracy(labels)
    result = rankopt.compress(model, [X], {"params": 0.2}, lambda m: 1 - right(m), space=SPACE)
    assert any("return 1 - error" in text for text in result.info["warnings"])
    result = rankopt.compress(model, [X], {"params": 0.2}, right, space=SPACE)
    assert not any("score" in text for text in result.info["warnings"])


def test_a_small_or_noisy_rise_is_none():
    assert misread_score(0.9, 0.93, None) is None
    assert misread_score(0.5, 0.6, 20) is None  # two examples of twenty
    assert misread_score(0.5, 0.6, 2000) is not None
    assert misread_score(0.05, 0.9, None) is not None


# --- rounds and reports ------------------------------------------------------------------------------


def test_rounds_in_a_search_space_are_made_from_python_too():
    space = dataclasses.replace(SPACE, rounds=2, round_steps=5)
    result = compress(sequential(), space=space, params=0.3)
    assert [r["round"] for r in result.info["rounds"]] == [1, 2]
    assert rankopt.count(result.model, X[:1]).params <= result.limits[0].target
    with pytest.raises(RankoptError, match=r"2 rounds: not with .*refine"):
        rankopt.compress(sequential(), [X], {"params": 0.3}, space=space, refine=True)


def test_shares_in_the_reasons_are_of_the_layer():
    """A layer of zeros is reproduced exactly: dense is not on its frontier, but shares are still of dense."""
    model = sequential()
    nn.init.zeros_(model[2].weight)
    dense = rankopt.count(model, X[:1])
    result = compress(model, params=0.7)
    for choice in result.plan.choices:
        if choice.method != "dense":
            said = int(re.match(r"keeps (\d+)% of its params", choice.reason)[1])
            layer = model.get_submodule(choice.name)
            assert said == round(100 * choice.params / sum(p.numel() for p in layer.parameters()))
    assert reasons(result)["2"].startswith("keeps") and result.plan.cost.params < dense.params


# --- plug-ins ----------------------------------------------------------------------------------------


class Other(SvdOut):
    """A decomposition of another package, sound."""

    name = "other"

    def fit(self, layer, weight, ranks, *args, **kwargs):
        yield from (self.changed(layer, fit) for fit in super().fit(layer, weight, ranks, *args, **kwargs))

    def changed(self, layer: rankopt.Layer, fit: Fit) -> Fit:
        return fit


class Scattered(Other):
    def changed(self, layer, fit):
        return fit._replace(factors=tuple(f.mT.contiguous().mT.requires_grad_() for f in fit.factors))


class TwoRanks(Other):
    def full_rank(self, layer):
        return (4, 4)


class Wrong(Other):
    def changed(self, layer, fit):
        return fit._replace(factors=(fit.factors[0], fit.factors[1][:-1]))


class Wide(Other):
    def changed(self, layer, fit):
        return fit._replace(factors=tuple(f.double() for f in fit.factors))


class Exploding(Other):
    def changed(self, layer, fit):
        return fit._replace(factors=(fit.factors[0] * float("nan"), fit.factors[1]))


class Boasting(Other):
    def changed(self, layer, fit):
        return fit._replace(error=0.0)


class Lazy(Other):
    def fit(self, *args, **kwargs):
        yield from list(super().fit(*args, **kwargs))[1:]


class Cheap(Other):
    def cost(self, layer, rank, form=None):
        return dataclasses.replace(super().cost(layer, rank, form), params=1)


class Misshapen(Other):
    def shapes(self, layer, rank):
        return tuple(s.shape(1)[:2] for s in (Stage(layer.in_channels, 1), Stage(1, layer.out_channels)))


class Raising(Other):
    def changed(self, layer, fit):
        raise KeyError("core")


class NoRank(Other):
    def full_rank(self, layer):
        return layer.no_such_attribute


def registered(monkeypatch: pytest.MonkeyPatch, registry: Registry[Any], **found: Any) -> None:
    """Entry points of a package named elsewhere."""
    monkeypatch.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
    for name, value in found.items():
        monkeypatch.setattr(sys.modules["elsewhere"], name, value, raising=False)
    entries = {name: EntryPoint(name, f"elsewhere:{name}", registry.group) for name in found}
    monkeypatch.setitem(registry.__dict__, "_added", entries)
    monkeypatch.setattr(registry, "_loaded", {})


def fitted(family: str) -> rankopt.Result:
    prepared = prepare(
        rankopt.Task(sequential(), X[:1], [X]), dataclasses.replace(SPACE, families=(family,)), workers=1
    )
    return run_search(prepared, prepared.problem({"params": 0.6}), SearchSettings())


@pytest.mark.parametrize("plug_in", [Other, Scattered])
def test_a_sound_plug_in_works_and_scattered_factors_are_gathered(plug_in, monkeypatch):
    registered(monkeypatch, DECOMPOSITIONS, other=plug_in())
    result = fitted("other")
    assert "other" in {c.method for c in result.plan.choices}
    assert rankopt.count(result.model, X[:1]) == result.plan.cost


@pytest.mark.parametrize(
    ("plug_in", "said"),
    [
        (TwoRanks, r"aspect \(1.0,\) for ranks such as \(4, 4\): give `aspects` one entry"),
        (Wrong, "gave factors of the shapes"),
        (Wide, "in torch.float64, where .* in torch.float32 are declared"),
        (Exploding, "gave factors that are NaN or infinite"),
        (Boasting, "declares an error of 0, its factors have 0"),
        (Lazy, "yield a Fit for each, in order"),
        (Cheap, "declares 1 parameters, its Factorised has .*: make `cost` and `factorised` agree"),
        (Misshapen, "make `shapes` and `factorised` agree"),
        (Raising, "fitting other to layer '.' failed: 'core'"),
        (NoRank, "its ranks raised AttributeError: .*no_such_attribute"),
    ],
)
def test_a_decomposition_that_breaks_its_contract_is_named(plug_in, said, monkeypatch):
    registered(monkeypatch, DECOMPOSITIONS, other=plug_in())
    with pytest.raises(RankoptError, match=said) as caught:
        fitted("other")
    assert "other" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_named_and_leaves_the_others_alone(monkeypatch):
    registered(monkeypatch, DECOMPOSITIONS, other=Other, renamed=Other())
    monkeypatch.setitem(DECOMPOSITIONS._added, "gone", EntryPoint("gone", "no_such_module:X", DECOMPOSITIONS.group))
    assert DECOMPOSITIONS["svd_out"].name == "svd_out" and {"gone", "other"} < set(DECOMPOSITIONS)
    with pytest.raises(RankoptError, match=r"'gone' of package no_such_module cannot be loaded \(ModuleNotFoundError"):
        fitted("gone")
    with pytest.raises(RankoptError, match="not an instance of a Decomposition"):
        fitted("other")
    with pytest.raises(RankoptError, match="its class has the name 'other': give both the same"):
        fitted("renamed")
    registered(monkeypatch, STRATEGIES, mine=Other())
    with pytest.raises(RankoptError, match=r"'mine' of package elsewhere cannot be used: .* not a subclass"):
        rankopt.compress(sequential(), [X], {"params": 0.5}, space=SPACE, strategy="mine")


@pytest.mark.parametrize("proposal", [(0,), (0, 0, 10**6), (0, 0, -1)])
def test_a_strategy_that_proposes_nonsense_is_named(proposal, monkeypatch):
    class Nonsense(Strategy):
        name = "nonsense"

        def propose(self, number):
            return proposal

    registered(monkeypatch, STRATEGIES, nonsense=Nonsense)
    with pytest.raises(RankoptError, match=r"the strategy 'nonsense' proposed .* an index for each of the 3 layers"):
        rankopt.compress(sequential(), [X], {"params": 0.5}, space=SPACE, strategy="nonsense")
