"""The walk over the layers as a Markov decision process: state, exact mask of actions, observation. Plain numpy.

State and episode follow AMC (He et al. 2018, arXiv 1802.03494, section 3.1): one step per layer, the budget kept by
forbidding what could no longer meet it. An action is a frontier position.
"""

from __future__ import annotations

import math

import numpy as np

from rankopt.core.problem import Problem
from rankopt.core.records import Layer, Proposal
from rankopt.strategies.allocation import allocate

COMPLETIONS = 64  # least completions kept per layer; only several limits at once can need more


class LayerMdp:
    """`spent` (limits,) is what the layers walked so far cost, in the order of the problem's limits.

    An allowed action can always be completed within all limits together. With one limit the mask is also complete:
    what it forbids cannot be completed; with several, as long as no layer has more than COMPLETIONS Pareto-least
    completions (otherwise it may forbid too much, never so much that nothing is left).
    Raises BudgetError if the limits cannot be met.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.start: Proposal = allocate(problem).proposal  # the exact plan under predicted losses
        metrics = [limit.metric for limit in problem.limits]
        self.room = problem.table.room.astype(np.int64)
        self.dense = np.array([[x.cost[m] for m in metrics] for x in problem.layers], np.int64)
        self.costs = [np.array([[c.cost[m] for m in metrics] for c in f], np.int64) for f in problem.frontiers]
        self.losses = [np.array([c.loss for c in f]) for f in problem.frontiers]
        self.errors = [np.array([c.error for c in f]) for f in problem.frontiers]
        self.width = max(map(len, self.costs), default=1)
        self.completions = self._least_completions()

    def mask(self, layer: int, spent: np.ndarray) -> np.ndarray:
        """Which positions of the layer's frontier can still be completed within the limits (len(frontier),), bool."""
        after = spent + self.costs[layer]
        return (after[:, None] + self.completions[layer + 1] <= self.room).all(2).any(1)

    def observation(self, layer: int, spent: np.ndarray, last: float) -> np.ndarray:
        """AMC's eleven features and the layer's frontier: a vector of the same length for every layer, float32.

        last: the relative position of the last action. Costs are shares of the free layers' room; after the last
        layer, what describes a layer is 0.
        """
        done, room = layer == len(self.costs), np.maximum(self.room, 1)
        saved = self.dense[:layer].sum(0) - spent
        rest = self.dense[layer + 1 :].sum(0)
        walk = [layer / max(len(self.costs), 1), last, *saved / room, *rest / room, *(self.room - spent) / room]
        about = [0.0] * (6 + len(room)) if done else [*_shape(self.problem.layers[layer]), *self.dense[layer] / room]
        frontier = np.zeros((2 + len(room), self.width))
        if not done:
            scale = max(self.problem.loss(self.start), 1e-12)
            rows = [self.errors[layer], self.losses[layer] / scale, *(self.costs[layer] / room).T]
            frontier[:, : len(rows[0])] = rows
        return np.concatenate([walk, about, frontier.ravel()]).astype(np.float32)

    def _least_completions(self) -> list[np.ndarray]:
        """Per layer the Pareto-least costs of it and all after it, each (count, limits); zero after the last."""
        least = [np.zeros((1, len(self.room)), np.int64)]
        known = least[0]  # what the exact plan costs from here on: a way that stays open however many are dropped
        for costs, at in zip(self.costs[::-1], self.start[::-1], strict=True):
            sums = pareto_least((pareto_least(costs)[:, None] + least[0]).reshape(-1, len(self.room)))
            known = known + costs[at]
            if len(sums) > COMPLETIONS:
                sums = np.vstack([sums[np.linspace(0, len(sums) - 1, COMPLETIONS).round().astype(int)], known])
            least.insert(0, sums)
        return least


def pareto_least(points: np.ndarray) -> np.ndarray:
    """The points (count, metrics) that no other is at most equal to in every metric; each once."""
    kept: list[np.ndarray] = []
    for point in np.unique(points, axis=0):  # in lexicographic order only earlier ones can dominate
        if not kept or not (np.array(kept) <= point).all(1).any():
            kept.append(point)
    return np.array(kept)


def _shape(layer: Layer) -> list[float]:
    """Kind and shape, about 0 to 1."""
    logs = [math.log2(x) / 10 for x in (layer.shape[0], layer.in_channels, *layer.kernel, layer.groups)]
    return [float(layer.kind == "Linear"), *logs]
