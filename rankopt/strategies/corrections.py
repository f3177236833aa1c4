"""Plans near the exact allocation: a log-multiplier on the predicted losses of every layer, or block of layers.

The exact allocation under the multiplied losses is the plan, so every plan lies on the budget surface and zeros
give the optimum of the predicted losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.strategies.allocation import allocate

BLOCKS = 24  # at most so many multipliers; with more layers, neighbours share one


CONTENDERS = 8  # plans that `knapsack` compares, and that the Bayesian search starts with


PRICES = 3.5  # of what is to be small beside the limits: up to e^3.5 times the exact plan's loss per cost


WIDTH = 0.5  # log-multipliers lie in [-WIDTH, WIDTH]: about as far as predicted losses are from measured ones


class Corrections:
    """Points (a log-multiplier per block) -> plans.

    also: a further metric that is to be small beside the limits; the last coordinate is then its price.
    """

    def __init__(self, problem: Problem, blocks: int = BLOCKS, width: float = WIDTH, also: str | None = None) -> None:
        self.problem, self.low, self.high, self.also = problem, -width, width, also
        free = [i for i, f in enumerate(problem.frontiers) if len(f) > 1]
        self.blocks = [b for b in np.array_split(free, min(blocks, max(len(free), 1))) if len(b)]
        self.size = len(self.blocks) + int(also is not None)

    def plan(self, point: Sequence[float]) -> Proposal:
        factors = np.ones(len(self.problem.layers))
        for block, x in zip(self.blocks, point, strict=False):
            factors[block] = np.exp(x)
        losses = [[w * c.loss for c in f] for w, f in zip(factors, self.problem.frontiers, strict=True)]
        if self.also is not None:
            price = self.exchange * np.expm1(PRICES * (point[-1] - self.low) / (self.high - self.low))
            costs = [[c.cost[self.also] for c in f] for f in self.problem.frontiers]
            losses = [[x + price * c for x, c in zip(*both, strict=True)] for both in zip(losses, costs, strict=True)]
        return allocate(self.problem, losses).proposal

    @cached_property
    def exchange(self) -> float:
        """The exact plan's predicted loss for its cost in `also`, which prices are multiples of."""
        chosen = self.problem.candidates(allocate(self.problem).proposal)
        return sum(c.loss for c in chosen) / max(sum(c.cost[str(self.also)] for c in chosen), 1)

    def stands_for(self, plan: Proposal, point: Sequence[float]) -> tuple[float, ...]:
        """What a sampler is told for a plan that came from this point."""
        return tuple(point)

    def contender(self, seed: int, number: int) -> Proposal:
        """The plan of random point `number`; the first is the exact allocation."""
        return self.plan(self.draw(seed, number))

    def draw(self, seed: int, number: int) -> list[float]:
        """Random point `number`, uniform; the first is zero: the exact allocation."""
        if number == 0:
            return [0.0] * len(self.blocks) + [self.low] * (self.size - len(self.blocks))
        return list(np.random.default_rng([seed, number]).uniform(self.low, self.high, self.size))
