"""Training with gates, what `lasso-train` and `differentiable` have in common: learn ranks, prune, go on.

A `GatedStrategy` builds the network, and a `GatedRun` decides in every step what becomes of its gates, under the
pressure of the budget.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from rankopt.candidates.prepare import Prepared
from rankopt.core.options import check_choice
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress
from rankopt.core.records import Rank
from rankopt.strategies.gates import (
    FAMILIES,
    STARTS,
    Bond,
    Gated,
    Pressure,
    start_network,
    without_gates,
)
from rankopt.strategies.trained import Trainer, TrainingStrategy

B = TypeVar("B", bound=Bond)


class GatedRun(ABC, Generic[B]):
    """The gates in one training run.

    Attributes:
        layers: The layers with gates.
        steps: Steps with gates.
        pressure: The budget.
        state: What the optimizer keeps of each parameter.
    """

    rate: ClassVar[float]
    """Adam's learning rate of `parameters`."""

    def __init__(self, problem: Problem, layers: Sequence[Gated[B]], steps: int) -> None:
        """Begin at the layers' ranks.

        Args:
            problem: The budget.
            layers: The layers with gates; all others are dense.
            steps: Steps with gates.
        """
        gated = {x.layer.name for x in layers}
        dense = sum((x.cost for x in problem.layers if x.name not in gated), problem.fixed)
        self.layers, self.steps = layers, steps
        self.pressure = Pressure(problem.limits, dense, layers, steps)
        self.state: Mapping[Any, Any] = {}

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the optimizer of weights and gates.

        Args:
            optimizer: Adam.
        """
        self.state = optimizer.state

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that decide on ranks."""
        return [p for x in self.layers for bond in x.bonds for p in bond.mask.parameters()]

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Bring the ranks down to the budget's target.

        Args:
            step: Number of the step, from 0.
        """

    @abstractmethod
    def outcome(self) -> tuple[list[list[Tensor]], tuple[Rank, ...]]:
        """Choose what remains.

        Returns:
            The value of each component, by layer and bond, and the rank of each layer.
        """


class GatedStrategy(TrainingStrategy):
    """Trains a network with gates on its components, takes components out, goes on, and delivers it.

    Attributes:
        families: Which decompositions the network may have.
        start: "allocation" or "dense".
    """

    gated: ClassVar[float]
    """Share of the steps that are made with gates."""

    bond: ClassVar[type[Bond]]
    """What makes the gates of a bond."""

    families: Sequence[str] = FAMILIES

    def __init__(self, problem: Problem, seed: int, start: str, steps: int, rate: float) -> None:
        """Check the options.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Seed of the training.
            start: Where ranks begin, one of STARTS.
            steps: Training steps, with gates and after.
            rate: Largest learning rate of the weights.

        Raises:
            RankoptError: For an option out of range.
        """
        super().__init__(problem, seed, steps=steps, rate=rate)
        check_choice(f"strategy {self.name!r}", "start", start, STARTS)
        self.start = start

    @abstractmethod
    def run(self, layers: Sequence[Gated[Any]], steps: int) -> GatedRun[Any]:
        """Begin a run.

        Args:
            layers: The layers with gates.
            steps: Steps with gates.
        """

    def train(self, prepared: Prepared, progress: Progress) -> nn.Module:
        model, chosen = start_network(prepared, self.problem, self.families, self.start)
        layers: list[Gated[Any]] = [
            Gated(x, chosen[x.name], model.get_submodule(x.name), self.bond)
            for x in self.problem.layers
            if x.name in chosen
        ]
        steps = max(1, round(self.gated * self.steps))
        trainer = Trainer(prepared, self.recipe, self.steps, steps, progress)
        if layers:
            run = self.run(layers, steps)
            gates, rate = run.parameters(), run.rate
            trainer(model, steps, ranks=gates, rank_rate=rate, prepare=run.begin, after_step=run.after_step)
            model = without_gates(prepared, model, layers, *run.outcome())
        trainer(model, self.steps)
        return model
