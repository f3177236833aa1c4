"""Ranks, fits and their gradients on every layer geometry, against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from scipy.optimize import check_grad
from torch import nn

from rankopt.core.records import Layer
from rankopt.decompositions import parameter_search
from rankopt.decompositions.linear_algebra import cut
from rankopt.decompositions.output_solver import OutputSolver
from rankopt.decompositions.parameter_search import SEARCH_RIDGE
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target, stored_fit
from rankopt.decompositions.types import Original
from rankopt.decompositions.variable_projection import OutputSolved
from tests.helpers.layers import MODULES, ONE_EACH, PAIRS, build, make


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_ranks_are_the_largest_within_a_fraction(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    for rank in decomposition.ranks(case.layer, [0.5]):
        least = decomposition.weights(case.layer, decomposition.valid(case.layer, tuple(1 for _ in rank)))
        assert decomposition.weights(case.layer, rank) <= max(0.5 * case.layer.weights, least)
        if len(rank) == 1 and decomposition.weights(case.layer, rank) > least:
            assert decomposition.weights(case.layer, (rank[0] + 1,)) > 0.5 * case.layer.weights


@pytest.mark.parametrize(("family", "name"), ONE_EACH)
def test_more_rank_and_more_steps_lower_the_error(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    ranks = decomposition.ranks(case.layer, [0.2, 0.5, 0.8])
    errors = {r: build(family, case, r)[1].error for r in ranks}
    single = [errors[r] for r in ranks] if len(ranks[0]) == 1 else [errors[ranks[0]], errors[ranks[-1]]]
    assert single == sorted(single, reverse=True)
    assert single[-1] < 0.7 * single[0]
    long = build(family, case, ranks[0], steps=100)[1].error
    assert long <= build(family, case, ranks[0], steps=0)[1].error + 1e-9


@pytest.mark.parametrize("family", ["tt", "tr", "ht"])
def test_a_search_for_something_else_than_the_error_never_raises_the_error(family):
    """On a Linear with an output metric: their rank over the outputs is chosen before the metric is undone, or with a
    Kronecker product in its place."""
    case, decomposition = make("linear"), DECOMPOSITIONS[family]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(40, case.layer.out_channels, dtype=torch.float64, generator=generator)
        g = g * torch.logspace(0, -2, case.layer.out_channels, dtype=torch.float64)
        case.metric = (g.T @ g)[None]
        for rank in decomposition.ranks(case.layer, [0.1, 0.3, 0.5]):
            start, end = (build(family, case, rank, steps=round(k / decomposition.effort))[1].error for k in (0, 20))
            assert end <= start


@pytest.mark.parametrize("family", ["svd_in", "svd_spatial", "svd_grouped", "tucker2", "tt"])
@pytest.mark.parametrize("kind", ["whole", "diagonal", "sketch", "identity"])
def test_rows_in_blocks_are_solved_as_all_rows_are(family, kind):
    case, decomposition = make("conv3x3"), DECOMPOSITIONS[family]
    moments = {
        "whole": case.moment,
        "diagonal": case.moment.diagonal(dim1=1, dim2=2),
        "sketch": torch.cat([case.moment.diagonal(dim1=1, dim2=2)[:, None], case.moment[:, :3]], 1),
        "identity": None,
    }
    target, _ = decomposition.target(case.layer, case.module.weight, moments[kind], case.metric)
    rank = decomposition.ranks(case.layer, [0.4])[0]
    theta = tuple(t.requires_grad_() for t in decomposition.start(case.layer, target, rank))
    rows, blocks = decomposition.rows(case.layer, theta), decomposition.blocks(case.layer, theta)
    assert blocks.diagonal.shape[1] > 1
    output_rank = decomposition.output_rank(case.layer, rank)
    whole = OutputSolver(target, output_rank)
    parts = OutputSolver(target, output_rank, z=blocks.diagonal.shape[1], interleaved=blocks.interleaved)
    ranks = None if output_rank is None else torch.tensor([output_rank[1]])
    loss, output, gradient = whole.solve(rows.detach()[:, None, None], ranks)
    losses, outputs, gradients = parts.solve(blocks.diagonal.detach().unsqueeze(1), ranks)
    torch.testing.assert_close(losses, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(outputs[:, 0] @ rows, output[:, 0] @ rows)
    alone, same = parts.losses(blocks.diagonal.detach().unsqueeze(1), ranks)  # with a ridge that is hardly any
    torch.testing.assert_close(alone, losses, rtol=1e-6, atol=0)
    assert torch.equal(same, outputs)
    by_rows = torch.autograd.grad(rows, theta, gradient[:, 0, 0] / whole.scales.sum(), retain_graph=True)
    by_blocks = torch.autograd.grad(blocks.diagonal, theta, gradients[:, 0] / parts.scales.sum())
    torch.testing.assert_close(by_blocks, by_rows)


def test_wide_layers_keep_less_and_are_fitted_the_same(monkeypatch):
    case = make("conv3x3")
    given = (case.layer, case.module.weight, [(2, 3), (4, 2), (2, 2)], case.moment, case.metric, 20)
    before = [fit.error for fit in DECOMPOSITIONS["svd_grouped"].fit(*given)]
    kept = []

    def watch(search, dtype, whole=parameter_search.Search._product):
        found = whole(search, dtype)
        kept.append(len(search.products))
        return found

    monkeypatch.setattr(parameter_search.Search, "_product", watch)
    monkeypatch.setattr(parameter_search, "KEPT_BYTES", 0)
    assert [fit.error for fit in DECOMPOSITIONS["svd_grouped"].fit(*given)] == before
    assert max(kept) == 1 < len(kept)


@pytest.mark.parametrize(("family", "name"), ONE_EACH)
def test_a_calibrated_fit_beats_a_plain_one_where_it_counts(family, name):
    case = make(name)
    target = full_target(case.layer, case.module.weight, case.moment, case.metric)
    rank = DECOMPOSITIONS[family].ranks(case.layer, [0.5])[0]
    plain, _ = build(family, case, rank, calibrated=False, steps=60)
    _, fitted = build(family, case, rank, steps=60)
    assert fitted.error < target.error(plain.weight.detach().reshape(target.weight.shape))


@pytest.mark.parametrize(("family", "name"), ONE_EACH)
def test_half_precision_and_zero_and_dead_inputs(family, name):
    for dtype in (torch.bfloat16, torch.float16):
        case = make(name)
        case.module = case.module.to(dtype)
        module, fit = build(family, case, DECOMPOSITIONS[family].ranks(case.layer, [0.5])[0])
        assert fit.error < 1 and all(p.dtype == dtype for p in module.parameters())
    zero = make(name)
    nn.init.zeros_(zero.module.weight)
    assert build(family, zero, DECOMPOSITIONS[family].ranks(zero.layer, [0.5])[0])[1].error == 0
    dead = make(name)
    half = dead.layer.patch // 2
    dead.moment[:, :half] = 0  # half of the input channels never fire
    dead.moment[:, :, :half] = 0
    _, fit = build(family, dead, DECOMPOSITIONS[family].ranks(dead.layer, [0.5])[0])
    assert np.isfinite(fit.error) and all(torch.isfinite(f).all() for f in fit.factors)


@pytest.mark.parametrize("family", [family for family, name in PAIRS if name == "grouped same reflect"])
def test_a_group_whose_inputs_are_always_zero(family):
    """Its weights do not matter; the others are fitted as ever."""
    dead, case = make("grouped same reflect"), make("grouped same reflect")
    dead.moment[0] = 0
    rank = DECOMPOSITIONS[family].ranks(case.layer, [0.5])[0]
    fits = {steps: build(family, dead, rank, steps=steps)[1] for steps in (0, 20)}
    assert all(torch.isfinite(f).all() for f in fits[20].factors)
    assert 0 < fits[20].error <= fits[0].error
    if not DECOMPOSITIONS[family].closed_form:
        assert fits[20].error < fits[0].error


@pytest.mark.parametrize("family", [f for f in DECOMPOSITIONS if isinstance(DECOMPOSITIONS[f], OutputSolved)])
@pytest.mark.parametrize("name", ["conv3x3", "linear", "grouped same reflect"])
def test_gradient_of_the_projected_loss(family, name):
    """Against finite differences, through the elimination of the output factor."""
    case, decomposition = make(name), DECOMPOSITIONS[family]
    if decomposition.full_rank(case.layer) is None:
        assert name == "linear"
        return
    rank = decomposition.ranks(case.layer, [0.4])[0]
    target, _ = decomposition.target(case.layer, case.module.weight, case.moment, case.metric)
    output_rank = decomposition.output_rank(case.layer, rank)
    solver = OutputSolver(target, output_rank, SEARCH_RIDGE)
    theta = decomposition.start(case.layer, target, rank)
    sizes = [p.numel() for p in theta]

    def unpack(x):
        flat = torch.as_tensor(x)
        return flat, [p.view(t.shape) for p, t in zip(flat.split(sizes), theta, strict=True)]

    def solved(rows):
        ranks = None if output_rank is None else torch.tensor([output_rank[1]])
        losses, _, gradients = solver.solve(rows[:, None, None], ranks)
        return losses.sum().item() / solver.scales.sum().item(), gradients[:, 0, 0] / solver.scales.sum()

    def value(x):
        return solved(decomposition.rows(case.layer, unpack(x)[1]))[0]

    def gradient(x):
        flat = torch.as_tensor(x).requires_grad_()
        rows = decomposition.rows(case.layer, unpack(flat)[1])
        return torch.autograd.grad(rows, flat, solved(rows.detach())[1])[0].numpy()

    x = torch.cat([p.reshape(-1) for p in theta]).numpy()
    x = x + 0.1 * np.random.default_rng(0).standard_normal(len(x))
    assert check_grad(value, gradient, x) < 1e-4 * np.linalg.norm(gradient(x)) + 1e-6


def plain_error(weight, approximation):
    return float((weight - approximation).square().sum() / weight.square().sum())


def test_no_worse_than_tensorly_at_the_same_rank():
    """In the weight metric, where tensorly fits too."""
    case = make("conv3x3")
    weight = case.module.weight.detach()
    with tensorly.backend_context("pytorch"):
        cp = tensorly.decomposition.parafac(weight, 14, init="svd", n_iter_max=300, random_state=0)
        core, factors = tensorly.decomposition.partial_tucker(weight, [6, 5], modes=[0, 1])[0]
        references = {
            ("cp", (14,)): tensorly.cp_to_tensor(cp),
            ("tucker2", (5, 6)): tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1]),
            ("tt", (5, 8, 6)): tensorly.tt_to_tensor(
                tensorly.decomposition.tensor_train(weight.permute(1, 2, 3, 0), [1, 5, 8, 6, 1])
            ).permute(3, 0, 1, 2),
        }
    for (family, rank), reference in references.items():
        ours = build(family, case, rank, calibrated=False, steps=400)[1].error
        assert ours <= plain_error(weight, reference) * 1.02, family


def test_svd_out_is_optimal_in_the_output_metric():
    """Against the closed form by whitening: truncated SVD of H^½ W S^½."""
    case = make("conv3x3")
    target = full_target(case.layer, case.module.weight, case.moment, case.metric)

    def root(m):
        values, vectors = torch.linalg.eigh(m)
        return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT

    s = torch.linalg.svdvals(root(target.metric) @ target.weight @ root(target.moment))[0]
    for rank in (1, 3, 7):
        best = float(s[rank:].square().sum() / s.square().sum())
        assert build("svd_out", case, (rank,))[1].error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("family", "name"), [pair for pair in ONE_EACH if DECOMPOSITIONS[pair[0]].closed_form])
def test_ranks_cut_from_the_factors_of_all_have_the_errors_that_they_declare(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    given = (case.layer, case.module.weight, case.moment, case.metric)
    nested = decomposition.nested(*given)
    assert len(nested.errors) == nested.left.shape[-1] + 1 == nested.right.shape[-2] + 1 and nested.errors[0] == 1
    for rank in decomposition.ranks(case.layer, [0.2, 0.5, 1.0]):
        factors = cut(nested.left, nested.right, decomposition.shapes(case.layer, rank), nested.dtype)
        fit = stored_fit(decomposition, *given[:2], factors, rank, *given[2:])
        assert fit.error == pytest.approx(float(nested.errors[rank[0]]), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize(("family", "name"), ONE_EACH)
@pytest.mark.parametrize("steps", [0, 20])
def test_estimated_errors_are_nearly_those_of_fits(family, name, steps):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    ranks = decomposition.ranks(case.layer, [0.2, 0.5])
    original = Original(case.layer, case.module.weight, case.moment, case.metric)
    ((fits,), (estimates,)) = (f([original], [ranks], steps) for f in (decomposition.fit_stack, decomposition.errors))
    for fit, estimate in zip(fits, estimates, strict=True):
        assert estimate.rank == fit.rank and estimate.factors == ()
        assert estimate.error == pytest.approx(fit.error, rel=0.1, abs=1e-6)
        assert (estimate.start is None) == (fit.start is None)
        if fit.start is not None:
            assert estimate.start == pytest.approx(fit.start, rel=0.2, abs=1e-6)


def test_factors_are_balanced():
    case = make("conv3x3")
    for family in ("svd_out", "svd_in", "svd_spatial"):
        first, second = build(family, case, DECOMPOSITIONS[family].ranks(case.layer, [0.5])[0])[1].factors
        assert first.norm() == pytest.approx(second.norm().item(), rel=1e-6)
    for family in ("cp", "cp_merged"):
        factors = build(family, case, (9,))[1].factors
        norms = [f.reshape(f.shape[0], -1).norm(dim=1) for f in factors[:-1]]
        norms.append(factors[-1].reshape(-1, 9).norm(dim=0))
        for other in norms[1:]:
            torch.testing.assert_close(norms[0], other)


def test_degenerate_layers_offer_nothing_larger():
    for shape in [(1, 1, 3, 3), (1, 64, 1, 1), (64, 1, 1, 1), (2, 2)]:
        layer = Layer("", "Linear" if len(shape) == 2 else "Conv2d", shape)
        for family in DECOMPOSITIONS:
            for rank in DECOMPOSITIONS[family].ranks(layer, [0.1, 0.5, 1.0]):
                assert DECOMPOSITIONS[family].weights(layer, rank) < layer.weights


def test_every_geometry_is_covered_by_a_family():
    assert {name for _, name in PAIRS} == set(MODULES)
