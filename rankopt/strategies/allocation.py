"""Choosing one candidate per layer within the limits: exact allocation, projection of proposals, filling up.

The problem is the multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, chapter 11): a choice j(i) per layer,

    minimise Σ_i c[i, j(i)]   subject to   Σ_i w_l[i, j(i)] ≤ room_l   for every limit l.

1. *Bound.* Pricing the limits at λ ≥ 0 splits the problem into layers: the Lagrangian
   L(λ) = Σ_i min_j (c + λ·w)[i, j] − λ·room is a lower bound of every plan that fits. Its minimisers lie on the lower
   convex hulls of the layers' candidates, so max L(λ) is the bound of the linear relaxation (Sinha & Zoltners 1979).
2. *Plan.* The minimisers at the best λ miss the room by less than a few candidates: repaired and filled up they give a
   plan of loss U, and U − L certifies how far it can be from the optimum.
3. *Core.* A plan with candidate j in layer i loses at least L + r[i, j], r = (c + λ·w)[i, j] − min_j (c + λ·w)[i, j].
   Where that exceeds U the candidate goes. Of the few that are left, `partial_plans` keeps the best partial plans layer
   by layer; where these become too many, `scipy.optimize.milp` (HiGHS) decides.

Memory and file size do not quite add up over layers: w estimates them. The plan that was found is counted as a whole,
and room_l corrected by the difference, until the plan fits (`_fitting`).
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rankopt.core.dual import Array, Positions, drop_impossible, excess_of, maximise_dual, pick, plan_loss, priced
from rankopt.core.problem import Problem, ProblemTable, cannot_be_met_together, check_feasible, padded
from rankopt.core.records import Proposal
from rankopt.strategies.partial_plans import best_plan

EXACT_LAYERS = 200  # with more layers, a gap of TOLERANCE is allowed


TOLERANCE = 1e-4


NEAREST = 1e-3  # relative gap of a projection's squared distance


FEW, MANY = 100, 20_000  # partial plans that the two searches of them keep after a layer


NODES = 2_000  # limit of branch and bound; unlike a time limit it gives the same plan on every machine


CORRECTIONS = 12  # plans that are counted before the cheapest one is taken; two or three are usual


@dataclass(frozen=True)
class Allocation:
    """A plan with a certificate.

    Attributes:
        proposal: One frontier index per layer.
        loss: The plan's predicted loss, the sum over layers.
        bound: A lower bound of the predicted loss of every plan within the limits.
    """

    proposal: Proposal
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """Relative optimality gap of this allocation."""
        return relative_gap(self.loss, self.bound)


def relative_gap(loss: float, bound: float) -> float:
    """Compute (loss − bound) / loss; 0 for a loss of 0.

    Args:
        loss: Loss of a plan.
        bound: Lower bound of the loss of all plans.
    """
    return max(0.0, (loss - bound) / loss) if loss > 0 else 0.0


def allocate(
    problem: Problem, losses: Sequence[Sequence[float]] | None = None, tolerance: float | None = None
) -> Allocation:
    """Choose one candidate per layer with the least total loss within the limits.

    Args:
        problem: The candidates of every layer, and the limits.
        losses: Losses to use instead of the candidates' own, by layer and candidate.
        tolerance: Relative gap at which to stop. Default: 0 for up to 200 layers, 1e-4 for more.

    Returns:
        The plan and its bound. Branch and bound ends after 2,000 nodes, which many layers of equal costs can exceed:
        then the allocation's gap says what is proven.

    Raises:
        BudgetError: If the limits cannot be met.
    """
    check_feasible(problem)
    if not problem.layers:
        return Allocation((), 0.0, 0.0)
    if tolerance is None:
        tolerance = 0.0 if len(problem.layers) <= EXACT_LAYERS else TOLERANCE
    table = problem.table if losses is None else problem.table._replace(losses=padded(losses, math.inf))
    bounds = [math.fsum(table.losses.min(axis=1))]

    def solve(room: Array) -> Positions | None:
        found = _solve(table._replace(room=room), tolerance)
        if found is None:
            return None
        bounds.append(found[1])
        return found[0]

    plan = _fitting(problem, solve, table.room)
    if plan is None:
        plan = _fitting_extreme(problem, table)
    else:  # where the sum overestimates this plan more than the cheapest, there may be room for a better one
        around = _room_around(problem, plan)
        other = solve(np.maximum(table.room, around)) if (around > table.room).any() else None
        if other is not None and plan_loss(table, other) < plan_loss(table, plan) and problem.fits(_proposal(other)):
            plan = other
    loss = plan_loss(table, plan)
    return Allocation(_proposal(plan), loss, min(loss, min(bounds[1:], default=bounds[0])))


def _proposal(plan: Positions) -> Proposal:
    return tuple(map(int, plan))


def _room_around(problem: Problem, plan: Positions) -> Array:
    """The limits on the layers' costs, if these over- and underestimate other plans as much as this one."""
    return pick(problem.table.costs, plan).sum(axis=-1) - problem.excess(_proposal(plan))


