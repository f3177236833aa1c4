"""Training recipes: the settings of a training, and the optimizers and schedules made from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from rankopt.core.errors import RankoptError

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "one-cycle", "constant"),
    "precision": ("float32", "tf32", "bfloat16", "auto"),
    "units": ("layers", "blocks"),
}


RANGES = {  # inclusive bounds
    "epochs": (0.0, math.inf),
    "rate": (1e-12, math.inf),
    "momentum": (0.0, 0.9999),
    "weight_decay": (0.0, math.inf),
    "warmup": (0.0, 0.9),
    "smoothing": (0.0, 0.9),
    "distill": (0.0, 1.0),
    "temperature": (1e-3, math.inf),
    "features": (0.0, math.inf),
    "ema": (0.0, 0.999999),
    "clip": (0.0, math.inf),
    "patience": (0, math.inf),
    "layerwise": (0, math.inf),
    "layerwise_rate": (1e-12, math.inf),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.

    The defaults suit a compressed model that a search found, not training from scratch.

    Attributes:
        epochs: Epochs over the task's `train`, may be a fraction; 0 runs only the layerwise stage, if any.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        rate: Largest learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of parameters with two or more dimensions; biases and norms have none.
        schedule: Learning rate after the warm-up: "cosine" or "constant"; or "one-cycle".
        warmup: Share of the steps in which the learning rate rises.
        smoothing: Label smoothing.
        distill: Weight of the distillation loss; that of the labels' loss is 1 - distill.
        temperature: Temperature of distillation.
        features: Weight of the distance between the outputs of factorised layers and the dense model's.
        ema: Decay of an exponential moving average of the weights, which then is the result; 0: none.
        clip: Largest norm of the gradient; 0: no clipping. CP needs it.
        precision: "float32"; "tf32", which on a GPU also lets matrix products round to TensorFloat-32; "bfloat16" for
            torch.autocast; or "auto": on a GPU, the fastest of tf32 and bfloat16, with and without `channels_last`, by
            a few timed steps of each; elsewhere float32, with `channels_last` for depthwise convolutions.
        channels_last: Whether 4-dimensional tensors are stored in the channels-last memory format.
        eval_mode: Train in eval mode: batch norms keep their statistics and dropout is off, which suits a model
            that is already good.
        orthogonal: Whether the cores of generated weights (`ttn`, `augmented_ttn`, `mera`, `brick_wall`) are kept
            orthogonal, each up to a scale.
        best: Whether to keep the weights of the epoch with the best validation score instead of the last ones.
        patience: Stop after this many epochs in a row without a better validation score; 0: never.
        layerwise: Steps of a first stage that trains each unit towards the dense model's output, on unlabelled
            calibration inputs.
        layerwise_rate: Largest learning rate of that stage.
        units: What that stage trains: "layers" (each factorised layer) or "blocks" (the modules that hold them).
        seed: Seed of the order of batches and of all random numbers.

    Raises:
        RankoptError: A value is out of its range.
    """

    epochs: float = 10.0
    optimizer: str = "sgd"
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    smoothing: float = 0.0
    distill: float = 0.9
    temperature: float = 4.0
    features: float = 0.0
    ema: float = 0.0
    clip: float = 5.0
    precision: str = "float32"
    channels_last: bool = False
    eval_mode: bool = False
    orthogonal: bool = False
    best: bool = False
    patience: int = 0
    layerwise: int = 0
    layerwise_rate: float = 1e-3
    units: str = "layers"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RankoptError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            whole = name in ("layerwise", "patience", "seed")
            kind = int if whole else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high or value == math.inf:
                what = "a whole number" if whole else "a number"
                raise RankoptError(f"{name} is {value!r}: give {what} from {low:g} to {high:g}")
            if not whole:
                object.__setattr__(self, name, float(value))
        for name in ("channels_last", "eval_mode", "orthogonal", "best"):
            if not isinstance(getattr(self, name), bool):
                raise RankoptError(f"{name} is {getattr(self, name)!r}: give true or false")

    @property
    def trains(self) -> bool:
        """Whether the recipe has any training step."""
        return bool(self.epochs or self.layerwise)

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}


def make_optimizer(
    recipe: Recipe, parameters: Iterable[nn.Parameter], fused: bool | None = None
) -> torch.optim.Optimizer:
    """Make the optimizer of a recipe.

    Args:
        recipe: Optimizer, learning rate, momentum and weight decay.
        parameters: Parameters to train; those with fewer than two dimensions get no weight decay.
        fused: As torch's optimizers take it.
    """
    moving = list(parameters)
    groups = [
        {"params": [p for p in moving if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.rate, fused=fused)
    return torch.optim.SGD(groups, recipe.rate, recipe.momentum, nesterov=recipe.momentum > 0, fused=fused)


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    """Make the learning rate schedule of a recipe, stepped once per optimizer step.

    Args:
        recipe: Schedule, learning rate and warm-up.
        optimizer: The optimizer.
        steps: Total number of steps.
    """
    if recipe.schedule == "one-cycle":
        steps = max(steps, 3)  # OneCycleLR divides by zero if the rise takes only one step
        rising_share = max(recipe.warmup, 2 / steps)
        return lr_scheduler.OneCycleLR(
            optimizer, recipe.rate, total_steps=steps, pct_start=rising_share, cycle_momentum=False
        )
    rising = round(recipe.warmup * steps)
    after: lr_scheduler.LRScheduler = (
        lr_scheduler.CosineAnnealingLR(optimizer, max(steps - rising, 1))
        if recipe.schedule == "cosine"
        else lr_scheduler.ConstantLR(optimizer, 1.0)
    )
    if not rising:
        return after
    warm = lr_scheduler.LinearLR(optimizer, 1 / (rising + 1), 1.0, rising)
    return lr_scheduler.SequentialLR(optimizer, [warm, after], [rising])
