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
from torch.optim.swa_utils import AveragedModel

from rankopt.core.errors import StudyError, TaskError
from rankopt.core.files import digest, without_folder
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task
from rankopt.core.result_record import EpochRow, ExecutionEntry, FinetuneInfo
from rankopt.decompositions.orthogonal import keep_orthogonal, make_ordinary
from rankopt.model.forward import device_name, device_of
from rankopt.model.inputs import CALIBRATION_EXAMPLES, collect_batches
from rankopt.model.objective import call
from rankopt.model.quantization import dequantize_all, requantize_all
from rankopt.training import checkpoint
from rankopt.training.checkpoint import State
from rankopt.training.loop import BATCH, Losses, epoch_length, new_capture, split, train
from rankopt.training.losses import UNITS, TrainingLoss, has_labels, layer_by_layer
from rankopt.training.precision import as_asked, fastest, lay_out
from rankopt.training.recipe import Recipe, make_optimizer, make_schedule
from rankopt.training.step import Capture, Loss

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
        capture: How steps are recorded, see `rankopt.training.step`; None where nothing records.
    """

    name: str
    batches: Iterable[Any]
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: lr_scheduler.LRScheduler
    steps: int
    epoch: int
    training: bool
    capture: Capture | None


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
    if recipe.orthogonal and not keep_orthogonal(model):
        raise TaskError("no weight of the model is generated from cores that could be kept orthogonal: leave it out")
    training = _Training(model, task, recipe, teacher or task.model, stop, note)
    if folder is not None:
        training.keep(Path(folder), resume)
    trained = training.run(progress)
    make_ordinary(trained.model)
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
        for name in ("best", "patience"):
            if getattr(recipe, name) and task.score is None:
                raise TaskError(
                    f"the best epoch cannot be told without a score: give the task one, or leave out {name}"
                )
        self.task, self.recipe, self.teacher, self.stop, self.note = task, recipe, teacher, stop, note
        self.used = as_asked(recipe)  # with the precision and memory format that "auto" stands for, once it is known
        self.state = State(model)
        self.averaging: _Averaging | None = None
        if recipe.ema:
            self.state.average = AveragedModel(model, use_buffers=True)
        self.stages = [self._layerwise] * (recipe.layerwise > 0) + [self._whole] * (recipe.epochs > 0)
        self.captures: list[Capture | None] = []
        self.path: Path | None = None
        self.kept: checkpoint.Checkpoint | None = None
        self.start = self.written = time.monotonic()
        self.steps_done, self.steps_seconds = 0, 0.0

    # --- the stages ---

    def _layerwise(self) -> TrainingStage:
        model, recipe = self.state.model, dataclasses.replace(self.used, rate=self.recipe.layerwise_rate)
        names = UNITS[recipe.units](model)
        if not names:
            raise TaskError("the model has no factorised layer to train by itself: give layerwise=0")
        inputs = self._unlabelled()
        found = (p for name in names for p in model.get_submodule(name).parameters())
        moving = dict.fromkeys(p for p in found if p.requires_grad)
        if not moving:
            raise TaskError("no parameter of a factorised layer requires a gradient: give layerwise=0")
        loss, steps = layer_by_layer(lay_out(self.task.model, recipe), names, recipe), recipe.layerwise
        capture = new_capture(model, list(moving), steps)
        adam = dataclasses.replace(recipe, optimizer="adamw", weight_decay=0.0)
        optimizer = make_optimizer(adam, moving, _fused(capture))
        schedule = make_schedule(recipe, optimizer, steps)
        return TrainingStage("layer by layer", inputs, loss, optimizer, schedule, steps, 0, False, capture)

    def _whole(self) -> TrainingStage:
        model, recipe = self.state.model, self.used
        batches = self._batches()
        epoch = epoch_length(batches)
        if epoch is None:
            raise TaskError("train does not say how many batches an epoch has: give it a __len__")
        steps = max(1, round(recipe.epochs * epoch))
        moving = [p for p in model.parameters() if p.requires_grad]
        capture = new_capture(model, moving, steps)
        optimizer = make_optimizer(recipe, moving, _fused(capture))
        schedule, trains = make_schedule(recipe, optimizer, steps), not recipe.eval_mode
        loss = self._loss(recipe, model)
        return TrainingStage("training", batches, loss, optimizer, schedule, steps, epoch, trains, capture)

    def _loss(self, recipe: Recipe, model: nn.Module) -> TrainingLoss:
        dense = lay_out(self.task.model, recipe)
        teacher = dense if self.teacher is self.task.model else lay_out(self.teacher, recipe)
        return TrainingLoss(recipe, dataclasses.replace(self.task, model=dense), teacher, model)

    def _batches(self) -> Iterable[Any]:
        return self._unlabelled() if self.task.train is None else self.task.train

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
        self._choose()
        for index in range(state.stage, len(self.stages)):
            stage = self.stages[index]()
            if self.kept is not None:
                checkpoint.restore_optimizer(stage.optimizer, stage.schedule, self.kept, stage.steps)
                self.kept = None
            else:
                state.stage, state.step = index, 0
                state.losses.append([])
            self.captures.append(stage.capture)
            first, begun = state.step, time.monotonic()
            train(
                state.model,
                stage.batches,
                stage.loss,
                stage.optimizer,
                steps=first if self._exhausted() else stage.steps,
                start=first,
                seed=recipe.seed,
                clip=recipe.clip or None,
                training=stage.training,
                schedule=stage.schedule,
                after_step=partial(self._after_step, stage),
                progress=progress,
                history=state.losses[-1],
                capture=stage.capture,
                tf32=self.used.precision in ("tf32", "bfloat16"),
            )
            self.steps_done += state.step - first
            self.steps_seconds += time.monotonic() - begun
        if state.best is not None:
            self._result().load_state_dict(state.best)
        return Trained(self._result(), self._info())

    def _choose(self) -> None:
        """Settle precision and memory format, and bring the weights into that format."""
        state, recipe = self.state, self.recipe
        if recipe.precision == "auto" and not state.chosen:
            state.chosen = fastest(state.model, self._batches(), recipe, self._loss)
        if state.chosen:
            self.used = dataclasses.replace(
                recipe, precision=state.chosen["precision"], channels_last=state.chosen["channels_last"]
            )
        for module in state.modules().values():
            lay_out(module, self.used, in_place=True)
        if state.average is not None:
            self.averaging = _Averaging(state.average, state.model, recipe.ema)

    def _after_step(self, stage: TrainingStage, step: int, losses: Losses) -> bool:
        state = self.state
        state.step = step + 1
        if self.averaging is not None and stage.epoch:
            self.averaging.update()
        stops = self.stop()
        ends = stage.epoch and (state.step % stage.epoch == 0 or state.step == stage.steps)
        if ends:
            losses.read()
            self._score(stage)
        finished = state.step == stage.steps or self._exhausted()
        last = finished and state.stage == len(self.stages) - 1
        if not losses.waiting:
            recent = losses.known[-50:]
            scored = f", score {s:.2%}" if state.epochs and (s := state.epochs[-1]["score"]) is not None else ""
            self.note(f"{stage.name}, loss {sum(recent) / len(recent):.3g}{scored}")
        if self.path is not None and (stops or last or time.monotonic() - self.written >= SECONDS):
            losses.read()
            state.seconds, self.start = self._seconds(), time.monotonic()
            checkpoint.write(self.path, state, stage.optimizer, self.fingerprint)
            self.written = time.monotonic()
        if stops:
            raise KeyboardInterrupt
        return finished

    def _exhausted(self) -> bool:
        """Whether the last `patience` epochs brought no better validation score."""
        patience = self.recipe.patience
        scores = [-math.inf if (s := e["score"]) is None else s for e in self.state.epochs]
        return bool(patience) and len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])

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
            "execution": self._execution(),
        }

    def _execution(self) -> ExecutionEntry:
        """How the steps were computed, and how fast."""
        last = self.captures[-1] if self.captures else None
        return {
            "device": device_name(device_of(self.state.model)),
            "precision": self.used.precision,
            "channels_last": self.used.channels_last,
            "graphs": sum(c.shapes for c in self.captures if c is not None),
            "not_recorded": "" if last is None else last.reason,
            "milliseconds": self.state.chosen.get("milliseconds", {}),
            "steps_per_second": float(f"{self.steps_done / self.steps_seconds:.4g}") if self.steps_done else 0.0,
        }

    # --- on disk ---

    def keep(self, folder: Path, resume: bool) -> None:
        """Write checkpoints to a folder, and restore the one that is there."""
        self.path = folder / checkpoint.FILE
        batches = self.task.train
        length = None if batches is None else epoch_length(batches)
        weights = [*self.state.model.state_dict().values(), *self.teacher.state_dict().values()]
        # Settings at their default do not count, so that a later version with more settings goes on.
        self.fingerprint = digest(self.recipe.changed(), without_folder(self.task.name), length, *weights)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"{folder} cannot be made: {error}") from error
        if not self.path.exists():
            return
        if not resume:
            raise StudyError(f"{self.path} is of a training that stopped: go on with resume, or remove it")
        self.kept = checkpoint.read(self.path, self.fingerprint)
        checkpoint.restore(self.state, self.kept)


def _fused(capture: Capture | None) -> bool | None:
    """torch's default unless steps are recorded, for which the optimizer must be fused."""
    return True if capture is not None and not capture.reason else None


class _Averaging:
    """Exponential moving averages of a model's floating-point tensors; others, such as counters, are copied.

    AveragedModel's own update waits for a GPU at every step.
    """

    def __init__(self, average: AveragedModel, model: nn.Module, decay: float) -> None:
        self.average, self.decay = average, decay
        pairs = [
            (kept.detach(), new.detach()) for kept, new in zip(_tensors(average.module), _tensors(model), strict=True)
        ]
        self.floats = [(kept, new) for kept, new in pairs if kept.is_floating_point()]
        self.others = [(kept, new) for kept, new in pairs if not kept.is_floating_point()]

    def update(self) -> None:
        """Take the model's present weights into account; the first are copied."""
        for pairs in (self.floats, self.others):
            if not pairs:
                continue
            kept, new = (list(tensors) for tensors in zip(*pairs, strict=True))
            if self.average.n_averaged and pairs is self.floats:
                torch._foreach_lerp_(kept, new, 1 - self.decay)
            else:
                torch._foreach_copy_(kept, new)
        self.average.n_averaged += 1


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


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
