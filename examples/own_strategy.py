"""A strategy of your own: the exact allocation first, then the same plan with some layers moved at random.

`rankopt.register` makes it known by its name in this process; packages have entry points for that
(docs/how-to/add-strategy.md).

Run: python examples/own_strategy.py
"""

from __future__ import annotations

import numpy as np

import rankopt
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.experiments.digits import digits
from rankopt.strategies.allocation import allocate


@rankopt.register
class Shaken(rankopt.Strategy):
    """Moves every layer by up to `reach` positions on its frontier."""

    name = "shaken"

    def __init__(self, problem: Problem, seed: int = 0, *, reach: int = 3) -> None:
        super().__init__(problem, seed)
        self.reach = reach  # --option reach=5

    def propose(self, number: int) -> Proposal | None:
        best = allocate(self.problem).proposal
        if number == 0:
            return best
        rng = np.random.default_rng([self.seed, number])  # nothing but the seed and the number: a search can resume
        moves = rng.integers(-self.reach, self.reach + 1, len(best))
        frontiers = self.problem.frontiers
        return tuple(int(np.clip(i + m, 0, len(f) - 1)) for i, m, f in zip(best, moves, frontiers, strict=True))


def main() -> None:
    task = digits()
    result = rankopt.compress(
        task.model,
        task.calibration,
        budget={"params": 0.3},
        score=task.score,
        strategy="shaken",  # or Shaken
        options={"reach": 2},
        trials=10,
        space=rankopt.SearchSpace(families=("svd_out", "cp_merged"), points=6, steps=20),  # quick
    )
    print(result.summary())


if __name__ == "__main__":
    main()
