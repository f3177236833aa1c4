"""Fine-tuning of a compressed model, layer by layer and then as a whole; it can stop and resume at any step."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rankopt.core.errors import StudyError, TaskError
from rankopt.core.files import digest, without_folder
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task
from rankopt.core.result_record import EpochRow, FinetuneInfo
from rankopt.model.inputs import CALIBRATION_EXAMPLES, collect_batches
from rankopt.model.objective import call
from rankopt.model.quantization import dequantize_all, requantize_all
from rankopt.training import checkpoint
from rankopt.training.checkpoint import State
from rankopt.training.loop import BATCH, Loss, epoch_length, split, train
from rankopt.training.losses import UNITS, TrainingLoss, has_labels, in_channels_last, layer_by_layer
from rankopt.training.recipe import Recipe, make_optimizer, make_schedule

SECONDS = 30.0  # between checkpoints
POINTS = 200  # largest number of losses per stage in result.json


@dataclass
class Trained:
    """A trained model and a record of its training.

    Attributes:
        model: The trained model.
        info: The entry "training" of result.json.
    """

    model: nn.Module
    info: FinetuneInfo


class TrainingStage(NamedTuple):
    """One stage of a training.

    Attributes:
        name: Name for progress displays.
        batches: Training batches.
        loss: Maps (model, batch) to a scalar.
        optimizer: The optimizer.
        schedule: Its learning rate schedule.
        steps: Number of steps.
        epoch: Steps per epoch, after each of which the validation score is measured; 0: never.
        training: Whether the model is in training mode, not eval mode.
    """

    name: str
    batches: Iterable[Any]
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: lr_scheduler.LRScheduler
    steps: int
    epoch: int
    training: bool


def finetune(  # noqa: PLR0913  # public: one keyword per option
    model: nn.Module,
    task: Task,
    recipe: Recipe | None = None,
    *,
    teacher: nn.Module | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Fine-tune a compressed model.

    On a CPU, the same settings give bit-identical weights. Quantized weights are dequantized, trained, and quantized
    again at the end. Validation scores are measured after every epoch; test data is not used.

    Args:
        model: The compressed model; it is not changed.
        task: The task, with the dense model as teacher. If it has `train` and `loss`, the model also learns from
            labels; otherwise it learns from the teacher alone, on the inputs of `train` or of the calibration data.
            `train` is iterated once per epoch, with torch's global generator seeded by the recipe, so that
            augmentations and shuffling are reproducible.
        recipe: Settings of the training. Default: `Recipe()`.
        teacher: Model to distil from instead of the dense one.
        folder: Where to write a checkpoint, every 30 seconds and at the end. Default: none is written.
        resume: Whether to continue from the checkpoint in `folder`. The weights are those of a training without
            interruption.
        stop: Called after every step. If it returns True, a checkpoint is written and KeyboardInterrupt raised.
        progress: Progress callback.
        note: Called after every step with a line about its state.

    Returns:
        The trained copy and a record of its training.

    Raises:
        TaskError: The recipe and the task do not fit together, or a loss is not finite.
        StudyError: The checkpoint is damaged or of another training, or there is one and `resume` is False.
    """
    recipe = recipe or Recipe()
    if not recipe.trains:
        raise TaskError("there is nothing to train: give epochs, or layerwise steps, or both")
    model = copy.deepcopy(model)
    kept = dequantize_all(model)
    training = _Training(model, task, recipe, teacher or task.model, stop, note)
    if folder is not None:
        training.keep(Path(folder), resume)
    trained = training.run(progress)
    requantize_all(trained.model, kept)
    return trained


