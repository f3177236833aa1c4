"""Fits by variable projection (Golub and Pereyra 1973), and the numerical tools of all fits.

Most families are linear in their output factor B: Ŵ = B K(θ), where the rows of K(θ) are what the input side of the
family can express. For given θ the best B solves a least-squares problem, so that only θ is searched:

    L(θ) = min_B ‖W − B K(θ)‖²

in the norm of base.py. H is absorbed into W before the fit and its effect on B undone afterwards. By the envelope
theorem dL/dK is the gradient of the joint loss for fixed B: −2 Bᵀ (W − B K) S. For families that also have a rank on
the output side (Tucker, TT) that rank is eliminated as well: B is the projection of the unconstrained solution onto
the leading eigenvectors of B K S Wᵀ, as in reduced-rank regression (Izenman 1975).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from scipy.optimize import minimize
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.types import Factors, Fit, Target
from rankopt.model.layer_kinds import as_matrix

RIDGE = 1e-10
"""Relative to each row's norm in K S Kᵀ: keeps nearly dependent rows solvable."""

SEARCH_RIDGE = 1e-5
"""The ridge while θ is searched.

It penalises λ Σ_r ‖b_r‖² ‖k_r‖², the energy of the individual terms, which is unbounded where CP components diverge and
cancel (Phan 2020), and makes the search converge sooner. The final B is solved without it.
"""

MAX_FLOPS = 1e11
"""Bound on the floating-point operations of one fit: very wide layers get fewer steps."""

NEGLIGIBLE = 1e-12
"""Relative loss below which a start is not improved further."""

Parameters = tuple[Tensor, ...]
"""The searched parameters θ, float64 tensors (g, ...)."""


# --- families with a free output factor ----------------------------------------------------------


class OutputSolved(Decomposition):
    """Base class of families whose output factor is solved exactly; subclasses supply the input side K(θ)."""

    @abstractmethod
    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        """The parameters from which the search for θ starts.

        Args:
            layer: Layer to decompose.
            target: What is fitted.
            rank: A valid rank.
        """

    @abstractmethod
    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        """The rows K(θ), (g, m, n), differentiable.

        Args:
            layer: Layer to decompose.
            theta: Parameters in the shapes of `start`.
        """

    @abstractmethod
    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        """The stages' weights, balanced so that they can be trained.

        Args:
            layer: Layer to decompose.
            theta: Parameters in the shapes of `start`.
            output: Output factor B (g, T, m).
            rank: A valid rank.
        """

    def output_rank(self, layer: Layer, rank: Rank) -> tuple[int, int] | None:
        """The rank constraint on the output factor.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.

        Returns:
            (t, r): B, with its T rows arranged as (T // t, t), has rank r over t. None: B is unconstrained.
        """
        return None

    def target(
        self, layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None
    ) -> tuple[Target, Tensor]:
        """The target of the search, with the output metric absorbed into the weight.

        Args:
            layer: Layer to decompose.
            weight: The module's weight.
            moment: S or None.
            metric: H or None.

        Returns:
            The target, and the matrix by which the fitted output factor is multiplied to undo the absorption.
        """
        return absorb_metric(layer, weight, moment, metric)

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
            theta, output = self._search(layer, theta, target, output_rank, math.ceil(steps * self.effort))
            factors = self.factors(layer, theta, undo @ output, rank)
            yield stored_fit(self, layer, weight, factors, rank, moment, metric)

    def _search(
        self, layer: Layer, theta: Parameters, target: Target, output_rank: tuple[int, int] | None, steps: int
    ) -> tuple[Parameters, Tensor]:
        """Improve θ; returns it and the output factor that belongs to it."""
        solver, damped = (OutputSolver(target, output_rank, ridge) for ridge in (RIDGE, SEARCH_RIDGE))

        def loss(rows: Tensor) -> tuple[float, Tensor]:
            value, _, gradient = damped(rows)
            return value, gradient

        rows = self.rows(layer, theta)
        width = target.weight.shape[-2] if target.diagonal else target.moment.shape[-2]
        steps = affordable_steps(steps, rows.numel() * width)
        start, output, _ = solver(rows)
        if steps > 0 and solver.scale > 0 and start > NEGLIGIBLE:
            better = lbfgs(lambda t: self.rows(layer, t), loss, theta, steps, history=20, tolerance=1e-8)
            end, new_output, _ = solver(self.rows(layer, better))
            theta, output = (better, new_output) if end < start else (theta, output)
        return theta, output


