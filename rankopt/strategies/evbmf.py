"""Ranks estimated by variational Bayesian matrix factorisation (Nakajima et al. 2013, JMLR 14), then put on the budget.

The estimate is taken on both channel unfoldings of the weight, as for Tucker-2. MUSCO's weakening (Gusak 2019),
rank = full − w (full − estimate), with one w for all layers bisected onto the budget, gives each layer its share;
the layer then takes the most accurate candidate of its frontier within that share, whatever its family.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from rankopt.core import Layer, Proposal
from rankopt.strategies.base import Strategy
from rankopt.strategies.uniform import largest


class Evbmf(Strategy):
    name = "evbmf"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        ranks = [_estimates(layer, *s) for layer, s in zip(self.problem.layers, self.problem.spectra, strict=True)]
        return largest(self.problem, lambda kept: self._weakened(ranks, 1 - kept))

    def _weakened(self, ranks: list[tuple[int, int]], w: float) -> Proposal:
        """w = 0: full ranks; 0.5: the estimates; 1: rank zero (w runs to twice the way to the estimate)."""
        proposal = []
        for layer, candidates, (r_out, r_in) in zip(self.problem.layers, self.problem.frontiers, ranks, strict=True):
            t, c, area = layer.out_channels, layer.in_channels, layer.patch / layer.in_channels
            out, into = (_between(full, r, w) for full, r in ((t, r_out), (c, r_in)))
            share = min(1.0, (c * into + into * out * area + out * t) / (t * layer.patch)) if w > 0 else 1.0
            within = [
                i
                for i, x in enumerate(candidates)
                if all(x.cost[m.metric] <= share * candidates[-1].cost[m.metric] for m in self.problem.limits)
            ]
            proposal.append(max(within, default=0))
        return tuple(proposal)


def _between(full: int, estimate: int, w: float) -> float:
    """From full rank (w = 0) over the estimate (0.5) to zero (1)."""
    return full - 2 * w * (full - estimate) if w < 0.5 else estimate * 2 * (1 - w)


def _estimates(layer: Layer, output: Sequence[float], into: Sequence[float]) -> tuple[int, int]:
    t, c, area = layer.out_channels, layer.in_channels, layer.patch // layer.in_channels
    return (
        max(1, evbmf_rank(output, t, c * area * layer.groups)),
        max(1, evbmf_rank(into, c, t * area * layer.groups)),
    )


def evbmf_rank(singular_values: Sequence[float], rows: int, columns: int) -> int:
    """The rank of the global analytic EVB solution with estimated noise variance.

    singular_values: all of the matrix (rows, columns), descending. Nakajima et al. 2013, theorems 2 and 4:
    a component is kept if s > sqrt(M sigma² x̄), with alpha = L/M, tau̅ = 2.5129 sqrt(alpha).
    """
    small, large = min(rows, columns), max(rows, columns)
    s2 = np.sort(np.asarray(singular_values, float)[:small])[::-1] ** 2
    s2 = np.pad(s2, (0, small - len(s2)))
    if s2.sum() <= 0:
        return 0
    alpha = small / large
    tau_bar = 2.5129 * np.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    most = min(int(np.ceil(small / (1 + alpha))) - 1, small - 1)
    upper = s2.sum() / (small * large)
    lower = max(s2[most] / (large * x_bar), s2[most:].mean() / large)
    if not 0 < lower < upper:
        variance = upper
    else:
        found = minimize_scalar(
            _free_energy, args=(s2, large, alpha, x_bar), bounds=(np.log(lower), np.log(upper)), method="bounded"
        )
        variance = float(np.exp(found.x))
    return int((s2 > large * variance * x_bar).sum())


def _free_energy(log_variance: float, s2: np.ndarray, large: int, alpha: float, x_bar: float) -> float:
    """Free energy as a function of the noise variance, up to a constant (theorem 4)."""
    variance = np.exp(log_variance)
    x = np.maximum(s2 / (large * variance), 1e-300)
    above, below = x[x > x_bar], x[x <= x_bar]
    t = above - (1 + alpha)
    tau = (t + np.sqrt(np.maximum(t**2 - 4 * alpha, 0))) / 2
    kept = above - tau + np.log((tau + 1) / above) + alpha * np.log(tau / alpha + 1)
    return float((below - np.log(below)).sum() + kept.sum())
