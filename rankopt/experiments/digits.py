"""The built-in task: a small CNN on scikit-learn's 1,797 handwritten digits (8 x 8, real scans).

The weights beside this file were made by `python -m rankopt.experiments.digits` (seed 0, a minute on two CPU cores).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankopt.core.records import Task

WEIGHTS = Path(__file__).with_name("digits.safetensors")


TRAIN, VALIDATION = slice(0, 1000), slice(1000, 1400)


TEST = slice(1400, 1797)


class DigitsNet(nn.Module):
    """A network of three convolutions and two linear layers, 38,218 parameters; (b, 1, 8, 8) -> (b, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(48)
        self.fc1 = nn.Linear(192, 96)
        self.fc2 = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.bn3(self.conv3(F.max_pool2d(x, 2))))
        x = F.max_pool2d(x, 2).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


def data(part: slice) -> tuple[Tensor, Tensor]:
    """Load a part of the digits, in a fixed shuffled order.

    Args:
        part: `TRAIN`, `VALIDATION` or `TEST`.

    Returns:
        Images (n, 1, 8, 8) in [0, 1] and labels (n,).
    """
    from sklearn.datasets import load_digits  # a second of CPU time, which workers that evaluate do not need

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[part]
    return torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(y)[order]


class Accuracy:
    """Top-1 accuracy of a model on one part of the digits, as a fraction.

    Args:
        part: `TRAIN`, `VALIDATION` or `TEST`.
    """

    def __init__(self, part: slice) -> None:
        self.x, self.y = data(part)

    def __call__(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        return (model(self.x.to(device)).argmax(1).cpu() == self.y).float().mean().item()


def digits() -> Task:
    """Return the task: calibration and training on 1,000 images, validation on 400, test on 397."""
    model = DigitsNet()
    model.load_state_dict(load_file(WEIGHTS))
    model.eval()
    x, y = data(TRAIN)
    return Task(
        model=model,
        example_input=x[:1],
        calibration=x.split(250),
        score=Accuracy(VALIDATION),
        test=Accuracy(TEST),
        train=list(zip(x.split(50), y.split(50), strict=True)),
        loss=F.cross_entropy,
        examples=400,
        test_examples=397,
    )


def train(epochs: int = 60) -> DigitsNet:
    """Train the network on the 1,000 training images, shifted by up to one pixel; deterministic.

    Args:
        epochs: Passes over the images.
    """
    torch.manual_seed(0)
    model = DigitsNet()
    x, y = data(TRAIN)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * 20
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        if step % 20 == 0:
            order = torch.randperm(len(y))
        batch = order[step % 20 * 50 :][:50]
        shift = tuple(torch.randint(-1, 2, (2,)).tolist())
        loss = F.cross_entropy(model(x[batch].roll(shift, (2, 3))), y[batch], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    network = train()
    save_file(network.state_dict(), WEIGHTS)
    with torch.no_grad():
        print(f"validation {Accuracy(VALIDATION)(network):.4f}, wrote {WEIGHTS.name}")  # noqa: T201
