"""ResNet-18/34/50 and VGG-11/16/19 for CIFAR-10, (b, 3, 32, 32) -> (b, 10), untrained.

ResNets (He 2016) with a first 3x3 convolution of stride 1 and no pooling before the stages; VGGs (Simonyan 2015) with
batch norm and one linear layer. These are the networks whose parameters the thesis counts, to the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {
    "ResNet-18": (2, 2, 2, 2),
    "ResNet-34": (3, 4, 6, 3),
    "ResNet-50": (3, 4, 6, 3),
    "VGG-11": (1, 1, 2, 2, 2),
    "VGG-16": (2, 2, 3, 3, 3),
    "VGG-19": (2, 2, 4, 4, 4),
}
"""Blocks of each stage; of a VGG, convolutions."""


def convolution(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


class Residual(nn.Module):
    """Convolutions with batch norm beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, convolutions: Sequence[nn.Conv2d], stride: int) -> None:
        super().__init__()
        for i, layer in enumerate(convolutions, 1):
            setattr(self, f"conv{i}", layer)
            setattr(self, f"bn{i}", nn.BatchNorm2d(layer.out_channels))
        self.depth = len(convolutions)
        c_in, c_out = convolutions[0].in_channels, convolutions[-1].out_channels
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(convolution(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.depth else y
        return F.relu(y + self.shortcut(x))


def basic(c_in: int, width: int, stride: int) -> Residual:
    return Residual([convolution(c_in, width, 3, stride), convolution(width, width, 3)], stride)


def bottleneck(c_in: int, width: int, stride: int) -> Residual:
    narrow = [convolution(c_in, width, 1), convolution(width, width, 3, stride)]
    return Residual([*narrow, convolution(width, 4 * width, 1)], stride)


class ResNet(nn.Module):
    """Stages of 64, 128, 256 and 512 channels (four times as many come out of bottlenecks)."""

    def __init__(self, block: Callable[[int, int, int], Residual], blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 64, 3), nn.BatchNorm2d(64)
        channels = 64
        self.stages = nn.Sequential()
        for stage, count in enumerate(blocks):
            made = []
            for i in range(count):
                made.append(block(channels, 64 * 2**stage, 2 if stage and i == 0 else 1))
                channels = made[-1].get_submodule(f"bn{made[-1].depth}").num_features
            self.stages.append(nn.Sequential(*made))
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stages(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def vgg(convolutions: Sequence[int]) -> nn.Sequential:
    """Stages of 64, 128, 256, 512 and 512 channels, each ended by a max pool."""
    parts: list[nn.Module] = []
    c_in = 3
    for count, channels in zip(convolutions, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            parts += [nn.Conv2d(c_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            c_in = channels
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(c_in, 10))


def build(name: str, seed: int = 0) -> nn.Module:
    """An untrained model by its name in SIZES; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("VGG"):
            return vgg(SIZES[name])
        return ResNet(bottleneck if name == "ResNet-50" else basic, SIZES[name])
