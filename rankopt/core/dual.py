"""Lagrangian bounds of a problem: prices for its limits, at which each layer can be looked at alone.

Pricing the limits at λ ≥ 0 splits the problem into layers: L(λ) = Σ_i min_j (c + λ·w)[i, j] − λ·room bounds the loss of
every plan that fits from below. `rankopt.strategies.allocation` describes what is made of it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rankopt.core.problem import ProblemTable

Array = NDArray[np.float64]


Positions = NDArray[np.int64]
"""A plan as an array: one frontier index per layer, (n,)."""


CUTS = 200  # limit of cutting planes; about a dozen are needed for one limit


MAX_PRICE = 1e6  # keeps the first linear programs bounded; in loss of all layers per cost of all layers


def pick(values: Array, plan: Positions) -> Array:
    """Take the values at a plan's positions.

    Args:
        values: (..., n, m).
        plan: The positions.

    Returns:
        (..., n).
    """
    return values[..., np.arange(len(plan)), plan]


def plan_loss(table: ProblemTable, plan: Positions) -> float:
    """The loss of a plan.

    Args:
        table: The problem.
        plan: The positions.
    """
    return math.fsum(pick(table.losses, plan))


def excess_of(table: ProblemTable, plan: Positions) -> Array:
    """By how much a plan exceeds each limit, (k,); negative where room is left.

    Args:
        table: The problem.
        plan: The positions.
    """
    return pick(table.costs, plan).sum(axis=-1) - table.room


def drop_impossible(table: ProblemTable) -> ProblemTable:
    """Exclude candidates that exceed a limit even beside the cheapest candidate of every other layer.

    Args:
        table: The problem.
    """
    least = table.costs.min(axis=-1, keepdims=True)
    spare = table.room - least.sum(axis=(1, 2))
    possible = (table.costs - least <= spare[:, None, None]).all(axis=0)
    return table._replace(losses=np.where(possible, table.losses, math.inf))


def priced(table: ProblemTable, prices: Array) -> Array:
    """The candidates' losses plus the priced costs, c + λ·w: (n, m).

    Args:
        table: The problem.
        prices: λ (k,).
    """
    return table.losses + np.tensordot(prices, table.costs, 1)


def maximise_dual(table: ProblemTable) -> tuple[Positions, Array, float]:
    """Find the plan that attains the greatest bound L(λ), the prices λ (k,) of the limits, and L(λ).

    Cutting planes (Kelley 1960): every plan p bounds L(λ) ≤ loss(p) + λ·excess(p), with equality where p is a
    minimiser. A small linear program finds the λ at which the plans seen so far allow most; its minimiser is the next
    plan. For one limit that is the intersection of two tangents. Any λ ≥ 0 gives a valid bound.

    Args:
        table: The problem.
    """
    reach = np.maximum(table.costs.max(axis=-1).sum(axis=-1), 1)
    available = np.where(np.isfinite(table.losses), table.costs, math.inf)
    seen = [available[limit].argmin(axis=-1) for limit in range(len(reach))]
    worst = plan_loss(table, np.where(np.isfinite(table.losses), table.losses, -math.inf).argmax(axis=1))
    prices, best = np.zeros(len(reach)), (-math.inf, np.zeros(len(reach)), seen[0])
    cuts = [(plan_loss(table, plan), excess_of(table, plan) / reach) for plan in seen]
    for _ in range(CUTS):
        plan = priced(table, prices).argmin(axis=1)
        excess = excess_of(table, plan)
        cuts.append((plan_loss(table, plan), excess / reach))
        best = max(best, (cuts[-1][0] + float(prices @ excess), prices, plan), key=lambda x: x[0])
        losses, excesses = (np.array(x) for x in zip(*cuts, strict=True))
        unit = max(abs(best[0]), 1e-6 * np.abs(losses).max()) or 1.0
        highest = _peak(losses / unit, excesses)
        if highest is None or highest[0] - best[0] / unit <= 1e-9 or best[0] > worst:
            break  # the maximum is reached, or a bound that no plan can meet
        prices = highest[1] * unit / reach
    return best[2], best[1], best[0]


def _peak(losses: Array, excesses: Array) -> tuple[float, Array] | None:
    """The highest point under all cuts loss + λ·excess, and its prices λ (k,) in [0, MAX_PRICE]."""
    if excesses.shape[1] == 1:  # two cuts meet there, or it is an end of the range
        with np.errstate(divide="ignore", invalid="ignore"):
            meets = np.subtract.outer(losses, losses) / -np.subtract.outer(excesses[:, 0], excesses[:, 0])
        inside = meets[(meets > 0) & (meets < MAX_PRICE)]
        prices = np.concatenate([[0.0, MAX_PRICE], inside])
        heights = (losses[:, None] + excesses * prices).min(axis=0)
        return float(heights.max()), prices[[heights.argmax()]]
    from scipy.optimize import linprog  # takes half a second: not at `import rankopt`

    limits = excesses.shape[1]
    found = linprog(
        np.eye(1 + limits)[0] * -1,  # maximise the bound, the first unknown; the others are the prices
        A_ub=np.column_stack([np.ones(len(losses)), -excesses]),
        b_ub=losses,
        bounds=[(None, None), *[(0, MAX_PRICE)] * limits],
    )
    return None if found.x is None else (float(found.x[0]), found.x[1:])
