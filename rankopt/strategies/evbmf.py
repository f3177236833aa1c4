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

With `ranks=kept` the estimates are the ranks, as in MUSCO: every layer takes the cheapest of its families at their
estimated ranks, w is 0.5, and more only where that is over the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankopt.core.budget import share
from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Cost, Layer, Proposal, Rank
from rankopt.decompositions.linear_algebra import roots
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.decompositions.types import is_sketch, mean_squares
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


NEWTON = 60  # steps at most; six to ten are usual


Array = NDArray[np.float64]


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
    """Gives every layer the cost of its estimated ranks, weakened to the budget, or these ranks themselves."""

    name = "evbmf"
    one_shot = True
    needs_model = True
    spectra: Sequence[Spectra] = ()

    def __init__(self, problem: Problem, seed: int = 0, *, ranks: str = "shares") -> None:
        """Set up what the estimates decide.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Not used.
            ranks: "shares": the estimates decide how much of the budget each layer gets. "kept": they are the ranks,
                weakened only where they exceed the budget; what they leave of it stays unused.

        Raises:
            RankoptError: For any other word.
        """
        super().__init__(problem, seed)
        if ranks not in {"shares", "kept"}:
            raise RankoptError(f"strategy 'evbmf': unknown ranks={ranks}: choose from shares, kept")
        self.ranks = ranks

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
        estimates = [{k: max(1, evbmf_rank(*s)) for k, s in spectra.items()} for spectra in self.spectra]
        return self._kept(estimates) if self.ranks == "kept" else self._shares(estimates)

    def _shares(self, estimates: Sequence[Mapping[str, int]]) -> Proposal:
        """The most accurate candidates within the cost of each layer's most expensive family at weakened ranks."""
        problem = self.problem

        def taken(w: float) -> list[_Option]:
            return [max(self._options(i, found, w)) for i, found in enumerate(estimates)]

        proposal = largest(problem, lambda kept: within(problem, [x.cost for x in taken(1 - kept)]))
        self.notes = {
            layer.name: f"EVBMF: {x.family} {x.rank} costs most of the families at their estimated ranks"
            for layer, x in zip(problem.layers, taken(0.5), strict=True)
        }
        return fill(problem, project(problem, proposal))

    def _kept(self, estimates: Sequence[Mapping[str, int]]) -> Proposal:
        """The cheapest family of each layer at its estimated ranks, all weakened alike where they exceed the budget."""

        def taken(w: float) -> list[_Option]:
            return [min(self._options(i, found, w)) for i, found in enumerate(estimates)]

        def proposal_at(kept: float) -> Proposal:
            return tuple(self._nearest(i, x) for i, x in enumerate(taken(1 - kept / 2)))

        self.notes = {
            layer.name: f"EVBMF: estimated are {x.family} {x.rank}"
            for layer, x in zip(self.problem.layers, taken(0.5), strict=True)
        }
        return project(self.problem, largest(self.problem, proposal_at))

    def _options(self, i: int, estimates: Mapping[str, int], w: float) -> list[_Option]:
        """The layer's families at a weakening w."""
        layer, spectra = self.problem.layers[i], self.spectra[i]
        kept = {k: _between(min(s.rows, s.columns), estimates[k], w) for k, s in spectra.items()}
        methods = {c.method for c in self.problem.frontiers[i]}
        options = []
        for name in [f for f in UNFOLDINGS if f in methods] or ["svd_out"]:
            rank = family_rank(name, layer, kept)
            cost = DECOMPOSITIONS[name].cost(layer, rank)
            options.append(_Option(share(self.problem.limits, cost), name, rank, cost))
        return options

    def _nearest(self, i: int, option: _Option) -> int:
        """The position of the family's candidate with the ranks nearest to an option's; dense if that is no dearer."""
        frontier = self.problem.frontiers[i]
        family = [at for at, c in enumerate(frontier) if c.method == option.family]
        if not family or option.share >= share(self.problem.limits, self.problem.layers[i].cost):
            return len(frontier) - 1
        wanted = np.log(option.rank)
        return min(family, key=lambda at: float(np.abs(np.log(frontier[at].rank) - wanted).sum()))