def _fitting(problem: Problem, solve: Callable[[Array], Positions | None], room: Array) -> Positions | None:
    """Solve under limits on the layers' costs, lowered until the plan fits as a whole; None if none was found."""
    for number in range(CORRECTIONS):
        plan = solve(room)
        if plan is None:
            return None
        excess = problem.excess(_proposal(plan))
        if (excess <= 0).all():
            return plan
        reached = pick(problem.table.costs, plan).sum(axis=-1)
        room = np.where(excess > 0, np.minimum(room, reached) - excess * 2.0**number, room)
    return None


def _fitting_extreme(problem: Problem, table: ProblemTable) -> Positions:
    """The better of the dense and the cheapest plans that fit; raises BudgetError if none does."""
    dense = tuple(len(f) - 1 for f in problem.frontiers)
    plans = [p for p in (dense, *(problem.cheapest(x.metric, x.target) for x in problem.limits)) if problem.fits(p)]
    if not plans:
        raise cannot_be_met_together(problem)
    return np.array(min(plans, key=lambda p: plan_loss(table, np.array(p))))


def _solve(table: ProblemTable, tolerance: float) -> tuple[Positions, float] | None:
    """The plan of least loss whose layers' costs are within the room, and a bound; None if there is none."""
    table = drop_impossible(table)
    if np.isinf(table.losses).all(axis=1).any():
        return None
    plan, prices, least = maximise_dual(table)
    plan = _fill(table, _repair(table, plan))
    upper, bound = plan_loss(table, plan) if _fits(table, plan) else math.inf, least
    for search in SEARCHES:
        if upper < math.inf and upper - bound <= tolerance * abs(upper):
            break
        core = _core(table, prices, upper, least)
        other, proven = search(core, tolerance)
        if other is not None:
            other = _fill(core.table, _repair(core.table, other))
            if _fits(core.table, other) and plan_loss(core.table, other) < upper:
                plan, upper = other, plan_loss(core.table, other)
        bound = max(bound, min(proven, upper))
    return (plan, min(bound, upper)) if _fits(table, plan) else None


def project(problem: Problem, proposal: Proposal) -> Proposal:
    """Project a proposal onto the budget.

    Args:
        problem: The candidates of every layer, and the limits.
        proposal: One frontier index per layer; indices out of range are clipped.

    Returns:
        The proposal itself if it fits. Otherwise the nearest plan that fits (in squared relative positions, up to a gap
        of 0.1 %), filled up.
    """
    proposal = tuple(max(0, min(len(f) - 1, int(i))) for f, i in zip(problem.frontiers, proposal, strict=True))
    if problem.fits(proposal):
        return proposal
    distances = [
        [((i - wanted) / max(len(f) - 1, 1)) ** 2 for i in range(len(f))]
        for f, wanted in zip(problem.frontiers, proposal, strict=True)
    ]
    return fill(problem, allocate(problem, distances, NEAREST).proposal)


def fill(problem: Problem, proposal: Proposal) -> Proposal:
    """Spend the unused budget greedily on the steps that gain most per share of the budget.

    Args:
        problem: The candidates of every layer, and the limits.
        proposal: A plan that fits.
    """
    plan, table = np.array(proposal, int), problem.table
    filled = _fitting(problem, lambda room: _fill(table._replace(room=room), plan), _room_around(problem, plan))
    return proposal if filled is None else _proposal(filled)


# --- plans: one position per layer -----------------------------------------------------------------


def _fits(table: ProblemTable, plan: Positions) -> bool:
    return bool((excess_of(table, plan) <= 0).all())


def _repair(table: ProblemTable, plan: Positions) -> Positions:
    """While a limit is exceeded, make the change of one layer that loses least per share of the excess removed."""
    plan = plan.copy()
    scale = np.maximum(table.room, 1)[:, None, None]
    excess = excess_of(table, plan)[:, None, None]
    while (excess > 0).any():
        after = excess + table.costs - pick(table.costs, plan)[..., None]
        freed = ((excess.clip(0) - after.clip(0)) / scale).sum(axis=0)
        extra = table.losses - pick(table.losses, plan)[:, None]
        price = np.where(freed > 0, extra / np.where(freed > 0, freed, 1), math.inf)
        layer, position = np.unravel_index(price.argmin(), price.shape)
        if price[layer, position] == math.inf:
            break
        plan[layer] = position
        excess = excess_of(table, plan)[:, None, None]
    return plan


