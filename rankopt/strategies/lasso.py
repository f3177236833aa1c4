"""Lasso on the calibration data: a layer's rank-one components as regressors for its output (Tibshirani 1996).

Component r of a fitted candidate is a_r b_rᵀ. With gates g, Ŵ = Σ g_r a_r b_rᵀ is a regression of the layer's output,
in the metric of decompositions/base.py. Its moments are known without data,

    G_rq = (a_rᵀ H a_q) (b_rᵀ S b_q),    c_r = a_rᵀ H W S b_r

with components and W scaled to unit norm. Coordinate descent gives the whole path of ½‖W − Ŵ‖² + α Σ |g_r|, which
orders the components by what they explain jointly. The penalty shrinks the gates that it keeps, and the layer is
refitted afterwards: so a point of the path has the error of least squares on its components (the relaxed Lasso,
Meinshausen 2007).

One price λ of the model's cost, in loss per budget, cuts every path: components that lower the loss by less than λ·cost
are given up, from the end of the path down. A fall of the error from e by d lowers the loss by d (loss / e), with the
layer's measured loss at e. (The slope of the loss itself is flatter where a layer is nearly lost; it would give up such
layers whole.) λ is bisected until the plan meets the budget. A layer takes the most accurate candidate within the cost
of the components that it keeps.

The components are those of `svd_out`, fitted here in closed form. The best R of them are the first R of all, so a
subset tells what a candidate of that cost can do; subsets of a CP are far worse than its refits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path
from torch import Tensor

from rankopt.candidates.sensitivity import predict
from rankopt.core.errors import RankoptError
from rankopt.core.records import Cost, Layer, Proposal
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Factors, Target
from rankopt.decompositions.variable_projection import full_target
from rankopt.strategies.allocation import fill, project
from rankopt.strategies.base import Strategy
from rankopt.strategies.baselines import largest, within

GRID = np.geomspace(1, 1e-5, 80)  # values of α, as fractions of the least one at which no component is kept


PENALTIES = (1e-9, 1e9)  # bounds of the bisection of λ, in loss per budget


class Path(NamedTuple):
    """A layer's path.

    Attributes:
        costs: Costs of the points of the path, rising, (k,).
        prices: λ above which the next point is given up, falling, (k - 1,).
    """

    costs: tuple[Cost, ...]
    prices: np.ndarray

    def at(self, penalty: float) -> Cost:
        """The cost of the components that are kept.

        Args:
            penalty: The price λ.
        """
        return self.costs[int((self.prices > penalty).sum())]


class Lasso(Strategy):
    """Gives every layer the cost of the components that the Lasso keeps at one price."""

    name = "lasso"
    one_shot = True
    needs_model = True
    paths: Sequence[Path] = ()

    def measure(self, prepared: Any, progress: Any) -> None:
        layers = self.problem.layers
        self.paths = [self._path(prepared, layer) for layer in progress(layers, "Lasso paths", len(layers))]

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        if not self.paths:
            raise RankoptError(
                "strategy 'lasso' looks at the model first: call measure(prepared, progress), then ask()"
            )
        low, high = np.log(PENALTIES)
        proposal = largest(self.problem, lambda kept: self._at(high - kept * (high - low)))
        return fill(self.problem, project(self.problem, proposal))

    def _at(self, log_penalty: float) -> Proposal:
        return within(self.problem, [path.at(np.exp(log_penalty)) for path in self.paths])

    def _path(self, prepared: Any, layer: Layer) -> Path:
        svd = DECOMPOSITIONS["svd_out"]
        full = svd.full_rank(layer)
        assert full is not None
        weight = prepared.model.get_submodule(layer.name).weight.detach().cpu()
        (fit,) = svd.fit(layer, weight, [full], *prepared.statistics[layer.name])
        target = full_target(layer, weight, *prepared.statistics[layer.name])
        gram, cross = regression(target, *rank_one(layer, fit.factors))
        sizes = {max(int(kept.sum()), 1): kept for kept in lasso(gram, cross).T != 0}  # the last point of each size
        ranks = sorted(sizes)
        costs = tuple(svd.cost(layer, (rank,)) for rank in ranks)
        shares = np.array([sum(c[x.metric] / x.target for x in self.problem.limits) for c in costs])
        errors = np.minimum.accumulate([refitted(gram, cross, sizes[rank]) for rank in ranks])
        curve = tuple(sorted((c.error, c.loss) for c in prepared.candidates[layer.name]))
        slopes = predict(curve, errors.tolist()) / np.maximum(errors, 1e-12)
        gains = -np.diff(errors) * slopes[:-1] / np.diff(shares)
        return Path(costs, np.maximum.accumulate(gains[::-1])[::-1])


def rank_one(layer: Layer, factors: Factors) -> tuple[Tensor, Tensor]:
    """Split an SVD's factors into rank-one components.

    Args:
        layer: The layer.
        factors: The factors of `svd_out`.

    Returns:
        A (g, T, R) and B (g, R, n), float64: component r of group g is A[g, :, r] B[g, r]ᵀ.
    """
    first, last = (f.double().cpu() for f in factors)
    out = last.reshape(layer.groups, layer.out_channels, -1)
    return out, first.reshape(layer.groups, out.shape[-1], -1)


def regression(target: Target, out: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Compute the moments of the regression, with components and target scaled to unit norm.

    Args:
        target: The weight and its metric.
        out: A of the components, (g, T, R).
        rows: B of the components, (g, R, n).

    Returns:
        G (R, R) and c (R,); a component's groups count as one.
    """
    felt = target.metric @ target.times_moment(target.weight)
    gram = ((out.mT @ target.metric @ out) * (target.times_moment(rows) @ rows.mT)).sum(0)
    cross = ((out.mT @ felt) * rows).sum((0, 2))
    norms = gram.diagonal().clamp_min(1e-30).sqrt()
    whole = (felt * target.weight).sum().clamp_min(1e-30).sqrt()
    return (gram / norms / norms[:, None]).numpy(), (cross / norms / whole).numpy()


def lasso(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Minimise ½ gᵀ G g − cᵀ g + α Σ |g_r| for falling α.

    Args:
        gram: G, (R, R).
        cross: c, (R,).

    Returns:
        The gates at every α, (R, k).
    """
    values, vectors = np.linalg.eigh(gram)
    roots = np.sqrt(np.maximum(values, 1e-10 * values[-1]))
    x, y = roots[:, None] * vectors.T, (vectors.T @ cross) / roots  # data with these moments: XᵀX = G, Xᵀy = c
    alphas = max(np.abs(cross).max(), 1e-12) * GRID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of components needs no last digits
        return lasso_path(x, y, alphas=alphas / len(x), precompute=gram, Xy=cross, max_iter=100, tol=1e-5)[1]


def refitted(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray) -> float:
    """Compute the relative squared error of least squares on some components A: 1 − c_Aᵀ G_AA⁺ c_A.

    Args:
        gram: G, (R, R).
        cross: c, (R,).
        kept: Which components, bools (R,).
    """
    part = cross[kept]
    return float(np.clip(1 - part @ np.linalg.lstsq(gram[np.ix_(kept, kept)], part)[0], 0.0, 1.0)) if len(part) else 1.0