class _Option(NamedTuple):
    """A family at some ranks, compared by its share of the budget."""

    share: float
    family: str
    rank: Rank
    cost: Cost


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

    Nakajima et al. 2013, theorems 2 and 4, for an L x M matrix with L ≤ M and α = L/M: a component is kept if
    s² > M σ² x̄, where x̄ = (1 + τ̄)(1 + α/τ̄) and τ̄ is the zero of log(τ + 1) + α log(τ/α + 1) − τ.

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
    x = np.maximum(s2, np.finfo(float).eps ** 2 * s2[0]) / large  # below, singular values are rounding
    return int((x > np.exp(least_energy(x, small / large)[0]) * threshold(small / large)).sum())


@lru_cache
def threshold(alpha: float) -> float:
    """Compute x̄: a component is kept if s² is above M σ² x̄.

    Args:
        alpha: The shorter over the longer side of the matrix.
    """
    from scipy.optimize import brentq  # takes half a second: not at `import rankopt`

    tau = brentq(lambda t: np.log1p(t) + alpha * np.log1p(t / alpha) - t, np.sqrt(alpha), 10)
    return float((1 + tau) * (1 + alpha / tau))


def least_energy(x: Array, alpha: float) -> tuple[float, float]:
    """Minimise the free energy over the noise variance, globally.

    Between the thresholds x / x̄ the same components are kept, and the energy is smooth. Its slope by −log σ²,

        Σ_dropped (x/σ² − 1) + α Σ_kept (1 + 1/τ),

    is convex there, since x/σ² and 1/τ both are: an interval has at most one minimum, the slope's last zero. Newton's
    steps from the interval's end fall to it without passing it; where they leave the interval there is none.

    Args:
        x: Squared singular values over M, falling, all above 0.
        alpha: L/M.

    Returns:
        The logarithm of σ² and the energy there, up to a constant.
    """
    x_bar, most = threshold(alpha), min(math.ceil(len(x) / (1 + alpha)) - 1, len(x) - 1)
    lower, upper = max(x[most] / x_bar, x[most:].mean()), x.mean()  # theorem 4's bounds of σ²
    steps = x / x_bar
    edges = -np.log(np.concatenate([[upper], steps[(steps > lower) & (steps < upper)], [max(min(lower, upper), 0)]]))
    kept = np.searchsorted(-steps, -np.exp(-(edges[1:] + edges[:-1]) / 2))  # of the intervals between the edges
    at, low = edges[1:].copy(), edges[:-1]
    open_ = np.ones(len(at), bool)
    for _ in range(NEWTON):
        slope, curvature = _slope(at, kept, x, alpha)
        open_ &= (slope > 0) & (curvature > 0)
        step = np.where(open_, slope / np.where(open_, curvature, 1), 0)
        at = np.maximum(at - step, low)
        if step.max(initial=0) < 1e-10:
            break
    points = np.concatenate([at, edges])
    energies = free_energy(-points, x, alpha)
    return -float(points[energies.argmin()]), float(energies.min())


def _terms(log_precision: Array, kept: Array, x: Array, alpha: float) -> tuple[Array, Array, NDArray[np.bool_]]:
    """x/σ², its τ where it is kept (else 1), and which are kept: (points, components)."""
    scaled = x * np.exp(log_precision)[:, None]
    above = np.arange(len(x)) < kept[:, None]
    t = np.where(above, scaled, 4.0) - (1 + alpha)
    return scaled, (t + np.sqrt(np.maximum(t**2 - 4 * alpha, 0))) / 2, above


def _slope(log_precision: Array, kept: Array, x: Array, alpha: float) -> tuple[Array, Array]:
    """First and second derivative of the free energy by −log σ², with the first `kept` components kept."""
    scaled, tau, above = _terms(log_precision, kept, x, alpha)
    slope = np.where(above, alpha * (1 + 1 / tau), scaled - 1).sum(1)
    bend = alpha * (1 + tau) * (tau + alpha) / (tau * np.maximum(tau**2 - alpha, 1e-12))
    return slope, np.where(above, -bend, scaled).sum(1)


def free_energy(log_variance: Array, x: Array, alpha: float) -> Array:
    """Compute the free energy at several noise variances, up to a constant (theorem 4).

    Args:
        log_variance: Logarithms of the variances, (points,).
        x: Squared singular values over M, falling, all above 0.
        alpha: L/M.
    """
    kept = (x > np.exp(log_variance)[:, None] * threshold(alpha)).sum(1)
    scaled, tau, above = _terms(-log_variance, kept, x, alpha)
    psi = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return (scaled - np.log(scaled) + np.where(above, psi, 0)).sum(1)
