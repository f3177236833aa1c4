"""The optimisation problem that strategies see: one candidate per layer, within the limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankopt.core.budget import Limit, amount
from rankopt.core.errors import BudgetError
from rankopt.core.records import Candidate, Cost, Layer, Proposal


class ProblemTable(NamedTuple):
    """A problem as float64 arrays: n layers, up to m candidates each, k limits. Integers up to 2^53 stay exact.

    Attributes:
        losses: (n, m) predicted losses, infinite where a layer has fewer candidates.
        costs: (k, n, m) costs in each limit's metric; a shorter row repeats its last candidate's.
        room: (k,) what each limit leaves for the n layers together.
    """

    losses: NDArray[np.float64]
    costs: NDArray[np.float64]
    room: NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What a strategy solves: choose one candidate per layer so that the whole model stays within the limits.

    Attributes:
        layers: The free layers: those that may be factorised.
        frontiers: For each free layer its Pareto frontier of candidates, cheapest first, dense last.
        dense: The dense model's cost.
        limits: The budget.
    """

    layers: tuple[Layer, ...]
    frontiers: tuple[tuple[Candidate, ...], ...]
    dense: Cost
    limits: tuple[Limit, ...]

    @property
    def fixed(self) -> Cost:
        """The cost of everything but the free layers."""
        rest = self.dense
        for layer in self.layers:
            rest = rest - layer.cost
        return rest

    def candidates(self, proposal: Proposal) -> tuple[Candidate, ...]:
        """The candidates that a proposal chooses.

        Args:
            proposal: One frontier index per free layer.
        """
        return tuple(f[i] for f, i in zip(self.frontiers, proposal, strict=True))

    def cost(self, proposal: Proposal) -> Cost:
        """The whole model's cost under a proposal.

        Args:
            proposal: One frontier index per free layer.
        """
        total = self.fixed
        for candidate in self.candidates(proposal):
            total = total + candidate.cost
        return total

    def loss(self, proposal: Proposal) -> float:
        """Predicted rise of the objective: the sum of the layers' losses.

        Args:
            proposal: One frontier index per free layer.
        """
        return sum(c.loss for c in self.candidates(proposal))

    def fits(self, proposal: Proposal) -> bool:
        """Whether the model stays within all limits under a proposal.

        Args:
            proposal: One frontier index per free layer.
        """
        cost = self.cost(proposal)
        return all(cost[limit.metric] <= limit.target for limit in self.limits)

    @cached_property
    def table(self) -> ProblemTable:
        """The problem as arrays."""
        fixed = self.fixed
        return ProblemTable(
            padded([[c.loss for c in f] for f in self.frontiers], math.inf),
            np.array([padded([[c.cost[x.metric] for c in f] for f in self.frontiers]) for x in self.limits]),
            np.array([x.target - fixed[x.metric] for x in self.limits], float),
        )


def padded(rows: Sequence[Sequence[float]], filler: float | None = None) -> NDArray[np.float64]:
    """Rows of different lengths as one array (rows, longest row).

    Args:
        rows: The rows.
        filler: What fills up shorter rows; None: their own last value.
    """
    width = max(map(len, rows), default=0)
    whole = [[*row, *[row[-1] if filler is None else filler] * (width - len(row))] for row in rows]
    return np.array(whole, float).reshape(len(rows), width)


def check_feasible(problem: Problem) -> None:
    """Check that each limit, taken alone, can be met.

    Args:
        problem: The problem.

    Raises:
        BudgetError: A limit is below the cost of the cheapest candidates; the message gives that cost.
    """
    if not problem.limits:
        return
    least_of_layers = problem.table.costs.min(axis=-1, initial=math.inf).sum(axis=-1)
    for limit, of_layers in zip(problem.limits, least_of_layers, strict=True):
        least = problem.fixed[limit.metric] + int(of_layers)
        if least > limit.target:
            share = least / problem.dense[limit.metric]
            raise BudgetError(
                f"budget {limit.metric}={amount(limit.metric, limit.target)} cannot be met: the least achievable in "
                f"this search space is {amount(limit.metric, least)} ({math.ceil(share * 10_000) / 100:.2f} % of dense)"
            )


def cannot_be_met_together(problem: Problem) -> BudgetError:
    """The error to raise if limits that can be met one by one exclude each other.

    Args:
        problem: The problem.
    """
    limits = ", ".join(f"{x.metric}={amount(x.metric, x.target)}" for x in problem.limits)
    return BudgetError(f"these limits cannot be met together: {limits}")
