"""Layers stored in fewer bits: their cost, their error, and that they are saved and loaded unchanged."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import rankopt
from rankopt.candidates.cache import FactorStore
from rankopt.candidates.pareto import dense_candidate, frontier
from rankopt.candidates.prepare import prepare
from rankopt.candidates.quantize import in_each_precision, quantize_candidate
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.records import DENSE, PRECISIONS, SAME, Candidate, Choice, Plan
from rankopt.decompositions.plan import apply, read_plan, save
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.experiments.digits import DigitsNet
from rankopt.model.inventory import inventory
from rankopt.model.layer_kinds import as_matrix
from rankopt.model.quantization import QuantizedMixin, decode, dequantized, encode, quantize_, scales
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.training.loop import distillation, train_briefly, with_targets
from tests.helpers.layers import MODULES, PAIRS, make

LOW = [p for p in PRECISIONS if p != SAME]
BITS = SearchSpace(
    name="bits", families=("svd_out", "cp_merged"), points=6, steps=20, precisions=("int8", "float16", "bfloat16")
)
CASES = [(family, name) for family, name in PAIRS if name in {"conv3x3", "linear", "transposed grouped dilated"}]
CASES += [(DENSE, name) for name in MODULES] + [("svd_out", name) for name in MODULES if ("svd_out", name) in PAIRS]


def whole_model(case):
    """The case's module as a model of one layer, in float32, and the layer."""
    module = case.module.float()
    x = case.x if case.layer.kind == "Embedding" else case.x.float()
    (layer,) = inventory(module, x)
    return module, x, layer


# --- one layer of every geometry, by every family ------------------------------------------------------


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("family", "name"), dict.fromkeys(CASES))
def test_cost_and_error_are_those_of_the_rebuilt_layer(family, name, precision):
    """In either form: bytes as counted, the error of its widened weight, which is the one that it runs with."""
    case = make(name)
    module, x, layer = whole_model(case)
    candidates, fit = [dense_candidate(layer)], ()
    if family != DENSE:
        decomposition = DECOMPOSITIONS[family]
        rank = (decomposition.ranks(layer, [0.7]) or [decomposition.full_rank(layer)])[
            0
        ]  # depthwise has but the latter
        fit = next(decomposition.fit(layer, module.weight, [rank], case.moment, case.metric, 5)).factors
        forms = decomposition.forms
        candidates = [Candidate(family, rank, decomposition.cost(layer, rank, f), 0.0, form=f) for f in forms]
    target = full_target(layer, module.weight, case.moment, case.metric)
    for candidate in (low for c in candidates for low in in_each_precision(layer, c, [precision])):
        encoded, error = quantize_candidate(layer, candidate, module.weight, fit, case.moment, case.metric)
        factors = FactorStore(None)
        factors.kept["it"] = encoded
        small = apply(module, [layer], [dataclasses.replace(candidate, key="it")], factors).eval()
        assert rankopt.count(small, x) == candidate.cost, candidate
        weight = small.weight.detach()
        assert weight.dtype == torch.float32 and weight.shape == module.weight.shape
        assert target.error(as_matrix(layer, weight.double())) == pytest.approx(error, rel=1e-5, abs=1e-12)
        twin = copy.deepcopy(module)
        twin.weight.data = weight
        torch.testing.assert_close(small(x), twin(x), rtol=1e-4, atol=1e-4)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126))


@given(st.lists(FLOATS, min_size=1), st.integers(1, 6), st.sampled_from([1, 128]))
@settings(max_examples=200)
def test_rounding_to_int8_moves_a_weight_by_half_a_scale_at_most(numbers, outputs, repeats):
    weight = torch.tensor(numbers).repeat(outputs, repeats) * torch.linspace(1, 0.1, outputs)[:, None]
    values, scale = encode(weight, "int8")
    assert values.dtype == torch.int8 and len(scale) == scales(weight.shape)
    distance = (weight.double() - decode((values, scale), torch.float64)).abs()
    assert (distance <= scale.double()[:, None] / 2 * (1 + 1e-6)).all()
    again = encode(decode((values, scale), torch.float32), "int8")[0]
    assert torch.equal(again.sign(), values.sign())


def test_short_outputs_share_a_scale_and_only_what_gets_smaller_is_rounded():
    assert [scales(s) for s in [(7, 3, 1, 1), (7, 14, 3, 3), (7, 15, 3, 3), (7, 127), (1, 999)]] == [1, 1, 7, 1, 1]
    case = make("conv3x3")
    module = nn.Conv2d(8, 12, 3).bfloat16()
    (layer,) = inventory(module, case.x.bfloat16())
    assert [c.precision for c in in_each_precision(layer, dense_candidate(layer), PRECISIONS)] == ["int8"]


