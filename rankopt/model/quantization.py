"""Weights kept in int8, bfloat16 or float16, and widened to the layer's own dtype wherever they are used.

    int8:  w ≈ scale · q,  q in -127..127,  scale = max |w| / 127 in bfloat16, for each output of a factor

Only storage changes: activations, biases, norms and the arithmetic stay in the model's dtype, so MACs are those of
the wide weights. A factor whose outputs have fewer than ROW weights each has one scale: more would take more bytes
than they save error (ResNet-20 at 6 % of its bytes: predicted loss 0.251 with a scale for every output, 0.213 with
ROW 64, 0.207 with 200 or one for each factor, which loses twice as much at 25 %). Counted as parameters are the
weights, once; scales are buffers and count in bytes alone.

Widening takes time at every call, most where few positions share the weight. Faster kernels do not serve (one thread
of a CPU with AMX, torch 2.13): torch's _weight_int8pack_mm takes 0.3 to 1.5 times the float32 layer's time at batch 1
with bfloat16 inputs, but up to 89 times with float32 ones; dynamic quantisation rounds the activations too; torchao
0.18 is weight-only for Linear alone, no faster than this, and its tensors cannot be saved with safetensors.
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

from rankopt.core.records import BFLOAT16, FLOAT16, INT8, SAME, Cost, Layer
from rankopt.model.layer_kinds import as_matrix, describe, in_own_shape

DTYPES = {INT8: torch.int8, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}


SCALE = torch.bfloat16


LARGEST = 127


ROW = 128


Encoded = tuple[Tensor, ...]
"""A factor as it is stored, in the shape in which families see it: (values,), of int8 (values, scales)."""


# --- numbers -----------------------------------------------------------------------------------------


def scales(shape: Sequence[int]) -> int:
    """How many scales an int8 factor of this shape, outputs first, has."""
    return shape[0] if math.prod(shape[1:]) >= ROW else 1


def encode(factor: Tensor, precision: str) -> Encoded:
    """Round a factor, outputs first, to nearest: no weight moves by more than half its scale."""
    if precision != INT8:
        return (factor.detach().to(DTYPES[precision]),)
    rows = factor.detach().reshape(len(factor), -1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = rows.abs().amax(1)
    largest = largest if scales(factor.shape) > 1 else largest.amax(0, keepdim=True)
    scale = (largest / LARGEST).to(SCALE).clamp_min(torch.finfo(SCALE).tiny)
    return to_grid(rows, scale).view(factor.shape), scale


def to_grid(rows: Tensor, scale: Tensor) -> Tensor:
    """int8 values of rows (..., outputs, n) at the scales (outputs,) or (1,)."""
    return (rows / scale.to(rows.dtype).unsqueeze(-1)).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """The factor as it is used."""
    values, *scale = encoded
    return dequantize(values, scale[0].view(-1, *[1] * (values.ndim - 1)) if scale else None, dtype)


def dequantize(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """values in dtype, times the scale if there is one: (values.ndim dims), or one more dimension, groups, in front.

    The product of 7 bits and a scale's 8 is exact in float32.
    """
    if scale is None:
        return values.to(dtype)
    if scale.ndim > values.ndim:
        return dequantize(values.unflatten(0, (len(scale), -1)), scale, dtype).flatten(0, 1)
    return (values * scale.float()).to(dtype)


def cost_at(layer: Layer, shapes: Sequence[Sequence[int]], cost: Cost, precision: str) -> Cost:
    """The cost of a layer whose factors of these shapes are stored in another precision; its bias stays."""
    weights = sum(map(math.prod, shapes))
    stored = weights * DTYPES[precision].itemsize
    if precision == INT8:
        stored += SCALE.itemsize * sum(map(scales, shapes))
    return dataclasses.replace(cost, bytes=cost.bytes - weights * layer.element_size + stored)


# --- modules -----------------------------------------------------------------------------------------


class QuantizedMixin(nn.Module):
    """A module whose weights are stored in another precision. Reads of .weight (or of a core) get it widened.

    The parameter NAME is gone; there are NAME_int8 (or NAME_bfloat16, ...), which takes no gradient, and for int8 a
    buffer NAME_scale. The class is made for its base: `store` changes a module's class in place, as torch's
    parametrize does, so whatever else the module is and has stays.
    """

    base: ClassVar[type[nn.Module]]
    names: ClassVar[tuple[str, ...]]
    precision: ClassVar[str]
    wide: torch.dtype
    trainable: bool

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The values and, of int8, the scale of a weight."""
        return self._parameters[f"{name}_{self.precision}"], self._buffers.get(f"{name}_scale")  # type: ignore[return-value]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedMixin:
        super()._apply(fn, recurse)
        self.wide = fn(torch.empty(0, dtype=self.wide)).dtype  # .to(dtype) and the like
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.base, self.names, self.precision), self.__getstate__()


