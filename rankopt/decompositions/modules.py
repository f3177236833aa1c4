"""The modules that replace a layer.

    Factorised       a chain of smaller layers (stages), each with one factor as its weight
    Reconstructed    one dense operation whose weight is computed from the cores

Families with modules of their own: core_networks.CoreNetworkLinear, tensor_train_matrix.TensorTrainMatrixLinear.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.types import Factors, Family, Stage
from rankopt.model.layer_kinds import (
    CONVOLUTIONS,
    TRANSPOSED,
    as_matrix,
    convolve,
    copy_geometry,
    describe,
    extended,
    in_own_shape,
)
from rankopt.model.lazy_weight import lazy

# --- factorised: a chain of stages -----------------------------------------------------------------


class Factorised(nn.Sequential):
    """A layer replaced by a chain of smaller ones.

    `weight` and `bias` read as the original's: the dense weight is computed from the factors at each access.

    Args:
        stages: The layers of the chain, input first.
        family: The decomposition that built it.
        rank: Its rank.
        layer: Description of the original layer.
    """

    __jit_unused_properties__ = ("factors", "weight", "bias")

    def __init__(self, stages: Sequence[nn.Module], family: Family, rank: Rank, layer: Layer) -> None:
        super().__init__(*stages)
        self.family, self.method, self.rank, self.layer = family, family.name, rank, layer
        self.lazy_weight = True

    @property
    def factors(self) -> Factors:
        """The stages' weights in the layout of `Layer.shape`."""
        parts = [(describe(s), s.weight) for s in self]
        return tuple(as_matrix(part, weight).reshape(part.shape) for part, weight in parts)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The dense weight in the original's own shape; it is built when its values are used."""
        like: Tensor = self[0].weight  # type: ignore[assignment]
        return lazy(self.layer.own_shape, like, self._build) if self.lazy_weight else self._build()

    def _build(self) -> Tensor:
        return in_own_shape(self.layer, self.family.weight(self.layer, self.factors))

    @property
    def bias(self) -> Tensor | None:
        """The bias, kept by the last stage."""
        return self[-1].bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"


def build_chain(module: nn.Module, stages: Sequence[Stage], family: Family, rank: Rank) -> nn.Module:
    """Build a chain of uninitialised layers from stages.

    Args:
        module: The original layer, from which stride, padding, dilation, dtype and device are taken.
        stages: The stages, input first; the last one gets the bias.
        family: The decomposition that the chain belongs to.
        rank: Its rank.
    """
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