def test_rounding_is_carried_to_the_output_factor():
    """CP's components cancel: rounded to nearest they lose several times what they lose so."""
    case = make("conv3x3")
    decomposition = DECOMPOSITIONS["cp_merged"]
    (fit,) = decomposition.fit(case.layer, case.module.weight, [(24,)], case.moment, case.metric, 300)
    target = full_target(case.layer, case.module.weight, case.moment, case.metric)
    plain = [decode(encode(f, "int8"), torch.float64) for f in fit.factors]
    nearest = target.error(decomposition.weight(case.layer, tuple(plain)).reshape(target.weight.shape))
    candidate = Candidate("cp_merged", (24,), case.layer.cost, fit.error, precision="int8")
    _, error = quantize_candidate(case.layer, candidate, case.module.weight, fit.factors, case.moment, case.metric)
    assert fit.error < error and error - fit.error < 0.5 * (nearest - fit.error)


def test_a_precision_that_overflows_is_no_candidate():
    case = make("linear")
    case.module.weight.data[0, 0] = 1e6
    for precision, finite in [("float16", False), ("bfloat16", True), ("int8", True)]:
        low = Candidate(DENSE, (), case.layer.cost, 0.0, precision=precision)
        encoded, error = quantize_candidate(case.layer, low, case.module.weight, (), case.moment, case.metric)
        assert (error is not None) == finite and encoded


# --- modules -------------------------------------------------------------------------------------------


