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
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property, reduce, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.lbfgs import Minimum, Objective, Precondition, minimize
from rankopt.decompositions.types import Factors, Fit, Target, is_sketch
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

Result = TypeVar("Result")

Parameters = tuple[Tensor, ...]
"""The searched parameters θ, float64 tensors (g, ...)."""

Solution = tuple[Parameters, Tensor]
"""θ and its output factor B (g, T, m)."""


class Blocks(NamedTuple):
    """A block-diagonal K, the rows of one block after those of the other. Products with it skip the zeros.

    Attributes:
        diagonal: The blocks (g, z, r, n / z): each holds r of the m = z r rows, over a z-th of the inputs.
        interleaved: Whether block i has the inputs i, i + z, i + 2 z, ...: K = A ⊗ I. Otherwise they follow each other.
    """

    diagonal: Tensor
    interleaved: bool = False

    def dense(self) -> Tensor:
        """K (g, m, n)."""
        z = self.diagonal.shape[1]
        eye = torch.eye(z, dtype=self.diagonal.dtype, device=self.diagonal.device)
        order = "gzrny" if self.interleaved else "gzryn"
        return torch.einsum(f"gzrn,zy->{order}", self.diagonal, eye).flatten(3).flatten(1, 2)


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

    def blocks(self, layer: Layer, theta: Parameters) -> Blocks:
        """The same K(θ) as blocks along its diagonal, differentiable.

        Args:
            layer: Layer to decompose.
            theta: Parameters in the shapes of `start`.

        Returns:
            The blocks. Default: all rows as one block.
        """
        return Blocks(self.rows(layer, theta).unsqueeze(1))

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

    def mode_moments(self, layer: Layer, target: Target) -> Parameters | None:
        """The input moment of each parameter's mode, for families whose K(θ) is `khatri_rao` of their parameters.

        With them the search has a preconditioner, and takes about half of the steps for the same error.

        Args:
            layer: Layer to decompose.
            target: What is fitted.

        Returns:
            For each parameter (g, r, size) a moment (g, size, size), whose Kronecker product is about S up to a factor.
            Default: None, and the search has no preconditioner.
        """
        return None

    def searches_error(self, layer: Layer) -> bool:
        """Whether the search minimises the error of the factors that it gives, and not an approximation of it.

        Args:
            layer: Layer to decompose.
        """
        return True

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        """Which ranks of a layer may be fitted in one batch.

        Parameters of the smaller ranks are then filled up with zeros, in every dimension. A family may allow it if rows
        of K(θ) that belong to zeros are zero, and zeros get no gradient: if every index of size rank is a dimension of
        its own, as in products of factors.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.

        Returns:
            Ranks of equal values may share a batch. Default: only a rank with itself.
        """
        return rank

    def fit(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> Iterator[Fit]:
        (fits,) = self._fit_stack([layer], [weight], ranks, [moment], [metric], steps)
        yield from fits

    def errors(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> list[Fit]:
        if type(self).fit is not OutputSolved.fit:
            return super().errors(layer, weight, ranks, moment, metric, steps)
        (fits,) = self.errors_stack([layer], [weight], ranks, [moment], [metric], steps)
        return fits

    def errors_stack(
        self,
        layers: Sequence[Layer],
        weights: Sequence[Tensor],
        ranks: Sequence[Rank],
        moments: Sequence[Tensor | None],
        metrics: Sequence[Tensor | None],
        steps: int = 100,
    ) -> list[list[Fit]]:
        if type(self).fit is not OutputSolved.fit:  # a subclass fits in its own way
            return super().errors_stack(layers, weights, ranks, moments, metrics, steps)
        given = list(zip(layers, weights, moments, metrics, strict=True))
        targets, undo = zip(*(self.target(*one) for one in given), strict=True)
        search = _Search(self, layers[0], stacked(targets), math.ceil(steps * self.effort))
        improved = search.improved([(r, self.start(layers[0], search.target, r)) for r in ranks])
        found, g = list(zip(ranks, improved, strict=True)), layers[0].groups
        parts = [slice(i * g, (i + 1) * g) for i in range(len(layers))]
        fits = [
            [Fit(r, (), search.whole(x.loss, p), search.whole(x.start, p), x.ended) for r, x in found] for p in parts
        ]
        if self.searches_error(layers[0]):
            return fits
        outputs = [search.exact(rank, x.theta)[1] for rank, x in found]
        for i, (own, part) in enumerate(zip(given, parts, strict=True)):
            stored = StoredError(self, *own)
            for j, ((rank, x), y) in enumerate(zip(found, outputs, strict=True)):
                fit, theta = fits[i][j], tuple(t[part] for t in x.theta)
                error = stored(self.factors(own[0], theta, undo[i] @ y[part], rank), rank).error
                fits[i][j] = fit._replace(error=error, start=error * (fit.start or 0.0) / max(fit.error, 1e-300))
        return fits

    def fit_stack(
        self,
        layers: Sequence[Layer],
        weights: Sequence[Tensor],
        ranks: Sequence[Rank],
        moments: Sequence[Tensor | None],
        metrics: Sequence[Tensor | None],
        steps: int = 100,
    ) -> list[list[Fit]]:
        if type(self).fit is not OutputSolved.fit:  # a subclass fits in its own way
            return super().fit_stack(layers, weights, ranks, moments, metrics, steps)
        return self._fit_stack(layers, weights, ranks, moments, metrics, steps)

    def _fit_stack(
        self,
        layers: Sequence[Layer],
        weights: Sequence[Tensor],
        ranks: Sequence[Rank],
        moments: Sequence[Tensor | None],
        metrics: Sequence[Tensor | None],
        steps: int,
    ) -> list[list[Fit]]:
        layer, g = layers[0], layers[0].groups
        given = list(zip(layers, weights, moments, metrics, strict=True))
        targets, undo = zip(*(self.target(*one) for one in given), strict=True)
        search = _Search(self, layer, stacked(targets), math.ceil(steps * self.effort))
        found = search([(r, self.start(layer, search.target, r)) for r in ranks])
        fits: list[list[Fit]] = [[] for _ in layers]
        for i, (own, weight, moment, metric) in enumerate(given):
            part, error = slice(i * g, (i + 1) * g), StoredError(self, own, weight, moment, metric)
            for rank, (before, solutions, ended) in zip(ranks, found, strict=True):
                factors = (self.factors(own, tuple(t[part] for t in x), undo[i] @ y[part], rank) for x, y in solutions)
                start, *better = (error(f, rank) for f in factors)
                started = start.error if before is None else search.whole(before, part)
                best = min([start, *better], key=lambda fit: fit.error)
                fits[i].append(best._replace(start=started, ended=ended))
        return fits


class OutputSolver:
    """Solves min_B ‖W − B K‖² for given rows K.

    Products with K are taken in the target's precision, and the small systems of equations solved in float64.

    Args:
        target: W and the norm, with the output metric absorbed.
        output_rank: As `OutputSolved.output_rank` returns it.
        ridge: Ridge relative to each row's norm.
        z: How many blocks K has.
        interleaved: How their inputs are arranged; see `Blocks`.
        weight_moment: W S, where it is known.
    """

    def __init__(
        self,
        target: Target,
        output_rank: tuple[int, int] | None,
        ridge: float = RIDGE,
        z: int = 1,
        interleaved: bool = False,
        weight_moment: Tensor | None = None,
    ) -> None:
        self.ridge, self.output_rank = ridge, output_rank
        if weight_moment is None:
            weight_moment = target.times_moment(target.weight)
        if interleaved:
            order = torch.arange(target.weight.shape[-1], device=target.weight.device).view(-1, z).T.flatten()
            target, weight_moment = target.inputs(order), weight_moment[..., order]
        self.target = target
        self.scales = (weight_moment.double() * target.weight).sum((-2, -1))
        self.scale = self.scales.sum().item()
        self.weight, self.weight_moment = (  # (g, z, T, n / z)
            w.unflatten(-1, (z, -1)).transpose(1, 2).contiguous() for w in (target.weight, weight_moment)
        )

    def __call__(self, rows: Tensor) -> tuple[float, Tensor, Tensor]:
        """Solve for the output factor.

        Args:
            rows: K (g, m, n), of a single block.

        Returns:
            The loss relative to ‖W‖², B (g, T, m), and the gradient of the loss with respect to K (g, m, n).
        """
        r = None if self.output_rank is None else torch.tensor([self.output_rank[1]], device=rows.device)
        losses, output, gradient = self.solve(rows[:, None, None], r)
        scale = self.scale or 1.0
        return losses.sum().item() / scale, output[:, 0], gradient[:, 0, 0] / scale

    def solve(self, blocks: Tensor, output_ranks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for the output factors of several K for each weight.

        Args:
            blocks: K as blocks (g, p, z, r, n / z).
            output_ranks: In place of the rank of `output_rank`, one for each p.

        Returns:
            The losses (g, p) in float64, B (g, p, T, m), and the gradients of the losses with respect to the blocks.
        """
        z, r = blocks.shape[2:4]
        moment, gram, cross = self._normal_equations(blocks)
        exact, ridge = self._solution(gram, cross, output_ranks)
        output = exact.to(blocks.dtype)
        own = output.unflatten(-1, (z, r)).movedim(-2, 2)  # (g, p, z, T, r)
        product = output @ moment.transpose(2, 3).flatten(3)  # not block by block: that would copy B for each of them
        rest_moment = self.weight_moment.unsqueeze(1) - product.unflatten(-1, (z, -1)).transpose(2, 3)
        # As a square, and not as a difference of squares, the loss keeps its digits in float32
        rest = self.weight.unsqueeze(1) - own @ blocks
        losses = (rest * rest_moment).sum((-3, -2, -1), dtype=torch.float64)
        losses = losses + (ridge * exact.square().sum(-2)).sum(-1)
        strength = ridge / gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300) * exact.square().sum(-2)
        inside = moment.unflatten(3, (z, r)).diagonal(dim1=2, dim2=3).movedim(-1, 2)
        gradient = strength.to(blocks.dtype).view(*blocks.shape[:4], 1) * inside - own.mT @ rest_moment
        return losses, output, 2 * gradient

    def losses(self, blocks: Tensor, output_ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `solve` in float64, without the ridge's penalty and gradients, in less than half of the time.

        Args:
            blocks: K as blocks (g, p, z, r, n / z), float64.
            output_ranks: As of `solve`.

        Returns:
            The losses (g, p) and B (g, p, T, m).
        """
        _, gram, cross = self._normal_equations(blocks)
        output, _ = self._solution(gram, cross, output_ranks)
        explained = (output * (2 * cross.mT - output @ gram)).sum((-2, -1))
        return (self.scales.unsqueeze(-1) - explained).clamp_min(0), output

    def _normal_equations(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K S by the block of its inputs (g, p, z, m, n / z), and in float64 K S Kᵀ (g, p, m, m) and
        K S Wᵀ (g, p, m, T)."""
        together = blocks.transpose(1, 2).flatten(2, 3)  # (g, z, p r, n / z)
        moment = self._times_moment(together, blocks.shape)
        gram = (moment @ blocks.mT).transpose(2, 3).flatten(3).double()
        cross = (together @ self.weight_moment.mT).unflatten(2, (-1, blocks.shape[3])).transpose(1, 2).flatten(2, 3)
        return moment, gram, cross.double()

    def _solution(self, gram: Tensor, cross: Tensor, output_ranks: Tensor | None) -> tuple[Tensor, Tensor]:
        """B (g, p, T, m), and what the ridge added to the diagonal."""
        exact, ridge = _solve(gram, cross, self.ridge)
        if self.output_rank and output_ranks is not None:
            exact = self._project(exact, cross, self.output_rank[0], output_ranks)
        return exact, ridge

    def _times_moment(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """K S by the block of its inputs, (g, p, z, m, n / z), of blocks (g, z, p r, n / z) of this shape."""
        g, p, z, r, n = shape
        s = self.target.moment
        if z == 1:
            return self.target.times_moment(blocks[:, 0]).view(g, p, 1, r, n)
        if self.target.plain or self.target.diagonal or is_sketch(s):
            product = self.target.times_moment(Blocks(blocks).dense())
        else:
            product = blocks @ s.view(g, z, n, z * n)
        return product.view(g, z, p, r, z, n).permute(0, 2, 4, 1, 3, 5).reshape(g, p, z, z * r, n)

    def _project(self, output: Tensor, cross: Tensor, t: int, ranks: Tensor) -> Tensor:
        """B projected onto the leading eigenvectors of B K S Wᵀ over t."""
        g, p, total, m = output.shape
        split = output.view(g, p, total // t, t, m)
        explained = (split @ cross.mT.reshape(g, p, total // t, t, m).mT).sum(2)
        basis = torch.linalg.eigh((explained + explained.mT) / 2)[1]
        led = torch.arange(t, 0, -1, device=ranks.device) <= ranks.unsqueeze(-1)  # eigenvalues ascend
        basis = (basis * led.unsqueeze(-2)).unsqueeze(2)
        return (basis @ (basis.mT @ split)).view(output.shape)


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """B = crossᵀ (gram + ridge · diag(gram))⁻¹; where this is not solvable, the ridge is multiplied by 100 until it is.

    Returns B and what was added to the diagonal, (..., m).
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-30 + 1e-14 * diagonal.amax(-1, keepdim=True)
    ridges = torch.full_like(floor, ridge)
    while True:
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridges * diagonal + floor))
        failed = (info > 0).unsqueeze(-1)
        if not failed.any() or ridges.max() > 1:
            half = torch.linalg.solve_triangular(factor, cross, upper=False)
            return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT, ridges * diagonal
        ridges = torch.where(failed, 100 * ridges, ridges)


# --- the search in batches ------------------------------------------------------------------------


class _Problem(NamedTuple):
    """A rank of all layers of a stack: where its search starts."""

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
        ended: Whether more steps would change nothing, or are not affordable.
        output: The output factor of parameters that take no steps; None of others, whose was not exact.
    """

    theta: Parameters
    start: Tensor
    loss: Tensor
    ended: bool
    output: Tensor | None = None


class Searched(NamedTuple):
    """What became of the parameters of one rank.

    Attributes:
        start: The relative loss of each weight (g,) before the search; None where the first solution tells.
        solutions: What was found. Where that may be worse than where the search started, that comes first.
        ended: As of `Improved`.
    """

    start: Tensor | None
    solutions: list[Solution]
    ended: bool


class _Search:
    """Improves the parameters of all ranks of a stack of layers, in batches.

    Args:
        family: The decomposition.
        layer: One of the layers, which have the same shape.
        target: Their targets, stacked.
        steps: The most steps of each.
    """

    def __init__(self, family: OutputSolved, layer: Layer, target: Target, steps: int) -> None:
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
            if improved.output is not None:
                found.append(Searched(None, [(theta, improved.output)], improved.ended))
                continue
            loss, output = self.exact(rank, improved.theta)
            better = (improved.loss < CLEARLY * improved.start) & (improved.start > PENALISED)
            if self.family.searches_error(self.layer) and better.all():
                found.append(Searched(improved.start, [(improved.theta, output)], improved.ended))
                continue
            before, first = self.exact(rank, theta)
            pairs = zip((*improved.theta, output), (*theta, first), strict=True)
            *best, output = (torch.where((loss < before).view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs)
            found.append(Searched(None, [(theta, first), (tuple(best), output)], improved.ended))
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
                found[i] = Improved(theta, loss, loss, ended=True, output=output)
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
        most, free = (GPU_BATCH, GPU_BATCH) if self.target.weight.is_cuda else (CPU_BATCH, CPU_FREE)
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
        flat = [torch.cat([_padded(t, s).flatten(1) for t, s in zip(p.theta, largest, strict=True)], -1) for p in batch]
        point, steps = torch.stack(flat, 1), torch.tensor([p.steps for p in batch])

        def objective(dtype: torch.dtype) -> Objective:
            like = self.family.blocks(self.layer, tuple(t.to(dtype) for t in batch[0].theta))
            solver = self._solver(batch[0].rank, like, SEARCH_RIDGE)
            return _Batch(self.family, self.layer, solver, self.target, largest, [p.rank for p in batch]).objective()

        found = minimize_in_both(objective, point, steps)
        ended = found.ended | (steps < self.steps)
        columns = (found.points.unbind(1), found.start.unbind(1), found.losses.unbind(1), ended.tolist())
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
        family: OutputSolved,
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

    def preconditioner(self, points: Tensor, columns: Tensor) -> Precondition:
        """Γ⁻¹ ⊗ M^−½ for each parameter, with Γ of `inverse_curvature`.

        B follows in part what changes in K, so that the full M⁻¹ would go too far.
        """
        theta = self._theta(points)
        if self.solved is None or not torch.equal(self.solved[0], points):  # these are not the last ones
            self._solve(points, columns, self.family.blocks(self.layer, theta).diagonal)
        assert self.solved is not None
        own = [tuple(t.repeat_interleave(points.shape[1], 0) for t in pair) for pair in self._mode_moments]
        inverses = inverse_curvature(theta, self.solved[1].flatten(0, 1), [m for m, _ in own])

        def precondition(vectors: Tensor) -> Tensor:
            parts = vectors.flatten(0, 1).split(self.sizes, -1)
            given = zip(parts, self.shapes, inverses, own, strict=True)
            turned = [i.unsqueeze(1) @ v.unflatten(-1, s) @ root.unsqueeze(1) for v, s, i, (_, root) in given]
            return torch.cat([t.flatten(2) for t in turned], -1).view(vectors.shape)

        return precondition

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


def _padded(theta: Tensor, shape: torch.Size) -> Tensor:
    """Filled up with zeros to (g, *shape)."""
    missing = [(0, size - have) for size, have in zip(shape, theta.shape[1:], strict=True)]
    return torch.nn.functional.pad(theta, [n for pair in reversed(missing) for n in pair])


# --- the search -----------------------------------------------------------------------------------


def minimize_in_both(objective: Callable[[torch.dtype], Objective], start: Tensor, steps: Tensor) -> Minimum:
    """Search in float32, and on in float64 where the loss is too small for it.

    Args:
        objective: Makes losses, gradients and preconditioners in a precision.
        start: Initial points (g, p, N), float64.
        steps: The most rounds of each column, integers (p,) on the CPU, not all 0.

    Returns:
        The points found, float64, with their losses and those of the start, and which searches came to their own end.
    """
    point, losses, ended = start, [], torch.zeros_like(steps, dtype=torch.bool)
    for dtype, floor in ((torch.float32, FLOAT32_LOSS), (torch.float64, NEGLIGIBLE)):
        found = minimize(objective(dtype), point.to(dtype), steps, TOLERANCE, floor)
        point = found.points.double()
        losses.append(found.start)
        going_on = torch.where((found.losses <= floor).any(0).cpu(), steps - found.rounds, 0)
        ended |= found.ended & (steps > 0) & (going_on == 0)
        steps = going_on
        if not steps.any():
            break
    return found._replace(points=point, start=losses[0], ended=ended)


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
        # Rows of padding, and those of no effect, have no curvature
        floor = (1e-8 * diagonal.amax(-1, keepdim=True)).clamp_min(1e-300)
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


def stacked(targets: Sequence[Target]) -> Target:
    """The targets of layers of the same shape as one, along the groups.

    Args:
        targets: Their targets.
    """
    if len(targets) == 1:
        return targets[0]
    first = targets[0]
    return first._replace(
        weight=torch.cat([t.weight for t in targets]),
        moment=torch.cat([t.moment for t in targets]),
        metric=torch.cat([t.metric for t in targets]),
        outer=None if first.outer is None else torch.cat([t.outer for t in targets if t.outer is not None]),
    )


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
    half, undo = _roots_once(target.metric)
    identity = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device).expand_as(half)
    return target._replace(weight=half @ target.weight, metric=identity), undo


_of_metric = WeakTensorKeyDictionary()


def _roots_once(metric: Tensor) -> tuple[Tensor, Tensor]:
    """`roots`, kept as long as the metric is: on a GPU all families of a layer are fitted with the same tensor."""
    if metric not in _of_metric:
        _of_metric[metric] = roots(metric)
    found: tuple[Tensor, Tensor] = _of_metric[metric]
    return found


def roots(metric: Tensor, least: float = 1e-4) -> tuple[Tensor, Tensor]:
    """H^½ and its inverse, (g, t, t) each.

    Small eigenvalues are raised, so that the inverse exists and full rank stays exact.

    Args:
        metric: H (g, t, t), symmetric positive semidefinite.
        least: The least eigenvalue, as a share of the largest.
    """
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(least * values.amax(-1, keepdim=True).clamp_min(1e-30)).sqrt().unsqueeze(-2)
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


class StoredError:
    """Rounds factors of a layer to the weight's dtype and measures the error of the rounded ones.

    Args:
        family: The decomposition.
        layer: The decomposed layer.
        weight: The module's weight, in its own shape.
        moment: S or None.
        metric: H or None.
    """

    def __init__(
        self, family: Decomposition, layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None
    ) -> None:
        self.family, self.layer, self.dtype = family, layer, weight.dtype
        self.target = full_target(layer, weight, moment, metric)
        self.norm = self.target.norm

    def __call__(self, factors: Factors, rank: Rank) -> Fit:
        """The fit of some factors.

        Args:
            factors: The fitted factors, float64.
            rank: Their rank.
        """
        stored = tuple(f.to(self.dtype).contiguous() for f in factors)
        rebuilt = self.family.weight(self.layer, tuple(f.double() for f in stored))
        return Fit(rank, stored, self.target.error(rebuilt.reshape(self.target.weight.shape), self.norm))


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
    return StoredError(family, layer, weight, moment, metric)(factors, rank)


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


def cut(left: Tensor, right: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Factors:
    """The balanced factors of one rank (`types.Nested`).

    Args:
        left: Tensor (g, T, R).
        right: Tensor (g, R, n).
        shapes: The shapes of the two factors, input first: (g r, ...) and (T, r, ...).
        dtype: Their precision.
    """
    rank = shapes[1][1]
    second, first = balanced(left[..., :rank], right[..., :rank, :])
    return tuple(f.reshape(*s).to(dtype).contiguous() for f, s in zip((first, second), shapes, strict=True))


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
    mean = reduce(torch.mul, norms) ** (1 / len(vectors))
    return [v * (mean / n.clamp_min(1e-300)) for v, n in zip(vectors, norms, strict=True)]


_of_target = WeakTensorKeyDictionary()


def once_per_target(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator: what a function of a layer, its target and other arguments returns is kept as long as the target is.

    Starts of all ranks are truncations of one decomposition, which is taken once.

    Args:
        compute: The function. It returns new tensors: one that refers to the target's would keep it for ever.
    """

    @wraps(compute)
    def known(layer: Layer, target: Target, *others: Any) -> Result:
        of_target: dict[Any, Result] = _of_target.setdefault(target.weight, {})
        if (key := (compute, layer.shape, others)) not in of_target:
            of_target[key] = compute(layer, target, *others)
        return of_target[key]

    return known


def leading_rows(matrix: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of a matrix as rows of unit norm, (g, rank, b).

    Args:
        matrix: Tensor (g, a, b).
        rank: Number of rows; beyond min(a, b) they are unit vectors.
    """
    return first_rows(singular_rows(matrix), rank)


def singular_rows(matrix: Tensor) -> Tensor:
    """The right singular vectors of a matrix as rows, the leading ones first, scaled by their singular values.

    Args:
        matrix: Tensor (g, a, b).

    Returns:
        Tensor (g, min(a, b), b).
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        return torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1).mT @ matrix
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).flip(-1).mT.contiguous()


def first_rows(rows: Tensor, rank: int) -> Tensor:
    """The first of some rows, scaled to unit norm, (g, rank, b).

    Args:
        rows: Tensor (g, m, b).
        rank: Number of rows; beyond m they are unit vectors.
    """
    rows = rows[:, :rank]
    if rows.shape[-2] < rank:
        extra = torch.eye(rank, rows.shape[-1], dtype=rows.dtype, device=rows.device)
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
