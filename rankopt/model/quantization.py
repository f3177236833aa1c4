"""Weight-only quantization: weights stored in int8, bfloat16 or float16, and dequantized wherever they are used.

    int8:  w ≈ scale · q,  q in -127..127,  scale = max |w| / 127 in bfloat16, one per output of a factor

Only storage changes: activations, biases, norms and the arithmetic stay in the model's dtype, so MACs do not change.
Factors with fewer than ROW weights per output have a single scale, as further scales would take more bytes than their
accuracy is worth (ResNet-20 at 6 % of its bytes: predicted loss 0.251 with one scale per output, 0.213 with ROW 64,
0.207 with ROW 200 or one scale per factor; the last loses twice as much at 25 %). Weights count once as parameters;
scales are buffers, which count as bytes only.

Dequantizing takes time at every call, relatively most if a weight is applied at few positions. Faster kernels do not
help (one thread of a CPU with AMX, torch 2.13): torch's _weight_int8pack_mm takes 0.3 to 1.5 times the float32 layer's
time at batch 1 with bfloat16 inputs, but up to 89 times with float32 ones; dynamic quantization rounds the activations,
too; torchao 0.18 quantizes weights of Linears only, is no faster, and its tensors cannot be saved with safetensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core.errors import not_scriptable
from rankopt.core.records import BFLOAT16, FLOAT16, INT8, SAME, Cost, Layer
from rankopt.model.layer_kinds import as_matrix, describe, in_own_shape, is_conv1d

DTYPES = {INT8: torch.int8, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}


SCALE = torch.bfloat16
"""The dtype of scales."""


LARGEST = 127
"""The largest int8 value that is used; -128 is not, so that the range is symmetric."""


ROW = 128
"""The least number of weights per output with which each output has its own scale."""


Encoded = tuple[Tensor, ...]
"""A factor as it is stored, in the shape that decompositions use: (values,), or for int8 (values, scales)."""


# --- numbers -----------------------------------------------------------------------------------------


def scales(shape: Sequence[int]) -> int:
    """The number of scales of an int8 factor.

    Args:
        shape: The factor's shape, outputs first.
    """
    return shape[0] if math.prod(shape[1:]) >= ROW else 1


def encode(factor: Tensor, precision: str) -> Encoded:
    """Round a factor to nearest, so that no weight changes by more than half its scale.

    Args:
        factor: The factor, outputs first.
        precision: INT8, BFLOAT16 or FLOAT16.
    """
    if precision != INT8:
        return (factor.detach().to(DTYPES[precision]),)
    rows = factor.detach().reshape(len(factor), -1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = rows.abs().amax(1)
    largest = largest if scales(factor.shape) > 1 else largest.amax(0, keepdim=True)
    scale = (largest / LARGEST).to(SCALE).clamp_min(torch.finfo(SCALE).tiny)
    return to_grid(rows, scale).view(factor.shape), scale


def to_grid(rows: Tensor, scale: Tensor) -> Tensor:
    """Round rows to int8 values.

    Args:
        rows: (..., outputs, n).
        scale: (outputs,) or (1,).
    """
    return (rows / scale.to(rows.dtype).unsqueeze(-1)).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """The inverse of `encode`, up to rounding.

    Args:
        encoded: A stored factor.
        dtype: The dtype of the result.
    """
    values, *scale = encoded
    return dequantize(values, scale[0].view(-1, *[1] * (values.ndim - 1)) if scale else None, dtype)


def dequantize(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Convert stored values to a dtype and multiply them by their scales.

    The product of a value's 7 bits and a scale's 8 is exact in float32.

    Args:
        values: The stored values.
        scale: None, or a tensor that broadcasts with the values; it may have one more dimension in front, of groups,
            which split the values' first dimension.
        dtype: The dtype of the result.
    """
    if scale is None:
        return values.to(dtype)
    if scale.ndim > values.ndim:
        return dequantize(values.unflatten(0, (len(scale), -1)), scale, dtype).flatten(0, 1)
    return (values * scale.float()).to(dtype)


