"""From dense, step by step down the frontier where a step loses least per share of the budget it frees."""

from __future__ import annotations

from rankopt.core import Proposal
from rankopt.strategies.base import Strategy


class Greedy(Strategy):
    name = "greedy"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        problem = self.problem
        current = tuple(len(f) - 1 for f in problem.frontiers)
        while not problem.fits(current):
            steps = [(*current[:i], p - 1, *current[i + 1 :]) for i, p in enumerate(current) if p > 0]
            if not steps:
                break
            current = min(steps, key=lambda after, before=current: self._price(before, after))  # type: ignore[misc]
        return current

    def _price(self, before: Proposal, after: Proposal) -> tuple[bool, float]:
        """Loss per share freed; a step that frees nothing comes last."""
        old, new = self.problem.cost(before), self.problem.cost(after)
        freed = sum((old[x.metric] - new[x.metric]) / x.target for x in self.problem.limits)
        return freed <= 0, (self.problem.loss(after) - self.problem.loss(before)) / max(freed, 1e-12)
