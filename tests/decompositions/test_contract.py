"""What every family of the registry must do, in each of its forms: as a layer, and in models made of it."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates.fit import in_each_form
from rankopt.candidates.pareto import dense_candidate, frontier
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.records import DENSE, FACTORISED, RECONSTRUCTED, Call, Candidate, Layer
from rankopt.decompositions.core_networks import linear_modes
from rankopt.decompositions.plan import replacement, save, to_measure
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.model.layer_kinds import as_matrix
from rankopt.model.objective import Divergence
from rankopt.training import loop as training
from rankopt.training.loop import RATE
from tests.helpers.layers import FORMED, PAIRS, SAMPLED, build_forms, make, sampled
from tests.helpers.models import compressed

EXACT = sampled([(family, name) for family, name in PAIRS if DECOMPOSITIONS[family].exact])
TWO_FORMS = sampled([pair for pair in PAIRS if len(DECOMPOSITIONS[pair[0]].forms) == 2])


# --- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EXACT)
@pytest.mark.parametrize("calibrated", [True, False])
def test_full_rank_reproduces_the_layer(family, name, calibrated):
    case = make(name)
    modules, fit = build_forms(family, case, DECOMPOSITIONS[family].full_rank(case.layer), calibrated=calibrated)
    assert fit.error < 1e-8
    for module in modules:
        torch.testing.assert_close(module(case.x), case.module(case.x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "name"), SAMPLED)
def test_cost_error_and_weight_are_those_of_the_module(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    target = full_target(case.layer, case.module.weight, case.moment, case.metric)
    for rank in decomposition.ranks(case.layer, [0.2, 0.5, 0.8]):
        assert decomposition.weights(case.layer, rank) < case.layer.weights
        shapes = [torch.Size(s) for s in decomposition.shapes(case.layer, rank)]
        modules, fit = build_forms(family, case, rank)
        assert [f.shape for f in fit.factors] == shapes
        for module, form in zip(modules, decomposition.forms, strict=True):
            assert count(module, case.x) == decomposition.cost(case.layer, rank, form)
            weight = module.weight.detach()
            assert target.error(as_matrix(case.layer, weight)) == pytest.approx(fit.error, rel=1e-6, abs=1e-12)
            twin = copy.deepcopy(case.module)
            twin.weight.data = weight
            torch.testing.assert_close(twin(case.x), module(case.x))


@pytest.mark.parametrize(("family", "name"), SAMPLED)
def test_what_is_measured_on_a_gpu_is_the_candidate_up_to_rounding(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    rank = decomposition.full_rank(case.layer)
    (fit,) = decomposition.fit(case.layer, case.module.weight, [rank], case.moment, case.metric, 5)
    cost, form = decomposition.cost(case.layer, rank), decomposition.forms[0]
    candidate = Candidate(family, rank, cost, fit.error, key="key", form=form)
    measured = to_measure(case.layer, candidate, torch.device("cuda:0"))
    assert (measured.form == RECONSTRUCTED) or case.module.weight.ndim == 2
    assert to_measure(case.layer, candidate, torch.device("cpu")) == candidate
    built, other = (replacement(case.module, case.layer, c, {"key": fit.factors}) for c in (candidate, measured))
    torch.testing.assert_close(other(case.x), built(case.x), rtol=1e-4, atol=1e-4)


def test_dense_and_quantized_layers_are_measured_as_they_are():
    case = make("conv3x3")
    dense = dense_candidate(case.layer)
    rounded = Candidate("svd_out", (2,), case.layer.cost, 0.1, key="key", precision="int8")
    for candidate in (dense, rounded, dataclasses.replace(rounded, method=DENSE, rank=())):
        assert to_measure(case.layer, candidate, torch.device("cuda")) == candidate


@pytest.mark.parametrize(("family", "name"), [pair for pair in PAIRS if pair[1] in {"conv3x3", "linear"}])
def test_bias_dtype_mode_and_requires_grad_survive_and_gradient_flows_to_every_factor(family, name):
    case = make(name, torch.float32)
    before = copy.deepcopy(case.module.state_dict())
    rank = DECOMPOSITIONS[family].ranks(case.layer, [0.6])[0]
    case.module.bias.requires_grad_(requires_grad=False)
    case.module.eval()
    for module in build_forms(family, case, rank, steps=5)[0]:
        assert not module.training and not any(m.training for m in module.modules())
        assert all(p.dtype == torch.float32 for p in module.parameters())
        assert torch.equal(module.bias, case.module.bias) and not module.bias.requires_grad
        factors = [p for p in module.parameters() if p is not module.bias]
        assert all(p.requires_grad for p in factors)
        for mode in (False, True):
            module.train(mode).zero_grad()
            module(case.x).square().sum().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)
    assert all(torch.equal(v, before[k]) for k, v in case.module.state_dict().items())
    case.module.weight.requires_grad_(requires_grad=False)
    for module in build_forms(family, case, rank, steps=0)[0]:
        assert not any(p.requires_grad for p in module.parameters())


# --- the two forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), TWO_FORMS)
def test_both_forms_of_a_fit_are_one_function_and_the_cheaper_one_is_taken(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    dense = rankopt.count(case.module, case.x).macs
    assert case.layer.macs == dense
    for rank in decomposition.ranks(case.layer, [0.1, 0.9]):
        modules = [module.eval() for module in build_forms(family, case, rank, steps=0)[0]]
        torch.testing.assert_close(modules[0](case.x), modules[1](case.x))
        macs = [rankopt.count(module, case.x).macs for module in modules]
        assert macs[1] == dense
        candidates = in_each_form(case.layer, family, rank, 0.1)
        assert [c.form for c in candidates] == [FACTORISED, RECONSTRUCTED][: 1 + (macs[0] > dense)]
        for metrics, wanted in [(["params"], FACTORISED), (["params", "macs"], candidates[-1].form)]:
            chosen = [c for c in frontier(case.layer, candidates, metrics) if c.method == family]
            assert [c.form for c in chosen] == [wanted]
        assert not any(c.form == RECONSTRUCTED for c in frontier(case.layer, candidates, ["macs"]))  # dense is as good


def test_a_joint_budget_reconstructs_where_that_spares_multiplications(tmp_path):
    """The 1 x 1 in front of a strided convolution runs on four times the positions."""
    torch.manual_seed(0)
    model = nn.Conv2d(32, 32, 3, stride=2, padding=1)
    x = torch.randn(16, 32, 12, 12)
    space = SearchSpace(families=("cp_merged",), points=6, steps=3)
    forms = {}
    for name, budget in [("params", {"params": 0.7}), ("both", {"params": 0.7, "macs": "100%"})]:
        result = rankopt.compress(model, [x], budget, space=space, cache=tmp_path / "cache")
        forms[name] = [c.form for c in result.plan.choices]
        assert rankopt.count(result.model, x) == result.plan.cost
        result.save(tmp_path / name)
        torch.testing.assert_close(rankopt.load(model, tmp_path / name).eval()(x), result.model.eval()(x))
    assert RECONSTRUCTED not in forms["params"] and RECONSTRUCTED in forms["both"]
    files = [p.name for p in (tmp_path / "cache").iterdir()]
    assert sum(name.endswith(".safetensors") for name in files) == 2, "statistics and fits"
    assert sum(name.startswith("sensitivity") for name in files) == 1


CONTRACTIONS = {  # x with the modes of C, and the cores
    "tt": "Nab,pa,qpb,rqc,dr->Ncd",
    "tr": "Nab,zpa,qpb,rqc,dzr->Ncd",
    "ht": "Nab,pa,qb,rpq,yxr,xc,dy->Ncd",
    "tt_matrix": "Nijk,zaip,pbjq,qcky->Nabc",
}


def macs_of_best_order(equation, shapes):
    """By exhaustive search (numpy's "optimal" is opt_einsum's; both were compared and agree)."""
    operands = [np.broadcast_to(0.0, shape) for shape in shapes]
    inputs, output = equation.split("->")
    terms, macs = inputs.split(","), 0
    sizes = {k: n for term, shape in zip(terms, shapes, strict=True) for k, n in zip(term, shape, strict=True)}
    for pair in np.einsum_path(equation, *operands, optimize=("optimal", 1e30))[0][1:]:
        picked = {k for i in pair for k in terms[i]}
        macs += math.prod(sizes[k] for k in picked)
        terms = [term for i, term in enumerate(terms) if i not in pair]
        terms.append("".join(sorted(picked & {*output, *"".join(terms)})))
    return macs


@pytest.mark.parametrize("family", CONTRACTIONS)
def test_factors_of_a_linear_family_are_contracted_in_the_best_order(family):
    """For one vector. Many could share a product of two cores: in the extreme that is the reconstructed form.

    A ring could start at its second core, which saves up to 7 % where R1 is 1 (not on this layer): not done.
    """
    layer, decomposition = Layer("", "Linear", (512, 128), calls=(Call(1, (1, 1), (1, 1)),)), DECOMPOSITIONS[family]
    for rank in decomposition.ranks(layer, [0.2]):
        cores = list(decomposition.shapes(layer, rank))
        inputs = (1, *linear_modes(layer)[:2]) if family != "tt_matrix" else (1, *(core[2] for core in cores))
        if family == "tr":
            cores[0], cores[3] = (rank[0], rank[1], cores[0][1]), (cores[3][0], rank[0], rank[3])
        best = macs_of_best_order(CONTRACTIONS[family], [inputs, *cores])
        macs = decomposition.macs(layer, rank)
        assert macs == best


# --- whole models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "form"), FORMED)
def test_saved_copied_pickled_and_exported_models_come_back(family, form, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 20, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 30)).eval()
    x = torch.randn(3, 16, 4, 4)
    small, plan = compressed(model, [x], family, form, 0.5, 2)
    assert plan.choices and {c.form for c in plan.choices} == {form}
    save(tmp_path, small, plan)
    loaded = rankopt.load(model, tmp_path)
    with torch.no_grad():
        expected = small(x)
        for again in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), copy.deepcopy(loaded)):
            torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
            assert rankopt.count(again, x) == plan.cost and set(again.state_dict()) == set(small.state_dict())
        exported = torch.export.export(loaded, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    assert not exported.constants  # the factors went into the file, not the weight
    assert sum(t.numel() for t in exported.state_dict.values()) == plan.cost.params


@pytest.fixture(scope="module")
def digits_data():
    """The digits task, its inputs with the dense model's outputs, and the divergence from these."""
    task = load_task("digits")
    inputs = list(task.calibration)
    data = training.with_targets(task.model, training.split(inputs, training.BATCH))
    return task, inputs, data, Divergence(task.model, inputs)


@pytest.mark.parametrize(("family", "form"), FORMED)
def test_twenty_steps_of_our_training_lower_the_loss(family, form, digits_data):
    """As in rounds.py: Adam, distillation, clipped gradients; from a fit that has lost something to be seen."""
    task, inputs, data, divergence = digits_data
    small, plan = compressed(task.model, inputs, family, form, 0.2, 10, least=10_000)
    before = divergence(small)
    optimizer = torch.optim.Adam(small.parameters(), RATE)
    training.train(small, data, training.distillation, optimizer, steps=20, clip=training.CLIP, training=False)
    after = divergence(small)
    assert plan.choices and before > 0.01 and after < 0.8 * before