def cost_at(layer: Layer, shapes: Sequence[Sequence[int]], cost: Cost, precision: str) -> Cost:
    """The cost of a layer if its factors are stored in another precision. Its bias stays as it is.

    Args:
        layer: The layer.
        shapes: The shapes of its factors, outputs first.
        cost: The cost with factors in the model's dtype.
        precision: INT8, BFLOAT16 or FLOAT16.
    """
    weights = sum(map(math.prod, shapes))
    stored = weights * DTYPES[precision].itemsize
    if precision == INT8:
        stored += SCALE.itemsize * sum(map(scales, shapes))
    return dataclasses.replace(cost, bytes=cost.bytes - weights * layer.element_size + stored)


# --- modules -----------------------------------------------------------------------------------------


class QuantizedMixin(nn.Module):
    """A module whose weights are stored in another precision; reading `.weight` (or a core) dequantizes it.

    In place of a parameter NAME there is NAME_int8 (or NAME_bfloat16, NAME_float16), which takes no gradient, and for
    int8 a buffer NAME_scale. There is a class for each base: `quantize_` changes a module's class in place, as torch's
    parametrize does, so that everything else about the module stays.

    Attributes:
        base: The class before.
        names: The names of the weights that are stored so.
        precision: INT8, BFLOAT16 or FLOAT16.
        wide: The dtype in which the weights are used.
        trainable: Whether the weights took gradients before.
    """

    base: ClassVar[type[nn.Module]]
    names: ClassVar[tuple[str, ...]]
    precision: ClassVar[str]
    wide: torch.dtype
    trainable: bool

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The stored values of a weight and, for int8, its scales.

        Args:
            name: The weight's name.
        """
        return self._parameters[f"{name}_{self.precision}"], self._buffers.get(f"{name}_scale")  # type: ignore[return-value]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedMixin:
        super()._apply(fn, recurse)
        self.wide = fn(torch.empty(0, dtype=self.wide)).dtype  # .to(dtype), .half() etc. change it, too
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse torch.jit.script."""
        raise not_scriptable("weights that are stored in another precision")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.base, self.names, self.precision), self.__getstate__()


class QuantizedEmbedding(QuantizedMixin):
    """A QuantizedMixin that dequantizes only the rows that are read, not the whole table."""

    def forward(self, x: Tensor) -> Tensor:
        values, scale = self.stored("weight")
        rows = nn.functional.embedding(x, values)
        return dequantize(rows, None if scale is None else scale.flatten(), self.wide)


def _dequantized(name: str, module: QuantizedMixin) -> Tensor:
    """Getter of the property that takes a weight's name."""
    return dequantize(*module.stored(name), module.wide)


@cache
def _quantized_class(base: type[nn.Module], names: tuple[str, ...], precision: str) -> type[QuantizedMixin]:
    """The class of modules of `base` whose weights of these names are stored in a precision."""
    mixin = QuantizedEmbedding if issubclass(base, nn.Embedding) else QuantizedMixin
    members: dict[str, Any] = {name: property(partial(_dequantized, name)) for name in names}
    members |= {"base": base, "names": names, "precision": precision, "__module__": __name__}
    return type(f"{precision.title()}{base.__name__}", (mixin, base), members)


def _empty(base: type[nn.Module], names: tuple[str, ...], precision: str) -> QuantizedMixin:
    """An object without state, for unpickling: classes made at run time cannot be found by name."""
    made = _quantized_class(base, names, precision)  # type: ignore[arg-type]
    return made.__new__(made)


