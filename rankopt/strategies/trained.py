"""Strategies that train: what they deliver is a network, a plan together with its weights.

Other strategies propose positions on frontiers, whose weights were fitted beforehand. Here ranks are learnt with the
weights, so they lie on no frontier and have no fit. `TrainingStrategy.measure` trains. It leaves a `Network`, and a
problem in which each layer has one candidate, the network's; the only proposal is this one, and whoever builds a model
from it gets a copy of the network. A subclass implements `train`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.prepare import Prepared
from rankopt.candidates.sensitivity import with_losses
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.files import digest
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress
from rankopt.core.records import METRICS, Candidate, Layer, Proposal, Task
from rankopt.decompositions.plan import load, plan_of, save
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import stored_fit
from rankopt.strategies.base import Strategy
from rankopt.training.loop import train
from rankopt.training.losses import TrainingLoss
from rankopt.training.recipe import Recipe, make_optimizer
from rankopt.training.step import Loss

RECIPE = Recipe(optimizer="adamw", rate=3e-4)
"""How the weights are trained; a strategy's options change the rate. It ends in a cosine over all steps."""


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        model: The network.
        candidates: What each free layer of the problem has become in it.
    """

    model: nn.Module
    candidates: tuple[Candidate, ...]

    @classmethod
    def of(cls, prepared: Prepared, layers: Sequence[Layer], model: nn.Module) -> Network:
        """Describe a trained model.

        Args:
            prepared: The task that it was made from.
            layers: The free layers.
            model: The model, which is not copied.
        """
        key = f"trained-{digest(*(t.detach().cpu() for t in model.state_dict().values()))}"
        return cls(model, tuple(replace(_candidate(prepared, x, model), key=key) for x in layers))

    def problem(self, before: Problem) -> Problem:
        """State the problem whose only plan is this network's.

        Args:
            before: The problem that was to be solved.
        """
        return replace(before, frontiers=tuple((c,) for c in self.candidates))

    def save(self, folder: Path) -> None:
        """Write plan and weights, to be read by `Network.read`.

        Args:
            folder: Where to write them.
        """
        save(folder, self.model, plan_of(self.model))

    @classmethod
    def read(cls, folder: Path, prepared: Prepared, layers: Sequence[Layer]) -> Network:
        """Read what `save` wrote.

        Args:
            folder: The folder.
            prepared: The same task.
            layers: The free layers.

        Raises:
            PlanError: A file is missing or damaged, or of another model.
        """
        return cls.of(prepared, layers, load(prepared.task.model, folder))


def _candidate(prepared: Prepared, layer: Layer, model: nn.Module) -> Candidate:
    """What a layer has become in a trained model; its error is the distance from the dense layer's weight."""
    try:
        module: Any = model.get_submodule(layer.name)
    except AttributeError:  # part of a composite module that was not expanded, as none of its parts is replaced
        return dense_candidate(layer)
    if not hasattr(module, "method"):
        return dense_candidate(layer)
    family, weight = DECOMPOSITIONS[module.method], prepared.model.get_submodule(layer.name).weight
    with torch.no_grad():
        statistics = prepared.statistics[layer.name]
        fit = stored_fit(family, layer, weight.detach(), module.factors, module.rank, *statistics)  # type: ignore[operator]
    found = Candidate(module.method, module.rank, family.cost(layer, module.rank), fit.error)
    return with_losses([found], prepared.curves.get(layer.name, ()))[0]


def check_trainable(name: str, task: Task) -> None:
    """Check that a task has what a strategy needs to train.

    Args:
        name: The strategy's name.
        task: The task.

    Raises:
        TaskError: It has not.
    """
    if task.train is None:
        raise TaskError(
            f"strategy {name!r} trains the network, and the task has no train: give it batches (input, target), or "
            "choose a strategy that does not train"
        )


