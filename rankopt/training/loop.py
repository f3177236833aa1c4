"""A small training loop, and distillation from the dense model."""

from __future__ import annotations

import copy
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
from rankopt.model.forward import batch_size, class_axis, inference, main_output, map_tensors, run, to_device
from rankopt.model.quantization import dequantized

RATE = 3e-4  # of Adam


def train_briefly(
    model: nn.Module, data: list[Any], loss: Loss, steps: int, seed: int = 0, progress: Progress = silent
) -> nn.Module:
    """A copy after so many steps of Adam, batch norms' statistics kept. The same seed gives the same model.

    Weights of a lower precision are trained in their layer's, and rounded again at the end.
    """
    changed = copy.deepcopy(model)
    with dequantized(changed):
        optimizer = torch.optim.Adam(changed.parameters(), RATE)
        train(changed, data, loss, optimizer, steps=steps, seed=seed, clip=CLIP, training=False, progress=progress)
    return changed


Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> a scalar to minimise."""


def train(
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
    after_step: Callable[[int, float], None] = lambda step, loss: None,
    progress: Callable[[Iterable[int], str, int], Iterable[int]] = lambda items, what, total: items,
) -> list[float]:
    """Train in place for steps [start, steps), over what `endless` makes of the batches; returns each step's loss.

    optimizer: over the parameters that are to move; only these take gradients. clip: largest norm of the
    gradient, all parameters together. training: the mode that the model is run in; False keeps batch norms'
    statistics. schedule: of the optimizer's learning rate, stepped with it. after_step(step, loss) is called with
    gradients still in place. Modes and requires_grad are restored. A training from `start` on goes on as the one
    that it continues would have, if model, optimizer and schedule are as they were there.
    Raises TaskError at a loss that is not finite.
    """
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    history: list[float] = []
    with _prepared(model, moving, training):
        lessons = endless(batches, seed, start)
        for step in progress(range(start, steps), "training", steps - start):
            value = loss(model, next(lessons))
            if not torch.isfinite(value):
                raise TaskError(f"the training loss is {value.item()} at step {step}: try a lower learning rate")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(moving, clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            history.append(value.item())
            after_step(step, history[-1])
        optimizer.zero_grad(set_to_none=True)
    return history


def endless(batches: Iterable[Any], seed: int, start: int = 0) -> Iterator[Any]:
    """Batches without end, epoch after epoch: a sequence's in another random order each time, others' as they come.

    Torch's global generator is seeded anew before each batch: what an iterable (or a DataLoader's workers) and then
    the model draw from it is the same for batch n, whatever was drawn before. The first `start` are left out; of an
    iterable with a length whole epochs are, and the rest is drawn. Raises TaskError where there is no batch.
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
    """How many batches an epoch has; None if it does not say."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


_END = object()


def _reseed(seed: int, n: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence((seed, n)).generate_state(1)[0]))  # it takes but 32 bits


def shuffled(n: int, seed: int) -> Iterator[int]:
    """0..n-1 in a random order, again and again, each time in another."""
    if n == 0:
        raise TaskError("train is empty: give at least one batch")
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


@contextmanager
def _prepared(model: nn.Module, moving: Sequence[Tensor], training: bool) -> Iterator[None]:
    """The mode, gradients for what moves only, and a random state of its own; all restored."""
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in (*model.parameters(), *moving)}
    for p in wanted:
        p.requires_grad_(False)
    for p in moving:
        p.requires_grad_(True)
    model.train(training)
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            yield
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)
        for module, mode in modes.items():
            module.training = mode


BATCH = 64  # examples a step, of distillation


CLIP = 5.0  # norm of the gradient: factors need it


def search_batches(task: Task, calibration: Iterable[Any]) -> tuple[list[Any], Loss]:
    """What a search trains on: a few batches, the same for every plan.

    The task's train and loss, if train is a sequence of batches; else (a loader, a stream that augments) distillation
    from its model on the calibration batches.
    """
    if isinstance(task.train, Sequence) and task.loss is not None:
        return list(task.train), supervised(task.loss)
    return with_targets(task.model, split(calibration, BATCH)), distillation


def split(batches: Iterable[Any], size: int) -> list[Any]:
    """The same inputs in equal batches of at most so many examples."""
    parts: list[Any] = []
    for x in batches:
        n = batch_size(x)
        count = -(-n // size)
        for i in range(count):
            cut = slice(n * i // count, n * (i + 1) // count)
            parts.append(map_tensors(x, lambda t, n=n, cut=cut: t[cut] if t.ndim and len(t) == n else t))
    return parts


def with_targets(teacher: nn.Module, batches: Iterable[Any]) -> list[tuple[Any, Tensor]]:
    """(input, the teacher's outputs) for every batch."""
    with inference(teacher):
        return [(x, main_output(run(teacher, to_device(x, teacher)))) for x in batches]


def distillation(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    """How far the model's predictions are from the teacher's, as `divergence` says."""
    x, wanted = batch
    return divergence(main_output(run(model, to_device(x, model))), wanted)


def divergence(z: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(wanted / T) ‖ softmax(z / T)), a mean over examples (Hinton 2015, section 2.1; T² keeps gradients).

    Where there is but one output, the squared error relative to the variance (of one example: the square) of what is
    wanted.
    """
    axis = class_axis(z)
    if axis is None:
        spread = (wanted - wanted.mean()).square().sum()  # none in a batch of one example
        scale = torch.where(spread > 0, spread, wanted.square().sum())
        return (z - wanted).square().sum() / scale.clamp_min(1e-12)
    log_p, log_p0 = (F.log_softmax(logits / temperature, axis) for logits in (z, wanted))
    total = F.kl_div(log_p, log_p0, reduction="sum", log_target=True)
    return temperature**2 * total * z.shape[axis] / z.numel()


def supervised(criterion: Callable[[Any, Any], Any]) -> Loss:
    """A task's loss(output, target) on batches (input, target)."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, target = (to_device(part, model) for part in batch)
        return labelled(criterion, run(model, x), target)

    return loss


def labelled(criterion: Callable[[Any, Any], Any], out: Any, target: Any) -> Tensor:
    """A task's loss. Raises TaskError where it cannot be learnt from."""
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
