"""Fits in the output metric by variable projection (Golub and Pereyra 1973).

Every family is linear in its output factor B: Ŵ = B K(θ), where the rows of K are what the input side of the
family can express. For given θ the best B is a least-squares problem, so only θ is searched:

    L(θ) = min_B ‖W − B K(θ)‖²        (norm as in base.py; H is absorbed into W, and undone at the end)

By the envelope theorem dL/dK is that of the joint loss at fixed B: −2 Bᵀ (W − B K) S. A family with a rank on
its output side as well (Tucker, TT) has it eliminated too: B is then the projection of the free solution onto
the leading eigenvectors of B K S Wᵀ, as in reduced-rank regression (Izenman 1975).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import minimize
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.types import Factors, Fit, Target
from rankopt.model.layer_kinds import as_matrix

RIDGE = 1e-10  # relative to each row of K: keeps near-dependent rows solvable


# While θ is searched: λ Σ_r ‖b_r‖² ‖k_r‖², the energy of the rows' terms apart, which grows without bound where CP
# components diverge and cancel (Phan 2020). It also makes the search converge sooner; the last B is free of it.
SEARCH_RIDGE = 1e-5


MAX_FLOPS = 1e11  # of one fit: layers so wide that a step is dear get fewer steps


Parameters = tuple[Tensor, ...]


class OutputSolved(Decomposition):
    """A family whose output factor is solved exactly; it supplies the input side."""

    @abstractmethod
    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        """Where the search for θ starts; tensors (g, ...)."""

    @abstractmethod
    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        """K(θ), (g, m, n)."""

    @abstractmethod
    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        """Balanced stage weights from θ and B (g, T, m)."""

    def output_rank(self, layer: Layer, rank: Rank) -> tuple[int, int] | None:
        """(t, r): B, its T rows seen as (T // t, t), has rank r over t. None: B is free."""
        return None

    def target(
        self, layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None
    ) -> tuple[Target, Tensor]:
        """What is fitted, and the matrix that undoes what the output metric did to the output factor."""
        return prepare(layer, weight, moment, metric)

    def fit(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> Iterator[Fit]:
        target, undo = self.target(layer, weight, moment, metric)
        for rank in ranks:
            theta = self.start(layer, target, rank)
            output_rank = self.output_rank(layer, rank)
            theta, output = self._minimise(layer, theta, target, output_rank, math.ceil(steps * self.effort))
            factors = self.factors(layer, theta, undo @ output, rank)
            yield declare(self, layer, weight, factors, rank, moment, metric)

    def _minimise(
        self, layer: Layer, theta: Parameters, target: Target, output_rank: tuple[int, int] | None, steps: int
    ) -> tuple[Parameters, Tensor]:
        """L-BFGS over θ, flattened; returns θ and the output factor that belongs to it."""
        shapes = [p.shape for p in theta]
        sizes = [p.numel() for p in theta]
        solver, damped = (OutputSolver(target, output_rank, ridge) for ridge in (RIDGE, SEARCH_RIDGE))

        def unpack(flat: Tensor) -> Parameters:
            return tuple(p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True))

        def loss(x: object) -> tuple[float, object]:
            flat = torch.as_tensor(x, device=target.weight.device).requires_grad_()
            rows = self.rows(layer, unpack(flat))
            value, _, gradient = damped(rows.detach())
            (flat_gradient,) = torch.autograd.grad(rows, flat, gradient)
            return value, flat_gradient.cpu().numpy()

        flat = torch.cat([p.reshape(-1) for p in theta])
        rows = self.rows(layer, theta)
        width = target.weight.shape[-2] if target.plain else target.moment.shape[-1]
        steps = min(steps, int(MAX_FLOPS / (2 * rows.numel() * width)))
        start, output, _ = solver(rows)
        if steps > 0 and solver.scale > 0 and start > 1e-12:
            options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 20, "ftol": 1e-8, "gtol": 0.0}
            found = minimize(loss, flat.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
            better = unpack(torch.as_tensor(found.x, device=flat.device))
            end, new_output, _ = solver(self.rows(layer, better))
            theta, output = (better, new_output) if end < start else (theta, output)
        return theta, output


class OutputSolver:
    """rows K -> (relative loss, output factor B, gradient of the loss over K)."""

    def __init__(self, target: Target, output_rank: tuple[int, int] | None, ridge: float = RIDGE) -> None:
        self.ridge = ridge
        self.weight, self.times_moment = target.weight, target.times_moment
        self.weight_moment = self.times_moment(self.weight)
        self.scale = (self.weight_moment * self.weight).sum().item()
        self.output_rank = output_rank

    def __call__(self, rows: Tensor) -> tuple[float, Tensor, Tensor]:
        rows_moment = self.times_moment(rows)
        gram = rows_moment @ rows.mT
        cross = rows_moment @ self.weight.mT
        output, ridge = _solve(gram, cross, self.ridge)
        if self.output_rank:
            output = self._project(output, cross, *self.output_rank)
        loss = self.scale - (output * cross.mT).sum().item()
        penalty = ridge * output.square().sum(-2).unsqueeze(-1) * rows_moment
        gradient = 2 * (penalty - output.mT @ (self.weight_moment - output @ rows_moment))
        scale = self.scale or 1.0
        return loss / scale, output, gradient / scale

    def _project(self, output: Tensor, cross: Tensor, t: int, rank: int) -> Tensor:
        g, total, m = output.shape
        split = output.view(g, total // t, t, m)
        explained = (split @ cross.mT.reshape(g, total // t, t, m).mT).sum(1)
        basis = torch.linalg.eigh((explained + explained.mT) / 2)[1][..., -rank:].unsqueeze(1)
        return (basis @ (basis.mT @ split)).view(g, total, m)


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, float]:
    """B = crossᵀ (gram + ridge · diag(gram))⁻¹, with the least ridge that is solvable of this, 100 times this, ..."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-30 + 1e-14 * diagonal.amax(-1, keepdim=True)
    while True:
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge * diagonal + floor))
        if not info.any() or ridge > 1:
            return torch.cholesky_solve(cross, factor).mT, ridge
        ridge *= 100


# --- shared pieces -------------------------------------------------------------------------------


def prepare(layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None) -> tuple[Target, Tensor]:
    """The fit's target with the output metric absorbed into the weight, and the matrix (g, T, T) that undoes it."""
    target = full_target(layer, weight, moment, metric)
    if metric is None:
        return target, target.metric
    half, undo = roots(target.metric)
    identity = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device).expand_as(half)
    return target._replace(weight=half @ target.weight, metric=identity), undo


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """H^½ and its inverse, (g, t, t) each.

    Directions that the model hardly feels keep a ten-thousandth of the largest weight: exactness at full rank.
    """
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(1e-4 * values.amax(-1, keepdim=True).clamp_min(1e-30)).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def full_target(layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None) -> Target:
    """Weight, moment and metric in float64 on one device; identities where not given. weight: the layer's own."""
    w = as_matrix(layer, weight.detach().double())

    def or_identity(m: Tensor | None, size: int) -> Tensor:
        if m is not None:
            return m.to(w)
        return torch.eye(size, dtype=w.dtype, device=w.device).expand(layer.groups, -1, -1)

    if layer.kind == "Embedding":
        diagonal = w.new_ones(1, layer.patch) if moment is None else moment.to(w)
        return Target(w, diagonal, or_identity(metric, layer.out_channels))
    plain = moment is None
    return Target(w, or_identity(moment, layer.patch), or_identity(metric, layer.out_channels), plain=plain)


def declare(
    family: Decomposition,
    layer: Layer,
    weight: Tensor,
    factors: Factors,
    rank: Rank,
    moment: Tensor | None,
    metric: Tensor | None,
) -> Fit:
    """The factors as they will be stored, with the error that these really have."""
    stored = tuple(f.to(weight.dtype).contiguous() for f in factors)
    rebuilt = family.weight(layer, tuple(f.double() for f in stored))
    target = full_target(layer, weight, moment, metric)
    return Fit(rank, stored, target.error(rebuilt.reshape(target.weight.shape)))


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product left @ right, (g, a, r) and (g, r, b), with its singular values split evenly.

    Whitened fits leave factors badly scaled, and training then goes nowhere.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    root = s.sqrt()
    new_left = (q_left @ u) * root.unsqueeze(-2)
    new_right = root.unsqueeze(-1) * (vh @ q_right.mT)
    short = right.shape[-2] - new_right.shape[-2]  # a rank above the product's own is filled with zeros
    if short > 0:
        new_left = torch.nn.functional.pad(new_left, (0, short))
        new_right = torch.nn.functional.pad(new_right, (0, 0, 0, short))
    return new_left, new_right


def balanced_bond(left: Tensor, left_dim: int, right: Tensor, right_dim: int) -> tuple[Tensor, Tensor]:
    """Balance two cores (g, ...) along the bond that links dimension left_dim of one with right_dim of the other."""
    before, after = left.movedim(left_dim, -1), right.movedim(right_dim, 1)
    new_left, new_right = balanced(before.flatten(1, -2), after.flatten(2))
    return new_left.view(before.shape).movedim(-1, left_dim), new_right.view(after.shape).movedim(1, right_dim)


def equal_norms(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Scale each component's vectors, (g, r, size) each, to one norm; their product stays."""
    norms = [v.norm(dim=-1, keepdim=True) for v in vectors]
    product = torch.stack([n.squeeze(-1) for n in norms]).prod(0).unsqueeze(-1)
    mean = product ** (1 / len(vectors))
    return [v * (mean / n.clamp_min(1e-300)) for v, n in zip(vectors, norms, strict=True)]


def leading_rows(matrix: Tensor, rank: int) -> Tensor:
    """The rank strongest row combinations of a matrix (g, a, b): left singular vectors' transpose times it.

    Rows are scaled to unit norm; beyond the matrix's own rank, unit vectors fill up.
    """
    u = torch.linalg.svd(matrix, full_matrices=False)[0]
    rows = u[..., :rank].mT @ matrix
    if rows.shape[-2] < rank:
        extra = torch.eye(rank, matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        rows = torch.cat([rows, extra[: rank - rows.shape[-2]].expand(len(rows), -1, -1)], -2)
    return torch.nn.functional.normalize(rows, dim=-1)


def hooi(weight: Tensor, bases: Parameters, output_rank: int, sweeps: int = 20) -> Parameters:
    """Higher-order orthogonal iteration (De Lathauwer 2000): each mode's best directions for given other ones, in turn.

    weight (g, T, modes...), bases (g, rank, mode) each. Only without data: else the best ones have no closed form.
    """
    best = list(bases)
    for _ in range(sweeps):
        inside = _projected(weight, best)
        output = leading_rows(inside.flatten(2).mT, output_rank)
        seen = torch.einsum("gt...,grt->gr...", weight, output)
        for i in range(len(best)):
            others = _projected(seen, [None if j == i else b for j, b in enumerate(best)])
            best[i] = leading_rows(others.movedim(i + 2, -1).flatten(1, -2), best[i].shape[1])
    return tuple(best)


def _projected(weight: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """The weight (g, T, modes...) in these bases of its modes."""
    for i, basis in enumerate(bases):
        if basis is not None:
            weight = torch.einsum("g...m,grm->g...r", weight.movedim(i + 2, -1), basis).movedim(-1, i + 2)
    return weight
