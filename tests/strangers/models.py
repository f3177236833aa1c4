"""The small models of the bug reports that the files beside this one are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rankopt

SPACE = rankopt.SearchSpace(families=("svd_out",), points=4, steps=10)


def example_batch() -> Tensor:
    """256 examples of 64 numbers, the same every time."""
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three Linears and an Identity; what is done with them is each report's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.h, self.i = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10), nn.Identity()


def net(forward: Callable[..., Any]) -> nn.Module:
    """A Net with a forward."""
    return type("M", (Net,), {"forward": forward})().eval()


def sequential() -> nn.Module:
    """An ordinary one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).eval()


def compress(model: nn.Module, batches: Any = None, space: Any = SPACE, **budget: Any) -> rankopt.Result:
    """rankopt.compress as the reports call it: the budget as keywords."""
    return rankopt.compress(model, [example_batch()] if batches is None else batches, budget, space=space)


def reasons(result: rankopt.Result) -> dict[str, str]:
    """Layer -> what the plan says of it."""
    return {c.name: c.reason for c in result.plan.choices}
