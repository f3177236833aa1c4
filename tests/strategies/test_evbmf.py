"""EVBMF: the estimate against its definition, and the ranks of every family."""

from __future__ import annotations

import numpy as np
import pytest
import scipy
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from rankopt.core.errors import RankoptError
from rankopt.core.progress import silent
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.inventory import inventory
from rankopt.strategies.evbmf import UNFOLDINGS, evbmf_rank, family_rank, free_energy, least_energy, threshold, unfolded
from rankopt.strategies.registry import make_strategy


@pytest.mark.parametrize("shape", [(40, 120), (60, 60), (30, 400)])
@pytest.mark.parametrize("rank", [0, 3, 10])
@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_evbmf_finds_planted_ranks(shape, rank, noise):
    rng = np.random.default_rng(rank)
    rows, columns = shape
    signal = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns)) * 3
    s = np.linalg.svd(signal + noise * rng.standard_normal(shape), compute_uv=False)
    assert evbmf_rank(s, rows, columns) == rank
    assert evbmf_rank(s, columns, rows) == rank, "the transpose has the same rank"


def brute_force_rank(s, rows, columns):
    """Minimise the free energy over a dense grid of noise variances, as published (Nakajima 2013, theorem 4)."""
    low, high = min(rows, columns), max(rows, columns)
    alpha = low / high
    tau_bar = 2.5129 * np.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)

    def energy(variance):
        total = 0.0
        for value in s**2 / (high * variance):
            total += value - np.log(value)
            if value > x_bar:
                tau = 0.5 * (value - (1 + alpha) + np.sqrt((value - (1 + alpha)) ** 2 - 4 * alpha))
                total += np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
        return total

    grid = np.geomspace((s**2).sum() / (low * high) * 1e-6, (s**2).sum() / (low * high), 4000)
    start = grid[int(np.argmin([energy(v) for v in grid]))]
    found = minimize_scalar(energy, bounds=(start / 1.01, start * 1.01), method="bounded").x
    return int((s > np.sqrt(high * found * x_bar)).sum())


@pytest.mark.parametrize("seed", range(6))
def test_evbmf_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    rows, columns, rank = 24, 50, 4
    decay = np.diag(2.0 ** -np.arange(rank))
    matrix = rng.standard_normal((rows, rank)) @ decay @ rng.standard_normal((rank, columns))
    s = np.linalg.svd(matrix + 0.2 * rng.standard_normal((rows, columns)), compute_uv=False)
    assert evbmf_rank(s, rows, columns) == brute_force_rank(s, rows, columns)


def never_worse(s, rows, columns):
    """The energy found is at most that of a dense grid of noise variances, far beyond where the minimum can be."""
    alpha, x = min(rows, columns) / max(rows, columns), np.asarray(s) ** 2 / max(rows, columns)
    x = np.maximum(x, 1e-30 * x.max())
    at, found = least_energy(x, alpha)
    grid = np.linspace(np.log(max(x.min(), 1e-12 * x.max())) - 3, np.log(x.mean()) + 3, 1500)
    energies = np.concatenate([free_energy(part, x, alpha) for part in np.array_split(grid, 10)])
    assert found == pytest.approx(free_energy(np.array([at]), x, alpha)[0])
    return energies.min() >= found - 1e-9 * abs(found)


