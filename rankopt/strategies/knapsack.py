"""The exact allocation; plans that are predicted to be about equally good are compared by measurement.

A predicted loss is a sum over layers, each measured alone. All layers together lose up to twice as much, and plans of
nearly equal sums differ by several per cent. So the exact allocation and a few others, exact under slightly different
losses, are measured as whole models, and the best is proposed.
"""

from __future__ import annotations

import math
from typing import Any

from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.model.objective import call
from rankopt.strategies.base import Strategy
from rankopt.strategies.corrections import CONTENDERS, Corrections


class Knapsack(Strategy):
    """Proposes the best of a few plans around the exact allocation."""

    name = "knapsack"
    one_shot = True

    def __init__(self, problem: Problem, seed: int = 0, *, contenders: int = CONTENDERS) -> None:
        """Set up the contenders.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Seed of the contenders.
            contenders: Plans to measure, the exact allocation among them. 1 proposes the exact allocation unmeasured.

        Raises:
            RankoptError: If contenders is less than 1.
        """
        super().__init__(problem, seed)
        if contenders < 1:
            raise RankoptError(f"contenders is {contenders}: give 1 or more")
        self.contenders, self.corrections = contenders, Corrections(problem)
        self.chosen: Proposal | None = None

    def measure(self, prepared: Any, progress: Any) -> None:
        plans = dict.fromkeys(self.corrections.contender(self.seed, n) for n in range(self.contenders))
        if len(plans) > 1:
            shown = progress(plans, "measuring contenders", len(plans))
            self.chosen = min(shown, key=lambda p: _measured(prepared, self.problem, p))

    def propose(self, number: int) -> Proposal | None:
        return (self.chosen or self.corrections.contender(self.seed, 0)) if number == 0 else None


def _measured(prepared: Any, problem: Problem, plan: Proposal) -> float:
    try:
        return call("the objective", prepared.objective, prepared.apply(problem, plan)) or 0.0
    except Exception:  # noqa: BLE001  # a user's code: if no plan can be measured, the search's own evaluation reports it
        return math.inf
