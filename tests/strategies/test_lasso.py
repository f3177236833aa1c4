"""Lasso: the path against its optimality conditions; gates, the proximal step, and runs that end on the budget.

And what holds for all strategies that look at the model.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import rankopt
from rankopt.core.errors import RankoptError
from rankopt.core.progress import silent
from rankopt.core.records import Candidate, Cost
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.model.layer_kinds import as_matrix
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.strategies.gates import FAMILIES, Gated
from rankopt.strategies.lasso import GRID, Components, family_components, lasso, refitted, regression, svd_components
from rankopt.strategies.lasso_train import LassoTrain, hoyer_weights, soft_threshold
from rankopt.strategies.registry import make_strategy
from tests.helpers.layers import PAIRS, build, make


def run(name, prepared, budget, **options):
    problem = prepared.problem(budget)
    strategy = make_strategy(name, problem, 0, options)
    strategy.measure(prepared, silent)
    return problem, strategy, strategy.ask()


# --- on calibration ---


def test_the_regression_is_that_of_the_layers_output():
    case = make("conv3x3")
    family = DECOMPOSITIONS["svd_out"]
    (fit,) = family.fit(case.layer, case.module.weight, [(9,)], case.moment, case.metric, steps=5)
    target = full_target(case.layer, case.module.weight, case.moment, case.metric)
    out, rows = svd_components(case.layer, target)
    out, rows = out[..., :9], rows[:, :9]
    torch.testing.assert_close((out @ rows).reshape(case.module.weight.shape), family.weight(case.layer, fit.factors))
    gram, cross = regression(target, out, rows)
    one = [out[:, :, [r]] @ rows[:, [r]] for r in range(9)]
    gates = np.array([target.error(target.weight - x) for x in one]) ** 0.5  # shares of the weight's norm
    assert 1 - 2 * cross @ gates + gates @ gram @ gates == pytest.approx(target.error(out @ rows), rel=1e-6)


@pytest.mark.parametrize("name", [n for f, n in PAIRS if f == "svd_out"])
def test_of_the_svd_alone_the_lasso_keeps_the_first_with_the_error_of_the_output_metrics_svd(name):
    """They are orthogonal in the metric; the reference is the SVD of H^½ W S^½, of all groups."""
    case = make(name)
    target = full_target(case.layer, case.module.weight, case.moment, case.metric)
    gram, cross = regression(target, *svd_components(case.layer, target))
    moment = target.moment.diag_embed() if target.diagonal else target.moment
    half, other = (_root(m) for m in (target.metric, moment))
    squares = torch.linalg.svdvals(half @ target.weight @ other).square().sum(0)
    tails = (squares.sum() - squares.cumsum(0)).clamp_min(0) / squares.sum()
    gates = lasso(gram, cross)
    for kept in gates.T != 0:
        rank = int(kept.sum())
        assert not rank or kept[:rank].all(), "the best R are the first R"
        if rank:
            assert refitted(gram, cross, kept) == pytest.approx(float(tails[rank - 1]), rel=1e-6, abs=1e-9)
    strong = cross > 1e-6
    np.testing.assert_allclose(gram[np.ix_(strong, strong)], np.eye(strong.sum()), atol=1e-6)


def _root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def test_directions_that_the_metric_does_not_see_do_not_matter():
    """A metric of rank 3: three components explain all, where the SVD of the bare weight needs eight."""
    case = make("conv3x3")
    low = case.metric[..., :3] @ case.metric[..., :3].mT
    target = full_target(case.layer, case.module.weight, case.moment, low)
    gram, cross = regression(target, *svd_components(case.layer, target))
    assert refitted(gram, cross, np.arange(len(cross)) < 3) == pytest.approx(0.0, abs=1e-9)


def test_among_components_of_several_families_the_lasso_is_more_than_a_threshold(digits):
    """Correlated components: what is kept is not what correlates most with the weight by itself."""
    layer = next(x for x in digits.problem({"params": 0.3}).layers if x.name == "conv3")
    weight = digits.model.get_submodule("conv3").weight
    target = full_target(layer, weight, *digits.statistics["conv3"])
    (block,) = family_components(layer, target, digits.candidates["conv3"], digits.factors, 10**6)
    fitted = sum(block.matrices)
    largest = max((c for c in digits.candidates["conv3"] if c.method == "cp_merged"), key=lambda c: c.rank)
    assert target.error(fitted) == pytest.approx(largest.error, rel=1e-3)
    svd = svd_components(layer, target)
    gram, cross = regression(target, *svd, block.matrices)
    assert np.allclose(np.diag(gram), 1)
    together = (svd[0][..., [0]] @ svd[1][:, [0]]) + block.matrices[0]
    norms = [target.error(target.weight - x) ** 0.5 for x in (svd[0][..., [0]] @ svd[1][:, [0]], block.matrices[0])]
    at = [0, svd[0].shape[-1]]
    moments = np.array(norms) @ gram[np.ix_(at, at)] @ np.array(norms)
    assert 1 - 2 * cross[at] @ norms + moments == pytest.approx(target.error(together), rel=1e-6)
    svd_cost = Components.of(layer, "svd_out", at[1]).cost.params
    prices = np.array([svd_cost] * at[1] + [block.cost.params] * block.number) / svd_cost
    gram, cross = gram / np.outer(prices, prices), cross / prices
    found = next(g for g in lasso(gram, cross).T if (g != 0).sum() >= 60)
    kept, slopes = found != 0, np.abs(cross - gram @ found)
    assert slopes[kept] == pytest.approx(slopes.max(), rel=1e-4)  # where the Lasso is at its minimum
    strongest = np.argsort(-np.abs(cross))
    strongest = strongest[prices[strongest].cumsum() <= prices @ kept]
    assert kept[: at[1]].any() and kept[at[1] :].any()
    assert set(np.flatnonzero(kept)) != set(strongest)


def test_an_unknown_dictionary_is_refused(digits):
    with pytest.raises(RankoptError, match="strategy 'lasso': unknown dictionary 'cp'; choose from families, svd"):
        make_strategy("lasso", digits.problem({"params": 0.3}), 0, {"dictionary": "cp"})


def test_the_path_meets_the_conditions_of_the_lasso():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 12))
    x /= np.linalg.norm(x, axis=0)
    gram, cross = x.T @ x, x.T @ (x[:, :3] @ [0.7, -0.4, 0.2])
    gates = lasso(gram, cross)
    alphas = np.abs(cross).max() * GRID
    for alpha, g in zip(alphas[:25:4], gates.T[:25:4], strict=True):
        slope = cross - gram @ g
        assert np.all(np.abs(slope) <= alpha + 0.03 * alphas[0])
        np.testing.assert_allclose(slope[g != 0], alpha * np.sign(g[g != 0]), atol=0.03 * alphas[0])
    assert not gates[:, 0].any()


def test_a_point_counts_with_least_squares_on_its_components():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 12)), rng.standard_normal(40)
    kept = np.arange(12) % 3 == 0
    residual = np.linalg.lstsq(x[:, kept], y)[1].item()
    gram, cross = x.T @ x / (y @ y), x.T @ y / (y @ y)
    assert refitted(gram, cross, kept) == pytest.approx(residual / (y @ y))
    assert refitted(gram, cross, kept & False) == 1.0


# --- while training ---


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in PAIRS if f in FAMILIES])
def test_gates_leave_the_layer_as_it_is_and_zero_gates_remove_components(family, name):
    """Per mode for Tucker, per bond for TT: and the penalised gates are what the output is made of."""
    case = make(name)
    decomposition = DECOMPOSITIONS[family]
    rank = decomposition.valid(case.layer, tuple(3 for _ in decomposition.full_rank(case.layer)))
    module, _ = build(family, case, rank, calibrated=False, steps=2)
    before = module(case.x)
    gated = Gated(case.layer, Candidate(family, rank, Cost(0, 0, 0), 0.0), module)
    torch.testing.assert_close(module(case.x), before)
    assert tuple(len(b.gates) for b in gated.bonds) == rank
    gated.bonds[0].absorb()
    with torch.no_grad():
        for weight, _ in gated.bonds[0].slices:
            weight.mul_(2.0)  # what training might do to make up for a shrunken gate
        grown = module(case.x)
        scales = gated.bonds[0].gates.clone()
        gated.bonds[0].absorb()
        torch.testing.assert_close(module(case.x), grown)
        torch.testing.assert_close(gated.bonds[0].gates, scales * 2.0 ** len(gated.bonds[0].slices))
        for bond in gated.bonds:
            bond.gates.zero_()
            assert not torch.allclose(module(case.x), grown), "the penalty must reach the output"
        bias = getattr(case.module, "bias", None)
        flat = module(case.x).movedim(-1 if len(case.layer.shape) == 2 else 1, -1)
        torch.testing.assert_close(flat, torch.zeros_like(flat) if bias is None else bias.expand_as(flat))


@pytest.mark.parametrize("name", [n for f, n in PAIRS if f == "svd_out"])
def test_rotated_components_are_singular_vectors(name):
    """The layer stays as it is, and its gates are the singular values of every group's weight, up to one factor."""
    case, svd = make(name), DECOMPOSITIONS["svd_out"]
    rank = svd.valid(case.layer, (3,))
    (fit,) = svd.fit(case.layer, case.module.weight, [rank], case.moment, case.metric)
    module = svd.build(case.module, case.layer, rank)
    load_factors(module, tuple(f * torch.linspace(1, 2, len(f)).view(-1, *[1] * (f.ndim - 1)) for f in fit.factors))
    before = module(case.x)
    values = torch.linalg.svdvals(as_matrix(case.layer, module.weight.detach()))[:, : rank[0]]
    gated = Gated(case.layer, Candidate("svd_out", rank, Cost(0, 0, 0), 0.0), module)
    gated.rotate()
    torch.testing.assert_close(module(case.x), before)
    gates = gated.bonds[0].gates.detach()
    if case.layer.groups == 1:
        torch.testing.assert_close(gates / gates[0], values[0] / values[0, 0])


