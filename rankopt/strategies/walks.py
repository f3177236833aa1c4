"""Many walks over the layers at once, on predicted losses: the cheap environment in which a policy is trained.

Every walk has its own budget and its own weights of the layers' losses. The state is that of AMC (He et al. 2018): kind
and shape of the layer, its share of the cost, budget spent and left, the last action; every frontier position is
described by its error, cost and loss. Costs are shares and losses ratios, so that a policy means the same in every
network and budget.

The reward is minus the logarithm of the walk's loss. It is paid out along the walk by potential shaping (Ng, Harada,
Russell 1999), which leaves the best policy what it is: the potential is minus the logarithm of the loss so far plus
what the layers ahead would lose if all paid the same price for cost, the one that the budget left allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankopt.core.problem import padded
from rankopt.strategies.layer_walk import LayerMdp, shape_features
from rankopt.strategies.policy import POSITION_FEATURES, STATE_FEATURES, Policy, Steps, choose

PRICES = 48  # points of the curves "loss of the layers ahead, if each pays this price for its cost"


FINE = 8  # prices between two of these, at which layers' choices are looked up


NEAR = 0.5  # share of the walks in training that have the problem's own budget; the others' are drawn


SPREAD = 0.5  # standard deviation of the logarithmic weights that walks in training have


@dataclass(frozen=True)
class Context:
    """What walks are made under.

    Attributes:
        weights: Weights of the layers' losses, (walks, layers).
        room: What the limits leave for all layers, (walks, limits).
    """

    weights: Tensor
    room: Tensor


class Walks:
    """Walks over one problem's layers."""

    def __init__(self, mdp: LayerMdp) -> None:
        """Put a problem's frontiers into arrays.

        Args:
            mdp: The decision process.
        """
        self.mdp = mdp
        self.sizes = [len(c) for c in mdp.losses]
        losses, errors = (torch.from_numpy(padded([list(x) for x in rows], 0.0)) for rows in (mdp.losses, mdp.errors))
        self.losses, self.errors = losses.clamp(min=0), errors.clamp(0, 1).float()
        costs = np.array([padded([list(c[:, k]) for c in mdp.costs]) for k in range(len(mdp.room))])
        self.costs = torch.from_numpy(costs).movedim(0, 2)  # (layers, positions, limits)
        self.valid = torch.arange(self.losses.shape[1]) < torch.tensor(self.sizes)[:, None]
        self.dense, self.room = (torch.from_numpy(x).double() for x in (mdp.dense, mdp.room))
        self.completions = [torch.from_numpy(c).double() for c in mdp.completions]
        self.shapes = torch.tensor([shape_features(x) for x in mdp.problem.layers])
        self.prices, self.choices = self._choices()

    def _choices(self) -> tuple[Tensor, Tensor]:
        """Logarithmic prices, falling, and each layer's position of least loss + price * cost at them."""
        relative = (self.costs / self.dense.sum(0).clamp(min=1)).sum(2)  # the cost that is priced
        slopes = self._slopes(relative)
        ends = (slopes.min().log() - 1, slopes.max().log() + 1) if len(slopes) else (torch.zeros(()), torch.ones(()))
        prices = torch.linspace(float(ends[1]), float(ends[0]), (PRICES - 1) * FINE + 1, dtype=torch.float64)
        value = self.losses[:, None] + prices.exp()[None, :, None] * relative[:, None]
        return prices, torch.where(self.valid[:, None], value, torch.inf).argmin(2)

    def _slopes(self, relative: Tensor) -> Tensor:
        """Losses per cost between neighbouring positions of all layers, as far as they are above 0."""
        both = self.valid[:, 1:]
        saved, paid = self.losses[:, :-1] - self.losses[:, 1:], relative[:, 1:] - relative[:, :-1]
        return (saved / paid.clamp(min=1e-12))[both & (saved > 0) & (paid > 0)]

    def ahead(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers from each one on lose and cost at falling prices, under weights of their losses.

        Args:
            weights: Weights, (walks, layers).

        Returns:
            Losses (walks, layers + 1, prices), and costs, which rise (walks, layers + 1, prices, limits).
        """
        layers, step = torch.arange(len(self.sizes)), self.prices[0] - self.prices[1]
        # A layer of weight w at a price p chooses as one of weight 1 at p / w.
        shift = (weights.log() / step).round().long() if len(self.prices) > 1 else torch.zeros_like(weights).long()
        at = (FINE * torch.arange(PRICES) + shift[..., None]).clamp(0, len(self.prices) - 1)
        chosen = self.choices[layers[:, None], at]  # (walks, layers, prices)
        losses = weights[..., None] * self.losses[layers[:, None], chosen]
        costs = self.costs[layers[:, None], chosen]
        return _summed_from(losses, 1), _summed_from(costs, 1).cummax(2).values

    def training_context(self, walks: int, generator: torch.Generator) -> Context:
        """Draw weights and budgets to train under.

        Args:
            walks: How many.
            generator: Source of randomness.
        """
        weights = torch.exp(SPREAD * torch.randn(walks, len(self.sizes), generator=generator, dtype=torch.float64))
        least = self.completions[0][torch.randint(len(self.completions[0]), (walks,), generator=generator)]
        share = torch.rand(walks, 1, generator=generator, dtype=torch.float64) ** 2
        drawn = least + (self.dense.sum(0) - least).clamp(min=0) * share
        own = torch.rand(walks, 1, generator=generator) < NEAR
        return Context(weights, torch.where(own, self.room, drawn.floor()))

    def run(
        self, policy: Policy, context: Context, generator: torch.Generator | None, temperature: float = 1.0
    ) -> tuple[Tensor, Steps]:
        """Walk.

        Args:
            policy: Chooses positions.
            context: Budgets and weights.
            generator: Source of randomness; None takes the position of the highest score.
            temperature: Scores are divided by it before positions are drawn.

        Returns:
            The positions (walks, layers), and all steps for training, layer after layer.
        """
        state = _State(self, context)
        steps: list[Steps] = []
        for layer in range(len(self.sizes)):
            positions, described, mask, potential = state.look(layer)
            with torch.no_grad():
                scores, value = policy(positions, described)
            action, log_probability = choose(scores / temperature, mask, generator)
            reward = state.take(layer, action, potential)
            steps.append(Steps(positions, described, mask, action, log_probability, value, reward))
        return torch.stack([s.action for s in steps], 1), Steps.stacked(steps)


class _State:
    """Where a batch of walks stands."""

    def __init__(self, walks: Walks, context: Context) -> None:
        """Begin at the first layer."""
        count = len(context.weights)
        self.walks, self.context = walks, context
        self.ahead_loss, self.ahead_cost = walks.ahead(context.weights)
        self.spent, self.lost = torch.zeros_like(context.room), torch.zeros(count, dtype=torch.float64)
        self.last = torch.ones(count)
        expected, self.share = self._expected(0, context.room[:, None], self.lost[:, None])
        self.floor = (1e-6 * expected).clamp(min=1e-300)
        self.potential = self.start = self._log(expected)[:, 0]

    def look(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of the positions and of the state, the mask, and the logarithmic losses to expect (potentials)."""
        walks, room = self.walks, self.context.room
        costs = walks.costs[layer]
        after = self.spent[:, None] + costs
        completions = walks.completions[layer + 1]
        mask = (after[:, :, None] + completions <= room[:, None, None]).all(3).any(2) & walks.valid[layer]
        own = self.context.weights[:, layer, None] * walks.losses[layer]
        expected, share = self._expected(layer + 1, room[:, None] - after, self.lost[:, None] + own)
        potential = self._log(expected)
        gap = potential - torch.where(mask, potential, torch.inf).min(1, keepdim=True).values
        left = (room - self.spent).clamp(min=1)
        size = walks.sizes[layer]
        relative = torch.arange(costs.shape[0]) / max(size - 1, 1)
        positions = torch.stack(
            [
                walks.errors[layer].expand_as(own),
                relative.expand_as(own),
                (costs / walks.dense[layer].clamp(min=1)).amax(1).expand_as(own),
                (costs / left[:, None]).amax(2).clamp(max=1),
                own / expected.clamp(min=1e-300),
                gap.clamp(0, 4),
                (8 * gap).clamp(0, 4),
                share / PRICES,
            ],
            2,
        ).float()
        return positions, self._described(layer, left), mask, potential

    def take(self, layer: int, action: Tensor, potential: Tensor) -> Tensor:
        """Take an action of each walk; returns the rewards."""
        walks, index = self.walks, action[:, None]
        self.lost = self.lost + self.context.weights[:, layer] * walks.losses[layer][action]
        self.spent = self.spent + walks.costs[layer][action]
        self.last = action / max(walks.sizes[layer] - 1, 1)
        before, self.potential = self.potential, potential.gather(1, index)[:, 0]
        _, self.share = self._expected(layer + 1, (self.context.room - self.spent)[:, None], self.lost[:, None])
        return (before - self.potential).float()

    def _described(self, layer: int, left: Tensor) -> Tensor:
        walks = self.walks
        total, count = walks.dense.sum(0).clamp(min=1), len(left)
        numbers = [
            layer / len(walks.sizes),
            float((walks.dense[layer] / total).amax()),
            float((walks.dense[layer + 1 :].sum(0) / total).amax()),
            *walks.shapes[layer].tolist(),
        ]
        moving = [
            (left / self.context.room.clamp(min=1)).amin(1),
            (self.context.room / total).amin(1),
            ((walks.dense[:layer].sum(0) - self.spent) / total).amax(1),
            self.share[:, 0] / PRICES,
            self.last,
            (self.potential - self.start).clamp(-4, 4),
            self.lost / torch.exp(self.potential),
        ]
        return torch.cat([torch.tensor(numbers).expand(count, -1), torch.stack(moving, 1).float()], 1)

    def _expected(self, layer: int, left: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
        """Loss so far plus that of the layers ahead at one price (walks, positions), and where among the prices."""
        at = torch.full_like(lost, PRICES - 1)
        for limit in range(left.shape[-1]):
            costs = self.ahead_cost[:, layer, :, limit].contiguous()
            low = (torch.searchsorted(costs, left[..., limit].contiguous(), right=True) - 1).clamp(0, PRICES - 2)
            below, above = costs.gather(1, low), costs.gather(1, low + 1)
            at = torch.minimum(at, low + ((left[..., limit] - below) / (above - below).clamp(min=1e-9)).clamp(0, 1))
        low = at.long().clamp(max=PRICES - 2)
        ahead = self.ahead_loss[:, layer]
        first, second = ahead.gather(1, low), ahead.gather(1, low + 1)
        return lost + first + (second - first) * (at - low), at

    def _log(self, loss: Tensor) -> Tensor:
        return torch.log(loss + self.floor)


def _summed_from(x: Tensor, dim: int) -> Tensor:
    """For each layer the sum of it and all after it, and zero after the last, along an axis."""
    sums = x.flip(dim).cumsum(dim).flip(dim)
    return torch.cat([sums, torch.zeros_like(sums.narrow(dim, 0, 1))], dim)


assert (STATE_FEATURES, POSITION_FEATURES) == (16, 8)
