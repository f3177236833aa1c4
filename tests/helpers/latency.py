"""A network to time, and a machine whose times follow from the work alone, whatever else runs on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rankopt.candidates import instruments, latency, latency_table
from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.records import Task
from rankopt.core.timing import Sample, by_clock, in_turn
from rankopt.model.counting import count

SPACE = SearchSpace(name="fast", families=("svd_out", "cp_merged"), points=4, steps=0)
CALL = 2_000  # nanoseconds of every layer beside its MACs, each of which takes one


POWER = 3.0
"""Watts of the modelled machine, times are its only work."""


class ModelledPass:
    """Stands for a measured forward pass: it takes `ns` nanoseconds, and energy each time that it is called."""

    joules = 0.0  # of all calls: what the modelled counter shows

    def __call__(self) -> None:
        ModelledPass.joules += POWER * self.ns * 1e-9

    def __init__(self, module: nn.Module, x: Any) -> None:
        layers = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
        self.ns = CALL * len(layers) + count(module, x).macs


def modelled_pass(module: nn.Module, x: Any, conditions: Conditions) -> ModelledPass:
    """Replaces `latency_table.timed`."""
    return ModelledPass(module, x)


def modelled_times(
    passes: Sequence[ModelledPass], rounds: int, warm_up: int = 0, sample: Sample = by_clock
) -> list[list[int]]:
    """Replaces `core.timing.in_turn`: the same times in every round, but for a spread of one in a thousand."""
    if sample is not by_clock:  # energy is measured as ever, by a counter that moves as the modelled passes work
        return in_turn(passes, rounds, warm_up=warm_up, sample=sample)
    return [[p.ns + p.ns * (i % 3 - 1) // 1000 for i in range(rounds)] for p in passes]


def use_modelled_times(patch: pytest.MonkeyPatch) -> None:
    """Layers and models are no longer timed: their latency is computed from their MACs."""
    for module in (latency, latency_table):
        patch.setattr(module, "machine", lambda conditions: "a modelled machine")  # its tables are its own
    patch.setattr(latency_table, "timed", modelled_pass)
    patch.setattr(latency_table, "in_turn", modelled_times)


def use_modelled_energy(patch: pytest.MonkeyPatch) -> None:
    """With `use_modelled_times`: a counter of energy that shows what the modelled passes took."""
    patch.setattr(instruments, "open_meter", lambda gpu: ("a modelled counter", lambda: ModelledPass.joules))
    patch.setitem(instruments.WINDOWS, "cpu", (0.0, 0.0))


class Net(nn.Module):
    """Wide enough that ranks, not calls, take the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 96, 3, padding=1)
        self.twice = nn.Conv2d(96, 96, 3, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def make_task():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 24, 24)
    return Task(Net().eval(), x[:1], x.split(8), name="net")
