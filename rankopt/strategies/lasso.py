"""Lasso on calibration: a layer's rank-one components as regressors for its output (Tibshirani 1996).

A component r of a fitted candidate is a_r b_rᵀ; Ŵ = Σ g_r a_r b_rᵀ, in the metric of decompositions/base.py, is a
regression of the layer's output whose moments are known without data,

    G_rq = (a_rᵀ H a_q) (b_rᵀ S b_q),    c_r = a_rᵀ H W S b_r

with components and W scaled to unit norm. Coordinate descent gives the whole path of ½‖W − Ŵ‖² + α Σ |g_r|: which
components explain the output jointly at every α. One penalty λ sets every layer's α. A component of gate g takes
g² off the relative error, so g² (loss / error) off the model's loss: it is worth its cost if |g| is above

    α = sqrt(λ cost / (loss / error))

with the cost as a share of the budget, and the layer's measured loss at the error that the path has reached.
λ is bisected until the plan meets the budget; a layer takes the most accurate candidate within what it kept.

The components are those of the largest fit of `cp_merged` (the family of most candidates on frontiers), else of
`cp`; of `svd_out` for 1 x 1 convolutions and Linear layers, fitted here in closed form if the search space lacks it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path
from torch import Tensor

from rankopt.allocation import fill, project
from rankopt.core import Cost, Layer, Proposal, RankoptError
from rankopt.decompositions import DECOMPOSITIONS
from rankopt.decompositions.base import Factors, Target
from rankopt.decompositions.fitting import full_target
from rankopt.frontier import largest_of
from rankopt.sensitivity import predict
from rankopt.strategies.base import Strategy
from rankopt.strategies.uniform import largest, within

FAMILIES = ("cp_merged", "cp", "svd_out")  # components of rank one, ending in a 1 x 1 to T
GRID = np.geomspace(1, 1e-5, 80)  # of α, as fractions of the least at which no component is kept
PENALTIES = (1e-9, 1e9)  # λ is bisected between these, in loss per budget


class Path(NamedTuple):
    """What a layer keeps along its path. prices: the λ at which each point is reached, falling; costs: what is kept."""

    prices: np.ndarray
    costs: tuple[Cost, ...]

    def at(self, penalty: float) -> Cost:
        """The cost of what is kept at a penalty λ."""
        reached = np.flatnonzero(self.prices <= penalty)
        return self.costs[reached[0] if len(reached) else -1]


class Lasso(Strategy):
    name = "lasso"
    one_shot = True
    needs_model = True
    paths: Sequence[Path] = ()

    def measure(self, prepared: Any, track: Any) -> None:
        layers = self.problem.layers
        self.paths = [self._path(prepared, layer) for layer in track(layers, "Lasso paths", len(layers))]

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        if not self.paths:
            raise RankoptError("strategy 'lasso' looks at the model first: call measure(prepared, track), then ask()")
        low, high = np.log(PENALTIES)
        proposal = largest(self.problem, lambda kept: self._at(high - kept * (high - low)))
        return fill(self.problem, project(self.problem, proposal))

    def _at(self, log_penalty: float) -> Proposal:
        return within(self.problem, [path.at(np.exp(log_penalty)) for path in self.paths])

    def _path(self, prepared: Any, layer: Layer) -> Path:
        family, factors = components(prepared, layer)
        weight = prepared.model.get_submodule(layer.name).weight.detach().cpu()
        target = full_target(layer, weight, *prepared.statistics[layer.name])
        alphas, gates, errors = lasso(*regression(target, *rank_one(layer, factors)))
        curve = tuple(sorted((c.error, c.loss) for c in prepared.candidates[layer.name]))
        sensitivity = predict(curve, errors) / np.maximum(errors, 1e-12)  # type: ignore[arg-type]
        costs = [self._cost(layer, family, int(n)) for n in (gates != 0).sum(0)]
        one = self._cost(layer, family, 2) - self._cost(layer, family, 1)
        share = sum(one[x.metric] / x.target for x in self.problem.limits)
        return Path(alphas**2 * sensitivity / max(share, 1e-12), tuple(costs))

    def _cost(self, layer: Layer, family: str, rank: int) -> Cost:
        return DECOMPOSITIONS[family].cost(layer, (max(rank, 1),))


def components(prepared: Any, layer: Layer) -> tuple[str, Factors]:
    """The family that a layer's components are of, and its factors at the largest rank fitted."""
    if largest_fit := largest_of(prepared.candidates[layer.name], FAMILIES):
        return largest_fit.method, prepared.factors[largest_fit.key]
    svd = DECOMPOSITIONS["svd_out"]
    full = svd.full_rank(layer)
    assert full is not None
    weight = prepared.model.get_submodule(layer.name).weight.detach().cpu()
    (fit,) = svd.fit(layer, weight, [full], *prepared.statistics[layer.name])
    return svd.name, fit.factors


def rank_one(layer: Layer, factors: Factors) -> tuple[Tensor, Tensor]:
    """A (g, T, R) and B (g, R, n), float64: component r of group g is A[g, :, r] B[g, r]ᵀ."""
    *inner, last = (f.double().cpu() for f in factors)
    out = last.reshape(layer.groups, layer.out_channels, -1)
    first, *depthwise = (f.reshape(layer.groups, out.shape[-1], *f.shape[1:]) for f in inner)
    rows = first
    for f in depthwise:  # (g, R, 1, kh, kw) onto (g, R, C, ...)
        rows = rows * f
    return out, rows.reshape(layer.groups, out.shape[-1], -1)


def regression(target: Target, out: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(G, c) of components a b (one for all groups together), with components and the target of unit norm."""
    felt = target.metric @ target.weight @ target.moment
    gram = ((out.mT @ target.metric @ out) * (rows @ target.moment @ rows.mT)).sum(0)
    cross = ((out.mT @ felt) * rows).sum((0, 2))
    norms = gram.diagonal().clamp_min(1e-30).sqrt()
    whole = (felt * target.weight).sum().clamp_min(1e-30).sqrt()
    return (gram / norms / norms[:, None]).numpy(), (cross / norms / whole).numpy()


def lasso(gram: np.ndarray, cross: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The path of ½ gᵀ G g − cᵀ g + α Σ |g_r|: α (k,), gates (R, k) and relative squared errors (k,)."""
    values, vectors = np.linalg.eigh(gram)
    roots = np.sqrt(np.maximum(values, 1e-10 * values[-1]))
    x, y = roots[:, None] * vectors.T, (vectors.T @ cross) / roots  # data with these moments: XᵀX = G, Xᵀy = c
    alphas = max(np.abs(cross).max(), 1e-12) * GRID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # how many components there are needs no last digits
        gates = lasso_path(x, y, alphas=alphas / len(x), precompute=gram, Xy=cross, max_iter=100, tol=1e-5)[1]
    errors = 1 - 2 * cross @ gates + np.einsum("rk,rq,qk->k", gates, gram, gates)
    return alphas, gates, np.clip(errors, 0.0, 1.0)
