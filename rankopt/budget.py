"""Budgets: reading them, allocating them exactly, projecting any proposal onto them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from rankopt.core import METRICS, BudgetError, Candidate, Cost, Layer, Proposal

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
HELP = "give a fraction of dense (0.5, 50%) or an absolute number (150000, 2M, 500KB)"


@dataclass(frozen=True)
class Limit:
    """One metric's limit: as requested (a fraction or an absolute number) and in absolute numbers."""

    metric: str
    requested: float
    target: int


# --- reading -------------------------------------------------------------------------------------


def parse_budget(budget: Mapping[str, Any] | Sequence[str], dense: Cost) -> tuple[Limit, ...]:
    """{"params": 0.5, "bytes": "500KB"} or ["params=0.5", ...] -> limits. Raises BudgetError."""
    if isinstance(budget, str) or not isinstance(budget, (Mapping, Sequence)):
        raise BudgetError(f"budget is {budget!r}: give a dictionary such as {{'params': 0.5}}")
    if not isinstance(budget, Mapping):
        pairs = [item.partition("=") for item in budget]
        for metric, equals, _ in pairs:
            if not equals:
                raise BudgetError(f"budget {metric!r} is not METRIC=VALUE: {HELP}")
        names = [metric for metric, _, _ in pairs]
        if len(set(names)) < len(names):
            raise BudgetError(f"a budget metric is given twice: {', '.join(names)}")
        budget = {metric: value for metric, _, value in pairs}
    if not budget:
        raise BudgetError(f"no budget: give at least one of {', '.join(METRICS)}, for example params=0.5")
    return tuple(_limit(metric, value, dense) for metric, value in budget.items())


def _limit(metric: str, value: Any, dense: Cost) -> Limit:
    if metric not in METRICS:
        raise BudgetError(f"unknown budget metric {metric!r}: choose from {', '.join(METRICS)}")
    number, is_fraction = _number(metric, value)
    target = math.floor(number * dense[metric] + 1e-9) if is_fraction else math.floor(number)
    if number <= 0:
        raise BudgetError(f"budget {metric}={value} is not above 0: {HELP}")
    if target > dense[metric]:
        raise BudgetError(
            f"budget {metric}={value} is {target:,}, above the dense model's {dense[metric]:,}: nothing to do"
        )
    return Limit(metric, number, target)


def _number(metric: str, value: Any) -> tuple[float, bool]:
    """The number, and whether it is a fraction of dense."""
    text = str(value).strip()
    wrong = BudgetError(f"budget {metric}={text} is not understood: {HELP}")
    if isinstance(value, bool):
        raise wrong
    match = re.fullmatch(r"([+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?|[+-]?\.\d+(?:e[+-]?\d+)?)\s*(%|[KMG]?B?)", text, re.I)
    if not match:
        raise wrong
    number, unit = float(match[1]), match[2].upper()
    if not math.isfinite(number):
        raise wrong
    if unit == "%":
        return number / 100, True
    if unit:
        if unit.endswith("B") and metric != "bytes":
            raise BudgetError(f"budget {metric}={text}: {unit} counts bytes, {metric} takes K, M or G")
        return number * UNITS[unit.removesuffix("B")], False
    is_integer = re.fullmatch(r"[+-]?\d+", match[1]) is not None
    if is_integer and number == 1:
        raise BudgetError(f"budget {metric}=1 is ambiguous: 100% keeps everything, 1.0 likewise; one {metric} is none")
    if not is_integer and number > 1:
        raise BudgetError(f"budget {metric}={text}: a fraction is at most 1, an absolute number is an integer; {HELP}")
    return number, not is_integer


# --- the problem that strategies see ---------------------------------------------------------------


class Spectrum(NamedTuple):
    """Singular values of an unfolding of a layer's weight (groups together), and the unfolding's shape."""

    values: tuple[float, ...]
    rows: int
    columns: int


Spectra = Mapping[str, Spectrum]
"""By name of the unfolding: "output" T x rest, "input" C x rest, "spatial" (C, height) x (width, T); for Linear
layers of modes (C1, C2, T1, T2) the bonds of a tensor train "bond1" C1 x rest, "bond2" and "bond3"."""


@dataclass(frozen=True)
class Problem:
    """Numbers only: per free layer its frontier (cheapest first, dense last), the fixed rest, and the limits."""

    layers: tuple[Layer, ...]
    frontiers: tuple[tuple[Candidate, ...], ...]
    dense: Cost
    limits: tuple[Limit, ...]
    spectra: tuple[Spectra, ...] = ()

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

    def room(self) -> dict[str, int]:
        """What each limit leaves for the free layers."""
        return {limit.metric: limit.target - self.fixed[limit.metric] for limit in self.limits}


@dataclass(frozen=True)
class Allocation:
    """An optimal choice under additive losses; bound: no choice has a lower predicted loss."""

    proposal: Proposal
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """Relative optimality gap of this allocation."""
        return relative_gap(self.loss, self.bound)


