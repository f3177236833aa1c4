"""Baseline strategies: uniform, energy, greedy and random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rankopt.core.budget import share
from rankopt.core.problem import Problem
from rankopt.core.records import Candidate, Cost, Proposal
from rankopt.strategies.allocation import fill, project
from rankopt.strategies.base import Strategy


class Uniform(Strategy):
    """Gives every layer the same share of its dense cost, the largest share that fits."""

    name = "uniform"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        return largest(self.problem, lambda share: at_share(self.problem, share)) if number == 0 else None


def at_share(problem: Problem, share: float) -> Proposal:
    """Choose in each layer the most accurate candidate with at most a share of its dense cost, in every metric.

    Args:
        problem: The candidates of every layer, and the limits.
        share: The share of the dense cost.
    """
    metrics = [limit.metric for limit in problem.limits]
    return within(problem, [{m: share * x.cost[m] for m in metrics} for x in problem.layers])


def within(problem: Problem, costs: Sequence[Cost | Mapping[str, float]]) -> Proposal:
    """Choose in each layer the most accurate candidate within a cost, in every limited metric.

    Args:
        problem: The candidates of every layer, and the limits.
        costs: The most that each layer may cost.

    Returns:
        One frontier index per layer; that of the cheapest candidate if none is within the cost.
    """
    metrics = [limit.metric for limit in problem.limits]
    return tuple(
        max((i for i, c in enumerate(f) if all(c.cost[m] <= most[m] for m in metrics)), default=_cheapest(f, metrics))
        for f, most in zip(problem.frontiers, costs, strict=True)
    )


def _cheapest(candidates: tuple[Candidate, ...], metrics: list[str]) -> int:
    return min(range(len(candidates)), key=lambda i: [candidates[i].cost[m] for m in metrics])


def largest(problem: Problem, proposal_at: Callable[[float], Proposal]) -> Proposal:
    """Bisect for the largest number in [0, 1] whose proposal fits the budget.

    Args:
        problem: The candidates of every layer, and the limits.
        proposal_at: Number -> proposal; larger numbers give proposals that cost more.

    Returns:
        The proposal of that number; the proposal at 0 if none fits.
    """
    low, high = 0.0, 1.0
    if problem.seems_to_fit(proposal_at(high)):
        return proposal_at(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.seems_to_fit(proposal_at(middle)) else (low, middle)
    return proposal_at(low)


class Energy(Strategy):
    """Allows every layer the same relative error, the smallest that fits: equal shares of kept energy."""

    name = "energy"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        return largest(self.problem, lambda kept: self.at_threshold(1 - kept)) if number == 0 else None

    def at_threshold(self, error: float) -> Proposal:
        """Choose in each layer the cheapest candidate within a relative error.

        Args:
            error: Largest relative error; dense has none.
        """
        return tuple(next(i for i, c in enumerate(f) if c.error <= error) for f in self.problem.frontiers)


class Greedy(Strategy):
    """Starts dense, and makes the step down that loses least per cost saved until the budget is met."""

    name = "greedy"
    one_shot = True

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        problem = self.problem
        current = tuple(len(f) - 1 for f in problem.frontiers)
        while not problem.seems_to_fit(current):
            steps = [(*current[:i], p - 1, *current[i + 1 :]) for i, p in enumerate(current) if p > 0]
            if not steps:
                break
            current = min(steps, key=lambda after, before=current: self._price(before, after))  # type: ignore[misc]
        return current

    def _price(self, before: Proposal, after: Proposal) -> tuple[bool, float]:
        """Loss per share of the budget saved; steps that save nothing come last."""
        old, new = self.problem.sum(before), self.problem.sum(after)
        freed = share(self.problem.limits, old - new)
        return freed <= 0, (self.problem.loss(after) - self.problem.loss(before)) / max(freed, 1e-12)


class Random(Strategy):
    """Draws frontier positions uniformly, and projects them onto the budget."""

    name = "random"

    def propose(self, number: int) -> Proposal | None:
        rng = np.random.default_rng([self.seed, number])
        wanted = tuple(int(rng.integers(len(f))) for f in self.problem.frontiers)
        return fill(self.problem, project(self.problem, wanted))
