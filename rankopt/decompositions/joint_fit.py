"""Fits of families without a free output factor: all cores are searched together.

The dense weight is a differentiable function of the cores; L-BFGS minimises ‖W − Ŵ(cores)‖² in the norm of base.py,
starting from a truncated SVD of the weight's unfoldings; in float32, and in float64 where the loss is small. Besides
what autograd keeps for Ŵ, a step holds three tensors of the weight's size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.lbfgs import Objective
from rankopt.decompositions.parameter_search import affordable_steps, minimize_in_both
from rankopt.decompositions.targets import StoredError, full_target
from rankopt.decompositions.types import Factors, Fit, Original, Target


class Joint(Decomposition):
    """Base class of families whose cores are all searched; subclasses supply their shapes, start and dense weight."""

    @abstractmethod
    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """The shapes of the cores, in order.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """

    @abstractmethod
    def starts(self, layer: Layer, weight: Tensor, ranks: Sequence[Rank]) -> Iterator[Factors]:
        """The cores from which the search starts.

        Args:
            layer: Layer to decompose.
            weight: Dense weight of `layer.shape`, float64.
            ranks: Valid ranks.

        Yields:
            The cores for each rank, float64.
        """

    @abstractmethod
    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        """The dense weight of `layer.shape`, differentiable with respect to the factors.

        Args:
            layer: The decomposed layer.
            factors: The cores.
        """

    def balance(self, layer: Layer, factors: Factors) -> Factors:
        """Rescale the cores for training without changing the dense weight.

        Args:
            layer: The decomposed layer.
            factors: The cores.
        """
        return factors

    def fit(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> Iterator[Fit]:
        error = StoredError(self, layer, weight, moment, metric)
        search = _Search(self, layer, error.target, steps)
        for rank, start in zip(ranks, self.starts(layer, search.dense, ranks), strict=True):
            found, before, _, ended = search(start)
            yield error(self.balance(layer, found), rank)._replace(start=before, ended=ended)

    def errors(
        self, originals: Sequence[Original], ranks: Sequence[Sequence[Rank]], steps: int = 100
    ) -> list[list[Fit]]:
        if type(self).fit is not Joint.fit:  # a subclass fits in its own way
            return super().errors(originals, ranks, steps)
        return [self._errors(original, own, steps) for original, own in zip(originals, ranks, strict=True)]

    def _errors(self, original: Original, ranks: Sequence[Rank], steps: int) -> list[Fit]:
        search = _Search(self, original.layer, full_target(*original), steps)
        found = map(search, self.starts(original.layer, search.dense, ranks))
        pairs = zip(ranks, found, strict=True)
        return [Fit(rank, (), after, before, ended) for rank, (_, before, after, ended) in pairs]


class _Search:
    """Improves the cores of a layer, in float32 as long as their loss allows it.

    Args:
        family: The decomposition.
        layer: The layer.
        target: What is fitted.
        steps: The most steps, before the family's own factor.
    """

    def __init__(self, family: Joint, layer: Layer, target: Target, steps: int) -> None:
        self.family, self.layer = family, layer
        self.dense = target.weight.reshape(layer.shape)
        self.scale = target.norm
        products = self.dense.numel() * sum(target.weight.shape[1:])
        asked = math.ceil(steps * family.effort)
        self.steps = affordable_steps(asked, products)
        self.cut = self.steps < asked
        self.targets = {dtype: target.to(dtype) for dtype in (torch.float32, torch.float64)}

    def __call__(self, start: Factors) -> tuple[Factors, float, float, bool]:
        """What becomes of some cores, their relative losses before and after that, and if more steps were no use."""
        point = torch.cat([core.reshape(-1) for core in start]).view(1, 1, -1)
        steps = self.steps if self.scale > 0 else 0
        objective = partial(self._objective, like=start)
        if steps == 0:
            loss = objective(torch.float64).evaluate(point, torch.arange(1))[0].item()
            return start, loss, loss, True
        found = minimize_in_both(objective, point, torch.tensor([[steps]]))
        ended = self.cut or bool(found.ended.item())
        return _split(found.points, start), found.start.item(), found.losses.item(), ended

    def _objective(self, dtype: torch.dtype, like: Factors) -> Objective:
        target = self.targets[dtype]
        scale = self.scale if self.scale > 0 else 1.0

        def evaluate(point: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            point = point.detach().requires_grad_()
            approximation = self.family.weight(self.layer, _split(point, like)).reshape(target.weight.shape)
            difference = target.weight - approximation.detach()
            gradient = target.times_moment(target.metric @ difference).mul_(-2 / scale)
            loss = -0.5 * (gradient * difference).sum(dtype=torch.float64)
            (found,) = torch.autograd.grad(approximation, point, gradient)
            return loss.view(1, 1), found

        return Objective(evaluate)


def _split(point: Tensor, like: Factors) -> Factors:
    """A point as cores of these shapes."""
    parts = point.flatten().split([core.numel() for core in like])
    return tuple(part.reshape(core.shape) for part, core in zip(parts, like, strict=True))
