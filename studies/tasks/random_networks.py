"""ResNet-18 (He et al. 2016) and VGG-16 (Simonyan & Zisserman 2015) as torchvision lays them out, random weights.

Random weights and images do for what does not depend on them: how fast a network is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rankopt

IMAGES, BATCH, SEED = 16, 4, 0
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pooling


class Block(nn.Module):
    """The basic block."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class ResNet18(nn.Module):
    """11,689,512 parameters, 1.81 GMACs at 224 x 224."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for number in range(1, 5):
            inside, outside, stride = widths[number - 1], widths[number], 1 if number == 1 else 2
            self.add_module(f"layer{number}", nn.Sequential(Block(inside, outside, stride), Block(outside, outside, 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def vgg16(pooled: int, classifier: nn.Module) -> nn.Sequential:
    """VGG-16 without batch norm; pooled: the size that its features are averaged to."""
    layers: list[nn.Module] = []
    inside = 3
    for width in VGG16:
        if width:
            layers += [nn.Conv2d(inside, width, 3, padding=1), nn.ReLU(inplace=True)]
            inside = width
        else:
            layers.append(nn.MaxPool2d(2))
    parts = {"features": nn.Sequential(*layers), "avgpool": nn.AdaptiveAvgPool2d(pooled), "flatten": nn.Flatten()}
    model = nn.Sequential()
    for name, part in (parts | {"classifier": classifier}).items():
        model.add_module(name, part)
    return model


def _task(name: str, model: nn.Module, size: int, number: int = IMAGES, batch: int = BATCH) -> rankopt.Task:
    """Random images; batch norms see what the weights make of them, so that signals keep their size."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(number, 3, size, size, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.train()
    with torch.no_grad():
        model(images[:batch])
    model.eval()
    return rankopt.Task(model=model, example_input=images[:1], calibration=images.split(batch), name=name)


def resnet18() -> rankopt.Task:
    """ResNet-18 at 224 x 224."""
    torch.manual_seed(SEED)
    return _task("ResNet-18 at 224", ResNet18(), 224)


def resnet20() -> rankopt.Task:
    """ResNet-20 at 32 x 32, as tasks/cifar10.py has it, on as many images."""
    from cifar10 import BATCH, CALIBRATION_IMAGES, CifarResNet

    torch.manual_seed(SEED)
    return _task("ResNet-20 at 32", CifarResNet(3), 32, CALIBRATION_IMAGES, BATCH)


def resnet18_32() -> rankopt.Task:
    """ResNet-18 at 32 x 32, to try a study on."""
    torch.manual_seed(SEED)
    return _task("ResNet-18 at 32", ResNet18(10), 32)


def vgg16_32() -> rankopt.Task:
    """VGG-16 for 32 x 32, with one Linear."""
    torch.manual_seed(SEED)
    return _task("VGG-16 at 32", vgg16(1, nn.Linear(512, 10)), 32)


def vgg16_224() -> rankopt.Task:
    """VGG-16 at 224 x 224, with its three Linear layers: 138,357,544 parameters."""
    torch.manual_seed(SEED)
    wide = nn.Sequential(
        nn.Linear(512 * 49, 4096), nn.ReLU(True), nn.Linear(4096, 4096), nn.ReLU(True), nn.Linear(4096, 1000)
    )
    return _task("VGG-16 at 224", vgg16(7, wide), 224)
