"""The exact allocation on measured losses: one plan, the best under additive losses."""

from __future__ import annotations

from rankopt.allocation import allocate
from rankopt.core import Proposal
from rankopt.strategies.base import Strategy


class Knapsack(Strategy):
    name = "knapsack"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        return allocate(self.problem).proposal if number == 0 else None