def _fill(table: ProblemTable, plan: Positions) -> Positions:
    """While a step fits that lowers the loss (or is upwards at equal loss), take the one with most gain per cost."""
    plan, left = plan.copy(), -excess_of(table, plan)
    rates, steps = _best_steps(table, plan, left)
    while rates.max(initial=-math.inf) > -math.inf:
        layer = int(rates.argmax())
        position = steps[layer]
        extra = table.costs[:, layer, position] - table.costs[:, layer, plan[layer]]
        if (extra <= left).all():
            left -= extra
            plan[layer] = position
        # Less room can only lower the other layers' rates: they are updated when their turn comes.
        rows = slice(layer, layer + 1) if (extra >= 0).all() else slice(None)
        part = ProblemTable(table.losses[rows], table.costs[:, rows], table.room)
        rates[rows], steps[rows] = _best_steps(part, plan[rows], left)
    return plan


def _best_steps(table: ProblemTable, plan: Positions, left: Array) -> tuple[Array, Positions]:
    """Each layer's best step that fits: its gain per share of the room (−inf if there is none), and its position."""
    extra = table.costs - pick(table.costs, plan)[..., None]
    gain = pick(table.losses, plan)[:, None] - table.losses
    up = np.arange(gain.shape[1]) > plan[:, None]
    allowed = ((gain > 0) | (gain == 0) & up) & (extra <= left[:, None, None]).all(axis=0)
    spent = (extra.clip(0) / np.maximum(table.room, 1)[:, None, None]).sum(axis=0)
    rate = np.where(allowed, gain / (spent + 1e-12), -math.inf)
    steps = rate.argmax(axis=1)
    return pick(rate, steps), steps


# --- the core: candidates that a better plan may use ---------------------------------------------


class Core(NamedTuple):
    """The candidates that a plan of less loss than the best known one can use.

    Attributes:
        table: The problem; excluded candidates have an infinite loss.
        reduced: (n, m) reduced costs r of the candidates.
        upper: Loss of the best known plan.
        least: L(λ), the bound that r adds to.
    """

    table: ProblemTable
    reduced: Array
    upper: float
    least: float


def _core(table: ProblemTable, prices: Array, upper: float, least: float) -> Core:
    """Exclude candidates that only plans worse than the best known one can use: reduced cost above U − L(λ)."""
    reduced = priced(table, prices)
    minima = reduced.min(axis=1, keepdims=True)
    least -= 1e-12 * float(np.abs(minima).sum())  # rounding
    reduced = reduced - minima
    return Core(
        table._replace(losses=np.where(reduced <= upper - least, table.losses, math.inf)), reduced, upper, least
    )


def _search_partial(core: Core, tolerance: float, width: int) -> tuple[Positions | None, float]:
    """The best plan among this many partial plans, and a lower bound of the core's plans."""
    wanted = core.upper - tolerance * abs(core.upper) if core.upper < math.inf else math.inf
    plan, complete = best_plan(core.table, core.reduced, wanted - core.least, width)
    return plan, wanted if complete else -math.inf


def _branch_and_bound(core: Core, tolerance: float) -> tuple[Positions | None, float]:
    """The plan that HiGHS finds, within its tolerances, and a lower bound of the core's plans."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes half a second: not at `import rankopt`
    from scipy.sparse import csr_array

    table, upper = core.table, core.upper
    kept = np.isfinite(table.losses)
    layers, positions = np.nonzero(kept)
    # Relative to each layer's least, so that the solver's tolerances apply to the differences that decide.
    base_loss = table.losses.min(axis=1)
    base_cost = np.where(kept, table.costs, math.inf).min(axis=2)
    losses = table.losses[layers, positions] - base_loss[layers]
    costs = table.costs[:, layers, positions] - base_cost[:, layers]
    room, base = table.room - base_cost.sum(axis=1), math.fsum(base_loss)
    scale = 1e4 / (losses.max() or 1.0)
    unit = 2.0 ** np.ceil(np.log2(np.maximum(costs.max(axis=1), 1)))  # a power of two: the division is exact
    gap = tolerance * abs(upper) / ((upper - base) or 1.0) if upper < math.inf else tolerance
    with no_stray_lines():
        found = milp(
            losses * scale,
            constraints=[
                LinearConstraint(csr_array((np.ones(len(layers)), (layers, np.arange(len(layers))))), 1, 1),
                LinearConstraint(costs / unit[:, None], -math.inf, room / unit),
            ],
            integrality=np.ones(len(losses)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap, "node_limit": NODES, "presolve": False},  # presolve finds little here
        )
    bound = -math.inf if found.mip_dual_bound is None else base + found.mip_dual_bound / scale
    if found.x is None:
        return None, bound
    chosen = np.zeros_like(table.losses)
    chosen[layers, positions] = found.x
    return chosen.argmax(axis=1), bound


SEARCHES = (partial(_search_partial, width=FEW), partial(_search_partial, width=MANY), _branch_and_bound)
"""In this order, until the best plan is proven: each takes longer and can decide more, of a core that the ones before
made smaller."""


_STDOUT = threading.Lock()


@contextmanager
def no_stray_lines() -> Iterator[None]:
    """Keep standard output clean of a debugging line that HiGHS 1.11 prints regardless of its options."""
    with _STDOUT, Path(os.devnull).open("w") as nowhere:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