def test_the_threshold_spares_negative_gates():
    gates = torch.tensor([-3.0, -0.1, 0.0, 0.1, 2.0])
    found = soft_threshold(gates, torch.tensor([0.5]))
    torch.testing.assert_close(found, torch.tensor([-2.5, 0.0, 0.0, 0.0, 1.5]))


def test_hoyer_weights_follow_the_derivative():
    gates = torch.tensor([1.5, -0.2, 0.4, 0.05], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gates.abs().sum() ** 2 / gates.square().sum(), gates)
    slope, ours = slope * gates.detach().sign(), hoyer_weights(gates.detach())
    assert ours[0] == 0 and slope[0] < 0
    torch.testing.assert_close(ours[1:] / ours[1], slope[1:] / slope[1])


def ends(digits, share, penalty="l1", steps=100, within=0.01):
    problem, strategy, proposal = run("lasso-train", digits, {"params": share}, penalty=penalty, steps=steps)
    left = strategy.problem.cost(proposal).params
    assert (1 - within) * problem.limits[0].target <= left <= problem.limits[0].target, (share, penalty)
    assert strategy.problem.fits(proposal)
    assert rankopt.count(strategy.network.model, digits.task.example_input).params == left
    return problem, strategy.network


SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in (0.15, 0.2, 0.45, 0.6)]


