"""Compress a model of your own: train a small network on handwritten digits, halve it, save it and load it again.

Run: python examples/own_model.py
"""

from __future__ import annotations

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

import rankopt


def build_model() -> nn.Module:
    """Three layers; (n, 1, 8, 8) -> (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    model = build_model()
    train(model, x[:1000], y[:1000])

    def accuracy(model: nn.Module) -> float:
        return (model(x[1000:]).argmax(1) == y[1000:]).float().mean().item()

    result = rankopt.compress(
        model,
        calibration=x[:1000].split(100),
        score=accuracy,
        budget={"params": 0.5},
        space=rankopt.SearchSpace(families=("svd_out", "cp_merged"), points=6, steps=50),  # quick; leave it out
        examples=len(x) - 1000,
    )
    print(result.summary())

    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        small = rankopt.load(build_model, folder)
    print("loaded again:", rankopt.count(small, x[:1]), f"accuracy {accuracy(small.eval()):.2%}")


if __name__ == "__main__":
    main()
