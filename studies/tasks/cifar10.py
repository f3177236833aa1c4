"""Tasks on CIFAR-10 with the pretrained CIFAR ResNets of He et al. 2016, section 4.2.

The data is not part of this project: it is found through the environment variable RANKOPT_DATA, else
in ../shared/data beside the checkout. The layout is described in DATA_HELP below.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import rankopt

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION_IMAGES, BATCH = 2000, 500
DATA_HELP = (
    "set RANKOPT_DATA to a folder with cifar10/train_{0..4}.webp, cifar10/test.webp (lossless mosaics of "
    "100 x 100 tiles of 32 x 32 RGB pixels, from https://www.cs.toronto.edu/~kriz/cifar.html), "
    "cifar10/labels.npz (train, test) and weights/resnet{20,56}_cifar10.safetensors"
)


def data_folder() -> Path:
    """The data folder: RANKOPT_DATA, else ../shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RANKOPT_DATA", beside))
    if not (folder / "cifar10").is_dir():
        raise FileNotFoundError(f"no CIFAR-10 in {folder}: {DATA_HELP}")
    return folder


# --- data ----------------------------------------------------------------------------------------


@cache
def _mosaic(name: str) -> np.ndarray:
    """The 10,000 images of one file, uint8 (10000, 32, 32, 3)."""
    mosaic = np.asarray(Image.open(data_folder() / "cifar10" / f"{name}.webp").convert("RGB"))
    return mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(10_000, 32, 32, 3)


def pixels(split: str, start: int, stop: int) -> np.ndarray:
    """Images [start, stop) of split "train" or "test", uint8 (n, 32, 32, 3)."""
    if split == "test":
        return _mosaic("test")[start:stop]
    files = range(start // 10_000, (stop - 1) // 10_000 + 1)
    return np.concatenate([_mosaic(f"train_{i}") for i in files])[start - files[0] * 10_000 :][: stop - start]


def images(split: str, start: int, stop: int) -> Tensor:
    """The same normalised, float32 (n, 3, 32, 32)."""
    return normalised(pixels(split, start, stop))


def normalised(x: np.ndarray) -> Tensor:
    """uint8 (n, 32, 32, 3) -> float32 (n, 3, 32, 32), what the weights were trained on."""
    scaled = torch.from_numpy(x.copy()).permute(0, 3, 1, 2).float() / 255  # channels_last: faster on a CPU
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def labels(split: str, start: int, stop: int) -> Tensor:
    """Class indices, int64 (n,)."""
    with np.load(data_folder() / "cifar10" / "labels.npz") as file:
        return torch.from_numpy(file[split][start:stop].astype(np.int64))


def augment(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pad 4, random crop 32, horizontal flip, as the weights were trained. x (n, 3, 32, 32)."""
    n = len(x)
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (n,), generator=generator) for _ in range(2))
    rows = top.view(n, 1, 1, 1) + torch.arange(32).view(1, 1, 32, 1)
    columns = left.view(n, 1, 1, 1) + torch.arange(32).view(1, 1, 1, 32)
    cropped = padded[torch.arange(n).view(n, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), rows, columns]
    flip = torch.rand(n, generator=generator) < 0.5
    flipped = torch.where(flip.view(n, 1, 1, 1), cropped.flip(3), cropped)
    return flipped.contiguous(memory_format=torch.channels_last)


class Augmented:
    """Batches (images, labels) of training images [start, stop), each epoch in another order and augmented anew.

    As the weights were trained: 4 black pixels on each side, crops of 32, flips. The images are read when first asked
    for, and then lie on the device.
    """

    def __init__(self, start: int, stop: int, size: int = 128, device: str = "cpu") -> None:
        self.start, self.stop, self.size, self.device = start, stop, size, device
        self.batches: rankopt.data.DeviceImages | None = None

    def __len__(self) -> int:
        return math.ceil((self.stop - self.start) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.batches is None:
            x = torch.from_numpy(pixels("train", self.start, self.stop).copy()).permute(0, 3, 1, 2)
            y = labels("train", self.start, self.stop)
            self.batches = rankopt.data.DeviceImages(
                x, y, self.size, mean=MEAN, std=STD, padding=4, flip=True, device=self.device
            )
        return iter(self.batches)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"batches": None}


# --- model ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions with an option-A shortcut: subsampled, zero-padded, free of parameters."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet of 6n+2 layers for 32x32 images: (b, 3, 32, 32) -> (b, 10)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for i, (c_in, c_out, stride) in enumerate(widths, 1):
            blocks = [Block(c_in, c_out, stride)] + [Block(c_out, c_out, 1) for _ in range(n - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


# --- tasks ---------------------------------------------------------------------------------------


class Accuracy:
    """Top-1 accuracy (a fraction) on images [start, stop) of a split; they are read when first asked for, and kept."""

    def __init__(self, split: str, start: int, stop: int) -> None:
        self.where = (split, start, stop)
        self.data: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        if self.data is None or self.data[0].device != device:
            self.data = images(*self.where).to(device), labels(*self.where).to(device)
        x, y = self.data
        size = 2500 if device.type == "cuda" else BATCH  # a GPU is idle in small batches
        with torch.inference_mode():
            correct = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(size), y.split(size), strict=True))
        return int(correct) / len(y)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"data": None}


def _task(n: int, trained_on: int = 45_000, batch: int = 128) -> rankopt.Task:
    model = CifarResNet(n)
    model.load_state_dict(load_file(data_folder() / "weights" / f"resnet{6 * n + 2}_cifar10.safetensors"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    # The weights saw every training image, so validation accuracy is 99.9 % and hardly ranks plans:
    # searches minimise the KL divergence to the dense model on augmented images (the default objective).
    calibration = augment(images("train", 0, CALIBRATION_IMAGES), torch.Generator().manual_seed(0))
    return rankopt.Task(
        model=model,
        example_input=torch.zeros(1, 3, 32, 32),
        calibration=calibration.split(BATCH),
        score=Accuracy("train", 45_000, 50_000),
        test=Accuracy("test", 0, 10_000),
        train=Augmented(0, trained_on, batch, device),
        loss=F.cross_entropy,
        examples=5_000,
        test_examples=10_000,
    )


def resnet20() -> rankopt.Task:
    """ResNet-20, 269,722 parameters, 91.73 % on test; trained on 45,000 images, the rest is for validation."""
    return _task(3)


def resnet56() -> rankopt.Task:
    """ResNet-56, 853,018 parameters, 93.39 % on test; trained on 45,000 images, the rest is for validation."""
    return _task(9)


def resnet20_256() -> rankopt.Task:
    """The same, trained on all 50,000 images in batches of 256: its validation score says nothing."""
    return _task(3, 50_000, 256)


def resnet56_256() -> rankopt.Task:
    """The same, trained on all 50,000 images in batches of 256: its validation score says nothing."""
    return _task(9, 50_000, 256)


def resnet20_all() -> rankopt.Task:
    """The same, trained on all 50,000 images in batches of 64: its validation score says nothing."""
    return _task(3, 50_000, 64)


def resnet56_all() -> rankopt.Task:
    """The same, trained on all 50,000 images in batches of 64: its validation score says nothing."""
    return _task(9, 50_000, 64)