class _Training:
    """A fine-tuning in progress: its stages, and the state that checkpoints hold."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        teacher: nn.Module,
        stop: Callable[[], bool],
        note: Callable[[str], None],
    ) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise TaskError("no parameter of the model requires a gradient: nothing can be trained")
        if recipe.best and task.score is None:
            raise TaskError("the best epoch cannot be told without a score: give the task one, or leave out best")
        if recipe.channels_last:
            for p in model.parameters():
                p.data = in_channels_last(p.data)
        self.task, self.recipe, self.teacher, self.stop, self.note = task, recipe, teacher, stop, note
        self.state = State(model)
        if recipe.ema:
            self.state.average = AveragedModel(model, multi_avg_fn=_averaging(recipe.ema), use_buffers=True)
        self.stages = [self._layerwise] * (recipe.layerwise > 0) + [self._whole] * (recipe.epochs > 0)
        self.path: Path | None = None
        self.kept: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None
        self.start = self.written = time.monotonic()

    # --- the stages ---

    def _layerwise(self) -> TrainingStage:
        model, recipe = self.state.model, dataclasses.replace(self.recipe, rate=self.recipe.layerwise_rate)
        names = UNITS[recipe.units](model)
        if not names:
            raise TaskError("the model has no factorised layer to train by itself: give layerwise=0")
        inputs = self._unlabelled()
        found = (p for name in names for p in model.get_submodule(name).parameters())
        moving = dict.fromkeys(p for p in found if p.requires_grad)
        if not moving:
            raise TaskError("no parameter of a factorised layer requires a gradient: give layerwise=0")
        optimizer = make_optimizer(dataclasses.replace(recipe, optimizer="adamw", weight_decay=0.0), moving)
        loss, steps = layer_by_layer(self.task.model, names, recipe), recipe.layerwise
        schedule = make_schedule(recipe, optimizer, steps)
        return TrainingStage("layer by layer", inputs, loss, optimizer, schedule, steps, 0, False)

    def _whole(self) -> TrainingStage:
        model, recipe, task = self.state.model, self.recipe, self.task
        batches = task.train
        if batches is None:
            batches = self._unlabelled()
        epoch = epoch_length(batches)
        if epoch is None:
            raise TaskError("train does not say how many batches an epoch has: give it a __len__")
        steps = max(1, round(recipe.epochs * epoch))
        optimizer = make_optimizer(recipe, (p for p in model.parameters() if p.requires_grad))
        loss = TrainingLoss(recipe, task, self.teacher, model)
        schedule, trains = make_schedule(recipe, optimizer, steps), not recipe.eval_mode
        return TrainingStage("training", batches, loss, optimizer, schedule, steps, epoch, trains)

    def _unlabelled(self) -> list[Any]:
        """Calibration inputs, the same for the same seed even if their loader shuffles."""
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            inputs = collect_batches(self.task.model, self.task.calibration, CALIBRATION_EXAMPLES)
            return [(x,) for x in split(inputs, BATCH)]

    # --- running them ---

    def run(self, progress: Progress) -> Trained:
        state, recipe = self.state, self.recipe
        if self.kept is None:
            state.before = call("the score", self.task.score, state.model)
        for index in range(state.stage, len(self.stages)):
            stage = self.stages[index]()
            if self.kept is not None:
                checkpoint.restore_optimizer(stage.optimizer, stage.schedule, *self.kept)
                self.kept = None
            else:
                state.stage, state.step = index, 0
                state.losses.append([])
            train(
                state.model,
                stage.batches,
                stage.loss,
                stage.optimizer,
                steps=stage.steps,
                start=state.step,
                seed=recipe.seed,
                clip=recipe.clip or None,
                training=stage.training,
                schedule=stage.schedule,
                after_step=partial(self._after_step, stage),
                progress=progress,
            )
        if state.best is not None:
            self._result().load_state_dict(state.best)
        return Trained(self._result(), self._info())

    def _after_step(self, stage: TrainingStage, step: int, loss: float) -> None:
        state = self.state
        state.step = step + 1
        state.losses[-1].append(loss)
        if state.average is not None and stage.epoch:
            state.average.update_parameters(state.model)
        ends = stage.epoch and (state.step % stage.epoch == 0 or state.step == stage.steps)
        if ends:
            self._score(stage)
        recent = state.losses[-1][-50:]
        scored = f", score {s:.2%}" if state.epochs and (s := state.epochs[-1]["score"]) is not None else ""
        self.note(f"{stage.name}, loss {sum(recent) / len(recent):.3g}{scored}")
        stops = self.stop()
        last = state.step == stage.steps and state.stage == len(self.stages) - 1
        if self.path is not None and (stops or last or time.monotonic() - self.written >= SECONDS):
            state.seconds, self.start = self._seconds(), time.monotonic()
            checkpoint.write(self.path, state, stage.optimizer, stage.schedule, self.fingerprint)
            self.written = time.monotonic()
        if stops:
            raise KeyboardInterrupt

    def _score(self, stage: TrainingStage) -> None:
        state, task = self.state, self.task
        number = len(state.epochs) + 1
        losses = state.losses[-1][(number - 1) * stage.epoch :]
        score = call("the score", task.score, self._result())
        row: EpochRow = {"epoch": state.step / stage.epoch, "loss": sum(losses) / len(losses), "score": score}
        if (
            self.recipe.best
            and score is not None
            and score > max((e["score"] for e in state.epochs if e["score"] is not None), default=-math.inf)
        ):
            state.best = {k: v.detach().clone() for k, v in self._result().state_dict().items()}
        state.epochs.append(row)

    def _result(self) -> nn.Module:
        """The model whose weights are the result: the moving average, if there is one."""
        average = self.state.average
        return self.state.model if average is None or not average.n_averaged else average.module

    def _seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.start

    def _info(self) -> FinetuneInfo:
        state = self.state
        names = [s.__name__.strip("_") for s in self.stages]
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "labels": has_labels(self.task),
            "before": state.before,
            "epochs": state.epochs,
            "losses": {name: thinned(x) for name, x in zip(names, state.losses, strict=True)},
            "seconds": round(self._seconds(), 3),
        }

    # --- on disk ---

    def keep(self, folder: Path, resume: bool) -> None:
        """Write checkpoints to a folder, and restore the one that is there."""
        self.path = folder / checkpoint.FILE
        batches = self.task.train
        length = None if batches is None else epoch_length(batches)
        weights = [*self.state.model.state_dict().values(), *self.teacher.state_dict().values()]
        self.fingerprint = digest(dataclasses.asdict(self.recipe), without_folder(self.task.name), length, *weights)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{folder} cannot be made: {error}") from error
        if not self.path.exists():
            return
        if not resume:
            raise StudyError(f"{self.path} is of a training that stopped: go on with resume, or remove it")
        self.kept = checkpoint.read(self.path, self.fingerprint)
        checkpoint.restore(self.state, *self.kept)


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving averages of floating-point tensors; others, such as counters, are copied."""
    ema = get_ema_multi_avg_fn(decay)

    def average(kept: Any, new: Any, count: Any) -> None:  # tensors of one dtype
        if kept[0].is_floating_point():
            ema(kept, new, count)
        else:
            torch._foreach_copy_(kept, new)

    return average


def thinned(losses: list[float]) -> list[list[float]]:
    """Thin out the losses of a stage.

    Args:
        losses: The loss of every step.

    Returns:
        At most POINTS pairs [step, mean loss since the previous pair].
    """
    size = max(1, -(-len(losses) // POINTS))
    parts = [(start + size, losses[start : start + size]) for start in range(0, len(losses), size)]
    return [[min(end, len(losses)), sum(part) / len(part)] for end, part in parts]
