"""The training loop, and the losses of short trainings within a search."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task
from rankopt.model.forward import (
    ONE_THREAD,
    batch_size,
    class_axis,
    device_of,
    inference,
    main_output,
    run,
    take,
    to_device,
)
from rankopt.model.quantization import dequantized
from rankopt.training.step import WORTH_IT, Capture, Loss, Step, can_fuse, device_settings, pinned, recorder

RATE = 3e-4  # learning rate of Adam in `train_briefly`


def train_briefly(
    model: nn.Module, data: list[Any], loss: Loss, steps: int, seed: int = 0, progress: Progress = silent
) -> nn.Module:
    """Train a copy of a model for a few steps of Adam, in eval mode.

    Batch norms keep their statistics. Quantized weights are trained in the layer's own precision and quantized again
    at the end. The same seed gives the same result.

    Args:
        model: The model; it is not changed.
        data: Training batches.
        loss: Maps (model, batch) to a scalar.
        steps: Number of steps.
        seed: Seed of the order of batches and of all random numbers.
        progress: Progress callback.

    Returns:
        The trained copy.
    """
    trained = copy.deepcopy(model)
    with dequantized(trained):
        moving = list(trained.parameters())
        capture = new_capture(trained, moving, steps)
        optimizer = torch.optim.Adam(moving, RATE, fused=capture is not None and not capture.reason)
        train(
            trained,
            data,
            loss,
            optimizer,
            steps=steps,
            seed=seed,
            clip=CLIP,
            training=False,
            progress=progress,
            capture=capture,
        )
    return trained


READ_EVERY = 100
"""Steps on a GPU after which losses are read at the latest: reading waits for all steps before."""


READ_SECONDS = 2.0
"""Seconds after which they are read, too: longer steps gain nothing from not waiting."""


class Losses:
    """The losses of a training's steps; on a GPU they are read now and then, since reading waits for it.

    Attributes:
        known: Those that were read.

    Args:
        known: Losses of earlier steps, which are kept; later ones are appended.
        step: Number of the next step, for messages.
        every: After how many steps losses are read.
    """

    def __init__(self, known: list[float], step: int, every: int) -> None:
        self.known, self.step, self.every = known, step, every
        self.waiting: list[Tensor] = []
        self.last_read = time.monotonic()

    def add(self, loss: Tensor) -> bool:
        """Note the loss of a step.

        Args:
            loss: A scalar on any device.

        Returns:
            Whether the losses were read.

        Raises:
            TaskError: They were read, and one is not finite.
        """
        self.waiting.append(loss)
        due = len(self.waiting) >= self.every or time.monotonic() - self.last_read >= READ_SECONDS
        if due:
            self.read()
        return due

    def read(self) -> list[float]:
        """Wait for all steps, and return their losses.

        Raises:
            TaskError: One is not finite.
        """
        values = torch.stack(self.waiting).tolist() if self.waiting else []
        self.waiting.clear()
        self.last_read = time.monotonic()
        for value in values:
            if not math.isfinite(value):
                raise TaskError(f"the training loss is {value} at step {self.step}: try a lower learning rate")
            self.known.append(value)
            self.step += 1
        return self.known


def train(  # noqa: PLR0913  # one keyword per option of a training loop
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    start: int = 0,
    seed: int = 0,
    clip: float | None = None,
    training: bool = True,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    after_step: Callable[[int, Losses], bool | None] = lambda step, losses: None,
    progress: Callable[[Iterable[int], str, int], Iterable[int]] = lambda items, what, total: items,
    history: list[float] | None = None,
    capture: Capture | None = None,
    tf32: bool = False,
) -> list[float]:
    """Train a model in place.

    Modes, `requires_grad` and torch's random state are restored afterwards. A step waits for the device only where its
    loss is read, see `Losses`.

    Args:
        model: The model.
        batches: Training batches, repeated as `endless` describes.
        loss: Maps (model, batch) to a scalar.
        optimizer: Optimizer over the parameters to train; only these get gradients.
        steps: Number of the last step, plus one.
        start: Number of the first step. With model, optimizer and schedule as they were after `start` steps, the
            training continues as if it had not been interrupted.
        seed: Seed of the order of batches and of all random numbers.
        clip: Largest norm of the gradient of all parameters together; None: no clipping.
        training: Whether the model is in training mode; False keeps the statistics of batch norms.
        schedule: Learning rate schedule, stepped after every optimizer step.
        after_step: Called with (step, losses) after every step, while the gradients are still there. If it returns
            True, the training ends.
        progress: Progress callback.
        history: Losses of the steps before `start`; those of this training are appended.
        capture: How steps are recorded, see `Step`; None: not at all.
        tf32: Whether float32 matrix products on a GPU may use TensorFloat-32.

    Returns:
        `history` with the loss of every step.

    Raises:
        TaskError: A loss is not finite, or there is no batch.
    """
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    device = moving[0].device if moving else device_of(model)
    on_gpu = device.type == "cuda"
    losses = Losses([] if history is None else history, start, READ_EVERY if on_gpu else 1)
    with _prepared(model, moving, training), device_settings(device):
        take_step = Step(model, loss, optimizer, clip, capture, tf32)
        repeated = endless(batches, seed, start)
        for step in progress(range(start, steps), "training", steps - start):
            batch = next(repeated)
            losses.add(take_step(pinned(batch) if on_gpu else batch))
            if schedule is not None:
                schedule.step()
            if after_step(step, losses):
                break
        optimizer.zero_grad(set_to_none=True)
        return losses.read()


def new_capture(model: nn.Module, moving: Sequence[Tensor], steps: int) -> Capture | None:
    """Decide whether the steps of a training are recorded.

    Args:
        model: The model.
        moving: The parameters to train.
        steps: Number of steps.

    Returns:
        How to record them; its `reason` says why not, if they are not. None where nothing records, as on a CPU.
    """
    record = recorder(device_of(model))
    if record is None:
        return None
    capture = Capture(record)
    if steps < WORTH_IT:
        capture.reason = f"recording does not pay for fewer than {WORTH_IT} steps"
    elif len({t.device for t in (*model.parameters(), *model.buffers())}) > 1:
        capture.reason = "the model is on several devices"
    elif not can_fuse(moving):
        capture.reason = "a parameter is not floating-point, or not dense in memory"
    return capture


def endless(batches: Iterable[Any], seed: int, start: int = 0) -> Iterator[Any]:
    """Repeat batches epoch after epoch, without end.

    Before each batch torch's global generator is seeded with the batch's number. What the iterable (or a DataLoader's
    workers) and the model then draw from it depends only on that number, not on what was drawn before.

    Args:
        batches: A sequence, which is shuffled every epoch, or another iterable, which is iterated every epoch.
        seed: Seed of the shuffling and of torch's generator.
        start: Number of batches to skip. An iterable with a length skips whole epochs without loading them.

    Yields:
        Batches.

    Raises:
        TaskError: There is no batch.
    """
    if isinstance(batches, Sequence):
        for n, i in enumerate(islice(shuffled(len(batches), seed), start, None), start):
            _reseed(seed, n)
            yield batches[i]
    length = epoch_length(batches)
    n = start - start % length if length else 0
    while True:
        _reseed(seed, n)
        iterator, first = iter(batches), n
        while (batch := next(iterator, _END)) is not _END:
            if n >= start:
                yield batch
            n += 1
            _reseed(seed, n)
        if n == first:
            raise TaskError("train gives no batch: it must be an iterable that can be gone through again every epoch")


def epoch_length(batches: Iterable[Any]) -> int | None:
    """Return the number of batches per epoch; None if the iterable has no length.

    Args:
        batches: Training batches.
    """
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


_END = object()


def _reseed(seed: int, n: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence((seed, n)).generate_state(1)[0]))  # NumPy takes 32 bits only


def shuffled(n: int, seed: int) -> Iterator[int]:
    """Yield 0 to n - 1 in random order, without end, in a new order each time.

    Args:
        n: How many numbers.
        seed: Seed of the orders.

    Raises:
        TaskError: n is 0.
    """
    if n == 0:
        raise TaskError("train is empty: give at least one batch")
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


@contextmanager
def _prepared(model: nn.Module, moving: Sequence[Tensor], training: bool) -> Iterator[None]:
    """Set the mode, enable gradients of the parameters to train only, and fork torch's random state; restore all."""
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in (*model.parameters(), *moving)}
    for p in wanted:
        p.requires_grad_(False)
    for p in moving:
        p.requires_grad_(True)
    model.train(training)
    try:
        with ONE_THREAD, torch.enable_grad(), torch.random.fork_rng():
            yield
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)
        for module, mode in modes.items():
            module.training = mode


