"""One search with everything that it takes, fine-tuning included: what hyperparameters change."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.calibration import class_axis, main_output
from rankopt.core import METRICS, RankoptError, Task
from rankopt.evaluate import call
from rankopt.fidelity import RATE, WHOLE, Ladder
from rankopt.inventory import inference, run, to_device
from rankopt.job import Runner, run_search
from rankopt.prepare import Prepared, Track, silent
from rankopt.result import Result, with_intervals
from rankopt.settings import Settings
from rankopt.space import SearchSpace
from rankopt.strategies import read_options, strategy_options
from rankopt.training import BATCH, CLIP, split, train


@dataclass(frozen=True)
class Training:
    """Fine-tuning of the plan that a search chose, by Adam; batch norms' statistics are kept.

    steps: 0 is none. rate: the learning rate. distill: the share of the loss that is distillation from the dense
    model at this temperature (Hinton 2015); the rest is the task's loss on its labels.
    """

    steps: int = 0
    rate: float = RATE
    distill: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.rate > 0 or not 0 <= self.distill <= 1 or not self.temperature > 0:
            raise RankoptError(
                f"training {dataclasses.asdict(self)}: steps are 0 or more, rate and temperature above 0, "
                "distill is from 0 to 1"
            )


@dataclass(frozen=True)
class Request:
    """One search, with everything that it takes but the task. Fields as in `Settings` and the command line."""

    budget: Mapping[str, Any]
    strategy: str = "knapsack"
    options: Mapping[str, Any] = field(default_factory=dict)
    space: SearchSpace = field(default_factory=SearchSpace)
    trials: int | None = None
    seed: int = 0
    refine: bool = False
    ladder: Ladder = WHOLE
    training: Training = Training()

    def known(self) -> dict[str, Any]:
        """The names that hyperparameters may have, with what they are without one."""
        space = {f.name: getattr(self.space, f.name) for f in dataclasses.fields(SearchSpace)}
        tables = {
            "budget": {m: self.budget.get(m, 1.0) for m in METRICS},
            "options": {**strategy_options(self.strategy), **self.options},
            "space": {k: v for k, v in space.items() if k not in ("name", "description")},
            "training": dataclasses.asdict(self.training),
        }
        return {f"{table}.{k}": v for table, values in tables.items() for k, v in values.items()}

    def changed(self, values: Mapping[str, Any]) -> Request:
        """With hyperparameters set. Raises RankoptError for a value that cannot be."""
        parts: dict[str, dict[str, Any]] = {"budget": {}, "options": {}, "space": {}, "training": {}}
        for name, value in values.items():
            table, _, key = name.partition(".")
            parts[table][key] = tuple(value) if isinstance(value, list) else value
        try:
            return dataclasses.replace(
                self,
                budget={**self.budget, **parts["budget"]},
                options=read_options(self.strategy, {**self.options, **parts["options"]}),
                space=dataclasses.replace(self.space, **parts["space"]),
                training=dataclasses.replace(self.training, **parts["training"]),
            )
        except TypeError as error:
            raise RankoptError(f"{', '.join(f'{k}={v}' for k, v in values.items())}: {error}") from error


def run_request(
    request: Request, prepared: Prepared, out: Path | None, resume: bool, runner: Runner, track: Track
) -> Result:
    """Search, fine-tune what was found if asked for, and, with a run folder, keep the result there."""
    problem = prepared.problem(request.budget)
    settings = Settings(
        request.strategy,
        request.trials,
        request.seed,
        resume,
        request.refine,
        request.options,
        request.ladder,
    )
    result = run_search(prepared, problem, settings, out, runner, track)
    if request.training.steps and not result.info["trials"]["interrupted"]:
        result = _fine_tuned(result, prepared, request, track)
        if out is not None:
            result.save(out)
    return result


def _fine_tuned(result: Result, prepared: Prepared, request: Request, track: Track) -> Result:
    """The result with its model trained, and measured again."""
    task, info = prepared.task, result.info
    model = fine_tuned(
        result.model, task, prepared.statistics.batches, request.training, seed=request.seed, track=track
    )
    score = {**info["score"], "compressed": {"validation": call("the score", task.score, model)}}
    score["compressed"]["test"] = call("the test score", task.test, model)
    objective = {**info["objective"], "best": call("the objective", prepared.objective, model)}
    info = {**info, **with_intervals(task, score), "objective": objective}
    return dataclasses.replace(result, model=model, info=info | {"fine_tuning": dataclasses.asdict(request.training)})


def fine_tuned(
    model: nn.Module, task: Task, calibration: Sequence[Any], training: Training, seed: int = 0, track: Track = silent
) -> nn.Module:
    """A trained copy of a compressed model: on the task's train and loss, and its own model's outputs.

    Without train and loss, on the dense model's outputs alone, for the calibration batches. The one place where
    the settings of a `Training` act. Raises TaskError where the loss is not finite.
    """
    labelled = task.train is not None and task.loss is not None
    share = training.distill if labelled else 1.0
    batches: Sequence[Any] = list(task.train or ()) if labelled else [(x, None) for x in split(calibration, BATCH)]
    with inference(task.model):
        taught = [(x, y, main_output(run(task.model, to_device(x, task.model)))) for x, y in batches]

    def loss(m: nn.Module, batch: Any) -> Tensor:
        x, y, wanted = batch
        z = run(m, to_device(x, m))
        soft = softened_divergence(main_output(z), wanted, training.temperature) if share else torch.zeros(())
        hard = task.loss(z, to_device(y, m)) if share < 1 and task.loss else torch.zeros(())
        return share * soft + (1 - share) * hard

    changed = copy.deepcopy(model)
    optimizer = torch.optim.Adam(changed.parameters(), training.rate)
    train(changed, taught, loss, optimizer, steps=training.steps, seed=seed, clip=CLIP, training=False, track=track)
    return changed


def softened_divergence(z: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(wanted / T), softmax(z / T)), the mean over predictions (Hinton 2015, eq. 2); of outputs that are
    no classes the relative squared error."""
    axis = class_axis(z)
    if axis is None:
        return (z - wanted).square().sum() / (wanted - wanted.mean()).square().sum().clamp_min(1e-12)
    log_p, log_p0 = (F.log_softmax(logits / temperature, axis) for logits in (z, wanted))
    divergence = F.kl_div(log_p, log_p0, reduction="sum", log_target=True)
    return temperature**2 * divergence * z.shape[axis] / z.numel()
