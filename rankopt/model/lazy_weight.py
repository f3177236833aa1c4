"""A weight that is only built where its values are used: `layer.weight.dtype` costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

FREE = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
    *(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta")
    ),
}
"""What may be asked of a weight without its values."""


class LazyWeight(Tensor):
    """Stands for a tensor that `build()` makes; every operation on its values builds it first.

    Attributes such as dtype, device and shape, and methods such as size() and dim(), answer without building it.

    Args:
        shape: The tensor's shape.
        like: A tensor of its dtype and on its device.
        build: Makes the tensor.
    """

    build: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor, build: Callable[[], Tensor]) -> LazyWeight:
        made: LazyWeight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device)
        made.build = build
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Build every lazy argument, unless the question needs no values."""
        with torch._C.DisableTorchFunctionSubclass():
            if func not in FREE:
                args, kwargs = tree_map(_built, args), tree_map(_built, dict(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Operations that reach the dispatcher from C++ see the built weight, too."""
        return func(*tree_map(_built, args), **tree_map(_built, dict(kwargs or {})))


def _built(x: Any) -> Any:
    return x.build() if isinstance(x, LazyWeight) else x


def lazy(shape: Sequence[int], like: Tensor, build: Callable[[], Tensor]) -> Tensor:
    """A lazy weight; in a compiled, traced or exported program the weight itself, which such programs can follow.

    Args:
        shape: The weight's shape.
        like: A tensor of the same dtype and on the same device.
        build: Makes the weight.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return build()
    return LazyWeight(shape, like, build)