class TrainingStrategy(Strategy):
    """Base class of strategies that deliver a trained network.

    Attributes:
        network: What was trained; None before `measure`.
        steps: Training steps altogether.
        recipe: How the weights are trained.
    """

    one_shot: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __init__(self, problem: Problem, seed: int = 0, *, steps: int = 400, rate: float = RECIPE.rate) -> None:
        """Check the options.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Seed of the training.
            steps: Training steps altogether, 2 or more.
            rate: Largest learning rate of the weights.

        Raises:
            RankoptError: An option is out of range, or the budget limits what is not known of arbitrary ranks.
        """
        super().__init__(problem, seed)
        if steps < 2:  # one to learn ranks, one to go on
            raise RankoptError(f"strategy {self.name!r}: steps is {steps}, give 2 or more")
        other = [x.metric for x in problem.limits if x.metric not in METRICS]
        if other:
            raise RankoptError(
                f"strategy {self.name!r} learns ranks, whose {other[0]} is not known beforehand: give a budget of "
                f"{', '.join(METRICS)}, or choose another strategy"
            )
        self.steps, self.recipe = steps, replace(RECIPE, rate=rate, seed=seed)

    @abstractmethod
    def train(self, prepared: Prepared, progress: Progress) -> nn.Module:
        """Train a network within the budget.

        Args:
            prepared: The task with its candidates.
            progress: As in `measure`.

        Returns:
            A model in which every layer is dense or replaced, as `rankopt.load` would rebuild it.
        """

    def measure(self, prepared: Prepared, progress: Progress) -> None:
        check_trainable(self.name, prepared.task)
        self.deliver(Network.of(prepared, self.problem.layers, self.train(prepared, progress)))

    def deliver(self, network: Network) -> None:
        """Take a network as what was trained.

        Args:
            network: The network.
        """
        self.network, self.problem = network, network.problem(self.problem)

    def propose(self, number: int) -> Proposal | None:
        if self.network is None:
            raise RankoptError(f"strategy {self.name!r} trains first: call measure(prepared, progress), then ask()")
        return (0,) * len(self.problem.layers) if number == 0 else None


Penalty = Callable[[], Any]
"""What a strategy adds to the loss of a step, a scalar."""


class Trainer:
    """Trains the networks of one run, one after the other, on one learning rate schedule.

    Args:
        prepared: The task.
        recipe: How to train the weights.
        steps: Steps of the whole run.
        learning: Steps of these in which ranks are learnt.
        progress: Shows them.

    Attributes:
        done: Steps that were made.
    """

    def __init__(self, prepared: Prepared, recipe: Recipe, steps: int, learning: int, progress: Progress) -> None:
        self.task, self.recipe, self.steps, self.learning = prepared.task, recipe, steps, learning
        self.progress = progress
        self.done = 0

    def rate(self, step: int) -> float:
        """The learning rate at a step as a share of the largest.

        It is constant after a short warm-up while ranks are learnt, and then falls in a cosine.

        Args:
            step: Number of the step, from 0.
        """
        warm = max(1, round(self.recipe.warmup * self.steps))
        falling = max(0.0, step - self.learning) / max(self.steps - self.learning, 1)
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(falling, 1.0))))

    def __call__(
        self,
        model: nn.Module,
        until: int,
        *,
        ranks: Sequence[nn.Parameter] = (),
        rank_rate: float = 0.0,
        penalty: Penalty | None = None,
        prepare: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train a network up to a step of the run.

        Args:
            model: The network; trained in place.
            until: Number of the last step, plus one.
            ranks: Parameters that decide on ranks, beside the weights: gates, or sizes of bonds.
            rank_rate: Their learning rate.
            penalty: What is added to the loss.
            prepare: Called with the optimizer before the first step.
            after_step: Called after every step, while the gradients are there.
        """
        apart = set(map(id, ranks))
        optimizer = make_optimizer(
            self.recipe, [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        )
        shares: list[Callable[[int], float]] = [lambda n: self.rate(self.done + n)] * len(optimizer.param_groups)
        if ranks:
            optimizer.add_param_group({"params": list(ranks), "lr": rank_rate, "weight_decay": 0.0})
            shares.append(lambda n: 1.0)
        prepare(optimizer)
        train(
            model,
            self.task.train or (),
            self._loss(model, penalty),
            optimizer,
            steps=until,
            start=self.done,
            seed=self.recipe.seed,
            clip=self.recipe.clip or None,
            training=not self.recipe.eval_mode,
            schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, shares),
            after_step=lambda step, losses: after_step(step),
            progress=self.progress,
        )
        self.done = until

    def _loss(self, model: nn.Module, penalty: Penalty | None) -> Loss:
        loss = TrainingLoss(self.recipe, self.task, self.task.model, model)
        return loss if penalty is None else lambda m, batch: loss(m, batch) + penalty()
