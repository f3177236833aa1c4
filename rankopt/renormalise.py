"""Batch norms of a compressed model, moved to what they now see.

Fits that lose little on average still shrink what a layer puts out, and layer adds to layer. A batch norm with
running statistics can take that back at no cost in parameters: its input y in the compressed model, of mean m
and variance v, is mapped to (y − m) s + m₀ with s = (v₀ / v)^(1/4), halfway (in log scale) to the mean m₀ and
variance v₀ that it has in the dense model; that is, running_var ← running_var / s² and
running_mean ← m − (m₀ − running_mean) / s. REPAIR (Jordan et al. 2022) goes the whole way; halfway lost less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankopt.inventory import inference, run, to_device

POWER = 0.25
FARTHEST = 2.0  # no channel is scaled by more than this factor, or its inverse
PASSES = 2  # moving a batch norm changes what those after it see

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Batch norm's name -> mean and variance of its input, float64 (channels,)."""


def renormalise(dense: nn.Module, small: nn.Module, batches: Sequence[Any]) -> bool:
    """Move the batch norms of `small` in place; False if it has none with running statistics."""
    norms = batch_norms(small)
    if not norms:
        return False
    originals = batch_norms(dense)
    targets = observe(dense, batches)
    for _ in range(PASSES):
        for name, (mean, variance) in observe(small, batches).items():
            _move(norms[name], originals[name], mean, variance, *targets[name])
    return True


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those with running statistics."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def observe(model: nn.Module, batches: Sequence[Any]) -> Statistics:
    """What each batch norm that is called sees over all batches."""
    sums: dict[str, list[Any]] = {}

    def note(name: str, y: Tensor) -> None:
        y = y.detach().double().movedim(1, 0).flatten(1)
        count, total, square = sums.get(name, [0, 0.0, 0.0])
        sums[name] = [count + y.shape[1], total + y.sum(1), square + y.square().sum(1)]

    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, m in batch_norms(model).items()
    ]
    try:
        with inference(model):
            for batch in batches:
                run(model, to_device(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    return {n: (total / count, square / count - (total / count).square()) for n, (count, total, square) in sums.items()}


def _move(norm: _BatchNorm, original: _BatchNorm, m: Tensor, v: Tensor, m0: Tensor, v0: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    assert original.running_mean is not None and original.running_var is not None
    s = (v0.clamp_min(1e-12) / v.clamp_min(1e-12)).pow(POWER).clamp(1 / FARTHEST, FARTHEST)
    with torch.no_grad():
        norm.running_mean.copy_(m - (m0 - original.running_mean.double()) / s)
        norm.running_var.copy_(((original.running_var.double() + norm.eps) / s**2 - norm.eps).clamp_min(0))
