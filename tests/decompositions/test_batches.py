"""Fits in batches: of several ranks, of several layers, and the search that serves them."""

from __future__ import annotations

import functools
import gc
import itertools

import pytest
import torch

from rankopt.core.records import Layer
from rankopt.decompositions.lbfgs import Objective, minimize
from rankopt.decompositions.parameter_search import DAMPING, inverse_curvature
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.svd import SvdIn
from rankopt.decompositions.targets import _of_target
from rankopt.decompositions.types import Original, Target
from rankopt.decompositions.variable_projection import OutputSolved
from tests.helpers.layers import make

SOLVED = [f for f in DECOMPOSITIONS.built_in if isinstance(DECOMPOSITIONS[f], OutputSolved)]
LAYERS = ["conv3x3", "linear", "grouped same reflect"]


def applies(family, case):
    return DECOMPOSITIONS[family].full_rank(case.layer) is not None


def errors(family, case, ranks, steps):
    fits = DECOMPOSITIONS[family].fit(case.layer, case.module.weight, ranks, case.moment, case.metric, steps)
    found = list(fits)
    assert [fit.rank for fit in found] == list(ranks)
    return [fit.error for fit in found]


@pytest.mark.parametrize("family", SOLVED)
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_in_one_batch_are_fitted_as_each_alone(family, name):
    """To rounding after a few steps; more steps amplify it, hundreds of them as far as to another minimum."""
    case = make(name)
    if not applies(family, case):
        return
    ranks = DECOMPOSITIONS[family].ranks(case.layer, [0.2, 0.4, 0.8])
    ranks = [*ranks[::2], *ranks[1::2]]  # in any order
    for taken, close in ((4, 1e-3), (20, 0.01)):
        steps = round(taken / DECOMPOSITIONS[family].effort)
        alone = [errors(family, case, [rank], steps)[0] for rank in ranks]
        assert errors(family, case, ranks, steps) == pytest.approx(alone, rel=close, abs=1e-7)


