"""Plans near the exact allocation, from log-multipliers on the predicted losses of layers or blocks of layers.

A plan is the exact allocation under the multiplied losses: so every plan uses up the budget, and zeros give the optimum
of the predicted losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.strategies.allocation import allocate

BLOCKS = 24  # largest number of multipliers; with more layers, neighbours share one


WARM = 8  # plans that the Bayesian search starts with


PRICES = 3.5  # the price of a further metric is at most e^3.5 times the exact plan's loss per cost


WIDTH = 0.5  # log-multipliers lie within ± WIDTH, about as far as measured losses are from predicted ones


class Corrections:
    """Parametrisation of plans by log-multipliers, one per block of layers.

    Attributes:
        low: Least value of a coordinate.
        high: Greatest value of a coordinate.
        size: Number of coordinates.
    """

    def __init__(
        self, problem: Problem, blocks: int = BLOCKS, width: float = WIDTH, metrics: Sequence[str] = ()
    ) -> None:
        """Divide the layers that have a choice into blocks.

        Args:
            problem: The candidates of every layer, and the limits.
            blocks: Largest number of blocks.
            width: Coordinates lie within ± width.
            metrics: Further metrics to keep small; the last coordinates are their prices.
        """
        self.problem, self.low, self.high, self.metrics = problem, -width, width, tuple(metrics)
        free = [i for i, f in enumerate(problem.frontiers) if len(f) > 1]
        self.blocks = [b for b in np.array_split(free, min(blocks, max(len(free), 1))) if len(b)]
        self.size = len(self.blocks) + len(self.metrics)

    def plan(self, point: Sequence[float]) -> Proposal:
        """Allocate exactly under multiplied losses.

        Args:
            point: Log-multipliers, and the coordinates of the prices: (size,).
        """
        factors = np.ones(len(self.problem.layers))
        for block, x in zip(self.blocks, point, strict=False):
            factors[block] = np.exp(x)
        losses = [[w * c.loss for c in f] for w, f in zip(factors, self.problem.frontiers, strict=True)]
        for metric, x in zip(self.metrics, point[len(self.blocks) :], strict=True):
            price = self.exchange[metric] * np.expm1(PRICES * (x - self.low) / (self.high - self.low))
            costs = [[c.cost[metric] for c in f] for f in self.problem.frontiers]
            losses = [[x + price * c for x, c in zip(*both, strict=True)] for both in zip(losses, costs, strict=True)]
        return allocate(self.problem, losses).proposal

    @cached_property
    def exchange(self) -> dict[str, float]:
        """For each metric the exact plan's predicted loss per cost: the unit of prices."""
        chosen = self.problem.candidates(allocate(self.problem).proposal)
        loss = sum(c.loss for c in chosen)
        return {m: loss / max(sum(c.cost[m] for c in chosen), 1) for m in self.metrics}

    def representative(self, plan: Proposal, point: Sequence[float]) -> tuple[float, ...]:
        """The point at which a sampler learns a plan's result: the one that it came from.

        Args:
            plan: The plan.
            point: The point that it came from.
        """
        return tuple(point)

    def contender(self, seed: int, number: int) -> Proposal:
        """The plan of a random point; the first is the exact allocation.

        Args:
            seed: Seed of the points.
            number: Number of the point, from 0.
        """
        return self.plan(self.draw(seed, number))

    def draw(self, seed: int, number: int) -> list[float]:
        """Draw a point uniformly; the first is zero, which gives the exact allocation.

        Args:
            seed: Seed of the points.
            number: Number of the point, from 0.
        """
        if number == 0:
            return [0.0] * len(self.blocks) + [self.low] * (self.size - len(self.blocks))
        return list(np.random.default_rng([seed, number]).uniform(self.low, self.high, self.size))