def relative_gap(loss: float, bound: float) -> float:
    """(loss − bound) / loss, 0 for a loss of 0."""
    return max(0.0, (loss - bound) / loss) if loss > 0 else 0.0


# --- allocation ------------------------------------------------------------------------------------


def check_feasible(problem: Problem) -> None:
    """Raises BudgetError, naming the least achievable, if no choice meets the limits."""
    for limit in problem.limits:
        least = problem.fixed[limit.metric] + sum(min(c.cost[limit.metric] for c in f) for f in problem.frontiers)
        if least > limit.target:
            share = least / problem.dense[limit.metric]
            raise BudgetError(
                f"budget {limit.metric}={limit.target:,} cannot be met: the least achievable in this search space is "
                f"{least:,} ({math.ceil(share * 10_000) / 100:.2f} % of dense)"
            )


def allocate(problem: Problem, losses: Sequence[Sequence[float]] | None = None) -> Allocation:
    """The multiple-choice knapsack: one candidate per layer, least total loss within the limits, solved exactly.

    losses: instead of the candidates' own. Raises BudgetError if the limits cannot be met.
    """
    if losses is None:
        losses = [[c.loss for c in f] for f in problem.frontiers]
    check_feasible(problem)
    if not problem.layers:
        return Allocation((), 0.0, 0.0)
    sizes = [len(f) for f in problem.frontiers]
    objective = np.concatenate([np.asarray(x, float) for x in losses])
    scale = 1e4 / max(np.abs(objective).max(), 1e-300)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = (owner == np.arange(len(sizes))[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for metric, room in problem.room().items():
        weights = np.array([c.cost[metric] for f in problem.frontiers for c in f], float)
        unit = max(weights.max(), 1.0)
        constraints.append(LinearConstraint(weights / unit, -np.inf, room / unit))
    found = milp(
        objective * scale,
        constraints=constraints,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        # Without presolve: it finds little here, and HiGHS 1.11 prints a stray line when it undoes it.
        options={"mip_rel_gap": 0.0, "time_limit": 60.0, "presolve": False},
    )
    if found.x is None:
        raise BudgetError(
            "these limits cannot be met together: " + ", ".join(f"{x.metric}={x.target:,}" for x in problem.limits)
        )
    starts = np.cumsum([0, *sizes[:-1]])
    proposal = tuple(int(found.x[s : s + n].argmax()) for s, n in zip(starts, sizes, strict=True))
    proposal = _repair(problem, proposal)
    loss = float(sum(values[i] for values, i in zip(losses, proposal, strict=True)))
    bound = found.mip_dual_bound
    return Allocation(proposal, loss, min(loss, bound / scale if bound is not None else 0.0))


def _repair(problem: Problem, proposal: Proposal) -> Proposal:
    """The solver works to a tolerance: if a limit is passed by a hair, give up what is cheapest to lose."""
    while not problem.fits(proposal):
        options = [(*proposal[:i], p - 1, *proposal[i + 1 :]) for i, p in enumerate(proposal) if p > 0]
        proposal = min(options, key=lambda o: (not problem.fits(o), problem.loss(o)))
    return proposal


def project(problem: Problem, proposal: Proposal) -> Proposal:
    """A proposal that fits as it is; else the nearest that does (squared distance in relative positions), filled up."""
    proposal = tuple(max(0, min(len(f) - 1, int(i))) for f, i in zip(problem.frontiers, proposal, strict=True))
    if problem.fits(proposal):
        return proposal
    distances = [
        [((i - wanted) / max(len(f) - 1, 1)) ** 2 for i in range(len(f))]
        for f, wanted in zip(problem.frontiers, proposal, strict=True)
    ]
    return fill(problem, allocate(problem, distances).proposal)


def fill(problem: Problem, proposal: Proposal) -> Proposal:
    """Spend what a proposal leaves of the budget: while any step up fits, the one with most gain per share spent."""
    current = list(proposal)
    cost = problem.cost(proposal)
    while True:
        best: tuple[float, int, int] | None = None
        for i, (candidates, at) in enumerate(zip(problem.frontiers, current, strict=True)):
            for j in range(at + 1, len(candidates)):
                after = cost + candidates[j].cost - candidates[at].cost
                if all(after[x.metric] <= x.target for x in problem.limits):
                    spent = sum(max(after[x.metric] - cost[x.metric], 0) / x.target for x in problem.limits)
                    gain = (candidates[at].loss - candidates[j].loss) / (spent + 1e-12)
                    if best is None or gain > best[0]:
                        best = (gain, i, j)
        if best is None:
            return tuple(current)
        _, i, j = best
        cost = cost + problem.frontiers[i][j].cost - problem.frontiers[i][current[i]].cost
        current[i] = j
