"""Precision and memory format of a training, chosen by measuring where the recipe leaves them open."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from typing_extensions import TypedDict

from rankopt.core.errors import TaskError
from rankopt.model.forward import device_of
from rankopt.training.loop import Losses, endless, new_capture, train
from rankopt.training.losses import in_channels_last
from rankopt.training.recipe import Recipe, make_optimizer
from rankopt.training.step import WARM_UP, WORTH_IT, Loss

TIMED = 12  # steps whose duration is measured, after those in which kernels are chosen and a graph is recorded


def as_asked(recipe: Recipe) -> Recipe:
    """Return the recipe with float32 in the place of "auto", which stands for it where nothing is measured.

    Args:
        recipe: The recipe.
    """
    return dataclasses.replace(recipe, precision="float32") if recipe.precision == "auto" else recipe


def lay_out(model: nn.Module, recipe: Recipe, in_place: bool = False) -> nn.Module:
    """Bring 4-dimensional parameters into the channels-last memory format, if the recipe asks for it.

    Args:
        model: The model.
        recipe: The recipe.
        in_place: Whether to change the model itself, not a copy.

    Returns:
        The model itself if nothing has to change.
    """
    wanting = [p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous(memory_format=torch.channels_last)]
    if not recipe.channels_last or not wanting:
        return model
    model = model if in_place else copy.deepcopy(model)
    for p in model.parameters():
        p.data = in_channels_last(p.data)
    return model


class Chosen(TypedDict, total=False):
    """What was chosen for a recipe that leaves it open.

    Attributes:
        precision: As in a recipe.
        channels_last: As in a recipe.
        milliseconds: Of a step, by choice.
    """

    precision: str
    channels_last: bool
    milliseconds: dict[str, float]


def fastest(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe, make_loss: Callable[[Recipe, nn.Module], Loss]
) -> Chosen:
    """Time some steps in each precision and memory format, on a copy of the model.

    Args:
        model: The model; it is not changed.
        batches: Training batches.
        recipe: The recipe, whose precision is "auto".
        make_loss: Makes the loss of a recipe and a model.

    Returns:
        The entries `precision` and `channels_last` of the fastest, and `milliseconds` of a step by choice. On a CPU,
        where the same settings give the same weights, nothing is timed: float32, and channels last for models with
        depthwise convolutions, whose backward pass is several times as fast so.
    """
    if device_of(model).type != "cuda":
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
        return {"precision": "float32", "channels_last": recipe.channels_last or depthwise, "milliseconds": {}}
    return time_choices(model, batches, recipe, make_loss)


def time_choices(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe, make_loss: Callable[[Recipe, nn.Module], Loss]
) -> Chosen:
    """As `fastest`, on any device.

    Args:
        model: The model.
        batches: Training batches.
        recipe: The recipe.
        make_loss: Makes the loss of a recipe and a model.
    """
    with torch.random.fork_rng():
        batch = next(endless(batches, recipe.seed))
    found: dict[str, float] = {}
    best: tuple[float, str, bool] | None = None
    for precision in ("tf32", "bfloat16"):
        for channels_last in (False, True):
            choice = dataclasses.replace(recipe, precision=precision, channels_last=channels_last)
            try:
                seconds = _seconds(model, batch, choice, make_loss)
            except TaskError:  # such as a loss that is not finite, or an operation without bfloat16
                continue
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
                continue
            found[f"{precision}{', channels_last' if channels_last else ''}"] = round(1e3 * seconds, 3)
            best = min(best or (seconds, precision, channels_last), (seconds, precision, channels_last))
    if best is None:  # the training itself will say what is wrong
        return {"precision": "float32", "channels_last": recipe.channels_last, "milliseconds": {}}
    return {"precision": best[1], "channels_last": best[2], "milliseconds": found}


def _seconds(model: nn.Module, batch: Any, recipe: Recipe, make_loss: Callable[[Recipe, nn.Module], Loss]) -> float:
    """Seconds of one step, after enough of them to have recorded it."""
    trial = lay_out(copy.deepcopy(model), recipe, in_place=True)
    moving = [p for p in trial.parameters() if p.requires_grad]
    before, steps = WARM_UP + 2, WARM_UP + 2 + TIMED
    capture = new_capture(trial, moving, max(steps, WORTH_IT))
    optimizer = make_optimizer(recipe, moving, capture is not None and not capture.reason)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay what they are
    times: list[float] = []

    def after_step(step: int, losses: Losses) -> None:
        if step + 1 in (before, steps):
            losses.read()  # waits for all steps
            times.append(time.perf_counter())

    train(
        trial,
        [batch],
        make_loss(recipe, trial),
        optimizer,
        steps=steps,
        seed=recipe.seed,
        clip=recipe.clip or None,
        training=not recipe.eval_mode,
        after_step=after_step,
        capture=capture,
        tf32=True,
    )
    return (times[1] - times[0]) / TIMED
