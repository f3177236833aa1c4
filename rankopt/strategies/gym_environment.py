"""The layer walk as a gymnasium environment, so that any library's agent can train on it (extra `rl`)."""

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
    """One step per free layer; the action is a frontier position, padded to the longest frontier.

    evaluate: proposal -> objective, minimised; the reward is minus it after the last layer, 0 before.
    An action that the mask forbids is clipped to the nearest allowed one, as AMC clips ratios; agents that know masks
    read `action_masks()` (the convention of sb3-contrib's MaskablePPO). info["proposal"]: the positions so far.
    Raises BudgetError if the limits cannot be met, RankoptError if no layer is free.
    """

    proposal: Proposal
    spent: np.ndarray
    last: float

    def __init__(self, problem: Problem, evaluate: Callable[[Proposal], float]) -> None:
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
        """(longest frontier,) bool: what can still be completed within the limits."""
        mask = self.walk.mask(len(self.proposal), self.spent)
        return np.pad(mask, (0, self.walk.width - len(mask)))

    def _begin(self) -> None:
        self.proposal = ()
        self.spent, self.last = np.zeros_like(self.walk.room), 1.0

    def _observe(self) -> np.ndarray:
        return self.walk.observation(len(self.proposal), self.spent, self.last)
