"""The evaluation of one plan: build its model, measure objective and score."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from rankopt.candidates.cache import FactorStore
from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import TaskError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.decompositions.plan import apply, apply_to_measure
from rankopt.model.forward import device_name, device_of, move
from rankopt.model.objective import Divergence, call
from rankopt.search.fidelity import FULL_FIDELITY, FidelitySchedule
from rankopt.search.trained_plans import TrainedPlans
from rankopt.training.loop import search_batches, train_briefly
from rankopt.training.step import Loss


@dataclass
class Evaluator:
    """Builds a proposal's model and measures it. Runners call it in this process or send it to a worker.

    Attributes:
        problem: The problem whose proposals are evaluated.
        model: The dense model.
        factors: Where the candidates' factors are kept.
        objective: Model -> objective, minimised.
        score: Model -> validation score, a fraction; None if the task has none.
        slices: Parts of the objective's examples, one for each fidelity; empty if the objective is measured whole.
        training_data: (batches, loss) of the short training at the last fidelity; None if there is none.
        steps: Steps of that training.
        network: A trained network, which is evaluated instead of what the factors make; None without one.
        kept: Where the weights of that training are kept; None for nowhere.
    """

    problem: Problem
    model: nn.Module
    factors: FactorStore
    objective: Callable[[nn.Module], float]
    score: Callable[[nn.Module], float] | None
    slices: Sequence[Any] = ()
    training_data: tuple[list[Any], Loss] | None = None
    steps: int = 0
    network: nn.Module | None = None
    kept: TrainedPlans | None = None

    @classmethod
    def of(
        cls,
        prepared: Prepared,
        problem: Problem,
        fidelities: FidelitySchedule = FULL_FIDELITY,
        kept: TrainedPlans | None = None,
    ) -> Evaluator:
        """Make the evaluator of a prepared task.

        Args:
            prepared: The task with its candidates.
            problem: The problem whose proposals are evaluated.
            fidelities: The fidelities to measure at.
            kept: Where the weights of a training at the last fidelity are kept; None for nowhere.

        Raises:
            TaskError: If there are fidelities on shares of the examples, and the task's own objective has no slices.
        """
        slices = []
        if fidelities.shares[:-1]:
            if not hasattr(prepared.objective, "slices"):
                raise TaskError(
                    "the task's own objective cannot be measured on a share of its examples: give it a method "
                    "slices(shares) as rankopt.model.objective.Divergence has, or search without such fidelities"
                )
            slices = prepared.objective.slices(fidelities.shares)
        # The default objective compares with the dense model: training on labels would lead away from it.
        task = prepared.task if prepared.task.objective else dataclasses.replace(prepared.task, train=None)
        return cls(
            dataclasses.replace(problem, counter=None),  # it holds the model, and is not needed to evaluate
            prepared.task.model,
            prepared.factors,
            prepared.objective,
            prepared.task.score,
            slices,
            training_data=search_batches(task, prepared.statistics.batches) if fidelities.steps else None,
            steps=fidelities.steps,
            network=prepared.network,
            kept=kept,
        )

    @property
    def device(self) -> str:
        """The device that plans are evaluated on, as "cpu" or "cuda:0 (NVIDIA H200)"."""
        return device_name(device_of(self.model))

    def to(self, device: str) -> None:
        """Move the dense model, from which plans are built, and the trained network.

        Args:
            device: A device as torch names it.

        Raises:
            TaskError: If the model does not move.
        """
        move(self.model, device)
        if self.network is not None:
            move(self.network, device)

    def __call__(self, proposal: Proposal) -> tuple[float, float | None]:
        """Evaluate at full fidelity.

        Args:
            proposal: A proposal within the budget.

        Returns:
            The objective, and the validation score if the task has one.
        """
        *_, (objective, score) = self.stages(proposal)
        return objective, score

    def stages(self, proposal: Proposal) -> Iterator[Any]:
        """Evaluate from fidelity to fidelity; no example is measured twice.

        Args:
            proposal: A proposal within the budget.

        Yields:
            The objective at each lower fidelity, then (objective, validation score).
        """
        measured = self._to_measure(proposal)
        model = self._build(proposal) if measured is None or self.score is not None else measured
        objective = yield from self._whole(model if measured is None else measured)
        if self.training_data:
            yield objective
            model = train_briefly(model, *self.training_data, self.steps)
            objective = _number(self.objective, model)
            if self.kept is not None:
                self.kept.keep(self.problem, proposal, model, objective)
        yield objective, call("the score", self.score, model)

    def _to_measure(self, proposal: Proposal) -> nn.Module | None:
        """What gives the default objective sooner on a GPU than the plan's own model; None where nothing does."""
        own = device_of(self.model).type != "cuda" or self.network is not None or bool(self.training_data)
        return self._build(proposal, apply_to_measure) if isinstance(self.objective, Divergence) and not own else None

    def _build(self, proposal: Proposal, build: Callable[..., nn.Module] = apply) -> nn.Module:
        if self.network is not None:
            return copy.deepcopy(self.network)
        return build(self.model, self.problem.layers, self.problem.candidates(proposal), self.factors)

    def _whole(self, model: nn.Module) -> Generator[float, None, float]:
        """Return the objective on all examples; yield it after every slice except the last."""
        if not self.slices:
            return _number(self.objective, model)
        total = weight = 0.0

        def up_to(part: Any, model: nn.Module) -> float:
            nonlocal total, weight
            more, heavier = part.sums(model)
            total, weight = total + more, weight + heavier
            return total / weight

        for part in self.slices[:-1]:
            yield _number(partial(up_to, part), model)
        return _number(partial(up_to, self.slices[-1]), model)


def _number(objective: Callable[[nn.Module], float], model: nn.Module) -> float:
    value = call("the objective", objective, model)
    assert value is not None
    return value
