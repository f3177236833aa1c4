"""A small training loop, and distillation from the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.calibration import class_axis, main_output
from rankopt.core import Task, TaskError
from rankopt.inventory import batch_size, inference, map_tensors, run, to_device

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> a scalar to minimise."""


def train(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    seed: int = 0,
    clip: float | None = None,
    training: bool = True,
    after_step: Callable[[int], None] = lambda step: None,
    track: Callable[[Iterable[int], str, int], Iterable[int]] = lambda items, what, total: items,
) -> list[float]:
    """Train in place for so many steps, over the batches in shuffled order; returns each step's loss.

    optimizer: over the parameters that are to move; only these take gradients. clip: largest norm of the
    gradient, all parameters together. training: the mode that the model is run in; False keeps batch norms'
    statistics. after_step(step) is called with gradients still in place. Modes and requires_grad are restored.
    Raises TaskError at a loss that is not finite.
    """
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    history: list[float] = []
    order = shuffled(len(batches), seed)
    with _prepared(model, moving, training):
        for step in track(range(steps), "training", steps):
            value = loss(model, batches[next(order)])
            if not torch.isfinite(value):
                raise TaskError(f"the training loss is {value.item()} at step {step}: try a lower learning rate")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(moving, clip)
            optimizer.step()
            after_step(step)
            history.append(value.item())
        optimizer.zero_grad(set_to_none=True)
    return history


def shuffled(n: int, seed: int) -> Iterator[int]:
    """0..n-1 in a random order, again and again, each time in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


@contextmanager
def _prepared(model: nn.Module, moving: Sequence[Tensor], training: bool) -> Iterator[None]:
    """The mode, gradients for what moves only, and a seed of dropout's own; all restored."""
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in (*model.parameters(), *moving)}
    for p in wanted:
        p.requires_grad_(False)
    for p in moving:
        p.requires_grad_(True)
    model.train(training)
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)
        for module, mode in modes.items():
            module.training = mode


BATCH = 64  # examples a step, of distillation
CLIP = 5.0  # norm of the gradient: factors need it


def lessons(task: Task, calibration: Iterable[Any]) -> tuple[list[Any], Loss]:
    """The task's train and loss where it has both, else distillation from its model on the calibration batches."""
    if task.train is not None and task.loss is not None:
        return list(task.train), supervised(task.loss)
    return with_targets(task.model, split(calibration, BATCH)), distillation


def split(batches: Iterable[Any], size: int) -> list[Any]:
    """The same inputs in batches of at most so many examples."""
    parts: list[Any] = []
    for x in batches:
        n = batch_size(x)
        for start in range(0, n, size):
            cut = slice(start, start + size)
            parts.append(map_tensors(x, lambda t, n=n, cut=cut: t[cut] if t.ndim and len(t) == n else t))
    return parts


def with_targets(teacher: nn.Module, batches: Iterable[Any]) -> list[tuple[Any, Tensor]]:
    """(input, the teacher's outputs) for every batch."""
    with inference(teacher):
        return [(x, main_output(run(teacher, to_device(x, teacher)))) for x in batches]


def distillation(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    """Mean KL divergence from the teacher's predictions, or relative squared error where there is but one output."""
    x, wanted = batch
    z = main_output(run(model, to_device(x, model)))
    axis = class_axis(z)
    if axis is None:
        return (z - wanted).square().sum() / (wanted - wanted.mean()).square().sum().clamp_min(1e-12)
    log_p, log_p0 = F.log_softmax(z, axis), F.log_softmax(wanted, axis)
    return F.kl_div(log_p, log_p0, reduction="sum", log_target=True) * z.shape[axis] / z.numel()


def supervised(criterion: Callable[[Any, Any], Any]) -> Loss:
    """A task's loss(output, target) on batches (input, target)."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, target = (to_device(part, model) for part in batch)
        return criterion(run(model, x), target)

    return loss
