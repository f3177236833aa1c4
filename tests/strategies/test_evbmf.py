"""EVBMF: the estimate against its definition, and the ranks of every family."""

from __future__ import annotations

import numpy as np
import pytest
import scipy
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from rankopt.core.progress import silent
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.inventory import inventory
from rankopt.strategies.evbmf import UNFOLDINGS, evbmf_rank, family_rank, unfolded
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


def test_evbmf_of_degenerate_matrices():
    assert evbmf_rank([0.0, 0.0], 2, 5) == 0
    assert 0 <= evbmf_rank([1.0], 1, 9) <= 1


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
