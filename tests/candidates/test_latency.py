"""Latency as a cost: conditions, tables of times, and what layers and candidates take."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankopt.candidates.latency import fit_line, key
from rankopt.candidates.latency_table import Conditions, read_table
from rankopt.candidates.prepare import prepare
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.core.records import RECONSTRUCTED
from rankopt.model.inputs import expanded
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from tests.helpers.command import run as command
from tests.helpers.latency import SPACE, make_task, use_modelled_times


@pytest.fixture(scope="module", autouse=True)
def _modelled_times(_cache):
    with pytest.MonkeyPatch.context() as patch:
        use_modelled_times(patch)
        yield


@pytest.fixture(scope="module")
def prepared(_modelled_times):
    return prepare(make_task(), SPACE, workers=1, budget={"latency": 0.9})


def test_a_budget_on_what_was_not_measured_is_refused(digits):
    with pytest.raises(BudgetError, match="was not measured here"):
        digits.problem({"latency": 0.5})


@given(st.floats(0.5, 2), st.integers(10**5, 10**8), st.lists(st.floats(0.1, 0.9), min_size=1, max_size=5))
def test_the_line_through_the_dense_model_is_found(slope, dense, shares):
    plans = [[round(s * dense), round(2 * dense - slope * (dense - round(s * dense)))] for s in shares]
    found, residual = fit_line({"dense": 2 * dense, "plans": plans}, dense)
    assert found == pytest.approx(slope, rel=1e-3) and residual < 1e-4


def test_inputs_are_expanded_to_the_batch():
    x = {"x": torch.arange(6).view(3, 2), "scale": torch.ones(())}
    found = expanded(x, 4)
    assert found["x"].tolist() == [[0, 1]] * 4 and found["scale"].shape == ()


# --- costs -----------------------------------------------------------------------------------------


def test_layers_and_candidates_have_latencies_and_none_is_slower_than_dense(prepared):
    problem = prepared.problem({"latency": 0.9})
    assert problem.dense.latency == prepared.latencies.dense > 0
    for layer, frontier in zip(problem.layers, problem.frontiers, strict=True):
        assert frontier[-1].cost.latency == layer.cost.latency > 0
        assert all(0 < c.cost.latency <= layer.cost.latency for c in frontier)
    twice = next(x for x in problem.layers if x.name == "twice")
    assert len(twice.calls) == 2
    assert "latency" not in [x.metric for x in prepared.problem({"params": 0.5}).limits]


def test_a_layer_that_would_be_slower_is_reconstructed_where_parameters_count(prepared):
    latencies = dataclasses.replace(
        prepared.latencies,
        entries={
            n: {k: v if k == "dense" else 10 * e["dense"] for k, v in e.items()}
            for n, e in prepared.latencies.entries.items()
        },
    )
    layer = prepared.free[1]
    found = latencies.with_candidates(layer, [c for c in prepared.candidates[layer.name] if c.form != RECONSTRUCTED])
    twins = [c for c in found if c.form == RECONSTRUCTED]
    assert len(found) == 2 * len(twins) > 0
    assert all(c.cost.latency == layer.cost.latency and c.cost.macs == layer.cost.macs for c in twins)


def test_rounded_candidates_have_times_of_their_own(_cache):
    """int8 takes bytes and widening takes time: both count, and dense int8 is not taken for dense."""
    bits = dataclasses.replace(SPACE, families=("svd_out",), precisions=("same", "int8"))
    found = prepare(make_task(), bits, workers=1, budget={"latency": 0.95, "bytes": 0.9})
    rounded = [(x, c) for x in found.free for c in found.candidates[x.name] if c.precision == "int8"]
    assert {c.method for _, c in rounded} == {"dense", "svd_out"}
    for layer, c in rounded:
        times = found.latencies.entries[layer.name]
        assert c.cost.latency == round(found.latencies.slope * times[key(c)]) and key(c).endswith("int8")
    problem = found.problem({"latency": 0.95, "bytes": 0.9})
    assert all(
        c.cost.latency <= x.cost.latency for x, f in zip(problem.layers, problem.frontiers, strict=True) for c in f
    )


def test_known_times_are_not_measured_again(prepared, _cache):
    asked = []

    def progress(items, what, total):
        asked.append((what, total))
        return items

    again = prepare(make_task(), SPACE, workers=1, budget={"latency": 0.9}, progress=progress, latency_on=Conditions())
    assert ("timing layers", 0) in asked and ("timing whole models", 4) not in asked
    for name, times in prepared.latencies.entries.items():  # other tests may have added theirs
        assert again.latencies.entries[name].items() >= times.items()
    assert again.dense == prepared.dense


def test_fits_do_not_depend_on_the_machine(prepared):
    """Latencies are no part of what statistics and fits are kept by."""
    plain = prepare(make_task(), SPACE, workers=1)
    assert plain.statistics.key == prepared.statistics.key


def test_a_table_of_another_machine_is_trusted_and_missing_layers_are_named(prepared, tmp_path):
    path = tmp_path / "phone.json"
    here = make_task()
    first = prepare(
        here, SPACE, workers=1, budget={"latency": 0.9}, latency_on=Conditions(table=_measured_as(path, "a phone"))
    )
    assert first.latencies.foreign and first.latencies.machine == "a phone"
    result = run_search(first, first.problem({"latency": 0.9}), SearchSettings())
    about = result.info["latency"]
    assert about["foreign"] and about["attempts"] == 0 and "met" not in about
    assert result.info["budget"]["latency"]["achieved"] <= result.info["budget"]["latency"]["target"]
    wider = dataclasses.replace(SPACE, families=("svd_in",))
    with pytest.raises(RankoptError, match=r"on a phone: there, run rankopt hardware TASK"):
        prepare(here, wider, workers=1, budget={"latency": 0.9}, latency_on=Conditions(table=str(path)))
    with pytest.raises(RankoptError, match="was measured with batch=1"):
        read_table(path, Conditions(batch=2))


def _measured_as(path, name):
    """A table of this machine, said to be another's."""
    prepare(make_task(), SPACE, workers=1)
    from rankopt.candidates.cache import Cache
    from rankopt.candidates.latency import measure_costs
    from rankopt.candidates.model_layers import ModelLayers
    from rankopt.core.progress import silent
    from rankopt.model.inventory import inventory

    task = make_task()
    layers = inventory(task.model, task.example_input)
    layered = ModelLayers(task.model, task.model, layers, task.example_input)
    measure_costs(layered, SPACE, Conditions(), Cache(), silent, path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"machine": name}))
    return str(path)


def test_infeasible_latencies_are_refused_before_anything_is_fitted(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("fitted")

    monkeypatch.setattr("rankopt.candidates.prepare.fit_candidates", never)
    with pytest.raises(BudgetError, match=r"least achievable in this search space is [\d.]+ ms"):
        prepare(make_task(), SPACE, workers=1, budget={"latency": 0.001})


def test_sweeps_refuse_latency_budgets(tmp_path):
    _, stderr = command("sweep", "digits", "--budgets", "latency=0.9:0.5:3", "--out", tmp_path / "front", code=2)
    assert "was not measured here" in stderr
