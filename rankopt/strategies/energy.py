"""One threshold for all: in every layer the cheapest candidate whose error stays below it, bisected onto the budget."""

from __future__ import annotations

from rankopt.core import Proposal
from rankopt.strategies.base import Strategy
from rankopt.strategies.uniform import largest


class Energy(Strategy):
    name = "energy"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        return largest(self.problem, lambda kept: self.at_threshold(1 - kept)) if number == 0 else None

    def at_threshold(self, error: float) -> Proposal:
        """Per layer the first (cheapest) frontier position with at most this relative error; dense has none."""
        return tuple(next(i for i, c in enumerate(f) if c.error <= error) for f in self.problem.frontiers)