@pytest.mark.parametrize("family", [*SOLVED, "svd_out", "tt_matrix"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_one_batch_are_fitted_as_each_alone(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    if not applies(family, case):
        return
    other = make(name)
    other.module.weight.data = torch.randn_like(other.module.weight)
    other.moment = other.moment + torch.eye(other.moment.shape[-1], dtype=other.moment.dtype)
    ranks = decomposition.ranks(case.layer, [0.3, 0.6])
    both = (case, other)
    originals = [Original(c.layer, c.module.weight, c.moment, c.metric) for c in both]
    stack, without_factors = (
        decomposition.fit_stack(originals, [ranks] * 2, 20),
        decomposition.errors(originals, [ranks] * 2, 20),
    )
    for one, fits, estimates in zip(originals, stack, without_factors, strict=True):
        (only,) = decomposition.errors([one], [ranks], 20)
        assert not any(fit.factors for fit in estimates)
        assert [fit.error for fit in estimates] == pytest.approx([fit.error for fit in only], rel=0.01, abs=1e-7)
        for fit, expected in zip(estimates, only, strict=True):
            assert fit.start == (None if expected.start is None else pytest.approx(expected.start, rel=0.01))
        alone = list(decomposition.fit(one.layer, one.weight, ranks, one.moment, one.metric, 20))
        for fit, expected in zip(fits, alone, strict=True):
            assert [f.shape for f in fit.factors] == [f.shape for f in expected.factors]
            assert fit.error == pytest.approx(expected.error, rel=0.01, abs=1e-7)


def test_a_family_with_a_fit_of_its_own_is_asked_for_it():
    """As families of other packages are: they know nothing of batches."""

    class Own(SvdIn):
        def fit(self, layer, weight, ranks, moment=None, metric=None, steps=100):
            asked.append(layer)
            return super().fit(layer, weight, ranks, moment, metric, 0)

    asked, case = [], make("conv3x3")
    stack = Own().fit_stack([Original(case.layer, case.module.weight, case.moment, case.metric)] * 2, [[(2,)]] * 2, 50)
    (expected,) = SvdIn().fit(case.layer, case.module.weight, [(2,)], case.moment, case.metric, 0)
    assert len(asked) == 2 and [fits[0].error for fits in stack] == [expected.error] * 2


def test_groups_end_on_their_own():
    """A group of zeros beside one that is searched."""
    case = make("grouped same reflect")
    with torch.no_grad():
        case.module.weight[6:] = 0
    assert 0 < errors("cp_merged", case, [(3,)], 50)[0] < errors("cp_merged", case, [(3,)], 0)[0]


@pytest.mark.parametrize("family", ["svd_in", "svd_spatial", "svd_grouped", "tucker2", "cp", "cp_merged"])
def test_starts_of_all_ranks_take_one_decomposition(family, monkeypatch):
    case, taken = make("conv3x3"), []
    for name in ("svd", "eigh"):
        real = getattr(torch.linalg, name)

        def counted(matrix, *args, real=real, name=name, **kwargs):
            taken.append((name, matrix.shape))
            return real(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)

    def decompositions(ranks):
        taken.clear()
        target, _ = DECOMPOSITIONS[family].target(case.layer, case.module.weight, case.moment, case.metric)
        starts = [DECOMPOSITIONS[family].start(case.layer, target, r) for r in ranks]
        assert len(starts) == len(ranks)
        return len([x for x in taken if x[1][-2:] != case.layer.kernel])  # those of cp's terms are of its rank

    ranks = [(2, r) for r in (1, 2, 3)] if family in {"svd_grouped", "tucker2"} else [(r,) for r in (1, 2, 3)]
    first = decompositions(ranks)
    assert first > decompositions(ranks) == decompositions(ranks[:1]) > 0, "the metric's roots are taken once"
    gc.collect()
    assert len(_of_target) == 0  # kept no longer than the target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minima_of_a_batch(dtype):
    """Rosenbrock's function from several points, each problem with its own scale."""
    scales = torch.tensor([[1.0, 100.0, 1e-3], [10.0, 1.0, 1.0]], dtype=dtype)

    def evaluate(points, columns):
        x = points.detach().requires_grad_()
        losses = scales[:, columns] * (100 * (x[..., 1] - x[..., 0] ** 2) ** 2 + (1 - x[..., 0]) ** 2)
        return losses.detach().double(), torch.autograd.grad(losses.sum(), x)[0]

    start = torch.tensor([-1.2, 1.0], dtype=dtype) + 0.1 * torch.arange(6, dtype=dtype).view(2, 3, 1)
    found = minimize(Objective(evaluate), start, torch.full((2, 3), 200), 1e-9, 1e-9)
    assert found.losses.max() < 1e-5
    short = minimize(Objective(evaluate), start, torch.tensor([[3, 200, 0], [5, 200, 0]]), 1e-9, 1e-9)
    assert short.rounds[:, 0].tolist() == [3, 5] and short.rounds[:, 2].tolist() == [0, 0]
    assert short.ended.tolist() == [[False, True, False]] * 2
    assert torch.equal(short.points[:, 2], start[:, 2]) and short.losses[:, 1].max() < 1e-5
    assert (short.losses <= evaluate(start, torch.arange(3))[0]).all()


class Product:
    """A preconditioner that is a product with a tensor (g, p, ...)."""

    def __init__(self, product, inverse):
        self.product, self.inverse = product, inverse

    def __call__(self, vectors):
        return self.product(vectors, self.inverse)

    def keep(self, index):
        return Product(self.product, self.inverse[:, index])


def test_what_is_found_for_a_problem_does_not_depend_on_its_batch():
    """To the last digit, with a preconditioner and without one, wherever the others end."""
    generator = torch.Generator().manual_seed(0)
    start = 1.5 * torch.randn(4, 3, 2, generator=generator)
    steepness = 10 ** torch.linspace(0, 2, 12).view(4, 3)
    steps = torch.tensor([[200, 40, 7]] * 4)

    def objective(rows, own_columns, with_preconditioner):
        own = steepness[rows][:, own_columns]

        def evaluate(points, columns):
            x = points.detach().requires_grad_()
            losses = own[:, columns] * (x[..., 1] - x[..., 0] ** 2) ** 2 + (1 - x[..., 0]) ** 2
            return losses.detach().double(), torch.autograd.grad(losses.sum(), x)[0]

        def preconditioner(points, columns):
            return Product(lambda v, m: m.unsqueeze(2) * v, 1 / (1 + own[:, columns].unsqueeze(-1) * points.square()))

        return Objective(evaluate, preconditioner if with_preconditioner else None)

    every = list(range(3))
    for with_preconditioner in (False, True):
        whole = minimize(objective(slice(None), every, with_preconditioner), start, steps, 1e-6, 1e-12)
        assert len(whole.rounds.unique()) > 3
        for i, j in itertools.product(range(4), every):
            rows, columns = slice(i, i + 1), [j]
            alone = minimize(
                objective(rows, columns, with_preconditioner), start[rows, columns], steps[rows, columns], 1e-6, 1e-12
            )
            for one, all_of_them in zip(alone, whole, strict=True):
                assert torch.equal(one, all_of_them[rows, columns])


@pytest.mark.parametrize("family", ["cp", "cp_merged", "tucker2", "svd_in"])
@pytest.mark.parametrize("steps", [4, 300])
def test_layers_in_a_stack_have_the_fits_that_they_have_alone(family, steps):
    """To the last digit, so that what is fitted does not depend on what else is: also of other ranks, where these are
    filled up to the same size."""
    decomposition, cases = DECOMPOSITIONS[family], [make("conv3x3") for _ in range(3)]
    originals = []
    for i, case in enumerate(cases):
        noise = torch.randn(case.module.weight.shape, generator=torch.Generator().manual_seed(i))
        moment = case.moment + i * torch.eye(case.moment.shape[-1], dtype=case.moment.dtype)
        originals.append(Original(case.layer, case.module.weight.detach() + i * noise, moment, case.metric))
    possible = decomposition.ranks(cases[0].layer, [0.2, 0.25, 0.3, 0.5, 0.55, 0.6, 0.7])
    ranks = [possible[-2:]] * 3
    if family.startswith("cp"):
        full = possible[-1][0]
        ranks = [[(full,), (2,)], [(full - 1,), (3,)], [(full,), (5,)]]
        assert len({decomposition.alike(cases[0].layer, own) for own in ranks}) == 1
    both = {f: getattr(decomposition, f)(originals, ranks, steps) for f in ("fit_stack", "errors")}
    for i, (original, own) in enumerate(zip(originals, ranks, strict=True)):
        for name, stack in both.items():
            (alone,) = getattr(decomposition, name)([original], [own], steps)
            for one, other in zip(alone, stack[i], strict=True):
                assert one[2:] == other[2:] and one.rank == other.rank
                assert all(map(torch.equal, one.factors, other.factors))


def test_a_preconditioner_makes_up_for_bad_scales():
    """Quadratic functions whose curvatures differ by 10⁶, some of which leave the batch earlier than others."""
    generator = torch.Generator().manual_seed(0)
    curvatures = 10 ** (6 * torch.rand(2, 3, 40, generator=generator, dtype=torch.float64))
    start = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)

    def evaluate(points, columns):
        gradient = curvatures[:, columns] * points
        return 0.5 * (gradient * points).sum(-1), gradient

    def preconditioner(_, columns):
        return Product(lambda vectors, inverse: inverse.unsqueeze(2) * vectors, 1 / curvatures[:, columns])

    plain = minimize(Objective(evaluate), start, torch.full((2, 3), 40), 0.0, 1e-20)
    assert plain.losses.min() > 1e-3
    found = minimize(Objective(evaluate, preconditioner), start, torch.tensor([[7, 40, 23]] * 2), 0.0, 1e-20)
    assert found.losses.max() < 1e-20 and found.rounds.max() <= 10


def test_a_preconditioner_that_changes_keeps_the_search_exact():
    """Rosenbrock's function: from the inverse of its own Hessian, made positive, at the last points."""

    def evaluate(points, _):
        x = points.detach().requires_grad_()
        losses = 100 * (x[..., 1] - x[..., 0] ** 2) ** 2 + (1 - x[..., 0]) ** 2
        return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]

    def preconditioner(points, _):
        x, y = points.unbind(-1)
        across = -400 * x
        hessian = torch.stack([1200 * x**2 - 400 * y + 2, across, across, torch.full_like(x, 200)], -1)
        values, vectors = torch.linalg.eigh(hessian.unflatten(-1, (2, 2)))
        inverse = (vectors / values.abs().clamp_min(1).unsqueeze(-2)) @ vectors.mT
        return Product(torch.matmul, inverse)

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64) + torch.rand(2, 5, 2, dtype=torch.float64)
    found = minimize(Objective(evaluate, preconditioner), start, torch.full((2, 5), 100), 1e-9, 1e-15)
    assert found.losses.max() < 1e-12
    assert found.points.flatten().numpy() == pytest.approx(1, abs=1e-4)


