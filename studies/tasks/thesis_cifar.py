"""Tasks of studies/thesis_*.toml: the thesis's networks on CIFAR-10, untrained or trained by these studies."""

from __future__ import annotations

import os
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


def resnet18() -> rankopt.Task:
    """Untrained; 11,173,962 parameters."""
    return _task("ResNet-18")


def resnet18_trained() -> rankopt.Task:
    """As the case ResNet-18-dense trained it."""
    return _task("ResNet-18", "thesis_accuracy")


def vgg11() -> rankopt.Task:
    """Untrained; 9,231,114 parameters."""
    return _task("VGG-11")


def vgg11_trained() -> rankopt.Task:
    """As the case VGG-11-dense trained it."""
    return _task("VGG-11", "thesis_accuracy")


def vgg11_brief() -> rankopt.Task:
    """As the case VGG-11-dense of thesis_vgg11.toml trained it."""
    return _task("VGG-11", "thesis_vgg11")
