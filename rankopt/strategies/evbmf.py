"""Ranks estimated by variational Bayesian matrix factorisation (Nakajima et al. 2013, JMLR 14), then put on the budget.

Every family on a layer's frontier gets ranks from the unfoldings of the weight on which it has them: `svd_out`
the output channels', `svd_in` the input channels', `svd_spatial` (in, height) x (width, out), `tucker2` both
channel unfoldings, `tt` one per bond. CP has no unfolding of its own: its rank is the one that a core of the size
that these estimates leave has in general, ⌈Π dᵢ / (Σ dᵢ − n + 1)⌉ (the expected rank, Comon et al. 2009).

MUSCO's weakening (Gusak 2019), rank = full − w (full − estimate), with one w for all layers bisected onto the
budget, makes ranks of estimates; beyond the estimate, w scales the ranks to zero. The family whose ranks cost
most is taken, so that a layer has room for its signal in every family (taking the cheapest adds up the families'
underestimates: on ResNet-20 at 30 % of the parameters, KL 1.85 against 0.22). Within that cost the layer takes the
most accurate candidate of its frontier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from rankopt.allocation import fill, project
from rankopt.core import Cost, Layer, Proposal, Rank
from rankopt.decompositions import DECOMPOSITIONS
from rankopt.strategies.base import Strategy
from rankopt.strategies.uniform import largest, within

UNFOLDINGS = {
    "svd_out": ("output",),
    "svd_in": ("input",),
    "svd_spatial": ("spatial",),
    "tucker2": ("input", "output"),
    "tt": ("input", "spatial", "output"),
    "cp": ("input", "output"),
    "cp_merged": ("input", "output"),
}
LINEAR_TT = ("bond1", "bond2", "bond3")


class Evbmf(Strategy):
    name = "evbmf"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        problem = self.problem
        estimates = [{k: max(1, evbmf_rank(*s)) for k, s in spectra.items()} for spectra in problem.spectra]

        def taken(w: float) -> list[tuple[Cost, str, Rank]]:
            return [self._dearest(i, found, w) for i, found in enumerate(estimates)]

        proposal = largest(problem, lambda kept: within(problem, [cost for cost, _, _ in taken(1 - kept)]))
        self.notes = {
            layer.name: f"EVBMF: {family} {rank} is the dearest of the families at their estimated ranks"
            for layer, (_, family, rank) in zip(problem.layers, taken(0.5), strict=True)
        }
        return fill(problem, project(problem, proposal))

    def _dearest(self, i: int, estimates: Mapping[str, int], w: float) -> tuple[Cost, str, Rank]:
        """The dearest family's cost, name and ranks at a weakening w."""
        layer, spectra = self.problem.layers[i], self.problem.spectra[i]
        kept = {k: _between(min(s.rows, s.columns), estimates[k], w) for k, s in spectra.items()}
        methods = {c.method for c in self.problem.frontiers[i]}
        options = []
        for name in [f for f in UNFOLDINGS if f in methods] or ["svd_out"]:
            rank = family_rank(name, layer, kept)
            options.append((DECOMPOSITIONS[name].cost(layer, rank), name, rank))
        return max(options, key=lambda o: sum(o[0][x.metric] / x.target for x in self.problem.limits))


def family_rank(family: str, layer: Layer, kept: Mapping[str, float]) -> Rank:
    """A family's ranks from the ranks kept of each unfolding."""
    decomposition = DECOMPOSITIONS[family]
    if family in {"cp", "cp_merged"}:
        spatial = layer.kernel if family == "cp" else (math.prod(layer.kernel),)
        core = (kept["input"], *spatial, kept["output"])
        return decomposition.valid(layer, (math.ceil(math.prod(core) / (sum(core) - len(core) + 1)),))
    names = LINEAR_TT if family == "tt" and len(layer.shape) == 2 else UNFOLDINGS[family]
    return decomposition.valid(layer, tuple(round(kept[k]) for k in names))


def _between(full: int, estimate: int, w: float) -> float:
    """From full rank (w = 0) over the estimate (0.5) to zero (1)."""
    return full - 2 * w * (full - estimate) if w < 0.5 else estimate * 2 * (1 - w)


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