class OutputSolver:
    """Solves min_B ‖W − B K‖² for given rows K.

    Args:
        target: W and the norm, with the output metric absorbed.
        output_rank: As `OutputSolved.output_rank` returns it.
        ridge: Ridge relative to each row's norm.
    """

    def __init__(self, target: Target, output_rank: tuple[int, int] | None, ridge: float = RIDGE) -> None:
        self.ridge = ridge
        self.weight, self.times_moment = target.weight, target.times_moment
        self.weight_moment = self.times_moment(self.weight)
        self.scale = (self.weight_moment * self.weight).sum().item()
        self.output_rank = output_rank

    def __call__(self, rows: Tensor) -> tuple[float, Tensor, Tensor]:
        """Solve for the output factor.

        Args:
            rows: K (g, m, n).

        Returns:
            The loss relative to ‖W‖², B (g, T, m), and the gradient of the loss with respect to K (g, m, n).
        """
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
        """B projected onto the leading eigenvectors of B K S Wᵀ over t."""
        g, total, m = output.shape
        split = output.view(g, total // t, t, m)
        explained = (split @ cross.mT.reshape(g, total // t, t, m).mT).sum(1)
        basis = torch.linalg.eigh((explained + explained.mT) / 2)[1][..., -rank:].unsqueeze(1)
        return (basis @ (basis.mT @ split)).view(g, total, m)


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, float]:
    """B = crossᵀ (gram + ridge · diag(gram))⁻¹; the ridge is multiplied by 100 until this is solvable.

    Returns B and the ridge that was used.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-30 + 1e-14 * diagonal.amax(-1, keepdim=True)
    while True:
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge * diagonal + floor))
        if not info.any() or ridge > 1:
            return torch.cholesky_solve(cross, factor).mT, ridge
        ridge *= 100


# --- the search -----------------------------------------------------------------------------------


def affordable_steps(steps: int, products: int) -> int:
    """Limit the steps of a fit so that it stays below MAX_FLOPS.

    Args:
        steps: The steps asked for.
        products: Multiply-accumulates of one step.
    """
    return min(steps, int(MAX_FLOPS / (2 * products)))


def lbfgs(
    model: Callable[[Parameters], Tensor],
    loss: Callable[[Tensor], tuple[float, Tensor]],
    start: Parameters,
    steps: int,
    history: int,
    tolerance: float,
) -> Parameters:
    """Minimise loss(model(θ)) over θ by L-BFGS (SciPy's L-BFGS-B, Zhu et al. 1997).

    Args:
        model: Differentiable function of the parameters, for example K(θ) or the dense weight.
        loss: Maps the model's detached value to the loss and its gradient with respect to that value.
        start: Initial parameters, float64.
        steps: Maximum number of iterations.
        history: Number of gradient pairs that approximate the Hessian.
        tolerance: Stop when the relative decrease of the loss falls below it.

    Returns:
        The parameters found, in the shapes of `start`.
    """
    shapes, sizes = [p.shape for p in start], [p.numel() for p in start]
    device = start[0].device

    def unpack(flat: Tensor) -> Parameters:
        return tuple(p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True))

    def objective(x: object) -> tuple[float, object]:
        flat = torch.as_tensor(x, device=device).requires_grad_()
        value = model(unpack(flat))
        found, gradient = loss(value.detach())
        (flat_gradient,) = torch.autograd.grad(value, flat, gradient)
        return found, flat_gradient.cpu().numpy()

    flat = torch.cat([p.reshape(-1) for p in start])
    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": history, "ftol": tolerance, "gtol": 0.0}
    found = minimize(objective, flat.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    return unpack(torch.as_tensor(found.x, device=device))


# --- targets and fits -----------------------------------------------------------------------------


def absorb_metric(layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None) -> tuple[Target, Tensor]:
    """The target H^½ W with an identity as output metric.

    Args:
        layer: Layer to decompose.
        weight: The module's weight.
        moment: S or None.
        metric: H or None.

    Returns:
        The target, and the matrix (g, T, T) that undoes the absorption: H^−½.
    """
    target = full_target(layer, weight, moment, metric)
    if metric is None:
        return target, target.metric
    half, undo = roots(target.metric)
    identity = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device).expand_as(half)
    return target._replace(weight=half @ target.weight, metric=identity), undo


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """H^½ and its inverse, (g, t, t) each.

    Eigenvalues are raised to 1e-4 of the largest, so that the inverse exists and full rank stays exact.

    Args:
        metric: H (g, t, t), symmetric positive semidefinite.
    """
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(1e-4 * values.amax(-1, keepdim=True).clamp_min(1e-30)).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def full_target(layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None) -> Target:
    """The target of a layer, in float64 on the weight's device.

    Args:
        layer: Layer to decompose.
        weight: The module's weight, in its own shape.
        moment: S; None: identity.
        metric: H; None: identity.
    """
    w = as_matrix(layer, weight.detach().double())

    s = w.new_ones(len(w), layer.patch) if moment is None else moment.to(w)
    identity = torch.eye(layer.out_channels, dtype=w.dtype, device=w.device).expand(layer.groups, -1, -1)
    return Target(w, s, identity if metric is None else metric.to(w), plain=moment is None)


def stored_fit(
    family: Decomposition,
    layer: Layer,
    weight: Tensor,
    factors: Factors,
    rank: Rank,
    moment: Tensor | None,
    metric: Tensor | None,
) -> Fit:
    """Round the factors to the weight's dtype and measure the error of the rounded factors.

    Args:
        family: The decomposition.
        layer: The decomposed layer.
        weight: The module's weight, in its own shape.
        factors: The fitted factors, float64.
        rank: Their rank.
        moment: S or None.
        metric: H or None.
    """
    stored = tuple(f.to(weight.dtype).contiguous() for f in factors)
    rebuilt = family.weight(layer, tuple(f.double() for f in stored))
    target = full_target(layer, weight, moment, metric)
    return Fit(rank, stored, target.error(rebuilt.reshape(target.weight.shape)))


# --- factors --------------------------------------------------------------------------------------


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale two factors so that the singular values of their product are split evenly; the product stays.

    Fits in a metric leave factors badly scaled, from which training makes no progress.

    Args:
        left: Tensor (g, a, r).
        right: Tensor (g, r, b).
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    root = s.sqrt()
    new_left = (q_left @ u) * root.unsqueeze(-2)
    new_right = root.unsqueeze(-1) * (vh @ q_right.mT)
    short = right.shape[-2] - new_right.shape[-2]  # pad with zeros if r exceeds the rank of the product
    if short > 0:
        new_left = torch.nn.functional.pad(new_left, (0, short))
        new_right = torch.nn.functional.pad(new_right, (0, 0, 0, short))
    return new_left, new_right


def balanced_bond(left: Tensor, left_dim: int, right: Tensor, right_dim: int) -> tuple[Tensor, Tensor]:
    """Balance two cores along the bond between them.

    Args:
        left: Core (g, ...).
        left_dim: Dimension of `left` that is the bond.
        right: Core (g, ...).
        right_dim: Dimension of `right` that is the bond.
    """
    before, after = left.movedim(left_dim, -1), right.movedim(right_dim, 1)
    new_left, new_right = balanced(before.flatten(1, -2), after.flatten(2))
    return new_left.view(before.shape).movedim(-1, left_dim), new_right.view(after.shape).movedim(1, right_dim)


def equal_norms(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Scale the vectors of each component to the same norm; their product stays.

    Args:
        vectors: One tensor (g, r, size) per mode.
    """
    norms = [v.norm(dim=-1, keepdim=True) for v in vectors]
    product = torch.stack([n.squeeze(-1) for n in norms]).prod(0).unsqueeze(-1)
    mean = product ** (1 / len(vectors))
    return [v * (mean / n.clamp_min(1e-300)) for v, n in zip(vectors, norms, strict=True)]


def leading_rows(matrix: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of a matrix as rows of unit norm, (g, rank, b).

    Args:
        matrix: Tensor (g, a, b).
        rank: Number of rows; beyond min(a, b) they are unit vectors.
    """
    u = torch.linalg.svd(matrix, full_matrices=False)[0]
    rows = u[..., :rank].mT @ matrix
    if rows.shape[-2] < rank:
        extra = torch.eye(rank, matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        rows = torch.cat([rows, extra[: rank - rows.shape[-2]].expand(len(rows), -1, -1)], -2)
    return torch.nn.functional.normalize(rows, dim=-1)


def leading_basis(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a matrix, (a, rank).

    Args:
        matrix: Tensor (a, b).
        rank: Number of vectors, at most a.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1)[:, :rank]
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def hooi(weight: Tensor, bases: Parameters, output_rank: int, sweeps: int = 20) -> Parameters:
    """Higher-order orthogonal iteration (De Lathauwer 2000): optimise the basis of one mode after the other.

    Only for fits without data; with a moment the best bases have no closed form.

    Args:
        weight: Tensor (g, T, *modes).
        bases: Initial basis (g, rank, mode) of each mode.
        output_rank: Rank over T.
        sweeps: Number of passes over all modes.

    Returns:
        The improved bases.
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
    """The weight (g, T, *modes) in the given bases of its modes; None leaves a mode as it is."""
    for i, basis in enumerate(bases):
        if basis is not None:
            weight = torch.einsum("g...m,grm->g...r", weight.movedim(i + 2, -1), basis).movedim(-1, i + 2)
    return weight
