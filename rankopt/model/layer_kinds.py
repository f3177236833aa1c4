"""The kinds of layers, reduced to the two that decompositions know: 2-d convolutions and matrices.

A decomposition sees a weight as (out, in // groups, height, width) or (out, in):

Conv1d              height 1, its axis is the width
Conv3d              its depth is the height, its plane the width: spatial decompositions split depth from plane
ConvTranspose       a convolution with the same kernel over the input with zeros in between; stored input first
Embedding           a Linear of one-hot vectors, (dim, vocabulary); stored input first
Conv1D              transformers' Linear with its weight stored input first (GPT-2); not a convolution
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
"""The modules that may be factorised, and transformers' Conv1D: exactly these classes, not their subclasses."""


GEOMETRY = (
    *("in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding"),
    *("num_embeddings", "embedding_dim", "padding_idx", "nx", "nf"),
)
"""The attributes of a layer that its replacement has, too: models may read layer.out_channels and the like."""


def copy_geometry(replacement: nn.Module, module: nn.Module) -> None:
    """Give a replacement the attributes in GEOMETRY that a layer has.

    Args:
        replacement: The replacement.
        module: The layer.
    """
    for name in GEOMETRY:
        if hasattr(module, name):
            setattr(replacement, name, getattr(module, name))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, which is recognised by its name: transformers may not be installed.

    Args:
        module: Any module.
    """
    return _is_conv1d(type(module))


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_kind(kind: type) -> bool:
    """Whether decompositions know the modules of a class.

    Args:
        kind: The class.
    """
    return kind in KINDS or _is_conv1d(kind)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is exactly an nn.Linear, or transformers' Conv1D.

    Args:
        module: Any module.
    """
    return type(module) is nn.Linear or is_conv1d(module)


AXES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    0: ((), ()),
    1: ((), (0,)),
    2: ((0,), (1,)),
    3: ((0,), (1, 2)),
}
"""Number of a module's spatial axes -> (those that are the height, those that are the width)."""


def pair(sizes: Sequence[int]) -> tuple[int, int]:
    """Sizes along a module's spatial axes as (height, width).

    Args:
        sizes: One size per axis, 0 to 3 of them.
    """
    height, width = (math.prod(sizes[i] for i in axes) for axes in AXES[len(sizes)])
    return height, width


def extended(module: _ConvNd, axes: str) -> list[bool]:
    """Which spatial axes of a convolution make up its height, its width or both.

    Args:
        module: The convolution.
        axes: "h", "w", "hw" or "".

    Returns:
        For each axis of the module, whether it is among them.
    """
    height, width = AXES[len(module.kernel_size)]
    taken = (*height, *width) if axes == "hw" else {"h": height, "w": width, "": ()}[axes]
    return [i in taken for i in range(len(height + width))]


def describe(module: nn.Module, name: str = "") -> Layer:
    """The kind and shapes of a layer, which are known without running the model.

    Args:
        module: A module of one of the kinds, or one that replaces such a module.
        name: Its name in the model.
    """
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
    """A weight as one matrix per group.

    Args:
        layer: The layer.
        weight: A tensor of the layer's own shape.

    Returns:
        (groups, out // groups, in // groups * height * width).
    """
    if layer.input_first:
        weight = _swapped(weight, layer.groups)
    return weight.reshape(layer.groups, layer.out_channels, layer.patch)


def in_own_shape(layer: Layer, weight: Tensor) -> Tensor:
    """The inverse of `as_matrix`.

    Args:
        layer: The layer.
        weight: A tensor of the shape that `as_matrix` gives, or of `layer.shape`.

    Returns:
        The weight in the layer's own shape.
    """
    if layer.input_first:
        weight = _swapped(weight.reshape(layer.shape[0], layer.in_channels, -1), layer.groups)
    return weight.reshape(layer.own_shape)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """(groups * a, b, ...) -> (groups * b, a, ...). It is its own inverse."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def convolve(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a convolution with another weight.

    Args:
        module: A convolution, or an object with the attributes of one (stride, padding, ...).
        x: Its input.
        weight: A weight of the convolution's own shape.
    """
    axes = weight.ndim - 2
    if not module.transposed:
        return CONVOLUTIONS[axes]._conv_forward(module, x, weight, module.bias)
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes]
    return function(
        x, weight, module.bias, module.stride, module.padding, module.output_padding, module.groups, module.dilation
    )
