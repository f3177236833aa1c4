"""Lasso on the calibration data: components of a layer as regressors for its output (Tibshirani 1996).

A component is a part X_r of a weight that a family adds by one more rank. With gates g, Ŵ = Σ g_r X_r is a regression
of the layer's output, in the metric of decompositions/base.py. Its moments are known without data,

    G_rq = tr(X_rᵀ H X_q S),    c_r = tr(X_rᵀ H W S)

with components and W scaled to unit norm. Coordinate descent gives the whole path of ½‖W − Ŵ‖² + α Σ cost_r |g_r|. The
penalty shrinks the gates that it keeps, and the layer is refitted afterwards: so a point of the path has the error of
least squares on its components (the relaxed Lasso, Meinshausen 2007).

The dictionary holds the components of the SVD in the output metric, which are orthogonal in it: of these alone the
Lasso keeps the first R, and the error is that of the truncated SVD. With them are the components of the largest
candidates of the layer's other families, which are cheaper and correlated: among all of them the Lasso chooses what
explains most for its cost.

One price λ of the model's cost, in loss per budget, cuts every path: components that lower the loss by less than λ·cost
are given up, from the end of the path down. A fall of the error from e by d lowers the loss by d (loss / e), with the
layer's measured loss at e. (The slope of the loss itself is flatter where a layer is nearly lost; it would give up such
layers whole.) λ is bisected until the plan meets the budget. A layer takes the most accurate candidate within the cost
of the components that it keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path
from torch import Tensor

from rankopt.candidates.sensitivity import predict
from rankopt.core.budget import share
from rankopt.core.errors import RankoptError
from rankopt.core.options import check_choice
from rankopt.core.problem import Problem
from rankopt.core.records import SAME, Candidate, Cost, Layer, Proposal
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.decompositions.types import FactorLookup, Target
from rankopt.strategies.allocation import fill, project
from rankopt.strategies.base import Strategy
from rankopt.strategies.baselines import largest, within

GRID = np.geomspace(1, 1e-5, 80)  # values of α, as fractions of the least one at which no component is kept


PENALTIES = (1e-9, 1e9)  # bounds of the bisection of λ, in loss per budget


DICTIONARIES = ("families", "svd")


LARGEST = 2**25
"""Elements of all components of a layer together; families beyond it are left out of the dictionary."""


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

    def __init__(self, problem: Problem, seed: int = 0, *, dictionary: str = "svd") -> None:
        """Check the options.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Not used.
            dictionary: "families": the components of all families that a layer has candidates of, as far as these have
                a single rank; "svd": those of the SVD alone.

        Raises:
            RankoptError: For another dictionary.
        """
        super().__init__(problem, seed)
        check_choice(f"strategy {self.name!r}", "dictionary", dictionary, DICTIONARIES)
        self.dictionary = dictionary

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
        weight = prepared.model.get_submodule(layer.name).weight.detach().cpu()
        target = full_target(layer, weight, *prepared.statistics[layer.name])
        out, rows = svd_components(layer, target)
        blocks = [Components.of(layer, "svd_out", out.shape[-1])]
        if self.dictionary == "families":
            room = LARGEST // weight.numel()
            blocks += family_components(layer, target, prepared.candidates[layer.name], prepared.factors, room)
        costs = np.array([share(self.problem.limits, block.cost) for block in blocks for _ in range(block.number)])
        owner = np.repeat(np.arange(len(blocks)), [block.number for block in blocks])
        gram, cross = regression(target, out, rows, [m for block in blocks for m in block.matrices])
        scale = np.maximum(costs / costs.max(), 1e-3) if costs.max() > 0 else np.ones(len(costs))
        points: dict[tuple[int, ...], np.ndarray] = {}
        for kept in lasso(gram / np.outer(scale, scale), cross / scale).T != 0:
            points[tuple(np.bincount(owner[kept], minlength=len(blocks)).tolist())] = kept
        return self._priced(prepared, layer, blocks, points, gram, cross)

    def _priced(
        self,
        prepared: Any,
        layer: Layer,
        blocks: Sequence[Components],
        points: Mapping[tuple[int, ...], np.ndarray],
        gram: np.ndarray,
        cross: np.ndarray,
    ) -> Path:
        """The points of a path that no cheaper one beats, with the prices above which they are given up."""
        if not any(any(sizes) for sizes in points):
            points = {(1, *[0] * (len(blocks) - 1)): np.arange(len(cross)) == 0}
        found = [(_cost(blocks, n), refitted(gram, cross, kept)) for n, kept in points.items() if any(n)]
        found.sort(key=lambda point: (share(self.problem.limits, point[0]), point[1]))
        kept: list[tuple[Cost, float]] = []
        for cost, error in found:
            if not kept or error < kept[-1][1]:
                kept.append((cost, error))
        errors, shares = np.array([e for _, e in kept]), np.array([share(self.problem.limits, c) for c, _ in kept])
        curve = tuple(sorted((c.error, c.loss) for c in prepared.candidates[layer.name]))
        slopes = predict(curve, errors.tolist()) / np.maximum(errors, 1e-12)
        gains = -np.diff(errors) * slopes[:-1] / np.maximum(np.diff(shares), 1e-30)
        return Path(tuple(c for c, _ in kept), np.maximum.accumulate(gains[::-1])[::-1])


def _cost(blocks: Sequence[Components], sizes: Sequence[int]) -> Cost:
    """What a layer of some components of each family costs; its bias counts once."""
    total = blocks[0].bias
    for block, size in zip(blocks, sizes, strict=True):
        total = sum([block.cost] * size, total)
    return total


class Components(NamedTuple):
    """Components of one family.

    Attributes:
        number: How many.
        cost: What each costs.
        bias: The cost of none.
        matrices: What each contributes to the weight, (g, T, n); empty for those of the SVD.
    """

    number: int
    cost: Cost
    bias: Cost
    matrices: Sequence[Tensor] = ()

    @classmethod
    def of(cls, layer: Layer, family: str, number: int, matrices: Sequence[Tensor] = ()) -> Components:
        """Components whose cost is that of one more rank.

        Args:
            layer: The layer.
            family: Name of a family with a single rank.
            number: How many.
            matrices: What they contribute.
        """
        one, two = (DECOMPOSITIONS[family].cost(layer, (r,)) for r in (1, 2))
        return cls(number, two - one, one - (two - one), matrices)


def svd_components(layer: Layer, target: Target) -> tuple[Tensor, Tensor]:
    """The rank-one components of the SVD in the output metric, the largest first.

    With H^½ W S Wᵀ H^½ = U Λ Uᵀ, component r is H^-½ u_r u_rᵀ H^½ W. Different components are orthogonal in the norm of
    decompositions/base.py, the square of component r is λ_r, and so the first R of them are the best R.

    Args:
        layer: The layer.
        target: Its weight and metric.

    Returns:
        A (g, T, R) and B (g, R, n): component r of group g is A[g, :, r] B[g, r]ᵀ.
    """
    values, vectors = torch.linalg.eigh(target.metric)
    seen = values > 1e-14 * values.amax(-1, keepdim=True)  # what the metric does not see cannot be told apart
    roots = values.clamp_min(0).sqrt()
    half = (vectors * roots.unsqueeze(-2)) @ vectors.mT
    undo = (vectors * torch.where(seen, 1 / roots.clamp_min(1e-150), 0.0).unsqueeze(-2)) @ vectors.mT
    felt = half @ target.weight
    full = min(layer.out_channels, layer.patch)
    u = torch.linalg.eigh(target.times_moment(felt) @ felt.mT)[1].flip(-1)[..., :full]
    return (undo @ u).cpu(), (u.mT @ felt).cpu()


def family_components(
    layer: Layer, target: Target, candidates: Sequence[Candidate], factors: FactorLookup, room: int
) -> list[Components]:
    """The components of other families with a single rank, of each those of its largest candidate.

    Args:
        layer: The layer.
        target: Its weight and metric.
        candidates: Its candidates.
        factors: Their factors.
        room: How many components there may be; a family with more is left out.

    Returns:
        One entry for each family.
    """
    found = []
    own = [c for c in candidates if len(c.rank) == 1 and c.method != "svd_out" and c.precision == SAME and c.key]
    for name in dict.fromkeys(c.method for c in own):
        family, largest_one = DECOMPOSITIONS[name], max((c for c in own if c.method == name), key=lambda c: c.rank)
        *before, last = (f.double().cpu() for f in factors[largest_one.key or ""])
        (rank,) = largest_one.rank
        if family.stages(layer, largest_one.rank) and last.shape[1] == rank and rank <= room:
            parts = [torch.zeros_like(last).index_copy_(1, i, last[:, i]) for i in torch.arange(rank).split(1)]
            matrices = [family.weight(layer, (*before, part)).reshape(target.weight.shape) for part in parts]
            found.append(Components.of(layer, name, rank, matrices))
            room -= rank
    return found


def regression(
    target: Target, out: Tensor, rows: Tensor, others: Sequence[Tensor] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the moments of the regression, with components and target scaled to unit norm.

    Args:
        target: The weight and its metric.
        out: A of the rank-one components, (g, T, R).
        rows: B of the rank-one components, (g, R, n).
        others: Further components, (g, T, n) each.

    Returns:
        G and c, of the rank-one components and then the others; a component's groups count as one.
    """
    felt = target.metric @ target.times_moment(target.weight)
    gram = ((out.mT @ target.metric @ out) * (target.times_moment(rows) @ rows.mT)).sum(0)
    cross = ((out.mT @ felt) * rows).sum((0, 2))
    if others:
        flat = torch.stack([x.flatten() for x in others])
        seen = [target.metric @ target.times_moment(x) for x in others]
        mixed = torch.stack([((out.mT @ x) * rows).sum((0, 2)) for x in seen], 1)
        among = flat @ torch.stack([x.flatten() for x in seen], 1)
        gram = torch.cat([torch.cat([gram, mixed], 1), torch.cat([mixed.mT, among], 1)])
        cross = torch.cat([cross, flat @ felt.flatten()])
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
