"""The walk over the layers as a Markov decision process: state, exact mask of actions, observation.

State and episode follow AMC (He et al. 2018, arXiv 1802.03494, section 3.1): one step per layer, and actions that could
no longer meet the budget are masked. An action is a position on the layer's frontier.
"""

from __future__ import annotations

import math

import numpy as np

from rankopt.core.problem import Problem
from rankopt.core.records import Layer, Proposal
from rankopt.strategies.allocation import allocate

COMPLETIONS = 64  # least completions kept per layer; more can only be needed with several limits


class LayerMdp:
    """The decision process of choosing one candidate after the other within the limits.

    `spent` (limits,) is the cost of the layers walked so far, in the order of the problem's limits.

    Every allowed action can be completed within all limits together. With one limit, every masked action cannot; with
    several this holds as long as no layer has more than `COMPLETIONS` Pareto-least completions. Beyond, the mask may
    exclude too much, but always leaves an action.
    """

    def __init__(self, problem: Problem) -> None:
        """Precompute the masks.

        Args:
            problem: The candidates of every layer, and the limits.

        Raises:
            BudgetError: If the limits cannot be met.
        """
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
        """Tell which positions of a layer can still be completed within the limits.

        Args:
            layer: Index of the layer.
            spent: Cost of the layers before it, (limits,).

        Returns:
            Bools, (len(frontier),).
        """
        after = spent + self.costs[layer]
        return (after[:, None] + self.completions[layer + 1] <= self.room).all(2).any(1)

    def observation(self, layer: int, spent: np.ndarray, last: float) -> np.ndarray:
        """Describe the state by AMC's eleven features and the layer's frontier. Costs are shares of the layers' room.

        Args:
            layer: Index of the layer; the number of layers after the last one, whose description is then 0.
            spent: Cost of the layers before it, (limits,).
            last: Relative position of the last action.

        Returns:
            A float32 vector of the same length for every layer.
        """
        done, room = layer == len(self.costs), np.maximum(self.room, 1)
        saved = self.dense[:layer].sum(0) - spent
        rest = self.dense[layer + 1 :].sum(0)
        walk = [layer / max(len(self.costs), 1), last, *saved / room, *rest / room, *(self.room - spent) / room]
        shape, frontier = [0.0] * (6 + len(room)), np.zeros((2 + len(room), self.width))
        if not done:
            shape = [*shape_features(self.problem.layers[layer]), *self.dense[layer] / room]
            scale = max(self.problem.loss(self.start), 1e-12)
            rows = [self.errors[layer], self.losses[layer] / scale, *(self.costs[layer] / room).T]
            frontier[:, : len(rows[0])] = rows
        return np.concatenate([walk, shape, frontier.ravel()]).astype(np.float32)

    def _least_completions(self) -> list[np.ndarray]:
        """Per layer the Pareto-least costs of it and all after it, each (count, limits); zero after the last."""
        least = [np.zeros((1, len(self.room)), np.int64)]
        known = least[0]  # the exact plan's completion is always kept, so that some action is always allowed
        for costs, at in zip(self.costs[::-1], self.start[::-1], strict=True):
            sums = pareto_least((pareto_least(costs)[:, None] + least[0]).reshape(-1, len(self.room)))
            known = known + costs[at]
            if len(sums) > COMPLETIONS:
                sums = np.vstack([sums[np.linspace(0, len(sums) - 1, COMPLETIONS).round().astype(int)], known])
            least.insert(0, sums)
        return least


def pareto_least(points: np.ndarray) -> np.ndarray:
    """Find the Pareto-least points.

    Args:
        points: Points (count, metrics).

    Returns:
        The distinct points that no other point is less than or equal to in every metric.
    """
    kept: list[np.ndarray] = []
    for point in np.unique(points, axis=0):  # in lexicographic order only earlier ones can dominate
        if not kept or not (np.array(kept) <= point).all(1).any():
            kept.append(point)
    return np.array(kept)


def shape_features(layer: Layer) -> list[float]:
    """Describe a layer's kind and shape by six numbers of about 0 to 1.

    Args:
        layer: The layer.
    """
    logs = [math.log2(x) / 10 for x in (layer.shape[0], layer.in_channels, *layer.kernel, layer.groups)]
    return [float(layer.kind in ("Linear", "Conv1D")), *logs]
