"""Lasso while training: gates on the components of every factorised layer, driven to exact zeros under the budget.

The network starts from the exact allocation at START times the budget, among families whose components can have gates
(`start=dense`: from each layer's largest candidate). A gate is the scale of one component of a bond between two stages:
CP and SVD have one vector of gates, Tucker-2 one per mode, a tensor train one per bond. Weights and gates are trained
together. After every optimiser step

- `absorb` moves changes in the scale of the stages' weights into the gates, so that the penalty is not evaded by
  shrinking a gate and growing its weights;
- the gates g take the proximal step of λ Σ_r cost_r |g_r| in Adam's own metric (Yun et al. 2021, ProxGen),
  g ← sign(g) max(|g| − lr λ cost_r / √v, 0): a gate stays at zero exactly if it lowers the loss by less than λ cost_r;
- λ is the least at which the gates that are left cost no more than a target, which falls from the start's cost to the
  budget.

cost_r is the component's cost in the budget's metrics, as shares of their limits. After the share GATED of the steps,
components with gates of zero are taken out, and the smaller network is trained for the rest of the steps: this is the
network that is delivered. Gates that are zero only for the moment may be kept as far as the budget has room. A bond
keeps at least one component, so that a penalty changes the ranks of a layer's family, and not the family. Penalties:

l1       Σ |g_r|
group    half on the components, half on the norm of all gates of a layer (sparse group lasso, Simon 2013)
hoyer    (Σ|g|)² / Σg² of a bond (Yang 2020, DeepHoyer), linearised at each step: large gates are not penalised
nuclear  `svd_out` alone: every ten steps the components are rotated to singular vectors, so that the gates are singular
         values
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.core.options import check_choice
from rankopt.core.records import Rank
from rankopt.strategies.gated_training import GatedRun, GatedStrategy
from rankopt.strategies.gates import Gated, GatedBond, adam_spread, take_while_they_fit
from rankopt.strategies.trained import RECIPE

PENALTIES = ("l1", "group", "hoyer", "nuclear")


GATED = 0.6  # share of the steps that are made with gates


GATE_RATE = 2e-2  # Adam's learning rate of the gates


def soft_threshold(gates: Tensor, threshold: Tensor) -> Tensor:
    """Apply the proximal operator of a weighted L1 norm, sign(g) max(|g| − threshold, 0).

    Args:
        gates: g, (R,).
        threshold: The threshold of each gate, (R,).
    """
    return gates.sign() * (gates.abs() - threshold).clamp_min(0)


def hoyer_weights(gates: Tensor) -> Tensor:
    """Compute the derivative of (Σ|g|)² / Σg² by |g_r|, up to a common factor; 0 where it is negative.

    Args:
        gates: g, (R,).
    """
    return (1 - gates.abs() * gates.abs().sum() / gates.square().sum().clamp_min(1e-30)).clamp_min(0)


class LassoTrain(GatedStrategy):
    """Trains a network with gates on its components, prunes those at zero, goes on, and delivers it."""

    name = "lasso-train"
    gated = GATED
    bond = GatedBond

    def __init__(
        self,
        problem: Any,
        seed: int = 0,
        *,
        penalty: str = "hoyer",
        start: str = "allocation",
        steps: int = 400,
        rate: float = RECIPE.rate,
    ) -> None:
        """Check the options.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Seed of the training.
            penalty: "l1", "group", "hoyer" or "nuclear".
            start: "allocation", at more than the budget; or "dense", the largest candidate of every layer.
            steps: Training steps, with gates and after.
            rate: Largest learning rate of the weights.

        Raises:
            RankoptError: For an option out of range.
        """
        super().__init__(problem, seed, start, steps, rate)
        check_choice(f"strategy {self.name!r}", "penalty", penalty, PENALTIES)
        self.penalty = penalty
        if penalty == "nuclear":
            self.families = ("svd_out",)

    def run(self, layers: Sequence[Gated[GatedBond]], steps: int) -> Run:
        return Run(self, layers, steps)


class Run(GatedRun[GatedBond]):
    """The penalty in one training run.

    Attributes:
        averages: id of a bond -> sum of its absolute gates over the last quarter of the steps, (R,).
    """

    rate = GATE_RATE

    def __init__(self, strategy: LassoTrain, layers: Sequence[Gated[GatedBond]], steps: int) -> None:
        """Begin at the layers' ranks.

        Args:
            strategy: The budget and the penalty.
            layers: The layers with gates; all others are dense.
            steps: Steps with gates.
        """
        super().__init__(strategy.problem, layers, steps)
        self.penalty = strategy.penalty
        self.averages = {id(b): torch.zeros_like(b.gates) for x in layers for b in x.bonds}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Absorb, and take the proximal step.

        Args:
            step: Number of the step, from 0.
        """
        for layer in self.layers:
            if self.penalty == "nuclear" and step % 10 == 0:
                layer.rotate()
            for bond in layer.bonds:
                bond.absorb()
        units = [self._units(n, layer) for n, layer in enumerate(self.layers)]  # thresholds at λ = 1
        pairs = [list(zip(x.bonds, of_layer, strict=True)) for x, of_layer in zip(self.layers, units, strict=True)]
        zeroing = [[np.sort((b.gates.abs() / u).cpu().numpy()) for b, u in of_layer] for of_layer in pairs]

        def ranks_at(price: float) -> list[Rank]:
            return [
                x.valid([len(values) - int(np.searchsorted(values, price, "right")) for values in of_layer])
                for x, of_layer in zip(self.layers, zeroing, strict=True)
            ]

        price = self.pressure.step(step, ranks_at)
        for bond, unit in (pair for of_layer in pairs for pair in of_layer):
            strongest = int(bond.gates.abs().argmax())  # is kept: a bond without gates would block all gradients
            value = bond.gates[strongest].clone()
            bond.gates.copy_(soft_threshold(bond.gates, price * unit))
            bond.gates[strongest] = value
        if step >= 3 * self.steps // 4:
            for layer in self.layers:
                for bond in layer.bonds:
                    self.averages[id(bond)] += bond.gates.abs()

    def _units(self, n: int, layer: Gated[GatedBond]) -> list[Tensor]:
        """The thresholds of the proximal step for λ = 1, by bond, (R,)."""
        rates = [
            GATE_RATE * self.pressure.share_of_one(n, i) / adam_spread(self.state, bond.gates)
            for i, bond in enumerate(layer.bonds)
        ]
        if self.penalty == "group":
            norm = torch.cat([b.gates for b in layer.bonds]).norm().clamp_min(1e-12)
            rates = [r / 2 * (1 + b.gates.abs() / norm) for r, b in zip(rates, layer.bonds, strict=True)]
        if self.penalty == "hoyer":
            rates = [r * hoyer_weights(b.gates) for r, b in zip(rates, layer.bonds, strict=True)]
        return [r.clamp_min(1e-30) for r in rates]

    @torch.no_grad()
    def outcome(self) -> tuple[list[list[Tensor]], tuple[Rank, ...]]:
        """Choose what remains: components whose gates are not zero, and then others while they fit.

        Each is ranked by the λ at which a proximal step would zero it. (Gates alone cannot be compared between layers:
        their scales are those of the layers' weights.)

        Returns:
            The value of each component, by layer and bond, and the rank of each layer.
        """
        scores = [
            [
                self.averages[id(b)] * adam_spread(self.state, b.gates) / self.pressure.share_of_one(n, i)
                for i, b in enumerate(x.bonds)
            ]
            for n, x in enumerate(self.layers)
        ]
        top = max((float(s.max()) for of_layer in scores for s in of_layer), default=0.0) + 1
        for of_layer, x in zip(scores, self.layers, strict=True):
            for values, bond in zip(of_layer, x.bonds, strict=True):
                values.add_(top * (bond.gates != 0))
                mean = self.averages[id(bond)] / max(self.steps - 3 * self.steps // 4, 1)
                bond.gates.copy_(torch.where(bond.gates == 0, mean, bond.gates))
        return scores, take_while_they_fit(self.layers, scores, self.pressure.fits)
