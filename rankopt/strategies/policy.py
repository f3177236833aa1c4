"""A policy network over the walk of the layers, learned by proximal policy optimisation.

The network scores every frontier position of a layer from features of the position and of the state; the weights are
the same for all positions, layers and models, so that it takes any number of them. A second head estimates the value of
the state. Training is PPO (Schulman et al. 2017, arXiv 1707.06347) with generalised advantages (Schulman et al. 2016)
and masked actions (Huang & Ontañón 2022).

sb3-contrib's MaskablePPO does the same with a fixed number of actions, owns the loop (it calls the environment, a
strategy is asked and told), and cannot be restored from the trials told: so PPO is written out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankopt.core.errors import RankoptError
from rankopt.core.files import open_tensors, write_beside
from rankopt.core.text import one_line, reason

VERSION = "1"  # of policy files: it changes with the features or the network


STATE_FEATURES, POSITION_FEATURES, WIDTH = 16, 8, 32


CLIP, LAMBDA = 0.2, 0.95


EPOCHS, MINIBATCH = 3, 256  # passes over the steps, and steps in a minibatch


LEARNING_RATE, ENTROPY, VALUE = 3e-3, 0.003, 0.5


class Policy(nn.Module):
    """Scores of positions, and the value of the state. Untrained, all positions score alike."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.state = nn.Linear(POSITION_FEATURES, WIDTH), nn.Linear(STATE_FEATURES, WIDTH)
        self.hidden, self.score = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.value_hidden, self.value = nn.Linear(STATE_FEATURES, WIDTH), nn.Linear(WIDTH, 1)
        for last in (self.score, self.value):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, positions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Score positions.

        Args:
            positions: Features of the positions, (steps, positions, POSITION_FEATURES).
            state: Features of the states, (steps, STATE_FEATURES).

        Returns:
            Scores (steps, positions), and values (steps,).
        """
        seen = torch.tanh(self.position(positions) + self.state(state)[:, None])
        scores = self.score(torch.tanh(self.hidden(seen)))[..., 0]
        return scores, self.value(torch.tanh(self.value_hidden(state)))[:, 0]


def new_policy(seed: int) -> Policy:
    """Make an untrained policy.

    Args:
        seed: Seed of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy()


class Steps(NamedTuple):
    """Steps of walks: tensors whose first axes are (layers, walks), or all steps in one."""

    positions: Tensor
    state: Tensor
    mask: Tensor
    action: Tensor
    log_probability: Tensor
    value: Tensor
    reward: Tensor

    @staticmethod
    def stacked(steps: list[Steps]) -> Steps:
        """Stack steps, one layer after the other.

        Args:
            steps: The steps of each layer.
        """
        return Steps(*map(torch.stack, zip(*steps, strict=True)))


def choose(scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Choose among the allowed positions.

    Args:
        scores: Scores (steps, positions).
        mask: Which are allowed.
        generator: Source of randomness; None chooses the highest score.

    Returns:
        The positions (steps,), and the logarithms of their probabilities.
    """
    logs = torch.log_softmax(scores.masked_fill(~mask, -torch.inf), 1)
    noise = 0.0 if generator is None else -torch.log(-torch.log(torch.rand(logs.shape, generator=generator) + 1e-20))
    action = (logs + noise).argmax(1)
    return action, logs.gather(1, action[:, None])[:, 0]


Rewards = Callable[[Tensor], Tensor]
"""Rewards (layers, walks) of a batch of walks -> those that the policy is to learn from."""


class PPO:
    """Improves a policy by the steps of its walks."""

    def __init__(self, policy: Policy, seed: int) -> None:
        """Set up the optimiser.

        Args:
            policy: The policy, which is changed in place.
            seed: Seed of the order of minibatches.
        """
        self.policy, self.generator = policy, torch.Generator().manual_seed(seed)
        self.adam = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)

    def update(self, steps: Steps, rate: float = 1.0) -> None:
        """Make one update.

        Args:
            steps: The steps of walks that the policy as it is has made, (layers, walks).
            rate: Factor of the learning rate and of the bonus for entropy.
        """
        for group in self.adam.param_groups:
            group["lr"] = rate * LEARNING_RATE
        advantage = advantages(steps.reward, steps.value)
        target = advantage + steps.value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        data = [x.flatten(0, 1) for x in (*steps, advantage, target)]
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(data[0]), generator=self.generator).split(MINIBATCH):
                self._step(Steps(*(x[batch] for x in data[:-2])), data[-2][batch], data[-1][batch], rate)

    def _step(self, steps: Steps, advantage: Tensor, target: Tensor, rate: float) -> None:
        scores, value = self.policy(steps.positions, steps.state)
        logs = torch.log_softmax(scores.masked_fill(~steps.mask, -1e9), 1)
        ratio = torch.exp(logs.gather(1, steps.action[:, None])[:, 0] - steps.log_probability)
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        entropy = -(logs.exp() * logs.masked_fill(~steps.mask, 0)).sum(1).mean()
        loss = VALUE * ((value - target) ** 2).mean() - gain - rate * ENTROPY * entropy
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
        self.adam.step()


def advantages(reward: Tensor, value: Tensor) -> Tensor:
    """Compute generalised advantages without discount.

    Args:
        reward: Rewards (layers, walks).
        value: Values of the states before (layers, walks).
    """
    following = torch.cat([value[1:], torch.zeros_like(value[:1])])
    surprise = reward + following - value
    sums, total = [], torch.zeros_like(surprise[0])
    for row in surprise.flip(0):
        total = row + LAMBDA * total
        sums.append(total)
    return torch.stack(sums[::-1])


# --- files -----------------------------------------------------------------------------------------


def save_policy(policy: Policy, path: Path) -> None:
    """Save a policy.

    Args:
        policy: The policy.
        path: The file, safetensors.

    Raises:
        RankoptError: It cannot be written.
    """
    weights = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    write_beside(path, lambda p: save_file(weights, p, {"rankopt_policy": VERSION}))


def load_policy(path: Path) -> Policy:
    """Load a policy.

    Args:
        path: The file.

    Raises:
        RankoptError: It is missing or damaged, no policy, or one of another version.
    """
    remedy = "train one by --strategy rl --option save=FILE"
    try:
        with open_tensors(path) as file:
            version = (file.metadata() or {}).get("rankopt_policy")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError) as error:
        raise RankoptError(f"policy {path} cannot be read ({reason(error)}): {remedy}") from error
    if version is None:
        raise RankoptError(f"{path} is no policy of strategy 'rl': {remedy}")
    policy = Policy()
    if version != VERSION:
        raise RankoptError(f"policy {path} is of version {one_line(version)}, this rankopt reads {VERSION}: {remedy}")
    own, found = ({k: (v.shape, v.dtype) for k, v in x.items()} for x in (policy.state_dict(), weights))
    if found != own or not all(math.isfinite(v.sum()) for v in weights.values()):
        raise RankoptError(f"policy {path} is damaged (other weights than a policy has): {remedy}")
    policy.load_state_dict(weights)
    return policy