BATCH = 64  # examples per step of distillation
CLIP = 5.0  # largest norm of the gradient in `train_briefly`: factors need clipping


def search_batches(task: Task, calibration: Iterable[Any]) -> tuple[list[Any], Loss]:
    """Choose the batches and the loss for short trainings within a search; they are the same for every plan.

    Args:
        task: The task.
        calibration: Its calibration batches.

    Returns:
        The task's `train` and `loss` if `train` is a sequence. Otherwise (a loader, an augmenting stream) calibration
        batches with the dense model's outputs, and the distillation loss.
    """
    if isinstance(task.train, Sequence) and task.loss is not None:
        return list(task.train), supervised(task.loss)
    return with_targets(task.model, split(calibration, BATCH)), distillation


def split(batches: Iterable[Any], size: int) -> list[Any]:
    """Split batches into smaller ones of about equal size.

    Args:
        batches: Inputs.
        size: Largest number of examples per batch.
    """
    parts: list[Any] = []
    for x in batches:
        n = batch_size(x)
        count = -(-n // size)
        for i in range(count):
            parts.append(take(x, slice(n * i // count, n * (i + 1) // count)))
    return parts


def with_targets(teacher: nn.Module, batches: Iterable[Any]) -> list[tuple[Any, Tensor]]:
    """Pair inputs with a teacher's outputs.

    Args:
        teacher: The teacher.
        batches: Inputs.

    Returns:
        (input, main output of the teacher) for every batch.
    """
    with inference(teacher):
        return [(x, main_output(run(teacher, to_device(x, teacher)))) for x in batches]


def distillation(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    """Compute the distillation loss on a batch.

    Args:
        model: The model to train.
        batch: (input, the teacher's output).

    Returns:
        The `divergence` of both outputs.
    """
    x, wanted = batch
    return divergence(main_output(run(model, to_device(x, model))), wanted)


def divergence(z: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T² KL(softmax(wanted / T) ‖ softmax(z / T)), a mean over examples (Hinton 2015, section 2.1).

    The factor T² keeps the scale of gradients. For a model with a single output, the squared error relative to the
    variance of `wanted`, or to its square if there is no variance.

    Args:
        z: Outputs of the model.
        wanted: Outputs of the teacher, of the same shape.
        temperature: T.

    Returns:
        A scalar.
    """
    axis = class_axis(z)
    if axis is None:
        spread = (wanted - wanted.mean()).square().sum()  # zero for a batch of one example
        scale = torch.where(spread > 0, spread, wanted.square().sum())
        return (z - wanted).square().sum() / scale.clamp_min(1e-12)
    log_p, log_p0 = (F.log_softmax(logits / temperature, axis) for logits in (z, wanted))
    total = F.kl_div(log_p, log_p0, reduction="sum", log_target=True)
    return temperature**2 * total * z.shape[axis] / z.numel()


def supervised(criterion: Callable[[Any, Any], Any]) -> Loss:
    """Make a loss on labels.

    Args:
        criterion: A task's loss: maps (output, target) to a scalar.

    Returns:
        A loss on batches (input, target).
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, target = (to_device(part, model) for part in batch)
        return labelled(criterion, run(model, x), target)

    return loss


def labelled(criterion: Callable[[Any, Any], Any], out: Any, target: Any) -> Tensor:
    """Evaluate a task's loss.

    Args:
        criterion: The task's loss.
        out: Output of the model.
        target: Target.

    Returns:
        A scalar.

    Raises:
        TaskError: The loss raised an error, or returned something other than a scalar with a gradient.
    """
    try:
        loss = criterion(out, target)
    except Exception as error:
        raise TaskError(f"the task's loss raised {type(error).__name__}: {error}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(f"the task's loss gave a value {what}: it must give a tensor with one number")
    if not loss.requires_grad:
        raise TaskError("the task's loss has no gradient: it must be computed from the model's output")
    return loss
