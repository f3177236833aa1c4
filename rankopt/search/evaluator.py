"""Search settings, fidelities, and the evaluation of one plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from torch import nn

from rankopt.candidates.cache import FactorStore
from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Trial
from rankopt.core.statistics import correlation
from rankopt.decompositions.plan import apply
from rankopt.model.objective import call
from rankopt.training.loop import Loss, search_batches, train_briefly


@dataclass(frozen=True)
class FidelitySchedule:
    """The fidelities of a search. The last one alone gives a trial's objective; below it are its rungs.

    shares: of the objective's examples, rising; the last is 1. steps: of training, after which the objective is
    measured last; 0: none. It trains on the task's train and loss if the objective is the task's own, else by
    distillation on the calibration batches: those that the objective is measured on.
    """

    shares: tuple[float, ...] = (1.0,)
    steps: int = 0

    @classmethod
    def parse(cls, text: str) -> FidelitySchedule:
        """ "0.1,0.5": these shares of the examples, then all. "0.1,train=9": and last, after 9 steps of training."""
        words = [word.strip() for word in text.split(",") if word.strip()]
        try:
            steps = int(words.pop().removeprefix("train=")) if words and words[-1].startswith("train=") else 0
            shares = [float(word) for word in words]
        except ValueError:
            raise RankoptError(
                f"fidelities {text!r}: give shares of the examples as 0.1,0.5 or 0.1,train=100"
            ) from None
        shares += [1.0] if not shares or shares[-1] != 1 else []
        if not all(0 < a < b <= 1 for a, b in zip([1e-9, *shares], shares, strict=False)) or steps < 0:
            raise RankoptError(f"fidelities {text!r}: shares lie above 0 and below 1, and rise; steps are 1 or more")
        ladder = cls(tuple(shares), steps)
        if not ladder.names[1:]:
            raise RankoptError(f"fidelities {text!r}: there is but one; give shares as 0.1,0.5, or train=100")
        return ladder

    @property
    def names(self) -> list[str]:
        """Of all fidelities, the full one last."""
        slices = [f"{share:.3g} of the examples" for share in self.shares[:-1]]
        return [*slices, "all examples", *([f"{self.steps} steps of training"] if self.steps else [])]

    def __str__(self) -> str:
        return ",".join([*(f"{share:g}" for share in self.shares), *([f"train={self.steps}"] if self.steps else [])])


FULL_FIDELITY = FidelitySchedule()  # the full objective, and no training


@dataclass(frozen=True)
class Settings:
    """How to search. trials: distinct plans in total, resumed ones included (30; one-shot strategies: 1).

    options: the strategy's own.
    refine: refit the chosen plan's layers one after the other, against the dense model's outputs, and move its
    batch norms to what they now see; each is kept if the objective falls.
    ladder: the fidelities that trials are evaluated at. storage: an SQLAlchemy URL of a study that several processes
    share; default: study.db in the run folder.
    """

    strategy: str = "knapsack"
    trials: int | None = None
    seed: int = 0
    resume: bool = False
    refine: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    ladder: FidelitySchedule = FULL_FIDELITY
    storage: str | None = None


@dataclass
class Evaluator:
    """Builds a proposal's model and measures it; what a runner calls, here or in a worker it is sent to."""

    problem: Problem
    model: nn.Module
    factors: FactorStore
    objective: Callable[[nn.Module], float]
    score: Callable[[nn.Module], float] | None
    slices: Sequence[Any] = ()  # of the objective; none: it is measured whole
    training_data: tuple[list[Any], Loss] | None = None
    steps: int = 0

    @classmethod
    def of(cls, prepared: Prepared, problem: Problem, ladder: FidelitySchedule = FidelitySchedule()) -> Evaluator:
        """Raises TaskError if the task's objective cannot be measured on slices and the ladder has some."""
        slices = []
        if ladder.shares[:-1]:
            if not hasattr(prepared.objective, "slices"):
                raise TaskError(
                    "the task's own objective cannot be measured on a share of its examples: give it a method "
                    "slices(shares) as rankopt.model.objective.Divergence has, or search without such fidelities"
                )
            slices = prepared.objective.slices(ladder.shares)
        task = prepared.task
        # Towards what the objective measures: labels would draw a model away from the dense one's predictions.
        taker = task if task.objective else dataclasses.replace(task, train=None)
        taught = search_batches(taker, prepared.statistics.batches) if ladder.steps else None
        return cls(problem, task.model, prepared.factors, prepared.objective, task.score, slices, taught, ladder.steps)

    def __call__(self, proposal: Proposal) -> tuple[float, float | None]:
        """(objective, validation score)."""
        *_, (objective, score) = self.stages(proposal)
        return objective, score

    def stages(self, proposal: Proposal) -> Iterator[Any]:
        """The objective at each lower fidelity, then (objective, validation score). No example is measured twice."""
        model = apply(self.model, self.problem.layers, self.problem.candidates(proposal), self.factors)
        objective = yield from self._whole(model)
        if self.training_data:
            yield objective
            model = train_briefly(model, *self.training_data, self.steps)
            objective = _number(self.objective, model)
        yield objective, call("the score", self.score, model)

    def _whole(self, model: nn.Module) -> Generator[float, None, float]:
        """The objective on all examples, returned; yielded after every slice but the last."""
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


def fidelity_rows(ladder: FidelitySchedule, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Each fidelity below the full one: how many trials it measured and stopped, and how it ranked the others.

    agreement: of the pairs of trials that went on to the end, the share that it ordered as the objective did.
    """
    rows = []
    for level, name in enumerate(ladder.names[:-1]):
        pairs = [(t.rungs[level], t.objective) for t in trials if t.objective is not None and len(t.rungs) > level]
        twos = [(a, b) for a, b in combinations(pairs, 2) if a[1] != b[1]]
        rows.append(
            {
                "name": name,
                "measured": sum(len(t.rungs) > level for t in trials),
                "stopped": [t.number for t in trials if t.state == "stopped" and len(t.rungs) == level + 1],
                "correlation": correlation(*map(list, zip(*pairs, strict=True))) if pairs else None,
                "agreement": sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in twos) / len(twos) if twos else None,
            }
        )
    return rows
