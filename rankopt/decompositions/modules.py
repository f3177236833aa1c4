"""The modules that replace a layer: factorised (a chain of stages) or reconstructed (a weight built from cores)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.types import Factors, Family, Stage
from rankopt.model.layer_kinds import CONVOLUTIONS, TRANSPOSED, as_matrix, convolve, describe, extended, in_own_shape


class Factorised(nn.Sequential):
    """A layer replaced by smaller ones in a row. Reads of .weight get the dense weight, rebuilt; .bias the bias."""

    def __init__(self, stages: Sequence[nn.Module], family: Family, rank: Rank, layer: Layer) -> None:
        super().__init__(*stages)
        self.family, self.method, self.rank, self.layer = family, family.name, rank, layer

    @property
    def factors(self) -> Factors:
        """The stages' weights as families see them."""
        parts = [(describe(s), s.weight) for s in self]
        return tuple(as_matrix(part, weight).reshape(part.shape) for part, weight in parts)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The dense weight in the shape of the original's."""
        return in_own_shape(self.layer, self.family.weight(self.layer, self.factors))

    @property
    def bias(self) -> Tensor | None:
        return self[-1].bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"


def chain(module: nn.Module, stages: Sequence[Stage], family: Family, rank: Rank) -> nn.Module:
    """The stages as modules in a row, geometry taken from the original; the last one carries its bias."""
    last = len(stages) - 1
    weight: Tensor = module.weight  # type: ignore[assignment]
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    parts: list[nn.Module] = []
    for i, s in enumerate(stages):
        bias = i == last and getattr(module, "bias", None) is not None
        if isinstance(module, _ConvNd):
            parts.append(stage_convolution(module, s, bias, like))
        elif isinstance(module, nn.Embedding) and s.axes:
            parts.append(nn.Embedding(s.in_channels, s.out_channels, module.padding_idx, **like))
        elif s.blocks > 1:
            parts.append(BlockLinear(s.in_channels, s.out_channels, s.blocks, like))
        else:
            parts.append(nn.Linear(s.in_channels, s.out_channels, bias, **like))
    return Factorised(parts, family, rank, describe(module))


class BlockLinear(nn.Linear):
    """y = x Wᵀ with W block-diagonal, its blocks (out, in // blocks) one below the other; no bias."""

    def __init__(self, in_features: int, out_features: int, blocks: int, like: dict[str, Any]) -> None:
        super().__init__(in_features // blocks, out_features, bias=False, **like)
        self.blocks = blocks

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = input.reshape(-1, self.blocks, self.in_features).transpose(0, 1)
        y = x @ self.weight.unflatten(0, (self.blocks, -1)).mT  # (blocks, N, out // blocks)
        return y.transpose(0, 1).reshape(*input.shape[:-1], self.out_features)


GEOMETRY = (
    *("in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding"),
    *("num_embeddings", "embedding_dim", "padding_idx"),
)


def finish(replacement: nn.Module, module: nn.Module) -> nn.Module:
    """Copy the bias, mode and requires_grad of the original; factors take the weight's requires_grad."""
    for name in GEOMETRY:  # for whoever reads layer.out_channels and the like
        if hasattr(module, name):
            setattr(replacement, name, getattr(module, name))
    bias: Tensor | None = getattr(module, "bias", None)
    with torch.no_grad():
        for parameter in replacement.parameters():
            parameter.requires_grad_(module.weight.requires_grad)  # type: ignore[arg-type]
        if bias is not None:
            replacement.bias.copy_(bias)  # type: ignore[operator]
            replacement.bias.requires_grad_(bias.requires_grad)
    return replacement.train(module.training)


def load_factors(replacement: nn.Module, factors: Factors) -> None:
    """Write the factors into an empty replacement."""
    names = [name for name, _ in replacement.named_parameters() if not name.endswith("bias")]
    with torch.no_grad():
        for name, factor in zip(names, factors, strict=True):
            module = replacement.get_submodule(name.rpartition(".")[0])
            own = isinstance(module, (_ConvNd, nn.Embedding))  # of others the factor is the parameter as it is
            replacement.get_parameter(name).copy_(in_own_shape(describe(module), factor) if own else factor)


def stage_convolution(conv: _ConvNd, s: Stage, bias: bool, like: dict[str, Any]) -> nn.Module:
    """The stage as a module: along its axes with the original's geometry, 1 x 1 along the others."""
    along = extended(conv, s.axes)
    apart = s.blocks if s.shared else 1  # blocks that the module folds into the batch

    def pick(values: Any, other: int) -> tuple[int, ...]:
        return tuple(v if on else other for v, on in zip(values, along, strict=True))

    # "same" and "valid" pad a 1 x 1 stage by nothing, too.
    padding = conv.padding if isinstance(conv.padding, str) else pick(conv.padding, 0)
    options: dict[str, Any] = {
        "in_channels": conv.groups * s.in_channels // apart,
        "out_channels": conv.groups * s.out_channels // apart,
        "kernel_size": pick(conv.kernel_size, 1),
        "stride": pick(conv.stride, 1),
        "padding": padding,
        "dilation": pick(conv.dilation, 1),
        "groups": conv.groups * (s.blocks // apart),
        "bias": bias,
        "padding_mode": conv.padding_mode if s.axes else "zeros",
        **like,
    }
    transposed = conv.transposed and bool(s.axes)
    if transposed or apart > 1:
        options["output_padding"] = pick(conv.output_padding, 0)
    if apart > 1:
        return SharedConv(transposed=transposed, **options)
    return (TRANSPOSED if transposed else CONVOLUTIONS)[len(along)](**options)


class SharedConv(_ConvNd):
    """One convolution for every block of the channels: (b, groups * blocks * in, *size), any number of blocks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        n, groups, inside = len(self.kernel_size), self.groups, self.in_channels // self.groups
        parts = input.unflatten(-n - 1, (groups, -1, inside))
        parts = parts.transpose(-n - 2, -n - 3)  # (b, blocks, groups, in, *size)
        y = convolve(self, parts.reshape(-1, self.in_channels, *input.shape[-n:]), self.weight)
        y = y.reshape(*parts.shape[: -n - 2], groups, -1, *y.shape[-n:]).transpose(-n - 2, -n - 3)
        return y.flatten(-n - 3, -n - 1)


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

    def __init__(self, family: Family, module: nn.Module, layer: Layer, rank: Rank) -> None:
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