def test_a_loss_that_is_not_finite_is_stepped_back_from():
    """log x + 1 / x, undefined at and below 0, from a point whose first steps go there."""

    def evaluate(points, _):
        losses = (points.log() + 1 / points).sum(-1)
        return losses, (1 / points - 1 / points**2).nan_to_num()

    found = minimize(Objective(evaluate), torch.tensor([[[1.5]]], dtype=torch.float64), torch.tensor([[100]]), 0.0, 1.0)
    assert found.points.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", ["cp", "cp_merged"])
def test_the_curvature_is_the_hessian_of_a_kronecker_moment(family):
    generator = torch.Generator().manual_seed(0)
    layer, own = Layer("x", "Conv2d", (5, 4, 3, 2)), DECOMPOSITIONS[family]
    modes = (4, 3, 2) if family == "cp" else (4, 6)
    moments = [_positive(n, generator)[None] for n in modes]
    theta = tuple(torch.randn(1, 3, n, generator=generator, dtype=torch.float64) for n in modes)
    weight, output = (torch.randn(1, 5, n, generator=generator, dtype=torch.float64) for n in (24, 3))
    s = functools.reduce(torch.kron, (m[0] for m in moments))
    target = Target(weight, s[None], torch.eye(5, dtype=torch.float64)[None])
    for found, m in zip(own.mode_moments(layer, target), moments, strict=True):
        torch.testing.assert_close(found / found[0, 0, 0], m / m[0, 0, 0])

    for i, inverse in enumerate(inverse_curvature(theta, output, moments)):

        def loss(x, i=i):
            rest = weight - output @ own.rows(layer, (*theta[:i], x.view_as(theta[i]), *theta[i + 1 :]))
            return (rest @ s * rest).sum()

        hessian = torch.autograd.functional.hessian(loss, theta[i].flatten())
        curvature = torch.linalg.inv(inverse[0])
        diagonal = curvature.diagonal() / (1 + DAMPING)
        curvature = curvature - DAMPING * torch.diag(diagonal)
        torch.testing.assert_close(2 * torch.kron(curvature.contiguous(), moments[i][0]), hessian, rtol=1e-4, atol=1e-4)


def _positive(size, generator):
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T + torch.eye(size, dtype=torch.float64)


def test_an_exact_start_is_not_given_up_for_a_smaller_penalty():
    """The loss that is searched holds a ridge's penalty, which a search can lower where no error is left."""
    case = make("1x3 circular")
    assert errors("btt", case, [DECOMPOSITIONS["btt"].full_rank(case.layer)], 20)[0] < 1e-8
