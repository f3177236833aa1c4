"""Tasks of studies/thesis_accuracy.toml: the thesis's networks on CIFAR-10, untrained or trained by that study."""

from __future__ import annotations

import os
from pathlib import Path

import cifar10
import thesis_models
import torch
import torch.nn.functional as F
from torch import nn

import rankopt

FOLDER = "runs/thesis_accuracy"


def _task(name: str, trained: bool) -> rankopt.Task:
    model: nn.Module = thesis_models.build(name)
    if trained:
        folder = Path(os.environ.get("RANKOPT_THESIS", FOLDER)) / f"{name}-dense" / "trained"
        if not (folder / "plan.json").is_file():
            raise FileNotFoundError(f"{folder} is missing: its case comes first in thesis_accuracy.toml")
        model = rankopt.load(model, folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    calibration = cifar10.augment(cifar10.images("train", 0, 2_000), torch.Generator().manual_seed(0))
    return rankopt.Task(
        model=model,
        example_input=torch.zeros(1, 3, 32, 32),
        calibration=calibration.split(500),
        score=cifar10.Accuracy("train", 45_000, 50_000),
        test=cifar10.Accuracy("test", 0, 10_000),
        train=cifar10.Augmented(0, 45_000),
        loss=F.cross_entropy,
        examples=5_000,
        test_examples=10_000,
    )


def resnet18() -> rankopt.Task:
    """Untrained; 11,173,962 parameters."""
    return _task("ResNet-18", trained=False)


def resnet18_trained() -> rankopt.Task:
    """As the case ResNet-18-dense trained it."""
    return _task("ResNet-18", trained=True)


def vgg11() -> rankopt.Task:
    """Untrained; 9,231,114 parameters."""
    return _task("VGG-11", trained=False)


def vgg11_trained() -> rankopt.Task:
    """As the case VGG-11-dense trained it."""
    return _task("VGG-11", trained=True)
