"""Fits of families without a free output factor: all cores are searched together.

The dense weight is a differentiable function of the cores; L-BFGS minimises ‖W − Ŵ(cores)‖² in the norm of base.py,
starting from a truncated SVD of the weight's unfoldings. Besides what autograd keeps for Ŵ, a step holds three tensors
of the weight's size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.types import Factors, Fit, Target
from rankopt.decompositions.variable_projection import NEGLIGIBLE, affordable_steps, full_target, lbfgs, stored_fit


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
        target = full_target(layer, weight, moment, metric)
        dense = target.weight.reshape(layer.shape)
        steps = affordable_steps(math.ceil(steps * self.effort), dense.numel() * sum(target.weight.shape[1:]))
        for rank, start in zip(ranks, self.starts(layer, dense, ranks), strict=True):
            factors = self.balance(layer, self._search(layer, start, target, steps))
            yield stored_fit(self, layer, weight, factors, rank, moment, metric)

    def _search(self, layer: Layer, start: Factors, target: Target, steps: int) -> Factors:
        """Improve all cores."""
        scale = target.norm

        def weight(cores: Factors) -> Tensor:
            return self.weight(layer, cores).reshape(target.weight.shape)

        def loss(approximation: Tensor) -> tuple[float, Tensor]:
            difference = target.weight - approximation
            gradient = target.times_moment(target.metric @ difference).mul_(-2 / scale)
            return -0.5 * (gradient * difference).sum().item(), gradient

        start = tuple(core.contiguous() for core in start)
        if steps > 0 and scale > 0 and loss(weight(start))[0] > NEGLIGIBLE:
            return lbfgs(weight, loss, start, steps, history=10, tolerance=1e-9)
        return start
