"""The reconstructed form of a layer: its weight is built from the factors, then applied as one dense operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core import Layer, Rank
from rankopt.kinds import convolve, describe, in_own_shape

if TYPE_CHECKING:
    from rankopt.decompositions.base import Decomposition, Factors


def empty_cores(module: nn.Module, shapes: Sequence[Sequence[int]]) -> nn.ParameterList:
    """Cores still to be filled, in the dtype and on the device of the module's weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return nn.ParameterList(nn.Parameter(weight.new_empty(s)) for s in shapes)


class Reconstructed(nn.Module):
    """A convolution, Linear or Embedding whose weight is built from cores, then applied as one dense operation.

    In eval mode the weight is built once, by .eval(), and again at the first forward after a core has changed;
    building it is therefore no part of an example's MACs, and rankopt.count, which calls .eval() first, never sees
    it. It is built at every forward in training, where gradients of the cores are wanted, and in a compiled or
    exported program, which so keeps the cores instead of the weight. The kept weight takes memory, but is neither
    a parameter nor a buffer and is not saved. Writes to core.data are seen at the next .eval().
    """

    def __init__(self, family: Decomposition, module: nn.Module, layer: Layer, rank: Rank) -> None:
        super().__init__()
        self.family, self.method, self.rank = family, family.name, rank
        self.layer = describe(module)
        self.cores = empty_cores(module, family.shapes(layer, rank))
        bias: Tensor | None = getattr(module, "bias", None)
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))
        if isinstance(module, _ConvNd):
            self._reversed_padding_repeated_twice = module._reversed_padding_repeated_twice
        self._kept: tuple[Any, Any, Tensor] | None = None

    @property
    def factors(self) -> Factors:
        """The cores."""
        return tuple(self.cores)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the shape of the original's."""
        stored = [*self.cores.parameters(), *self.cores.buffers()]  # the cores, or what they are widened from
        wanted = torch.is_grad_enabled() and any(c.requires_grad for c in stored)
        if self.training or wanted or torch.compiler.is_compiling() or any(c.is_inference() for c in stored):
            return self._build()
        return self._keep(stored)

    def _build(self) -> Tensor:
        return in_own_shape(self.layer, self.family.weight(self.layer, self.factors))

    def _keep(self, stored: Sequence[Tensor]) -> Tensor:
        """The weight as built before; built anew if a core is another or was written to since."""
        state = [(c.data_ptr(), c._version) for c in stored]
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(mode=False), torch.no_grad():
                pins = [c.detach() for c in stored]  # keep the memory, so that no other core can be at its address
                self._kept = state, pins, self._build()
        return self._kept[2]

    def train(self, mode: bool = True) -> Reconstructed:
        super().train(mode)
        self._kept = None
        if not mode:
            with torch.no_grad():
                _ = self.weight
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.kind == "Embedding":
            return nn.functional.embedding(x, self.weight, self.padding_idx)  # type: ignore[arg-type]
        if len(self.layer.shape) == 2:
            return nn.functional.linear(x, self.weight, self.bias)
        return convolve(self, x, self.weight)

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"
