"""Every layer at the same share of its own cost: the baseline of most papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rankopt.budget import Problem
from rankopt.core import Candidate, Cost, Proposal
from rankopt.strategies.base import Strategy


class Uniform(Strategy):
    name = "uniform"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        return largest(self.problem, lambda share: at_share(self.problem, share)) if number == 0 else None


def at_share(problem: Problem, share: float) -> Proposal:
    """In each layer the most accurate candidate with at most this share of its dense cost, in every metric."""
    metrics = [limit.metric for limit in problem.limits]
    return within(problem, [{m: share * f[-1].cost[m] for m in metrics} for f in problem.frontiers])


def within(problem: Problem, costs: Sequence[Cost | Mapping[str, float]]) -> Proposal:
    """In each layer the most accurate candidate that costs at most this, in every metric; the cheapest if none does."""
    metrics = [limit.metric for limit in problem.limits]
    return tuple(
        max((i for i, c in enumerate(f) if all(c.cost[m] <= most[m] for m in metrics)), default=_cheapest(f, metrics))
        for f, most in zip(problem.frontiers, costs, strict=True)
    )


def _cheapest(candidates: tuple[Candidate, ...], metrics: list[str]) -> int:
    return min(range(len(candidates)), key=lambda i: [candidates[i].cost[m] for m in metrics])


def largest(problem: Problem, proposal_at: Callable[[float], Proposal]) -> Proposal:
    """Bisect a scalar in [0, 1] for the largest whose proposal fits; the proposal at 0 if none does."""
    low, high = 0.0, 1.0
    if problem.fits(proposal_at(high)):
        return proposal_at(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.fits(proposal_at(middle)) else (low, middle)
    return proposal_at(low)
