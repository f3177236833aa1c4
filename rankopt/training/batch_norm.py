"""Recalibration of the batch norms of a compressed model.

A fit with a small error still shrinks the variance of a layer's output, and this accumulates over layers. Batch norms
with running statistics can correct it at no cost in parameters. Let y be the input of a batch norm, with mean m and
variance v in the compressed model, and m₀ and v₀ in the dense one. It is mapped to

    (y − m) s + m₀,    s = (v₀ / v)^(1/4),

which moves the standard deviation halfway, on a log scale, to the dense model's. In terms of the running statistics:

    running_var ← running_var / s²,    running_mean ← m − (m₀ − running_mean) / s

REPAIR (Jordan et al. 2022) corrects the standard deviation fully; correcting it halfway lost less accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankopt.model.forward import hooked, inference, run, to_device

POWER = 0.25  # of v₀ / v; 0.5 would correct fully
FARTHEST = 2.0  # largest s; the smallest is its inverse


NormStatistics = dict[str, tuple[Tensor, Tensor]]
"""By name of a batch norm, mean and variance of its input, float64 (channels,)."""


def recalibrate(dense: nn.Module, small: nn.Module, batch: Any) -> bool:
    """Recalibrate the batch norms of a compressed model in place, in one forward pass.

    Each batch norm is corrected before it runs, so later ones see the effect of earlier corrections.

    Args:
        dense: The dense model.
        small: The compressed model.
        batch: A batch of inputs.

    Returns:
        Whether the model has batch norms with running statistics.
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
    """Find the batch norms that have running statistics.

    Args:
        model: The model.

    Returns:
        Batch norms by name.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def _pass(model: nn.Module, batch: Any, see: Callable[[str, tuple[Tensor, Tensor]], None]) -> None:
    """Run a model; before each batch norm, call see(its name, (mean, variance) of its input)."""

    def note(name: str, args: tuple[Any, ...]) -> None:
        y: Tensor = args[0]
        wide = y if y.dtype == torch.float64 else y.float()
        variance, mean = torch.var_mean(wide, [d for d in range(y.ndim) if d != 1], correction=0)
        see(name, (mean.double(), variance.double()))

    with inference(model), hooked(model, batch_norms(model), on_input=note):
        run(model, to_device(batch, model))


def _move(norm: _BatchNorm, original: _BatchNorm, m: Tensor, v: Tensor, m0: Tensor, v0: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    assert original.running_mean is not None and original.running_var is not None
    s = (v0.clamp_min(1e-12) / v.clamp_min(1e-12)).pow(POWER).clamp(1 / FARTHEST, FARTHEST)
    with torch.no_grad():
        norm.running_mean.copy_(m - (m0 - original.running_mean.double()) / s)
        norm.running_var.copy_(((original.running_var.double() + norm.eps) / s**2 - norm.eps).clamp_min(0))
