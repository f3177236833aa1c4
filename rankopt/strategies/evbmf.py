"""Ranks estimated by variational Bayesian matrix factorisation (Nakajima et al. 2013, JMLR 14), scaled to the budget.

The matrices are unfoldings of the weight in the metric of decompositions/base.py, H^½ W S^½: noise is then what does
not matter at the layer's output. (Estimates on the bare weight take ranks from layers that matter: ResNet-20 at 30 % of
the MACs, KL 0.92 instead of 0.26.)

Every family on a layer's frontier gets ranks from its own unfoldings: `svd_out` the output channels', `svd_in` the
input channels', `svd_spatial` (in, height) x (width, out), `tucker2` both channel unfoldings, `tt` one per bond. CP has
no unfolding of its own: its rank is the expected rank of a core of the size that the estimates leave,
⌈Π dᵢ / (Σ dᵢ − n + 1)⌉ (Comon et al. 2009).

Estimates become ranks by MUSCO's weakening (Gusak 2019), rank = full − w (full − estimate), with one w for all layers
bisected onto the budget; beyond the estimate, w scales the ranks to zero. A layer may cost as much as its most
expensive family at these ranks, so that it has room for its signal in every family (the cheapest family would add up
all underestimates). Within that cost it takes the most accurate candidate of its frontier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from rankopt.core.errors import RankoptError
from rankopt.core.records import Cost, Layer, Proposal, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import is_sketch, mean_squares
from rankopt.decompositions.variable_projection import full_target, roots
from rankopt.strategies.allocation import fill, project
from rankopt.strategies.base import Strategy
from rankopt.strategies.baselines import largest, within

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


class Spectrum(NamedTuple):
    """Spectrum of an unfolding, groups together.

    Attributes:
        values: Its singular values, falling.
        rows: Number of its rows.
        columns: Number of its columns.
    """

    values: tuple[float, ...]
    rows: int
    columns: int


Spectra = Mapping[str, Spectrum]
"""By name of the unfolding: "output" T x rest, "input" C x rest, "spatial" (C, height) x (width, T); for Linear
layers of modes (C1, C2, T1, T2) the bonds of a tensor train "bond1" C1 x rest, "bond2" and "bond3"."""


class Evbmf(Strategy):
    """Gives every layer the cost of its estimated ranks, weakened to the budget."""

    name = "evbmf"
    one_shot = True
    needs_model = True
    spectra: Sequence[Spectra] = ()

    def measure(self, prepared: Any, progress: Any) -> None:
        layers = self.problem.layers

        def look(layer: Layer) -> Spectra:
            weight = prepared.model.get_submodule(layer.name).weight.detach().cpu()
            return unfolded(layer, weight, *prepared.statistics[layer.name])

        self.spectra = [look(layer) for layer in progress(layers, "singular values", len(layers))]

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        if not self.spectra:
            raise RankoptError(
                "strategy 'evbmf' looks at the model first: call measure(prepared, progress), then ask()"
            )
        problem = self.problem
        estimates = [{k: max(1, evbmf_rank(*s)) for k, s in spectra.items()} for spectra in self.spectra]

        def taken(w: float) -> list[tuple[Cost, str, Rank]]:
            return [self._most_expensive(i, found, w) for i, found in enumerate(estimates)]

        proposal = largest(problem, lambda kept: within(problem, [cost for cost, _, _ in taken(1 - kept)]))
        self.notes = {
            layer.name: f"EVBMF: {family} {rank} costs most of the families at their estimated ranks"
            for layer, (_, family, rank) in zip(problem.layers, taken(0.5), strict=True)
        }
        return fill(problem, project(problem, proposal))

    def _most_expensive(self, i: int, estimates: Mapping[str, int], w: float) -> tuple[Cost, str, Rank]:
        """Cost, name and ranks of the family that costs most at a weakening w."""
        layer, spectra = self.problem.layers[i], self.spectra[i]
        kept = {k: _between(min(s.rows, s.columns), estimates[k], w) for k, s in spectra.items()}
        methods = {c.method for c in self.problem.frontiers[i]}
        options = []
        for name in [f for f in UNFOLDINGS if f in methods] or ["svd_out"]:
            rank = family_rank(name, layer, kept)
            options.append((DECOMPOSITIONS[name].cost(layer, rank), name, rank))
        return max(options, key=lambda o: sum(o[0][x.metric] / x.target for x in self.problem.limits))


def unfolded(layer: Layer, weight: Tensor, moment: Tensor | None = None, metric: Tensor | None = None) -> Spectra:
    """Compute the spectra of H^½ W S^½ on the unfoldings on which some family has a rank.

    Args:
        layer: The layer.
        weight: Its weight.
        moment: Second moment S of its inputs, as `Decomposition.fit` takes it.
        metric: Metric H of its outputs, as `Decomposition.fit` takes it.
    """
    target = full_target(layer, weight, moment, metric)
    felt = roots(target.metric)[0] @ target.weight  # (groups, T, C * height * width)
    known = mean_squares(target.moment) if is_sketch(target.moment) else target.moment
    felt = felt * known.sqrt().unsqueeze(1) if known.ndim == 2 else felt @ roots(known)[0]
    tensor = felt.unflatten(2, (layer.in_channels, *layer.kernel)).permute(2, 3, 4, 1, 0)  # C, height, width, T, groups
    matrices = {"output": tensor.movedim(3, 0).flatten(1)}
    if layer.kind != "Embedding":
        matrices["input"] = tensor.flatten(1)
    if min(layer.kernel) > 1:
        matrices["spatial"] = tensor.flatten(0, 1).flatten(1)
    tt = DECOMPOSITIONS["tt"]
    if len(layer.shape) == 2 and tt.full_rank(layer) is not None:
        modes = tt.modes(layer)  # type: ignore[attr-defined]
        train = felt[0].T.reshape(modes)
        matrices |= {f"bond{i}": train.reshape(math.prod(modes[:i]), -1) for i in (1, 2, 3)}
    return {name: Spectrum(tuple(torch.linalg.svdvals(m).tolist()), *m.shape) for name, m in matrices.items()}


def family_rank(family: str, layer: Layer, kept: Mapping[str, float]) -> Rank:
    """Derive a family's ranks from ranks of unfoldings.

    Args:
        family: Name of the family.
        layer: The layer.
        kept: Unfolding -> rank, not necessarily an integer.
    """
    decomposition = DECOMPOSITIONS[family]
    if family in {"cp", "cp_merged"}:
        spatial = layer.kernel if family == "cp" else (math.prod(layer.kernel),)
        core = (kept["input"], *spatial, kept["output"])
        return decomposition.valid(layer, (math.ceil(math.prod(core) / (sum(core) - len(core) + 1)),))
    names = LINEAR_TT if family == "tt" and len(layer.shape) == 2 else UNFOLDINGS[family]
    return decomposition.valid(layer, tuple(round(kept[k]) for k in names))


def _between(full: int, estimate: int, w: float) -> float:
    """Interpolate from the full rank (w = 0) over the estimate (0.5) to zero (1)."""
    return full - 2 * w * (full - estimate) if w < 0.5 else estimate * 2 * (1 - w)


def evbmf_rank(singular_values: Sequence[float], rows: int, columns: int) -> int:
    """Estimate a matrix's rank: the rank of the global analytic EVB solution with estimated noise variance.

    Nakajima et al. 2013, theorems 2 and 4, for an L x M matrix with L ≤ M: a component is kept if
    s > √(M σ² x̄), where x̄ = (1 + τ̄)(1 + α/τ̄), α = L/M and τ̄ = 2.5129 √α.

    Args:
        singular_values: All singular values.
        rows: Number of rows.
        columns: Number of columns.
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
    """Free energy as a function of the logarithmic noise variance, up to a constant (theorem 4)."""
    variance = np.exp(log_variance)
    x = np.maximum(s2 / (large * variance), 1e-300)
    above, below = x[x > x_bar], x[x <= x_bar]
    t = above - (1 + alpha)
    tau = (t + np.sqrt(np.maximum(t**2 - 4 * alpha, 0))) / 2
    kept = above - tau + np.log((tau + 1) / above) + alpha * np.log(tau / alpha + 1)
    return float((below - np.log(below)).sum() + kept.sum())
