"""Fits by variable projection (Golub and Pereyra 1973).

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
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.linear_algebra import padded
from rankopt.decompositions.output_solver import Blocks
from rankopt.decompositions.parameter_search import Improved, Search, Searched, Solution
from rankopt.decompositions.targets import StoredError, absorb_metric, stacked
from rankopt.decompositions.types import Factors, Fit, Original, Parameters, Target


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

    def filled(self, layer: Layer, rank: Rank) -> Rank:
        """The rank up to which parameters are filled with zeros, for families whose components share nothing.

        Layers of the same shape, each with a rank of its own, are one stack if they are filled up to the same rank. It
        is for ranks (R,) that are the first dimension of each parameter and the number of rows of K(θ).

        Args:
            layer: Layer to decompose.
            rank: A valid rank.

        Returns:
            Default: the rank, which is not filled up.
        """
        return rank

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
        (fits,) = self._fit_stack([Original(layer, weight, moment, metric)], [ranks], steps)
        yield from fits

    @property
    def _fits_in_its_own_way(self) -> bool:
        """Whether a subclass overrides `fit`, and knows nothing of stacks."""
        return type(self).fit is not OutputSolved.fit

    @property
    def stacks_ranks(self) -> bool:
        return type(self).filled is not OutputSolved.filled

    def alike(self, layer: Layer, ranks: Sequence[Rank]) -> Hashable | None:
        if self.closed_form or self._fits_in_its_own_way:
            return None
        return tuple(self.filled(layer, rank) for rank in ranks)

    def fit_stack(
        self, originals: Sequence[Original], ranks: Sequence[Sequence[Rank]], steps: int = 100
    ) -> list[list[Fit]]:
        if self._fits_in_its_own_way:
            return super().fit_stack(originals, ranks, steps)
        return self._fit_stack(originals, ranks, steps)

    def errors(
        self, originals: Sequence[Original], ranks: Sequence[Sequence[Rank]], steps: int = 100
    ) -> list[list[Fit]]:
        if self._fits_in_its_own_way:
            return super().errors(originals, ranks, steps)
        stack = _Stack(self, originals, ranks, steps)
        columns = stack.search.improved(stack.starts())
        if self.searches_error(originals[0].layer):
            return [[stack.estimate(i, j, x) for j, x in enumerate(columns)] for i in range(len(originals))]
        outputs = [stack.search.exact(own[0], x.theta)[1] for own, x in zip(stack.columns, columns, strict=True)]
        fits = []
        for i, own in enumerate(originals):
            error, found = StoredError(self, *own), [stack.estimate(i, j, x) for j, x in enumerate(columns)]
            made = [error(stack.factors(i, j, (x.theta, outputs[j])), ranks[i][j]).error for j, x in enumerate(columns)]
            fits.append(list(map(_with_error, found, made)))
        return fits

    def _fit_stack(self, originals: Sequence[Original], ranks: Sequence[Sequence[Rank]], steps: int) -> list[list[Fit]]:
        stack = _Stack(self, originals, ranks, steps)
        columns, fits = stack.search(stack.starts()), []
        for i, own in enumerate(originals):
            error = StoredError(self, *own)
            fits.append([stack.fit(i, j, x, error) for j, x in enumerate(columns)])
        return fits


def _with_error(fit: Fit, error: float) -> Fit:
    """A fit whose search minimised something else than its error, which is supposed to have fallen as much."""
    return fit._replace(error=error, start=error * (fit.start or 0.0) / max(fit.error, 1e-300))


class _Stack:
    """Layers of the same shape whose parameters are searched at once, along the groups.

    Args:
        family: Their decomposition.
        originals: The layers.
        ranks: The ranks of each.
        steps: Steps of the search, before the family's own factor.

    Attributes:
        search: The search.
        columns: The first rank of all layers, the second of all, and so on.
        parts: Where the groups of each layer are.
    """

    def __init__(
        self, family: OutputSolved, originals: Sequence[Original], ranks: Sequence[Sequence[Rank]], steps: int
    ) -> None:
        self.family, self.layer, self.originals = family, originals[0].layer, originals
        self.columns = list(zip(*ranks, strict=True))
        targets, self.undo = zip(*(family.target(*one) for one in originals), strict=True)
        self.search = Search(family, self.layer, stacked(targets), math.ceil(steps * family.effort))
        g = self.layer.groups
        self.parts = [slice(i * g, (i + 1) * g) for i in range(len(originals))]

    def starts(self) -> list[tuple[Rank, Parameters]]:
        """Of each column of ranks the first, and the parameters of all layers."""
        return [(column[0], self._start(column)) for column in self.columns]

    def _start(self, ranks: Sequence[Rank]) -> Parameters:
        of_rank = {rank: self.family.start(self.layer, self.search.target, rank) for rank in dict.fromkeys(ranks)}
        (size, *_) = self.family.filled(self.layer, ranks[0])
        if all(self.family.filled(self.layer, rank) == rank for rank in of_rank):
            return of_rank[ranks[0]]
        filled = {rank: [padded(t, (size, *t.shape[2:])) for t in theta] for rank, theta in of_rank.items()}
        own = ([t[part] for t in filled[rank]] for rank, part in zip(ranks, self.parts, strict=True))
        return tuple(torch.cat(parts) for parts in zip(*own, strict=True))

    def fit(self, number: int, column: int, found: Searched, error: StoredError) -> Fit:
        """The fit of a layer.

        Args:
            number: The layer's number.
            column: The number of its rank.
            found: What the search found for that rank of all layers.
            error: Stores factors of the layer.
        """
        part, rank = self.parts[number], self.columns[column][number]
        sure = not found.either or bool(found.better[part].all())
        solutions = [found.found] if sure else found.either
        made = [error(self.factors(number, column, solution), rank) for solution in solutions]
        started = self.search.whole(found.start, part) if sure else made[0].error
        best = min(made, key=lambda fit: fit.error)
        return best._replace(start=started, ended=bool(found.ended[part].all()))

    def estimate(self, number: int, column: int, found: Improved) -> Fit:
        """A fit of a layer without factors, with the relative loss of its parameters as its error.

        Args:
            number: The layer's number.
            column: The number of its rank.
            found: What the search made of that rank of all layers.
        """
        part = self.parts[number]
        loss, start = (self.search.whole(losses, part) for losses in (found.loss, found.start))
        return Fit(self.columns[column][number], (), loss, start, bool(found.ended[part].all()))

    def factors(self, number: int, column: int, solution: Solution) -> Factors:
        """The factors of a layer.

        Args:
            number: The layer's number.
            column: The number of its rank.
            solution: The parameters and output factors of all layers.
        """
        part, rank, (theta, output) = self.parts[number], self.columns[column][number], solution
        theta, output = tuple(t[part] for t in theta), output[part]
        if self.family.filled(self.layer, rank) != rank:
            theta, output = tuple(t[:, : rank[0]] for t in theta), output[..., : rank[0]]
        return self.family.factors(self.originals[number].layer, theta, self.undo[number] @ output, rank)