def stage_convolution(conv: _ConvNd, s: Stage, bias: bool, like: dict[str, Any]) -> nn.Module:
    """Build the convolution of one stage.

    Args:
        conv: The original convolution, whose geometry the stage has along `s.axes`; it is 1 x 1 along the others.
        s: The stage.
        bias: Whether the convolution has a bias.
        like: Keyword arguments `device` and `dtype`.
    """
    along = extended(conv, s.axes)
    folded = s.blocks if s.shared else 1  # blocks that SharedConv folds into the batch

    def pick(values: Any, other: int) -> tuple[int, ...]:
        return tuple(v if on else other for v, on in zip(values, along, strict=True))

    # "same" and "valid" can stay: they do not pad 1 x 1 kernels.
    padding = conv.padding if isinstance(conv.padding, str) else pick(conv.padding, 0)
    options: dict[str, Any] = {
        "in_channels": conv.groups * s.in_channels // folded,
        "out_channels": conv.groups * s.out_channels // folded,
        "kernel_size": pick(conv.kernel_size, 1),
        "stride": pick(conv.stride, 1),
        "padding": padding,
        "dilation": pick(conv.dilation, 1),
        "groups": conv.groups * (s.blocks // folded),
        "bias": bias,
        "padding_mode": conv.padding_mode if s.axes else "zeros",
        **like,
    }
    transposed = conv.transposed and bool(s.axes)
    if transposed or folded > 1:
        options["output_padding"] = pick(conv.output_padding, 0)
    if folded > 1:
        return SharedConv(transposed=transposed, **options)
    return (TRANSPOSED if transposed else CONVOLUTIONS)[len(along)](**options)


class BlockLinear(nn.Linear):
    """y = x Wᵀ with a block-diagonal W, without bias.

    Args:
        in_features: Inputs of all blocks together.
        out_features: Outputs of all blocks together.
        blocks: Number of blocks; the weight (out, in // blocks) stacks them.
        like: Keyword arguments `device` and `dtype`.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int, like: dict[str, Any]) -> None:
        super().__init__(in_features // blocks, out_features, bias=False, **like)
        self.blocks = blocks

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = input.reshape(-1, self.blocks, self.in_features).transpose(0, 1)
        y = x @ self.weight.unflatten(0, (self.blocks, -1)).mT  # (blocks, N, out // blocks)
        return y.transpose(0, 1).reshape(list(input.shape[:-1]) + [self.out_features])  # noqa: RUF005  # TorchScript


class SharedConv(_ConvNd):
    """A convolution that applies the same kernel to every block of channels.

    The input is (batch, groups * blocks * in, *size) for any number of blocks, which are folded into the batch.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        n, groups, inside = len(self.kernel_size), self.groups, self.in_channels // self.groups
        parts = input.unflatten(-n - 1, (groups, -1, inside))
        parts = parts.transpose(-n - 2, -n - 3)  # (b, blocks, groups, in, *size)
        y = convolve(self, parts.reshape(-1, self.in_channels, *input.shape[-n:]), self.weight)
        y = y.reshape(*parts.shape[: -n - 2], groups, -1, *y.shape[-n:]).transpose(-n - 2, -n - 3)
        return y.flatten(-n - 3, -n - 1)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles."""
        return OnBatches(self, _smallest_map(self))


# --- reconstructed: a dense weight computed from cores ---------------------------------------------


def empty_cores(module: nn.Module, shapes: Sequence[Sequence[int]]) -> nn.ParameterList:
    """Uninitialised cores in the dtype and on the device of a module's weight.

    Args:
        module: Module with a `weight`.
        shapes: One shape per core.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    return nn.ParameterList(nn.Parameter(weight.new_empty(s)) for s in shapes)


class Reconstructed(nn.Module):
    """A convolution, Linear or Embedding whose dense weight is computed from cores.

    In eval mode the weight is cached: computed by .eval() and again at the first forward after a core changed. The
    computation therefore does not count towards the MACs of an example (rankopt.count calls .eval() first). The weight
    is computed at every forward in training mode, while gradients of the cores are needed, and in compiled or exported
    programs, which so store the cores instead of the weight. The cached weight takes memory, but is neither a
    parameter nor a buffer and is not saved. Writes to core.data take effect at the next .eval().

    Args:
        family: The decomposition that the cores belong to.
        module: The original layer.
        layer: Its description.
        rank: The rank.
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
        self._cache: tuple[Any, Any, Tensor] | None = None  # state of the cores, references to them, weight

    @property
    def factors(self) -> Factors:
        """The cores as a tuple."""
        return tuple(self.cores)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the original's own shape."""
        stored = [*self.cores.parameters(), *self.cores.buffers()]  # the cores, or what quantized cores are stored as
        needs_grad = torch.is_grad_enabled() and any(c.requires_grad for c in stored)
        followed = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if self.training or needs_grad or followed or any(c.is_inference() for c in stored):
            return self._build()
        return self._cached(stored)

    def _build(self) -> Tensor:
        return in_own_shape(self.layer, self.family.weight(self.layer, self.factors))

    def _cached(self, stored: Sequence[Tensor]) -> Tensor:
        """The cached weight, recomputed if a core was replaced or written to since."""
        state = [(c.data_ptr(), c._version) for c in stored]
        if self._cache is None or self._cache[0] != state:
            with torch.inference_mode(mode=False), torch.no_grad():
                pins = [c.detach() for c in stored]  # hold the memory, so that no new core gets the same address
                self._cache = state, pins, self._build()
        return self._cache[2]

    def train(self, mode: bool = True) -> Reconstructed:
        super().train(mode)
        self._cache = None
        if not mode:
            with torch.no_grad():
                _ = self.weight
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles."""
        if len(self.layer.shape) == 4:
            return OnBatches(self, _smallest_map(self))
        like = next(self.parameters())
        x = torch.zeros(1, dtype=torch.long, device=like.device)
        return traced(self, x if self.layer.kind == "Embedding" else like.new_zeros(1, self.layer.in_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.kind == "Embedding":
            return nn.functional.embedding(x, self.weight, self.padding_idx)  # type: ignore[arg-type]
        if len(self.layer.shape) == 2:
            weight = self.weight.mT if self.layer.input_first else self.weight
            return nn.functional.linear(x, weight, self.bias)
        return convolve(self, x, self.weight)

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"


# --- TorchScript -----------------------------------------------------------------------------------


def traced(module: nn.Module, x: Tensor) -> nn.Module:
    """A module as torch.jit.script can compile it, which does not follow the Python code of a decomposition.

    Args:
        module: A module that does the same operations on inputs of every size.
        x: An input.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trace might")  # of the factors' shapes, which do not change
        return torch.jit.trace(module, x, check_trace=False)


def _smallest_map(conv: Any) -> Tensor:
    """The smallest input of a convolution, or of a module with the attributes of one."""
    sizes = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return next(conv.parameters()).new_zeros(1, conv.in_channels, *sizes)


class OnBatches(nn.Module):
    """A module that is traced on a batch, for inputs with any number of batch dimensions.

    Args:
        module: The module.
        x: A batch, with one dimension before those of an example.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.batches, self.axes = traced(module, x), x.ndim - 1

    def forward(self, x: Tensor) -> Tensor:
        at = x.ndim - self.axes
        y = self.batches(x.reshape([-1] + list(x.shape[at:])))  # noqa: RUF005  # TorchScript
        return y.reshape(list(x.shape[:at]) + list(y.shape[1:]))


# --- filling a replacement -------------------------------------------------------------------------


def copy_settings(replacement: nn.Module, module: nn.Module) -> nn.Module:
    """Give a replacement the bias, training mode, requires_grad and geometry attributes of the original.

    Args:
        replacement: The replacement; its factors take the requires_grad of the original's weight.
        module: The original.

    Returns:
        The replacement.
    """
    copy_geometry(replacement, module)
    bias: Tensor | None = getattr(module, "bias", None)
    with torch.no_grad():
        for parameter in replacement.parameters():
            parameter.requires_grad_(module.weight.requires_grad)  # type: ignore[arg-type]
        if bias is not None:
            replacement.bias.copy_(bias)  # type: ignore[operator]
            replacement.bias.requires_grad_(bias.requires_grad)
    return replacement.train(module.training)


def load_factors(replacement: nn.Module, factors: Factors) -> None:
    """Write factors into a replacement.

    Args:
        replacement: As `Decomposition.build` returns it.
        factors: As `Decomposition.fit` returns them.
    """
    names = [name for name, _ in replacement.named_parameters() if not name.endswith("bias")]
    with torch.no_grad():
        for name, factor in zip(names, factors, strict=True):
            module = replacement.get_submodule(name.rpartition(".")[0])
            own = isinstance(module, (_ConvNd, nn.Embedding))  # in other modules a factor has the parameter's shape
            replacement.get_parameter(name).copy_(in_own_shape(describe(module), factor) if own else factor)
