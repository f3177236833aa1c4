"""The search for the parameters θ of `variable_projection`: ranks and layers in batches, in the precision they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property, reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.lbfgs import Minimum, Objective, minimize
from rankopt.decompositions.linear_algebra import padded, roots
from rankopt.decompositions.output_solver import RIDGE, Blocks, OutputSolver
from rankopt.decompositions.types import Parameters, Target

SEARCH_RIDGE = 1e-5
"""The ridge while θ is searched.

It penalises λ Σ_r ‖b_r‖² ‖k_r‖², the energy of the individual terms, which is unbounded where CP components diverge and
cancel (Phan 2020), and makes the search converge sooner. The final B is solved without it.
"""

MAX_FLOPS = 1e11
"""Bound on the floating-point operations of one fit: very wide layers get fewer steps."""

DAMPING = 1e-2
"""Relative to the diagonal of a curvature: keeps its inverse bounded where components are nearly the same."""

LEAST_MODE = 1e-3
"""The least eigenvalue of a mode's moment in a preconditioner, as a share of the largest."""

NEGLIGIBLE = 1e-12
"""Relative loss below which a start is not improved further."""

TOLERANCE = 1e-3
"""A search ends where its loss falls by less than this share of it in `lbfgs.WINDOW` steps.

With 1e-4, searches of `cp_merged` on ResNet-20 take 1.3 times as long and end at losses that are lower by 0.5 %."""

FLOAT32_LOSS = 1e-5
"""Relative loss below which the search goes on in float64."""

CLEARLY = 0.999
"""A search that leaves less than this share of the loss has found something better, whatever was rounded."""

PENALISED = 100 * SEARCH_RIDGE
"""Relative loss of a start below which much of it may be the ridge's penalty, which says nothing of its error."""

CPU_BATCH, GPU_BATCH = 2**18, 2**26
"""Elements of K in a batch: on a CPU larger ones leave its cache, on a GPU they leave its memory."""

CPU_FREE = 2**17
"""Elements of K up to which padding costs less than another batch on a CPU."""

CPU_RATIO = 1.5
"""In larger batches: how many times as large as the smallest problem the largest one is."""

KEPT_BYTES = 2**28
"""Bytes of a layer's weight up to which a search keeps what it needs in both precisions and for all sizes of blocks."""

Solution = tuple[Parameters, Tensor]
"""θ and its output factor B (g, T, m)."""


class Parametrised(Protocol):
    """What the search asks of a family; see `variable_projection.OutputSolved`."""

    def blocks(self, layer: Layer, theta: Parameters) -> Blocks: ...

    def output_rank(self, layer: Layer, rank: Rank) -> tuple[int, int] | None: ...

    def mode_moments(self, layer: Layer, target: Target) -> Parameters | None: ...

    def searches_error(self, layer: Layer) -> bool: ...

    def padding(self, layer: Layer, rank: Rank) -> Hashable: ...


class _Problem(NamedTuple):
    """A rank of all layers of a stack, or one of each that is filled up to the same size: where its search starts."""

    place: int
    rank: Rank
    theta: Parameters
    rows: int
    steps: int


class Improved(NamedTuple):
    """What a search made of the parameters of one rank.

    Attributes:
        theta: The parameters.
        start: The relative loss of each weight (g,) before the search.
        loss: And after it.
        ended: Whether more steps would change nothing, or are not affordable (g,).
        output: The output factor of parameters that take no steps; None of others, whose was not exact.
    """

    theta: Parameters
    start: Tensor
    loss: Tensor
    ended: Tensor
    output: Tensor | None = None


class Searched(NamedTuple):
    """What became of the parameters of one rank.

    Attributes:
        start: The relative loss of each weight (g,) before the search.
        better: Whether what was found for it is better for sure (g,).
        found: What was found.
        either: Where the search started, and of both what is better for each weight; empty where all `found` is.
        ended: As of `Improved`.
    """

    start: Tensor
    better: Tensor
    found: Solution
    either: list[Solution]
    ended: Tensor


