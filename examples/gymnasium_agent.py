"""An agent of another library as a strategy: MaskablePPO of sb3-contrib learns on the layer walk.

It trains on the predicted losses, proposes the walks that it has learned, and is used like any strategy:
`rankopt search digits --budget params=0.3 --strategy gymnasium_agent:Outside` in this folder.

Needs: pip install 'rankopt[rl]' sb3-contrib
Run: python examples/gymnasium_agent.py
"""

from __future__ import annotations

import numpy as np
import torch
from sb3_contrib import MaskablePPO

import rankopt
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.experiments.digits import digits
from rankopt.strategies.base import Strategy
from rankopt.strategies.gym_environment import LayerWalk


class Outside(Strategy):
    """Walks as MaskablePPO has learned it on predicted losses; first its best walk, then others that it draws."""

    name = "outside"

    def __init__(self, problem: Problem, seed: int = 0, *, steps: int = 2048) -> None:
        super().__init__(problem, seed)
        self.environment = LayerWalk(problem, problem.loss)
        self.agent = MaskablePPO("MlpPolicy", self.environment, n_steps=256, seed=seed, device="cpu")
        self.agent.learn(steps)

    def propose(self, number: int) -> Proposal | None:
        torch.manual_seed(int(np.random.default_rng([self.seed, number]).integers(2**62)))
        observation, info = self.environment.reset()
        while len(info["proposal"]) < len(self.problem.layers):
            masks = self.environment.action_masks()
            action, _ = self.agent.predict(observation, action_masks=masks, deterministic=number == 0)
            observation, _, _, _, info = self.environment.step(action)
        return info["proposal"]


def main() -> None:
    task = digits()
    result = rankopt.compress(
        task,
        budget={"params": 0.3},
        strategy=Outside,
        trials=5,
        space=rankopt.SearchSpace(families=("svd_out", "cp_merged"), points=6, steps=20),  # quick
    )
    print(result.summary())


if __name__ == "__main__":
    main()