def quantize_(module: nn.Module, precision: str, encoded: Sequence[Tensor] = ()) -> nn.Module:
    """Store the weights of a layer, or of the module that replaced it, in a precision, in place. Biases stay.

    Args:
        module: The module.
        precision: One of PRECISIONS; with SAME, weights are dequantized.
        encoded: The stored factors' tensors, one factor after the other. Without it, weights are rounded to nearest.

    Returns:
        The module.
    """
    dequantize_all(module)
    rest = list(encoded)
    for part in list(module.modules()):
        names = tuple(n for n, p in part.named_parameters(recurse=False) if n != "bias")
        if precision == SAME or not names:
            continue
        seen = [_as_seen(part, part.get_parameter(name)) for name in names]
        taken = 2 if precision == INT8 else 1
        factors = [tuple(rest[i * taken : (i + 1) * taken]) or encode(f, precision) for i, f in enumerate(seen)]
        del rest[: taken * len(names)]
        _quantize_one(part, names, precision, factors)
    return module


def _own(part: nn.Module) -> Layer | None:
    """The layer that a part is, if decompositions see its weight in another shape than it is kept in."""
    return describe(part) if isinstance(part, (_ConvNd, nn.Embedding)) or is_conv1d(part) else None


def _as_seen(part: nn.Module, weight: Tensor) -> Tensor:
    """A part's weight in the shape that decompositions use, outputs first."""
    layer = _own(part)
    return weight if layer is None else as_matrix(layer, weight).flatten(0, 1)


def _quantize_one(part: nn.Module, names: tuple[str, ...], precision: str, factors: Sequence[Encoded]) -> None:
    """Replace the weights of one module by stored factors, and its class."""
    layer, wide = _own(part), part.get_parameter(names[0])
    for name, (seen, *scale) in zip(names, factors, strict=True):
        device = part.get_parameter(name).device
        values = seen if layer is None else in_own_shape(layer, seen)
        delattr(part, name)
        part.register_parameter(
            f"{name}_{precision}", nn.Parameter(values.to(device, copy=True).contiguous(), requires_grad=False)
        )
        if scale:
            part.register_buffer(f"{name}_scale", _beside(layer, scale[0], values.ndim).to(device, copy=True))
    part.__class__ = _quantized_class(type(part), names, precision)  # type: ignore[arg-type]
    assert isinstance(part, QuantizedMixin)
    part.wide, part.trainable = wide.dtype, wide.requires_grad


def _beside(layer: Layer | None, scale: Tensor, ndim: int) -> Tensor:
    """Scales, (outputs,) or (1,), in a shape that `dequantize` takes for a weight of `ndim` dimensions."""
    if len(scale) == 1 or layer is None or not layer.input_first:
        return scale.view(-1, *[1] * (ndim - 1))
    shape = (1, -1, *[1] * (ndim - 2))
    return scale.view(layer.groups, *shape) if layer.groups > 1 else scale.view(shape)


def dequantize_all(module: nn.Module) -> dict[str, str]:
    """Turn all stored weights back into ordinary parameters, in place.

    Args:
        module: A model or a part of one.

    Returns:
        Name of each module that was quantized -> its precision, for `requantize_all`.
    """
    stored = {name: m for name, m in module.named_modules() if isinstance(m, QuantizedMixin)}
    kept = {name: part.precision for name, part in stored.items()}
    for part in stored.values():
        wide = {name: getattr(part, name) for name in part.names}
        precision, trainable = part.precision, part.trainable
        part.__class__ = part.base  # type: ignore[assignment]
        for name, weight in wide.items():
            delattr(part, f"{name}_{precision}")
            part._buffers.pop(f"{name}_scale", None)
            part.register_parameter(name, nn.Parameter(weight, requires_grad=trainable))
        del part.wide, part.trainable
    return kept


def requantize_all(module: nn.Module, kept: Mapping[str, str]) -> None:
    """Undo `dequantize_all`, in place: weights are rounded to nearest.

    Args:
        module: The module that was dequantized.
        kept: What `dequantize_all` returned.
    """
    for name, precision in kept.items():
        quantize_(module.get_submodule(name), precision)


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Context for training: weights are dequantized and take gradients; at the end they are rounded again.

    Args:
        model: The model.
    """
    kept = dequantize_all(model)
    try:
        yield
    finally:
        requantize_all(model, kept)
