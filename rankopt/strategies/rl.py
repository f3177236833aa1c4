"""Reinforcement learning: a policy network that walks the layers, learned on predicted and then on measured losses.

Model-based policy optimisation (Sutton 1991's Dyna; Janner et al. 2019): measured objectives are few and slow, walks
through a model of them are many and cheap. The model is a weighted sum of the layers' predicted losses.

1. *Before the first ask* PPO trains the policy on the predicted losses, under random budgets and random weights of the
   layers, so that it learns to react to both. A saved policy takes the place of this training; it may come from another
   budget or network.
2. *An ask* draws weights from their posterior given the trials, lets the policy make some walks under them, and takes
   the one of the least loss under these weights (sampling decoding: Bello et al. 2017, arXiv 1611.09940).
3. *After every batch of trials* PPO goes on under weights from the posterior, at the search's own budget.

Neither plans of `knapsack` nor filling up are used: what the agent proposes first, it has learned by itself. Everything
is a function of the trials told, so that several plans may be evaluated at once and a stopped search can go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.progress import silent
from rankopt.core.records import Proposal
from rankopt.core.timing import threads
from rankopt.strategies.layer_walk import LayerMdp
from rankopt.strategies.policy import PPO, load_policy, new_policy, save_policy
from rankopt.strategies.thompson import BOLDNESS, WeighsLosses, log_weights
from rankopt.strategies.walks import Context, Walks

WALKS = 64  # in one update


ADAPTATIONS = 4  # updates after a batch of trials


GENTLE = 0.3  # learning rate of these, in that of the training before


TRIES = 10  # rounds of walks per ask in search of a new plan, drawn ever more evenly


SPREAD, NOISE = 0.4, 0.03  # prior of the weights, and of the objective's model, as in `thompson`


class Agent(WeighsLosses):
    """Proposes the walks of a policy network that learns by proximal policy optimisation."""

    name = "rl"

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        *,
        walks: int = 3072,
        batch: int = 5,
        policy: str = "",
        save: str = "",
    ) -> None:
        """Set up the decision process.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: The same seed gives the same proposals.
            walks: Walks on predicted losses that a new policy is trained by; 0 leaves it untrained.
            batch: Trials after which the policy learns from them.
            policy: File of a policy to start from, instead of training one.
            save: File to save the policy to, after training and after every batch.

        Raises:
            RankoptError: If an option is out of range, or the file is no policy of this version.
        """
        super().__init__(problem, seed)
        for option, value, least in (("walks", walks, 0), ("batch", batch, 1)):
            if value < least:
                raise RankoptError(f"strategy 'rl': option {option} is {value}: give {least} or more")
        self.walks, self.batch, self.save = walks, batch, save
        self.environment = Walks(LayerMdp(problem))
        self.policy = load_policy(Path(policy)) if policy else new_policy(seed)
        self.trained, self.batches = bool(policy), 0

    def measure(self, prepared: Any, progress: Any) -> None:
        self.train(progress)

    def train(self, progress: Any = silent) -> list[float]:
        """Train the policy on predicted losses, unless it is.

        Args:
            progress: Shows long work.

        Returns:
            The mean return of the walks before each update.
        """
        if self.trained or not self.problem.layers:
            return []
        self.trained, returns = True, []
        generator, updates = torch.Generator().manual_seed(self.seed), self.walks // WALKS
        ppo = PPO(self.policy, self.seed)
        with threads(1):
            for i in progress(range(updates), "training the policy", updates):
                context = self.environment.training_context(WALKS, generator)
                returns.append(self._learn(ppo, context, generator, 1 - i / updates))
        self._save()
        return returns

    def propose(self, number: int) -> Proposal | None:
        self.train()
        rng = np.random.default_rng([self.seed, number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with threads(1):
            self._adapt()
            mean, root = self._posterior(len(self.results))
            drawn = mean + (BOLDNESS * root @ rng.standard_normal(len(mean)) if number else 0)
            context = self._context(np.repeat(drawn[None], WALKS, 0))
            for attempt in range(TRIES):
                walks, steps = self.environment.run(self.policy, context, generator, 2.0 ** (attempt - 1))
                best = steps.reward.double().sum(0).argsort(descending=True, stable=True)
                plans = [tuple(walk) for walk in walks[best].tolist()]
                if plan := next((p for p in plans if p not in self.seen), None):
                    return plan
        return plans[0]

    def _adapt(self) -> None:
        """Learn from the batches of trials that were told since."""
        before = self.batches
        while self.batches < len(self.results) // self.batch:
            self.batches += 1
            mean, root = self._posterior(self.batches * self.batch)
            generator = torch.Generator().manual_seed(self.seed + self.batches)
            ppo = PPO(self.policy, self.seed + self.batches)
            for _ in range(ADAPTATIONS):
                noise = torch.randn(WALKS, len(mean), generator=generator, dtype=torch.float64).numpy()
                self._learn(ppo, self._context(mean + noise @ root.T), generator, GENTLE)
        if self.batches > before:
            self._save()

    def _learn(self, ppo: PPO, context: Context, generator: torch.Generator, rate: float) -> float:
        """One update of PPO from walks under a context; the walks' mean return."""
        _, steps = self.environment.run(self.policy, context, generator)
        ppo.update(steps, rate)
        return float(steps.reward.sum(0).mean())

    def _posterior(self, trials: int) -> tuple[np.ndarray, np.ndarray]:
        return log_weights(self.results[:trials], len(self.problem.layers), SPREAD, NOISE)

    def _context(self, log_weights: np.ndarray) -> Context:
        """The search's own budget under weights (walks, layers + 1), of which the last belongs to an offset."""
        weights = torch.from_numpy(np.exp(log_weights[:, :-1]))
        return Context(weights, self.environment.room.expand(len(weights), -1))

    def _save(self) -> None:
        if self.save:
            save_policy(self.policy, Path(self.save))
