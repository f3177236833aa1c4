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

# --- the problem that strategies see ---------------------------------------------------------------


class ProblemTable(NamedTuple):
    """A problem as arrays: n layers, up to m candidates each, k limits. Integers up to 2^53 stay exact.

    losses: (n, m), infinite where there is no candidate. costs: (k, n, m). room: (k,), for the n layers together.
    """

    losses: NDArray[np.float64]
    costs: NDArray[np.float64]
    room: NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Numbers only: per free layer its frontier (cheapest first, dense last), the fixed rest, and the limits."""

    layers: tuple[Layer, ...]
    frontiers: tuple[tuple[Candidate, ...], ...]
    dense: Cost
    limits: tuple[Limit, ...]

    @property
    def fixed(self) -> Cost:
        """What the model costs beside the free layers."""
        rest = self.dense
        for layer in self.layers:
            rest = rest - layer.cost
        return rest

    def candidates(self, proposal: Proposal) -> tuple[Candidate, ...]:
        return tuple(f[i] for f, i in zip(self.frontiers, proposal, strict=True))

    def cost(self, proposal: Proposal) -> Cost:
        """The whole model's cost."""
        total = self.fixed
        for candidate in self.candidates(proposal):
            total = total + candidate.cost
        return total

    def loss(self, proposal: Proposal) -> float:
        """Predicted rise of the objective: the layers' losses added."""
        return sum(c.loss for c in self.candidates(proposal))

    def fits(self, proposal: Proposal) -> bool:
        cost = self.cost(proposal)
        return all(cost[limit.metric] <= limit.target for limit in self.limits)

    @cached_property
    def table(self) -> ProblemTable:
        """Losses, costs and what each limit leaves for the layers."""
        fixed = self.fixed
        return ProblemTable(
            padded([[c.loss for c in f] for f in self.frontiers], math.inf),
            np.array([padded([[c.cost[x.metric] for c in f] for f in self.frontiers]) for x in self.limits]),
            np.array([x.target - fixed[x.metric] for x in self.limits], float),
        )


def padded(rows: Sequence[Sequence[float]], filler: float | None = None) -> NDArray[np.float64]:
    """Rows of any length as one array; a short row is filled up with the filler, or with its own last value."""
    width = max(map(len, rows), default=0)
    whole = [[*row, *[row[-1] if filler is None else filler] * (width - len(row))] for row in rows]
    return np.array(whole, float).reshape(len(rows), width)


def check_feasible(problem: Problem) -> None:
    """Raises BudgetError, naming the least achievable, if some limit cannot be met."""
    if not problem.limits:
        return
    least_of_layers = problem.table.costs.min(axis=-1, initial=math.inf).sum(axis=-1)
    for limit, of_layers in zip(problem.limits, least_of_layers, strict=True):
        least = problem.fixed[limit.metric] + int(of_layers)
        if least > limit.target:
            share = least / problem.dense[limit.metric]
            raise BudgetError(
                f"budget {limit.metric}={amount(limit.metric, limit.target)} cannot be met: the least achievable in this "
                f"search space is {amount(limit.metric, least)} ({math.ceil(share * 10_000) / 100:.2f} % of dense)"
            )


def cannot_be_met_together(problem: Problem) -> BudgetError:
    limits = ", ".join(f"{x.metric}={amount(x.metric, x.target)}" for x in problem.limits)
    return BudgetError(f"these limits cannot be met together: {limits}")