class QuantizedEmbedding(QuantizedMixin):
    """Widens the rows that are read, not the whole table."""

    def forward(self, x: Tensor) -> Tensor:
        values, scale = self.stored("weight")
        rows = nn.functional.embedding(x, values)
        return dequantize(rows, None if scale is None else scale.flatten(), self.wide)


def _dequantized(name: str, module: QuantizedMixin) -> Tensor:
    return dequantize(*module.stored(name), module.wide)


@cache
def _quantized_class(base: type[nn.Module], names: tuple[str, ...], precision: str) -> type[QuantizedMixin]:
    mixin = QuantizedEmbedding if issubclass(base, nn.Embedding) else QuantizedMixin
    members: dict[str, Any] = {name: property(partial(_dequantized, name)) for name in names}
    members |= {"base": base, "names": names, "precision": precision, "__module__": __name__}
    return type(f"{precision.title()}{base.__name__}", (mixin, base), members)


def _empty(base: type[nn.Module], names: tuple[str, ...], precision: str) -> QuantizedMixin:
    made = _quantized_class(base, names, precision)  # type: ignore[arg-type]
    return made.__new__(made)


def quantize_(module: nn.Module, precision: str, encoded: Sequence[Tensor] = ()) -> nn.Module:
    """Keep the weights of a layer, or of what replaced it, in a precision, in place; biases stay as they are.

    encoded: what the factors are, in order, one after the other; without it they are rounded to nearest.
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
    """What the part is to families, if they see its weight otherwise than it is kept."""
    return describe(part) if isinstance(part, (_ConvNd, nn.Embedding)) else None


def _as_seen(part: nn.Module, weight: Tensor) -> Tensor:
    """A part's weight, outputs first."""
    layer = _own(part)
    return weight if layer is None else as_matrix(layer, weight).flatten(0, 1)


def _quantize_one(part: nn.Module, names: tuple[str, ...], precision: str, factors: Sequence[Encoded]) -> None:
    layer, wide = _own(part), part.get_parameter(names[0])
    for name, (values, *scale) in zip(names, factors, strict=True):
        device = part.get_parameter(name).device
        values = values if layer is None else in_own_shape(layer, values)
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
    """Scales (outputs,) or (1,) in a shape that `widen` takes for a weight of so many dimensions."""
    if len(scale) == 1 or layer is None or not layer.input_first:
        return scale.view(-1, *[1] * (ndim - 1))
    shape = (1, -1, *[1] * (ndim - 2))
    return scale.view(layer.groups, *shape) if layer.groups > 1 else scale.view(shape)


def dequantize_all(module: nn.Module) -> dict[str, str]:
    """Back to weights in the dtype that they are used in, in place; returns the names of parts, and what they had."""
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
    """The opposite of `widen_all`, in place: parts of these names rounded to nearest again."""
    for name, precision in kept.items():
        quantize_(module.get_submodule(name), precision)


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Around what trains: weights are wide and take gradients, and are rounded to nearest again at the end."""
    kept = dequantize_all(model)
    try:
        yield
    finally:
        requantize_all(model, kept)