def mixed():
    """A model with factors, cores, a table and dense layers in all precisions; its input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 16),
        nn.Conv1d(6, 16, 3),
        nn.Flatten(),
        nn.Linear(224, 64),
        nn.ReLU(),
        nn.Linear(64, 10, bias=False),
    )
    x = torch.randint(50, (3, 6))
    layers = [layer for layer in inventory(model, x) if layer.reason is None]
    plans = [("svd_out", "int8"), ("cp_merged", "float16"), ("tt", "int8"), (DENSE, "bfloat16")]
    chosen, factors = [], FactorStore(None)
    for layer, (family, precision) in zip(layers, plans, strict=True):
        candidate = dataclasses.replace(dense_candidate(layer), precision=precision)
        fit = ()
        weight = model.get_submodule(layer.name).weight
        if family != DENSE:
            rank = DECOMPOSITIONS[family].ranks(layer, [0.6])[0]
            fit = next(DECOMPOSITIONS[family].fit(layer, weight, [rank], steps=2)).factors
            candidate = Candidate(family, rank, DECOMPOSITIONS[family].cost(layer, rank), 0.0, form="factorised")
            (candidate,) = in_each_precision(layer, candidate, [precision])
        factors.kept[layer.name] = quantize_candidate(layer, candidate, weight, fit, None, None)[0]
        chosen.append(dataclasses.replace(candidate, key=layer.name))
    small = apply(model, layers, chosen, factors).eval()
    choices = tuple(
        Choice(x.name, x.kind, x.own_shape, c.method, c.rank, c.cost.params, c.cost.macs, 0.0, "", c.form, c.precision)
        for x, c in zip(layers, chosen, strict=True)
    )
    return model, small, Plan(choices, rankopt.count(small, x), rankopt.count(model, x)), x


def test_saved_copied_pickled_and_exported_models_come_back(tmp_path):
    model, small, plan, x = mixed()
    save(tmp_path, small, plan)
    loaded = rankopt.load(model, tmp_path)
    assert read_plan(tmp_path)[0] == plan
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.int8, torch.bfloat16, torch.float16, torch.float32}
    blank = copy.deepcopy(small)
    with torch.no_grad():
        for t in (*blank.parameters(), *blank.buffers()):
            t.zero_()
        blank.load_state_dict(small.state_dict())
        expected = small(x)
        copies = (loaded.eval(), copy.deepcopy(small), pickle.loads(pickle.dumps(small)), copy.deepcopy(loaded), blank)
        for again in copies:
            torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
            assert rankopt.count(again, x) == plan.cost and set(again.state_dict()) == set(small.state_dict())
        exported = torch.export.export(loaded, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    assert sum(t.numel() * t.element_size() for t in exported.state_dict.values()) == plan.cost.bytes
    torch._dynamo.reset()  # other tests may have used up the compilations of this kind of call
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_moved_to_another_dtype_still_runs(dtype):
    _, small, _, x = mixed()
    expected = small(x)
    moved = copy.deepcopy(small).to(dtype)
    assert moved(x).dtype == dtype
    torch.testing.assert_close(moved(x).float(), expected, rtol=0.1, atol=0.05)


def test_the_inventory_says_why_quantized_layers_stay_as_they_are():
    _, small, _, x = mixed()
    reasons = [layer.reason for layer in inventory(small, x)]
    assert sum("stored in int8 already" in (r or "") for r in reasons) >= 2


def test_training_is_in_full_precision_and_its_weights_are_rounded():
    _, small, plan, x = mixed()
    before = {n: t.clone() for n, t in small.state_dict().items()}
    with dequantized(small):
        assert not any(isinstance(m, QuantizedMixin) for m in small.modules())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in small.parameters())
        assert sum(p.numel() for p in small.parameters()) == plan.cost.params
    assert rankopt.count(small, x) == plan.cost
    after = small.state_dict()
    assert all(
        (after[n].float() - t.float()).abs().max() <= 1 + 0.01 * t.float().abs().max() for n, t in before.items()
    )
    teacher, _, _, _ = mixed()
    inputs = [torch.randint(50, (32, 6)) for _ in range(4)]
    data = with_targets(teacher, inputs)
    taught = train_briefly(small, data, distillation, 30)
    assert rankopt.count(taught, x) == plan.cost
    with torch.no_grad():
        losses = [sum(float(distillation(m, batch)) for batch in data) for m in (small, taught)]
    assert losses[1] < 0.9 * losses[0]


def test_a_stage_is_stored_under_its_own_class_and_widened_back():
    conv = nn.Conv2d(4, 6, 3)
    weight = conv.weight.detach().clone()
    quantize_(conv, "float16")
    assert type(conv).__name__ == "Float16Conv2d" and "weight" not in dict(conv.named_parameters())
    assert torch.equal(conv.weight, weight.half().float())
    quantize_(conv, "int8")
    assert type(conv).__name__ == "Int8Conv2d" and set(conv.state_dict()) == {"weight_int8", "weight_scale", "bias"}
    quantize_(conv, SAME)
    assert type(conv) is nn.Conv2d and conv.weight.requires_grad


# --- whole searches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(digits):
    return prepare(digits.task, BITS, workers=1)


@pytest.mark.slow
def test_bits_make_a_budget_in_bytes_cheaper(digits, prepared, tmp_path):
    """The same families and ranks: with bits the predicted loss falls, and the budget is kept as counted."""
    for budget in ({"bytes": 0.2}, {"bytes": 0.12, "macs": 0.9}):
        made = run_search(prepared, prepared.problem(budget), SearchSettings())
        cost = rankopt.count(made.model, digits.task.example_input)
        assert cost == made.plan.cost and all(cost[x.metric] <= x.target for x in made.limits)
        assert {c.precision for c in made.plan.choices} > {"int8"} - {SAME}
        assert "int8" in made.summary()
    plain = run_search(digits, digits.problem({"bytes": 0.2}), SearchSettings())
    bits = run_search(prepared, prepared.problem({"bytes": 0.2}), SearchSettings())
    assert bits.info["objective"]["best"] < plain.info["objective"]["best"]
    bits.save(tmp_path)
    small = rankopt.load(DigitsNet, tmp_path).eval()
    x = digits.task.example_input
    torch.testing.assert_close(small(x), bits.model.eval()(x), rtol=0, atol=0)


def test_without_a_limit_on_bytes_nothing_is_rounded(digits, prepared):
    for budget in ({"params": 0.3}, {"macs": 0.5}):
        mine, theirs = prepared.problem(budget), digits.problem(budget)
        assert [[(c.method, c.rank, c.precision) for c in f] for f in mine.frontiers] == [
            [(c.method, c.rank, SAME) for c in f] for f in theirs.frontiers
        ]


def test_a_layer_that_no_family_takes_may_still_be_rounded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(16, 16))
    x = [torch.randn(64, 16, 3, 3)]
    made = rankopt.compress(model, x, {"bytes": 0.45}, space=BITS, cache=tmp_path)
    assert made.plan.choices[0].method == DENSE and made.plan.choices[0].precision in LOW
    assert "of its bytes" in made.plan.choices[0].reason
    with pytest.raises(rankopt.BudgetError, match="least achievable"):
        rankopt.compress(model, x, {"bytes": 0.05}, space=BITS, cache=tmp_path)


def test_refinement_rounds_what_it_refits(prepared):
    made = run_search(prepared, prepared.problem({"bytes": 0.12}), SearchSettings(refine=True))
    assert made.info["refinement"] and made.plan.cost.bytes <= made.limits[0].target
    assert any(isinstance(m, QuantizedMixin) for m in made.model.modules())


def test_settings_and_plans_with_an_unknown_precision_are_refused(prepared, tmp_path):
    with pytest.raises(rankopt.RankoptError, match="unknown precision 'int4'; choose from same, int8"):
        SearchSpace(precisions=("int4",))
    assert set(load_space("bits").precisions) == {SAME, "int8", "float16"} and load_space("default").precisions == (
        SAME,
    )
    run_search(prepared, prepared.problem({"bytes": 0.3}), SearchSettings()).save(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["layers"][0]["precision"] = "int4"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(rankopt.PlanError, match="unknown precision 'int4'"):
        read_plan(tmp_path)


def test_a_frontier_in_bytes_mixes_precisions(prepared):
    layer = prepared.free[-1]
    found = frontier(layer, prepared.candidates[layer.name], ["bytes"])
    assert {c.precision for c in found} >= {SAME, "int8"} and found[-1].unchanged
    assert isinstance(next(iter(prepared.factors[c.key] for c in found if c.precision == "int8"))[0], torch.Tensor)
