"""Batch norms of a compressed model, moved to what they now see.

Fits that lose little on average still shrink what a layer puts out, and layer adds to layer. A batch norm with
running statistics can take that back at no cost in parameters: its input y in the compressed model, of mean m
and variance v, is mapped to (y − m) s + m₀ with s = (v₀ / v)^(1/4), halfway (in log scale) to the mean m₀ and
variance v₀ that it has in the dense model; that is, running_var ← running_var / s² and
running_mean ← m − (m₀ − running_mean) / s. REPAIR (Jordan et al. 2022) goes the whole way; halfway lost less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankopt.model.forward import inference, run, to_device

POWER = 0.25


FARTHEST = 2.0  # no channel is scaled by more than this factor, or its inverse


NormStatistics = dict[str, tuple[Tensor, Tensor]]
"""Batch norm's name -> mean and variance of its input, float64 (channels,)."""


def recalibrate(dense: nn.Module, small: nn.Module, batch: Any) -> bool:
    """Move the batch norms of `small` in place, first to last; False if it has none with running statistics.

    One pass over one batch of inputs: each batch norm sees what those before it, moved already, let through.
    """
    norms, originals = batch_norms(small), batch_norms(dense)
    if not norms:
        return False
    targets: NormStatistics = {}
    _pass(dense, batch, targets.__setitem__)

    def move(name: str, seen: tuple[Tensor, Tensor]) -> None:
        if name in targets:
            _move(norms[name], originals[name], *seen, *targets[name])

    _pass(small, batch, move)
    return True


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those with running statistics."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def _pass(model: nn.Module, batch: Any, see: Callable[[str, tuple[Tensor, Tensor]], None]) -> None:
    """Run the model; before each batch norm runs, show the mean and variance of its input."""

    def note(name: str, y: Tensor) -> None:
        wide = y if y.dtype == torch.float64 else y.float()
        variance, mean = torch.var_mean(wide, [d for d in range(y.ndim) if d != 1], correction=0)
        see(name, (mean.double(), variance.double()))

    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, m in batch_norms(model).items()
    ]
    try:
        with inference(model):
            run(model, to_device(batch, model))
    finally:
        for handle in handles:
            handle.remove()


def _move(norm: _BatchNorm, original: _BatchNorm, m: Tensor, v: Tensor, m0: Tensor, v0: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    assert original.running_mean is not None and original.running_var is not None
    s = (v0.clamp_min(1e-12) / v.clamp_min(1e-12)).pow(POWER).clamp(1 / FARTHEST, FARTHEST)
    with torch.no_grad():
        norm.running_mean.copy_(m - (m0 - original.running_mean.double()) / s)
        norm.running_var.copy_(((original.running_var.double() + norm.eps) / s**2 - norm.eps).clamp_min(0))
