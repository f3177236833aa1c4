"""How a model is trained: what a person may set, and torch's optimizers and schedules made from it."""

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
    "precision": ("float32", "bfloat16"),
    "units": ("layers", "blocks"),
}


RANGES = {  # inclusive
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
    "layerwise": (0, math.inf),
    "layerwise_rate": (1e-12, math.inf),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a training. The defaults are for a plan that came out of a search, not for one from scratch.

    epochs: over the task's train, may be a fraction; 0: only the layerwise stage, if any. optimizer: "sgd" (Nesterov,
    with this momentum) or "adamw". rate: the largest learning rate. weight_decay: of weights, not of biases and norms.
    schedule: "cosine" or "constant" after a linear warm-up over this share of the steps, or "one-cycle", which rises
    for that share. smoothing: of labels. distill: weight of the teacher's logits beside the labels' (1 - distill), at
    this temperature. features: weight of the distance between outputs of factorised layers and the dense model's.
    ema: decay of the average of weights that is kept instead of the last ones; 0: none. clip: largest norm of the
    gradient (CP needs one); 0: none. precision: "bfloat16" runs models under torch.autocast.
    eval_mode: run the model in eval mode, so that batch norms keep their statistics and nothing is dropped: gentler to
    a model that is good already. best: keep the weights of the epoch with the best validation score, not the last.
    layerwise: so many steps before, in which each factorised layer ("layers") or the module that holds it ("blocks")
    is trained towards the dense model's output, on unlabelled calibration inputs.
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
    best: bool = False
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
            whole = name in ("layerwise", "seed")
            kind = int if whole else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high or value == math.inf:
                what = "a whole number" if whole else "a number"
                raise RankoptError(f"{name} is {value!r}: give {what} from {low:g} to {high:g}")
            if not whole:
                object.__setattr__(self, name, float(value))
        for name in ("channels_last", "eval_mode", "best"):
            if not isinstance(getattr(self, name), bool):
                raise RankoptError(f"{name} is {getattr(self, name)!r}: give true or false")

    @property
    def trains(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.epochs or self.layerwise)

    def changed(self) -> dict[str, Any]:
        """What is not as by default."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}


def make_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD or AdamW over parameters, those of fewer than two dimensions without weight decay."""
    moving = list(parameters)
    groups = [
        {"params": [p for p in moving if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.rate)
    return torch.optim.SGD(groups, recipe.rate, recipe.momentum, nesterov=recipe.momentum > 0)


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    """The learning rate over so many steps."""
    if recipe.schedule == "one-cycle":
        steps = max(steps, 3)  # it divides by zero where rising takes but one step
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