def random_matrix(seed):
    """Singular values of noise, of noise with planted components of many sizes, and ones that fall by a power law."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 60))
    columns = int(rng.integers(rows, 6 * rows + 2))
    matrix = rng.standard_normal((rows, columns))
    if seed % 3 == 1:
        rank = int(rng.integers(1, rows + 1))
        sizes = rng.uniform(0.1, 1, rank) ** 3
        matrix += rng.standard_normal((rows, rank)) * sizes @ rng.standard_normal((rank, columns))
    s = np.linalg.svd(matrix, compute_uv=False)
    return (s[0] * np.arange(1, rows + 1) ** -rng.uniform(0.3, 2) if seed % 3 == 2 else s), rows, columns


def test_no_noise_variance_of_a_dense_grid_is_better_on_1000_random_matrices():
    assert not [seed for seed in range(1000) if not never_worse(*random_matrix(seed))]


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.03, 0.0005])
def test_the_threshold_is_where_keeping_a_component_begins_to_pay(alpha):
    """The energy is continuous there. Nakajima's approximation of it is exact for square matrices."""
    x = np.array([threshold(alpha)])
    below, above = free_energy(np.array([1e-9, -1e-9]), x, alpha)
    assert below == pytest.approx(above, abs=1e-7)
    tau = 2.5129 * np.sqrt(alpha)
    assert threshold(alpha) == pytest.approx((1 + tau) * (1 + alpha / tau), rel=1e-4 if alpha == 1 else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet56", "minilm"])
def test_no_noise_variance_is_better_on_any_unfolding_of_a_real_network(name):
    from studies.tasks import cifar10, minilm

    try:
        task = getattr(minilm if name == "minilm" else cifar10, name)()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = task.model.eval()
    checked = 0
    for layer in inventory(model, task.example_input):
        if layer.reason is None:
            spectra = unfolded(layer, model.get_submodule(layer.name).weight.detach())
            assert all(never_worse(*spectrum) for spectrum in spectra.values()), layer.name
            checked += len(spectra)
    assert checked > 50


def test_evbmf_of_degenerate_matrices():
    assert evbmf_rank([0.0, 0.0], 2, 5) == 0
    assert 0 <= evbmf_rank([1.0], 1, 9) <= 1
    assert evbmf_rank([5.0, 3.0, 1.0, *[0.0] * 7], 10, 30) == 3, "without noise every component is kept"


@pytest.mark.parametrize("module", [nn.Conv2d(8, 12, (3, 5)), nn.Conv2d(8, 12, 3, groups=2), nn.Linear(12, 20)])
@pytest.mark.parametrize("family", list(UNFOLDINGS))
def test_full_unfoldings_give_the_families_full_ranks(family, module):
    x = torch.randn(2, 12) if isinstance(module, nn.Linear) else torch.randn(2, 8, 9, 9)
    (layer,) = inventory(module, x)
    full = DECOMPOSITIONS[family].full_rank(layer)
    if full is None or family.startswith("cp"):
        return
    spectra = unfolded(layer, module.weight)
    one_group = {k: min(s.rows, s.columns) for k, s in spectra.items()}
    rank = family_rank(family, layer, one_group)
    assert rank == DECOMPOSITIONS[family].valid(layer, full)


def test_spectra_are_those_of_the_unfoldings():
    conv = nn.Conv2d(4, 6, (3, 2)).double()
    (layer,) = inventory(conv, torch.randn(1, 4, 5, 5, dtype=torch.float64))
    s, h = (torch.randn(1, n, 3 * n, dtype=torch.float64) for n in (layer.patch, 6))
    s, h = s @ s.mT, h @ h.mT
    spectra = unfolded(layer, conv.weight, s, h)
    w = conv.weight.detach().numpy().reshape(6, -1)
    w = (scipy.linalg.sqrtm(h[0].numpy()) @ w @ scipy.linalg.sqrtm(s[0].numpy())).reshape(6, 4, 3, 2)
    spatial = w.transpose(1, 2, 3, 0).reshape(4 * 3, 2 * 6)
    for name, matrix in (
        ("output", w.reshape(6, -1)),
        ("input", w.transpose(1, 0, 2, 3).reshape(4, -1)),
        ("spatial", spatial),
    ):
        assert (spectra[name].rows, spectra[name].columns) == matrix.shape
        np.testing.assert_allclose(spectra[name].values, np.linalg.svd(matrix, compute_uv=False), rtol=1e-6)


def test_the_expected_rank_of_cp():
    (layer,) = inventory(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 5, 5))
    assert family_rank("cp_merged", layer, {"input": 2, "output": 2}) == (4,)  # 2 x 9 x 2: ceil(36 / 11)


def test_it_says_which_family_every_layer_got(digits):
    strategy = make_strategy("evbmf", digits.problem({"params": 0.3}))
    strategy.measure(digits, silent)
    strategy.ask()
    assert set(strategy.notes) == {x.name for x in strategy.problem.layers}


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1])
def test_the_estimates_may_be_the_ranks(digits, budget):
    problem = digits.problem({"params": budget})
    strategy = make_strategy("evbmf", problem, 0, {"ranks": "kept"})
    strategy.measure(digits, silent)
    proposal = strategy.ask()
    assert problem.fits(proposal) and strategy.ask() is None
    if budget < 1:
        return
    assert problem.cost(proposal).params < 0.9 * problem.dense.params, "nothing is filled up"
    for layer, spectra, candidate in zip(problem.layers, strategy.spectra, problem.candidates(proposal), strict=True):
        ranks = {k: max(1, evbmf_rank(*s)) for k, s in spectra.items()}
        families = {c.method for c in problem.frontier(layer.name)} & set(UNFOLDINGS)
        wanted = {f: family_rank(f, layer, ranks) for f in families}
        cost = {f: DECOMPOSITIONS[f].cost(layer, r).params for f, r in wanted.items()}
        if min(cost.values(), default=layer.cost.params) >= layer.cost.params:
            assert candidate.unchanged
        else:
            family = min(cost, key=cost.get)
            near = [c for c in problem.frontier(layer.name) if c.method == family]
            assert candidate in near
            assert abs(np.log(candidate.rank) - np.log(wanted[family])).sum() == min(
                abs(np.log(c.rank) - np.log(wanted[family])).sum() for c in near
            )


def test_an_unknown_use_of_the_estimates_is_refused(digits):
    with pytest.raises(RankoptError, match="unknown ranks=all: choose from shares, kept"):
        make_strategy("evbmf", digits.problem({"params": 0.5}), 0, {"ranks": "all"})
