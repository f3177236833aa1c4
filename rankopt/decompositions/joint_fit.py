"""Fits of families without a free output factor: all cores are searched together.

The dense weight is a differentiable function of the cores; L-BFGS minimises ‖W − Ŵ(cores)‖² in the norm of base.py,
starting from a truncated SVD of the weight's unfoldings. Besides what autograd keeps for Ŵ, a step holds three tensors
of the weight's size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.lbfgs import minimize
from rankopt.decompositions.types import Factors, Fit, Target
from rankopt.decompositions.variable_projection import (
    NEGLIGIBLE,
    TOLERANCE,
    StoredError,
    affordable_steps,
)


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
        target = error.target
        dense = target.weight.reshape(layer.shape)
        steps = affordable_steps(math.ceil(steps * self.effort), dense.numel() * sum(target.weight.shape[1:]))
        for rank, start in zip(ranks, self.starts(layer, dense, ranks), strict=True):
            yield error(self.balance(layer, self._search(layer, start, target, steps)), rank)

    def _search(self, layer: Layer, start: Factors, target: Target, steps: int) -> Factors:
        """Improve all cores."""
        scale = target.norm
        shapes, sizes = [core.shape for core in start], [core.numel() for core in start]

        def cores(point: Tensor) -> Factors:
            return tuple(c.reshape(s) for c, s in zip(point.flatten().split(sizes), shapes, strict=True))

        def evaluate(point: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            point = point.detach().requires_grad_()
            approximation = self.weight(layer, cores(point)).reshape(target.weight.shape)
            difference = target.weight - approximation.detach()
            gradient = target.times_moment(target.metric @ difference).mul_(-2 / scale)
            loss = -0.5 * (gradient * difference).sum()
            (found,) = torch.autograd.grad(approximation, point, gradient)
            return loss.view(1, 1), found

        if steps == 0 or scale <= 0:
            return start
        flat = torch.cat([core.reshape(-1) for core in start]).view(1, 1, -1)
        return cores(minimize(evaluate, flat, torch.tensor([steps]), TOLERANCE, NEGLIGIBLE).points)
