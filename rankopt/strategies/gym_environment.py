"""The layer walk as a gymnasium environment, on which agents of other libraries can train (extra `rl`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.strategies.layer_walk import LayerMdp


class LayerWalk(gymnasium.Env[np.ndarray, np.int64]):
    """An episode chooses one frontier position per free layer, within the limits.

    Actions are positions, padded to the longest frontier. A masked action is replaced by the nearest allowed one, as
    AMC clips ratios; agents that support masks read `action_masks()`, by the convention of sb3-contrib's MaskablePPO.
    The reward is minus the objective after the last layer, and 0 before. `info["proposal"]` holds the positions so far.
    """

    proposal: Proposal
    spent: np.ndarray
    last: float

    def __init__(self, problem: Problem, evaluate: Callable[[Proposal], float]) -> None:
        """Set up the environment.

        Args:
            problem: The candidates of every layer, and the limits.
            evaluate: Proposal -> objective, minimised.

        Raises:
            BudgetError: If the limits cannot be met.
            RankoptError: If no layer is free.
        """
        if not problem.layers:
            raise RankoptError("0 layers are free: nothing to walk; allow more in the search space")
        self.walk, self.evaluate = LayerMdp(problem), evaluate
        self.action_space: Any = gymnasium.spaces.Discrete(self.walk.width)
        self._begin()
        self.observation_space: Any = gymnasium.spaces.Box(-np.inf, np.inf, self._observe().shape, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._begin()
        return self._observe(), {"proposal": ()}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        allowed = np.flatnonzero(self.action_masks())
        at = int(allowed[np.abs(allowed - int(action)).argmin()])
        costs = self.walk.costs[len(self.proposal)]
        self.spent, self.last = self.spent + costs[at], at / max(len(costs) - 1, 1)
        self.proposal = (*self.proposal, at)
        done = len(self.proposal) == len(self.walk.costs)
        reward = -float(self.evaluate(self.proposal)) if done else 0.0
        return self._observe(), reward, done, False, {"proposal": self.proposal}

    def action_masks(self) -> np.ndarray:
        """Which positions can still be completed within the limits: bools, (longest frontier,); none after the end."""
        if len(self.proposal) == len(self.walk.costs):
            return np.zeros(self.walk.width, bool)
        mask = self.walk.mask(len(self.proposal), self.spent)
        return np.pad(mask, (0, self.walk.width - len(mask)))

    def _begin(self) -> None:
        self.proposal = ()
        self.spent, self.last = np.zeros_like(self.walk.room), 1.0

    def _observe(self) -> np.ndarray:
        return self.walk.observation(len(self.proposal), self.spent, self.last)


class ContinuousLayerWalk(gymnasium.ActionWrapper[np.ndarray, Any, np.int64]):
    """The layer walk with actions from 0 (the cheapest candidate) to 1 (dense), for DDPG and its like, as in AMC."""

    def __init__(self, environment: LayerWalk) -> None:
        """Wrap an environment.

        Args:
            environment: The layer walk.
        """
        super().__init__(environment)
        self.layers = environment
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def action(self, action: Any) -> np.int64:
        """Convert a relative position to the nearest position on the layer's frontier.

        Args:
            action: The relative position, (1,).
        """
        size = len(self.layers.walk.costs[len(self.layers.proposal)])
        return np.int64(round(float(np.clip(np.ravel(action)[0], 0, 1)) * (size - 1)))
