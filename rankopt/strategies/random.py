"""Random positions on the budget surface."""

from __future__ import annotations

import numpy as np

from rankopt.allocation import fill, project
from rankopt.core import Proposal
from rankopt.strategies.base import Strategy


class Random(Strategy):
    name = "random"

    def propose(self, number: int) -> Proposal | None:
        rng = np.random.default_rng([self.seed, number])
        wanted = tuple(int(rng.integers(len(f))) for f in self.problem.frontiers)
        return fill(self.problem, project(self.problem, wanted))
