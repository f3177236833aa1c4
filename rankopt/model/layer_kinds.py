"""What every kind of layer is to a decomposition: a convolution over two axes, or a matrix.

A family sees a weight (out, in // groups, height, width) or (out, in), and nothing of how many axes there are:

Conv1d              height 1, its axis is the width
Conv3d              its depth is the height, its plane the width: what splits the axes splits depth from plane
ConvTranspose       a convolution of the same axes over the input with zeros in between; kept input first
Embedding           a Linear of one-hot vectors, (dim, vocabulary); kept input first
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core.records import INPUT_FIRST, Layer

CONVOLUTIONS: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


TRANSPOSED: dict[int, type[_ConvNd]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


KINDS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS.values(), *TRANSPOSED.values(), nn.Linear, nn.Embedding)
"""The modules that may be factorised, by number of axes where they have any."""


AXES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    0: ((), ()),
    1: ((), (0,)),
    2: ((0,), (1,)),
    3: ((0,), (1, 2)),
}
"""Number of a module's axes -> which of them are the height and which the width."""


def pair(sizes: Sequence[int]) -> tuple[int, int]:
    """Sizes along a module's axes as (height, width)."""
    height, width = (math.prod(sizes[i] for i in axes) for axes in AXES[len(sizes)])
    return height, width


def extended(module: _ConvNd, axes: str) -> list[bool]:
    """For each axis of a convolution, whether it belongs to these of "hw"."""
    height, width = AXES[len(module.kernel_size)]
    taken = (*height, *width) if axes == "hw" else {"h": height, "w": width, "": ()}[axes]
    return [i in taken for i in range(len(height + width))]


def describe(module: nn.Module, name: str = "") -> Layer:
    """A layer's kind and shapes: what can be said without running the model. For KINDS and what replaces them."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    kind, groups = "Embedding" if isinstance(module, nn.Embedding) else type(module).__name__, 1
    if isinstance(module, _ConvNd):
        kind = f"Conv{'Transpose' if module.transposed else ''}{len(module.kernel_size)}d"
        groups = module.groups
    bias = isinstance(getattr(module, "bias", None), Tensor)
    first, second, *kernel = weight.shape
    if kind.startswith(INPUT_FIRST):
        first, second = second * groups, first // groups
    shape = (first, second, *pair(kernel)) if kernel else (first, second)
    return Layer(name, kind, shape, groups, bias, stored=tuple(weight.shape))


def as_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """A weight of the layer's own shape as one matrix for each group, (groups, out, in * height * width)."""
    if layer.input_first:
        weight = _swapped(weight, layer.groups)
    return weight.reshape(layer.groups, layer.out_channels, layer.patch)


def in_own_shape(layer: Layer, weight: Tensor) -> Tensor:
    """A weight as families see it, or as `matricise` gives it, in the layer's own shape."""
    if layer.input_first:
        weight = _swapped(weight.reshape(layer.shape[0], layer.in_channels, -1), layer.groups)
    return weight.reshape(layer.own_shape)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """(groups * a, b, ...) -> (groups * b, a, ...); its own inverse."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def convolve(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What a convolution does, with another weight of its own shape. module: whatever has its attributes."""
    axes = weight.ndim - 2
    if not module.transposed:
        return CONVOLUTIONS[axes]._conv_forward(module, x, weight, module.bias)
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes]
    return function(
        x, weight, module.bias, module.stride, module.padding, module.output_padding, module.groups, module.dilation
    )