class Search:
    """Improves the parameters of all ranks of a stack of layers, in batches.

    Args:
        family: The decomposition.
        layer: One of the layers, which have the same shape.
        target: Their targets, stacked.
        steps: The most steps of each.
    """

    def __init__(self, family: Parametrised, layer: Layer, target: Target, steps: int) -> None:
        self.family, self.layer, self.target, self.steps = family, layer, target, steps
        self.is_large = target.weight.nbytes > KEPT_BYTES
        self.products: dict[torch.dtype, tuple[Target, Tensor]] = {}
        self.solvers: dict[Hashable, OutputSolver] = {}
        self.scales = (self._product(torch.float64)[1] * target.weight).sum((-2, -1))

    def __call__(self, starts: Sequence[tuple[Rank, Parameters]]) -> list[Searched]:
        """Improve θ of every rank.

        Args:
            starts: Each rank, and its θ.

        Returns:
            For every rank what the search found, with its output factor.
        """
        found: list[Searched] = []
        for (rank, theta), improved in zip(starts, self.improved(starts), strict=True):
            start = improved.start
            if improved.output is not None:
                unmoved = (theta, improved.output)
                nowhere = torch.zeros_like(start, dtype=torch.bool)
                found.append(Searched(start, nowhere, unmoved, [unmoved], improved.ended))
                continue
            loss, output = self.exact(rank, improved.theta)
            better = (improved.loss < CLEARLY * start) & (start > PENALISED) & self.family.searches_error(self.layer)
            either: list[Solution] = []
            if not better.all():
                before, first = self.exact(rank, theta)
                pairs = zip((*improved.theta, output), (*theta, first), strict=True)
                *best, other = (torch.where((loss < before).view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs)
                either = [(theta, first), (tuple(best), other)]
            found.append(Searched(start, better, (improved.theta, output), either, improved.ended))
        return found

    def improved(self, starts: Sequence[tuple[Rank, Parameters]]) -> list[Improved]:
        """Improve θ of every rank, with output factors that are not exact, in float32 if the losses allow it.

        Args:
            starts: Each rank, and its θ.
        """
        outputs, inputs = self.target.weight.shape[-2:]
        width = max(2 * outputs, 1 if self.target.diagonal else self.target.moment.shape[-2])  # products with W and S
        found: dict[int, Improved] = {}
        problems = []
        for i, (rank, theta) in enumerate(starts):
            rows = math.prod(self.family.blocks(self.layer, theta).diagonal.shape[1:3])
            steps = affordable_steps(self.steps, self.layer.groups * rows * inputs * width)
            if steps > 0:
                problems.append(_Problem(i, rank, theta, rows, steps))
            else:
                loss, output = self.exact(rank, theta)
                found[i] = Improved(theta, loss, loss, torch.ones(len(loss), dtype=torch.bool), output)
        for batch in self._batches(problems):
            found |= zip((problem.place for problem in batch), self._improved(batch), strict=True)
        return [found[i] for i in range(len(starts))]

    def whole(self, losses: Tensor, part: slice | None = None) -> float:
        """The relative loss of all weights together.

        Args:
            losses: The relative loss of each (g,).
            part: Only these weights.
        """
        scales = self.scales[part or slice(None)]
        return ((losses[part or slice(None)] * scales).sum() / scales.sum().clamp_min(1e-300)).item()

    def exact(self, rank: Rank, theta: Parameters) -> tuple[Tensor, Tensor]:
        """The relative loss of each weight and the output factor, with hardly any ridge.

        Args:
            rank: A rank.
            theta: Its parameters.
        """
        blocks = self.family.blocks(self.layer, theta)
        solver = self._solver(rank, blocks, RIDGE)
        ranks = None
        if (output_rank := self.family.output_rank(self.layer, rank)) is not None:
            ranks = torch.tensor([output_rank[1]], device=blocks.diagonal.device)
        losses, output = solver.losses(blocks.diagonal.unsqueeze(1), ranks)
        return losses[:, 0] / solver.scales.clamp_min(1e-300), output[:, 0]

    def _solver(self, rank: Rank, blocks: Blocks, ridge: float) -> OutputSolver:
        """A solver for a rank and blocks like these, in their precision."""
        output_rank = self.family.output_rank(self.layer, rank)
        t, z, dtype = output_rank and output_rank[0], blocks.diagonal.shape[1], blocks.diagonal.dtype
        if (key := (t, z, blocks.interleaved, dtype, ridge)) not in self.solvers:
            target, product = self._product(dtype)
            if self.is_large:
                self.solvers.clear()
            self.solvers[key] = OutputSolver(target, output_rank, ridge, z, blocks.interleaved, product)
        return self.solvers[key]

    def _product(self, dtype: torch.dtype) -> tuple[Target, Tensor]:
        """The target in a precision, and its W S."""
        if dtype not in self.products:
            if self.is_large:
                self.products.clear()
                self.solvers.clear()
            target = self.target.to(dtype)
            self.products[dtype] = target, target.times_moment(target.weight)
        return self.products[dtype]

    def _batches(self, problems: Sequence[_Problem]) -> Iterator[list[_Problem]]:
        """Problems that are fitted at once: as many as pay, of sizes as different as pays."""
        g, _, n = self.target.weight.shape
        most = free = GPU_BATCH
        if not self.target.weight.is_cuda:  # a layer's batches are the same in every stack
            g, most, free = self.layer.groups, CPU_BATCH, CPU_FREE
        keys = {p.place: repr(self.family.padding(self.layer, p.rank)) for p in problems}
        batch: list[_Problem] = []
        for problem in sorted(problems, key=lambda p: (keys[p.place], p.rows)):
            elements = (len(batch) + 1) * g * problem.rows * n
            pays = elements <= free or problem.rows <= CPU_RATIO * batch[0].rows if batch else True
            if batch and (keys[batch[0].place] != keys[problem.place] or elements > most or not pays):
                yield batch
                batch = []
            batch.append(problem)
        if batch:
            yield batch

    def _improved(self, batch: Sequence[_Problem]) -> Iterator[Improved]:
        """Improve the problems of a batch at once."""
        shapes = [[t.shape[1:] for t in problem.theta] for problem in batch]
        largest = [torch.Size(map(max, zip(*parts, strict=True))) for parts in zip(*shapes, strict=True)]
        flat = [torch.cat([padded(t, s).flatten(1) for t, s in zip(p.theta, largest, strict=True)], -1) for p in batch]
        point, steps = torch.stack(flat, 1), torch.tensor([p.steps for p in batch])
        most = steps.expand(len(point), -1)

        def objective(dtype: torch.dtype) -> Objective:
            like = self.family.blocks(self.layer, tuple(t.to(dtype) for t in batch[0].theta))
            solver = self._solver(batch[0].rank, like, SEARCH_RIDGE)
            return _Batch(self.family, self.layer, solver, self.target, largest, [p.rank for p in batch]).objective()

        found = minimize_in_both(objective, point, most)
        ended = found.ended | (steps < self.steps)
        columns = (found.points.unbind(1), found.start.unbind(1), found.losses.unbind(1), ended.unbind(1))
        for own_shapes, own, before, after, at_end in zip(shapes, *columns, strict=True):
            whole = [t.view(-1, *s) for t, s in zip(own.split([s.numel() for s in largest], -1), largest, strict=True)]
            cropped = (t[(slice(None), *map(slice, s))] for t, s in zip(whole, own_shapes, strict=True))
            yield Improved(tuple(t.contiguous() for t in cropped), before, after, at_end)


class _Batch:
    """Losses, gradients and preconditioners of several ranks of a stack of layers, in one precision.

    Args:
        family: The decomposition.
        layer: One of the layers.
        solver: Solves for their output factors.
        target: Their targets, stacked, in float64.
        shapes: The shape of each parameter (without g), filled up to that of the largest rank.
        ranks: The ranks, a column of points each.
    """

    def __init__(
        self,
        family: Parametrised,
        layer: Layer,
        solver: OutputSolver,
        target: Target,
        shapes: Sequence[torch.Size],
        ranks: Sequence[Rank],
    ) -> None:
        self.family, self.layer, self.solver, self.shapes = family, layer, solver, shapes
        self.sizes = [s.numel() for s in shapes]
        constraints = [family.output_rank(layer, r) for r in ranks]
        self.output_ranks = None if solver.output_rank is None else torch.tensor([c[1] for c in constraints if c])
        self.scales = solver.scales.where(solver.scales > 0, 1.0).unsqueeze(-1)  # where no input comes, no loss is left
        self.moments = family.mode_moments(layer, target)
        self.solved: tuple[Tensor, Tensor] | None = None  # the last points and their output factors

    def objective(self) -> Objective:
        """What `lbfgs.minimize` takes."""
        return Objective(self.evaluate, None if self.moments is None else self.preconditioner)

    def evaluate(self, points: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """As `lbfgs.Evaluate`."""
        flat = points.detach().requires_grad_()
        blocks = self.family.blocks(self.layer, self._theta(flat)).diagonal
        losses, gradient = self._solve(points, columns, blocks)
        gradient = gradient / self.scales[..., None, None, None].to(gradient.dtype)
        (found,) = torch.autograd.grad(blocks, flat, gradient.flatten(0, 1))
        return losses / self.scales, found

    def preconditioner(self, points: Tensor, columns: Tensor) -> _Kronecker:
        """Γ⁻¹ ⊗ M^−½ for each parameter, with Γ of `inverse_curvature`.

        B follows in part what changes in K, so that the full M⁻¹ would go too far.
        """
        theta = self._theta(points)
        if self.solved is None or not torch.equal(self.solved[0], points):  # these are not the last ones
            self._solve(points, columns, self.family.blocks(self.layer, theta).diagonal)
        assert self.solved is not None
        moments = [m.repeat_interleave(points.shape[1], 0) for m, _ in self._mode_moments]
        inverses = inverse_curvature(theta, self.solved[1].flatten(0, 1), moments)
        return _Kronecker(
            [i.unflatten(0, points.shape[:2]) for i in inverses], [root for _, root in self._mode_moments]
        )

    @cached_property
    def _mode_moments(self) -> list[tuple[Tensor, Tensor]]:
        """M and M^−½ of each parameter's mode, M with a mean of 1 on its diagonal."""
        like = self.solver.target.weight
        scaled = [m / m.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)[:, None, None] for m in self.moments or ()]
        return [(m.to(like), roots(m, LEAST_MODE)[1].to(like)) for m in scaled]

    def _theta(self, points: Tensor) -> Parameters:
        parts = points.flatten(0, 1).split(self.sizes, -1)
        return tuple(t.reshape(-1, *s) for t, s in zip(parts, self.shapes, strict=True))

    def _solve(self, points: Tensor, columns: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, and their gradients with respect to the blocks."""
        own = None if self.output_ranks is None else self.output_ranks[columns].to(points.device)
        losses, output, gradient = self.solver.solve(blocks.detach().unflatten(0, points.shape[:2]), own)
        self.solved = points, output
        return losses, gradient


class _Kronecker:
    """The preconditioner that is a Kronecker product for each parameter: a matrix of its rows and one of its columns.

    Args:
        left: For each parameter (g, p, r, r).
        right: For each parameter (g, size, size).
    """

    def __init__(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        self.left, self.right = left, right
        self.sizes = [i.shape[-1] * m.shape[-1] for i, m in zip(left, right, strict=True)]

    def __call__(self, vectors: Tensor) -> Tensor:
        """As of `lbfgs.Preconditioner`."""
        found = []
        for part, left, right in zip(vectors.split(self.sizes, -1), self.left, self.right, strict=True):
            rows = part.unflatten(-1, (left.shape[-1], right.shape[-1]))  # (g, p, h, r, size)
            turned = (rows.flatten(2, 3) @ right.unsqueeze(1)).view(rows.shape)
            found.append((left.unsqueeze(2) @ turned).flatten(3))
        return torch.cat(found, -1)

    def keep(self, index: Tensor) -> _Kronecker:
        """As of `lbfgs.Preconditioner`."""
        return _Kronecker([t[:, index] for t in self.left], self.right)


def minimize_in_both(objective: Callable[[torch.dtype], Objective], start: Tensor, steps: Tensor) -> Minimum:
    """Search in float32, and on in float64 where the loss is too small for it.

    Args:
        objective: Makes losses, gradients and preconditioners in a precision.
        start: Initial points (g, p, N), float64.
        steps: The most rounds of each problem, integers (g, p) on the CPU, not all 0.

    Returns:
        The points found, float64, with their losses and those of the start, and which searches came to their own end.
    """
    first = minimize(objective(torch.float32), start.float(), steps, TOLERANCE, FLOAT32_LOSS)
    left = torch.where((first.losses <= FLOAT32_LOSS).cpu(), steps - first.rounds, 0)
    if not left.any():
        return first._replace(points=first.points.double())
    further = minimize(objective(torch.float64), first.points.double(), left, TOLERANCE, NEGLIGIBLE)
    moved, on = left > 0, (left > 0).to(start.device)
    return Minimum(
        further.points,
        torch.where(on, further.losses, first.losses),
        first.start,
        first.rounds + further.rounds,
        torch.where(moved, further.ended, first.ended),
    )


def inverse_curvature(theta: Parameters, output: Tensor, moments: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of the loss's curvature between the components of each parameter, where K(θ) = `khatri_rao` of them.

    For fixed B, if S is the Kronecker product of the modes' moments M_j, the Hessian with respect to a parameter X_i
    is 2 Γ_i ⊗ M_i with Γ_i = (Bᵀ B) ∘ Π_{j ≠ i} (X_j M_j X_jᵀ): alternating least squares solves for X_i with it.

    Args:
        theta: Parameters (g, r, size).
        output: Output factor B (g, T, r).
        moments: M_i (g, size, size).

    Returns:
        Γ_i⁻¹ of each parameter, (g, r, r), with `DAMPING`.
    """
    grams = [x @ m @ x.mT for x, m in zip(theta, moments, strict=True)]
    found = []
    for i in range(len(theta)):
        curvature = reduce(torch.mul, [*grams[:i], *grams[i + 1 :]], output.mT @ output).double()
        diagonal = curvature.diagonal(dim1=-2, dim2=-1)
        # Rows of padding, and those of no effect, have no curvature; nor has anything where no input comes
        peak = diagonal.amax(-1, keepdim=True)
        floor = torch.where(peak > 1e-30, 1e-8 * peak, 1.0)
        damped = curvature + torch.diag_embed(DAMPING * diagonal + floor)
        found.append(torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0]).to(output.dtype))
    return found


def affordable_steps(steps: int, products: int) -> int:
    """Limit the steps of a fit so that it stays below MAX_FLOPS.

    Args:
        steps: The steps asked for.
        products: Multiply-accumulates of one step.
    """
    return min(steps, int(MAX_FLOPS / (2 * products)))