@pytest.mark.parametrize("share", [0.3, *SLOW])
def test_a_run_ends_on_the_budget_and_below_uniform(digits, share):
    problem, network = ends(digits, share, within=0.013 if share == 0.6 else 0.01)  # of fc1 one component is 1.25 %
    uniform = make_strategy("uniform", problem).ask()
    assert digits.objective(network.model) < digits.objective(digits.apply(problem, uniform))


@pytest.mark.parametrize("penalty", ["group", "hoyer", "nuclear"])
def test_every_penalty_ends_on_the_budget(digits, penalty):
    ends(digits, 0.3, penalty, 60, 0.03 if penalty == "nuclear" else 0.01)  # one component of fc1 is 2.5 %


# --- all that look at the model ---


@pytest.mark.parametrize("metric", ["params", "macs"])
@pytest.mark.parametrize("name", ["evbmf", "lasso", "lasso-train"])
def test_searches_end_below_uniform_and_leave_the_model_alone(digits, name, metric):
    before = {k: v.clone() for k, v in digits.task.model.state_dict().items()}
    options = {"steps": 40} if name == "lasso-train" else {}
    problem = digits.problem({metric: 0.3})
    result = run_search(digits, problem, SearchSettings(name, options=options))
    uniform = run_search(digits, problem, SearchSettings("uniform"))
    assert result.info["objective"]["best"] < uniform.info["objective"]["best"]
    assert all(torch.equal(v, before[k]) for k, v in digits.task.model.state_dict().items())
    assert not digits.task.model.training


@pytest.mark.parametrize("name", ["evbmf", "lasso", "lasso-train"])
def test_asking_before_measuring_says_what_to_do(digits, name):
    with pytest.raises(RankoptError, match="measure"):
        make_strategy(name, digits.problem({"params": 0.3})).ask()


def test_unknown_penalties_list_the_valid_ones(digits):
    with pytest.raises(RankoptError, match="choose from l1, group, hoyer, nuclear"):
        LassoTrain(digits.problem({"params": 0.3}), penalty="l0")


def plans(prepared):
    few: dict[str, dict[str, int]] = {"evbmf": {}, "lasso": {}, "lasso-train": {"steps": 10}}
    found = [run(name, prepared, {"params": 0.3}, **options) for name, options in few.items()]
    return [[[c.method, *c.rank] for c in s.problem.candidates(proposal)] for _, s, proposal in found]


SPAWNED = """
import json, sys
from rankopt.candidates.prepare import prepare
from rankopt.experiments.tasks import load_task
from tests.helpers.spaces import QUICK
from tests.strategies.test_lasso import plans
import torch
torch.set_num_threads(1)
json.dump(plans(prepare(load_task("digits"), QUICK, workers=1)), sys.stdout)
"""


@pytest.mark.slow
def test_same_seed_same_plans_in_another_process(digits):
    out = subprocess.run([sys.executable, "-c", SPAWNED], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == plans(digits)
