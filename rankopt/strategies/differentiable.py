"""Differentiable ranks: where each bond is cut off is a parameter, learnt together with the weights.

As in Dobi-SVD (Wang et al. 2025) and in the rank search of HALOC (Xiao et al. 2023), the components of a bond are put
in order of their size, and component number r = 0, 1, ... has the gate

    m_r = sigmoid((k − r − ½) / τ)

of which the cut k is learnt: k components are kept, softly. After every optimiser step the cuts are moved down in
Adam's own metric, k ← k − lr λ cost / √v, with the least λ at which the ranks cost no more than a target, which falls
from the start's cost to the budget. So k settles where one more component gains as much as it costs, at the same λ in
all layers. The width τ falls from WIDTH of a bond's components (and at least SHARPEST) to SHARPEST, so that what is cut
off in the end contributes little by then.

After the share SOFT of the steps, components are taken by their gates while they fit the budget, and the network of
these is trained for the rest of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.core.records import Rank
from rankopt.strategies.gated_training import GatedRun, GatedStrategy
from rankopt.strategies.gates import Bond, Gated, Slices, adam_spread, take_while_they_fit
from rankopt.strategies.trained import RECIPE

SOFT = 0.6  # share of the steps that are made with soft ranks


CUT_RATE = 1e-2  # Adam's learning rate of the cuts, as shares of their bonds


WIDTH, SHARPEST = 0.05, 0.2  # τ at first, as a share of a bond's components; and in the end


class Truncation(nn.Module):
    """Gates that fall from 1 to 0 around a cut.

    Attributes:
        cut: k / R, a parameter.
        order: The number r of each component, (R,).
        width: τ.

    Args:
        order: The number of each component, in the dtype of the gates.
    """

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.first = self.width = max(WIDTH * len(order), SHARPEST)
        self.cut = nn.Parameter(order.new_tensor(1 + self.width / len(order)))

    def narrow(self, done: float) -> None:
        """Make the slope narrower.

        Args:
            done: The share of the steps that are made; at 1 the width is SHARPEST.
        """
        self.width = self.first + (SHARPEST - self.first) * done

    def logits(self) -> Tensor:
        """(k − r − ½) / τ of each component, (R,)."""
        return (self.cut * len(self.order) - self.order - 0.5) / self.width

    def forward(self) -> Tensor:
        """The gates, (R,)."""
        return torch.sigmoid(self.logits())


class SoftBond(Bond):
    """A bond that is cut off softly; its components are in order of the norms of what they contribute."""

    def __init__(self, slices: Slices, components: int) -> None:
        super().__init__(slices, components)
        self.mask = Truncation(self.scale().argsort(descending=True).argsort().to(slices[0][0].dtype))

    def kept(self, cut: float) -> int:
        """The number of components before a cut.

        Args:
            cut: The cut, k / R.
        """
        return min(len(self), round(len(self) * cut))


class Differentiable(GatedStrategy):
    """Learns where each bond is cut off, with the weights and under the budget, and delivers the network."""

    name = "differentiable"
    gated = SOFT
    bond = SoftBond

    def __init__(
        self,
        problem: Any,
        seed: int = 0,
        *,
        start: str = "allocation",
        steps: int = 400,
        rate: float = RECIPE.rate,
    ) -> None:
        """Check the options.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Seed of the training.
            start: "allocation", at more than the budget; or "dense", the largest candidate of every layer.
            steps: Training steps, with soft ranks and after.
            rate: Largest learning rate of the weights.

        Raises:
            RankoptError: For an option out of range.
        """
        super().__init__(problem, seed, start, steps, rate)

    def run(self, layers: Sequence[Gated[SoftBond]], steps: int) -> Run:
        return Run(self.problem, layers, steps)


class Run(GatedRun[SoftBond]):
    """The cuts in one training run."""

    rate = CUT_RATE

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Narrow the gates' slope, and move the cuts down to the target.

        Args:
            step: Number of the step, from 0.
        """
        moves = [[self._move(n, i, b) for i, b in enumerate(x.bonds)] for n, x in enumerate(self.layers)]
        cuts = [[float(b.mask.cut) for b in x.bonds] for x in self.layers]

        def ranks_at(price: float) -> list[Rank]:
            return [
                x.valid([b.kept(cut - price * move) for b, cut, move in zip(x.bonds, *of_layer, strict=True)])
                for x, *of_layer in zip(self.layers, cuts, moves, strict=True)
            ]

        price = self.pressure.step(step, ranks_at)
        for x, of_layer in zip(self.layers, moves, strict=True):
            for bond, move in zip(x.bonds, of_layer, strict=True):
                bond.mask.narrow((step + 1) / self.steps)
                bond.mask.cut.sub_(price * move).clamp_(1 / len(bond), 1 + bond.mask.width / len(bond))

    def _move(self, layer: int, index: int, bond: SoftBond) -> float:
        """How far a proximal step moves a cut down for λ = 1."""
        cost = len(bond) * self.pressure.share_of_one(layer, index)
        return CUT_RATE * cost / float(adam_spread(self.state, bond.mask.cut))

    @torch.no_grad()
    def outcome(self) -> tuple[list[list[Tensor]], tuple[Rank, ...]]:
        """Choose what remains: components by their gates while they fit.

        Returns:
            The value of each component, by layer and bond, and the rank of each layer.
        """
        scores = [[b.mask.logits() for b in x.bonds] for x in self.layers]
        return scores, take_while_they_fit(self.layers, scores, self.pressure.fits)
