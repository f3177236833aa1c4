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

from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.output_solver import Blocks
from rankopt.decompositions.parameter_search import Search
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
        (fits,) = self._fit_stack([Original(layer, weight, moment, metric)], ranks, steps)
        yield from fits

    def fit_stack(self, originals: Sequence[Original], ranks: Sequence[Rank], steps: int = 100) -> list[list[Fit]]:
        if type(self).fit is not OutputSolved.fit:  # a subclass fits in its own way
            return super().fit_stack(originals, ranks, steps)
        return self._fit_stack(originals, ranks, steps)

    def errors(self, originals: Sequence[Original], ranks: Sequence[Rank], steps: int = 100) -> list[list[Fit]]:
        if type(self).fit is not OutputSolved.fit:  # a subclass fits in its own way
            return super().errors(originals, ranks, steps)
        search, undo = self._search(originals, steps)
        starts = [(rank, self.start(originals[0].layer, search.target, rank)) for rank in ranks]
        found, parts = list(zip(ranks, search.improved(starts), strict=True)), _parts(originals)
        fits = [
            [Fit(r, (), search.whole(x.loss, p), search.whole(x.start, p), x.ended) for r, x in found] for p in parts
        ]
        if self.searches_error(originals[0].layer):
            return fits
        outputs = [search.exact(rank, x.theta)[1] for rank, x in found]
        for i, (own, part) in enumerate(zip(originals, parts, strict=True)):
            stored = StoredError(self, *own)
            for j, ((rank, x), y) in enumerate(zip(found, outputs, strict=True)):
                fit, theta = fits[i][j], tuple(t[part] for t in x.theta)
                error = stored(self.factors(own.layer, theta, undo[i] @ y[part], rank), rank).error
                fits[i][j] = fit._replace(error=error, start=error * (fit.start or 0.0) / max(fit.error, 1e-300))
        return fits

    def _fit_stack(self, originals: Sequence[Original], ranks: Sequence[Rank], steps: int) -> list[list[Fit]]:
        search, undo = self._search(originals, steps)
        found = search([(rank, self.start(originals[0].layer, search.target, rank)) for rank in ranks])
        fits: list[list[Fit]] = [[] for _ in originals]
        for i, (own, part) in enumerate(zip(originals, _parts(originals), strict=True)):
            error = StoredError(self, *own)
            for rank, (before, solutions, ended) in zip(ranks, found, strict=True):
                ours = ((tuple(t[part] for t in x), undo[i] @ y[part]) for x, y in solutions)
                start, *better = (error(self.factors(own.layer, x, y, rank), rank) for x, y in ours)
                started = start.error if before is None else search.whole(before, part)
                best = min([start, *better], key=lambda fit: fit.error)
                fits[i].append(best._replace(start=started, ended=ended))
        return fits

    def _search(self, originals: Sequence[Original], steps: int) -> tuple[Search, Sequence[Tensor]]:
        """The search for the parameters of layers of the same shape, and for each what undoes its metric."""
        targets, undo = zip(*(self.target(*one) for one in originals), strict=True)
        return Search(self, originals[0].layer, stacked(targets), math.ceil(steps * self.effort)), undo


def _parts(originals: Sequence[Original]) -> list[slice]:
    """Where the groups of each layer are in their stack."""
    g = originals[0].layer.groups
    return [slice(i * g, (i + 1) * g) for i in range(len(originals))]
