"""How far two outputs of a model are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Parity:
    """The largest difference of outputs from the PyTorch model's, and the same over each output's largest value."""

    absolute: float
    relative: float
    examples: int


def compare(outputs: Any, expected: Any, examples: int) -> Parity:
    """The differences of all tensors of two outputs; infinite where their number, shapes or infinities differ."""
    pairs = [[t for t in tree_leaves(out) if isinstance(t, Tensor)] for out in (outputs, expected)]
    worst = Parity(0.0, 0.0, examples)
    if len(pairs[0]) != len(pairs[1]) or any(a.shape != b.shape for a, b in zip(*pairs, strict=True)):
        return Parity(torch.inf, torch.inf, examples)
    for a, b in zip(*pairs, strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        same = (a == b) | (a.isnan() & b.isnan())
        absolute = (a - b)[~same].abs().nan_to_num(torch.inf, torch.inf).max().item() if not same.all() else 0.0
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        relative = absolute / largest if largest else absolute and torch.inf
        worst = Parity(max(worst.absolute, absolute), max(worst.relative, relative), examples)
    return worst
