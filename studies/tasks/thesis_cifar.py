"""Tasks of studies/thesis_*.toml: the thesis's networks on CIFAR-10, untrained or trained by these studies."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cifar10
import thesis_models
import torch
import torch.nn.functional as F
from torch import nn

import rankopt

RUNS = "runs"


def _task(name: str, study: str | None = None) -> rankopt.Task:
    """study: the one that trained it, where its runs are (RANKOPT_RUNS, else runs)."""
    model: nn.Module = thesis_models.build(name)
    if study:
        folder = Path(os.environ.get("RANKOPT_RUNS", RUNS)) / study / f"{name}-dense" / "trained"
        if not (folder / "plan.json").is_file():
            raise FileNotFoundError(f"{folder} is missing: its case comes first in studies/{study}.toml")
        model = rankopt.load(model, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    calibration = cifar10.augment(cifar10.images("train", 0, 2_000), torch.Generator().manual_seed(0))
    return rankopt.Task(
        model=model,
        example_input=torch.zeros(1, 3, 32, 32),
        calibration=calibration.split(500),
        score=cifar10.Accuracy("train", 45_000, 50_000),
        test=cifar10.Accuracy("test", 0, 10_000),
        train=cifar10.Augmented(0, 45_000, device=device),
        loss=F.cross_entropy,
        examples=5_000,
        test_examples=10_000,
    )


def _both(name: str) -> tuple[Callable[[], rankopt.Task], Callable[[], rankopt.Task]]:
    """The task with the untrained network, and with that which the case NAME-dense of thesis_accuracy.toml trained."""
    return partial(_task, name), partial(_task, name, "thesis_accuracy")


resnet18, resnet18_trained = _both("ResNet-18")
resnet34, resnet34_trained = _both("ResNet-34")
resnet50, resnet50_trained = _both("ResNet-50")
vgg11, vgg11_trained = _both("VGG-11")
vgg16, vgg16_trained = _both("VGG-16")
vgg19, vgg19_trained = _both("VGG-19")

vgg11_brief = partial(_task, "VGG-11", "thesis_vgg11")
"""As the case VGG-11-dense of thesis_vgg11.toml trained it."""
