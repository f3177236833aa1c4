"""Exact search of the few candidates that can still belong to a better plan: layer by layer, all partial plans at once.

Multiple-choice knapsack by dynamic programming over undominated states with bounds (Nemhauser & Ullmann 1969; Dyer,
Riha & Walker 1995). A state is a partial plan: its cost, its loss, and how far it is above the Lagrangian bound, the
sum of the reduced costs r of its candidates. It is dropped

- above the bound by more than the best known plan is (no completion of it is better),
- beyond a limit even with the cheapest candidates in the layers to come,
- where another state costs and loses no more (only looked for under a single limit, where sorting finds them).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rankopt.core.dual import Array, Positions
from rankopt.core.problem import ProblemTable


class States(NamedTuple):
    """Partial plans, all of the same layers.

    Attributes:
        above: (s,) sum of reduced costs.
        losses: (s,) sum of losses.
        costs: (k, s) sum of costs.
    """

    above: Array
    losses: Array
    costs: Array

    def take(self, kept: Positions) -> States:
        """The states at these indices.

        Args:
            kept: The indices.
        """
        return States(self.above[kept], self.losses[kept], self.costs[:, kept])


def best_plan(core: ProblemTable, reduced: Array, gap: float, width: int) -> tuple[Positions | None, bool]:
    """Find the plan of least loss among those at most `gap` above the bound.

    Args:
        core: The problem; excluded candidates have an infinite loss.
        reduced: (n, m) reduced costs, 0 for each layer's minimiser.
        gap: Greatest sum of reduced costs of a plan.
        width: Most states to keep after a layer: those nearest to the bound.

    Returns:
        The plan, None if there is none, and whether all states were kept: then no better plan exists.
    """
    allowed = np.where(np.isfinite(core.losses), core.costs, math.inf)
    # Layers in which a second choice costs most come first: few states until the last layers.
    order = np.argsort(-np.sort(reduced, axis=1)[:, min(1, reduced.shape[1] - 1)], kind="stable")
    least = allowed.min(axis=2)[:, order]
    to_come = least.sum(axis=1, keepdims=True) - least.cumsum(axis=1)
    states = States(np.zeros(1), np.zeros(1), np.zeros((len(core.room), 1)))
    steps, complete = [], True
    for layer, later in zip(order, to_come.T, strict=True):
        choices = np.flatnonzero(np.isfinite(core.losses[layer]))
        states = States(
            np.add.outer(states.above, reduced[layer, choices]).ravel(),
            np.add.outer(states.losses, core.losses[layer, choices]).ravel(),
            (states.costs[:, :, None] + core.costs[:, layer][:, None, choices]).reshape(len(core.room), -1),
        )
        fits = (states.costs <= (core.room - later)[:, None]).all(axis=0)
        kept = _undominated(states, np.flatnonzero(fits & (states.above <= gap)))
        if len(kept) > width:
            kept, complete = kept[np.argpartition(states.above[kept], width)[:width]], False
        if not len(kept):
            return None, complete
        steps.append((layer, kept // len(choices), choices[kept % len(choices)]))
        states = states.take(kept)
    return _plan(steps, int(states.losses.argmin())), complete


def _undominated(states: States, kept: Positions) -> Positions:
    """Under one limit: the states that lose less than every cheaper one."""
    if len(states.costs) > 1 or not len(kept):
        return kept
    by_cost = kept[np.lexsort((states.losses[kept], states.costs[0, kept]))]
    losses = states.losses[by_cost]
    best_before = np.minimum.accumulate(np.concatenate([[math.inf], losses[:-1]]))
    return by_cost[losses < best_before]


def _plan(steps: list[tuple[int, Positions, Positions]], state: int) -> Positions:
    """Follow a state back through its parents."""
    plan = np.empty(len(steps), int)
    for layer, parents, choices in reversed(steps):
        plan[layer] = choices[state]
        state = parents[state]
    return plan
