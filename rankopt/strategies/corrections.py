"""Plans near the exact allocation: a log-multiplier on the predicted losses of every layer, or block of layers.

The exact allocation under the multiplied losses is the plan, so every plan lies on the budget surface and zeros
give the optimum of the predicted losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankopt.allocation import allocate
from rankopt.budget import Problem
from rankopt.core import Proposal

BLOCKS = 24  # at most so many multipliers; with more layers, neighbours share one
CONTENDERS = 8  # plans that `knapsack` compares, and that the Bayesian search starts with
WIDTH = 0.5  # log-multipliers lie in [-WIDTH, WIDTH]: about as far as predicted losses are from measured ones


class Corrections:
    """Points (a log-multiplier per block) -> plans."""

    def __init__(self, problem: Problem, blocks: int = BLOCKS, width: float = WIDTH) -> None:
        self.problem, self.low, self.high = problem, -width, width
        free = [i for i, f in enumerate(problem.frontiers) if len(f) > 1]
        self.blocks = [b for b in np.array_split(free, min(blocks, max(len(free), 1))) if len(b)]
        self.size = len(self.blocks)

    def plan(self, point: Sequence[float]) -> Proposal:
        factors = np.ones(len(self.problem.layers))
        for block, x in zip(self.blocks, point, strict=True):
            factors[block] = np.exp(x)
        losses = [[w * c.loss for c in f] for w, f in zip(factors, self.problem.frontiers, strict=True)]
        return allocate(self.problem, losses).proposal

    def stands_for(self, plan: Proposal, point: Sequence[float]) -> tuple[float, ...]:
        """What a sampler is told for a plan that came from this point."""
        return tuple(point)

    def draw(self, seed: int, number: int) -> list[float]:
        """Random point `number`, uniform; the first is zero: the exact allocation."""
        if number == 0:
            return [0.0] * self.size
        return list(np.random.default_rng([seed, number]).uniform(self.low, self.high, self.size))
