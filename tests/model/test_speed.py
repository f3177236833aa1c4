"""Forward times: of one example, and of a batch that fills the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankopt.model import speed
from rankopt.model.speed import forward_times, full_batch


class Modelled(nn.Module):
    """Takes some time for each call and for each example; batches above `most` raise an error."""

    def __init__(self, call: float, example: float, most: int = 10**9) -> None:
        super().__init__()
        self.call, self.example, self.most = call, example, most

    def forward(self, x):
        if len(x) > self.most:
            raise IndexError("a batch too large")
        self.seconds = self.call + self.example * len(x)
        return x


@pytest.mark.parametrize(
    ("call", "example", "most", "full"),
    [
        (1e-3, 1e-5, 10**9, 1024),  # 1024 examples take 11 ms, twice as many 1.9 times as long
        (1e-3, 1e-5, 6, 4),  # no larger one runs
        (1e-3, 1e-5, 1, 1),
        (1e-9, 1e-3, 10**9, 1),  # one example fills the device
        (0.5, 1e-5, 10**9, 1),  # longer passes are not tried
        (1e-3, 1e-12, 10**9, 4096),  # nor larger batches
    ],
)
def test_a_batch_fills_the_device_where_twice_as_many_take_twice_as_long(monkeypatch, call, example, most, full):
    model = Modelled(call, example, most)

    def in_turn(calls, rounds):
        calls[0]()
        return [[round(model.seconds * 1e9)] * rounds]

    monkeypatch.setattr(speed, "in_turn", in_turn)
    monkeypatch.setattr(speed, "LONGEST_PASS", 0.02)
    assert full_batch(model, torch.zeros(1, 3)) == full
    assert full_batch(model, torch.zeros(1, 3), 4) == max(4, full)


def test_the_ratio_of_times_lies_within_its_interval():
    models = [nn.Sequential(*(nn.Linear(64, 64) for _ in range(n))).eval() for n in (1, 4)]
    for found in forward_times(models, torch.zeros(1, 64), [models[0]], seconds=0.02):
        dense, compressed, _ = found.milliseconds
        low, high = found.ratios[1]
        assert low <= compressed / dense <= high
        assert found.ratios[0] == (1, 1) and found.rounds >= 10
