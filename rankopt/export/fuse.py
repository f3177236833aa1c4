"""Fusing a model for inference: the same function in fewer and faster operations.

Multiplied out    a layer in reconstructed form, and one whose factors take more MACs than its dense weight
Folded            a batch norm into the convolution or Linear before it:  Ŵ = γ W / σ,  b̂ = γ (b − μ) / σ + β
Merged            the depthwise k × 1 and 1 × k convolutions of CP into one k × k;  two adjacent Linears or 1 × 1
                  convolutions into one where that takes fewer MACs:  Ŵ = W₂ W₁,  b̂ = W₂ b₁ + b₂
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rankopt.core.errors import RankoptError
from rankopt.core.records import Layer
from rankopt.core.timing import medians
from rankopt.decompositions.core_networks import CoreNetworkLinear
from rankopt.decompositions.modules import Factorised, Reconstructed
from rankopt.decompositions.tensor_train_matrix import TensorTrainMatrixLinear
from rankopt.export.dataflow import Dataflow
from rankopt.model.attention import linear
from rankopt.model.counting import count
from rankopt.model.forward import find_output, inference, run, to_device
from rankopt.model.inputs import one_example
from rankopt.model.inventory import names_of
from rankopt.model.layer_kinds import CONVOLUTIONS, TRANSPOSED, as_matrix
from rankopt.model.quantization import QuantizedMixin

REPLACEMENTS = (Factorised, Reconstructed, CoreNetworkLinear, TensorTrainMatrixLinear)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

CLEARLY = 0.95
"""A dense layer counts as faster below this share of the factorised layer's time."""

LARGEST = 25
"""Positions of a merged depthwise kernel: 7 x 7 is slower merged in channels_last (studies/results/fused.md)."""


def fuse(model: nn.Module, example_input: Any, *, channels_last: bool = False, measured: bool = False) -> nn.Module:
    """Copy a model for inference, with the same outputs from fewer operations.

    Layers that are shared, hooked, parametrised or called more than once stay as they are. A folded batch norm becomes
    an nn.Identity. The copy is in eval mode and its parameters are frozen; for further training use the original.

    Args:
        model: Model to fuse; it is not changed.
        example_input: As in Task; one example of it is run to see which layer follows which.
        channels_last: Whether to store weights in channels_last format.
        measured: Whether to also multiply layers out that are measured to be faster so, on this machine and example.

    Raises:
        RankoptError: If the copy's output is not the model's, for example because a forward uses layers other than by
            calling them.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
    x = to_device(one_example(fused, example_input), fused)
    fused = _multiply_out(fused, Dataflow(fused, x), measured)
    while _join(fused, Dataflow(fused, x)):
        pass
    if channels_last:
        fused = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check(model, fused, x)
    return fused


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replace a module under each of its names; returns the model (`new`, if the module is the whole model)."""
    new = new.eval().requires_grad_(requires_grad=False)
    if old is model:
        return new
    for name in names_of(model)[old]:
        model.set_submodule(name, new)
    return model


def _check(model: nn.Module, fused: nn.Module, x: Any) -> None:
    with inference(model):
        before, after = find_output(run(model, x)), find_output(run(fused, x))
    if before is None or after is None:
        return
    tolerance = 1e-4 if before.dtype in (torch.float32, torch.float64) else 0.1
    if (before - after).abs().max() > tolerance * before.abs().max():
        raise RankoptError(
            "the fused model's output is not the model's: its forward reaches layers by other ways than its "
            "submodules, or does not always the same; use it unfused"
        )


# --- multiplying out ---------------------------------------------------------------------------------


def _multiply_out(model: nn.Module, flow: Dataflow, measured: bool) -> nn.Module:
    for module, calls in flow.calls.items():
        if not isinstance(module, REPLACEMENTS) or module not in flow.free or calls[0] is None:
            continue
        if any(isinstance(part, QuantizedMixin) for part in module.modules()):
            continue  # its weights are meant to stay small
        x, dense = calls[0][0], dense_twin(module)
        if isinstance(module, Reconstructed) or _better(module, dense, x, measured):
            model = _put(model, module, dense)
    return model


def _better(module: nn.Module, dense: nn.Module, x: Tensor, measured: bool) -> bool:
    """Whether the dense layer takes fewer MACs or is measured to be faster."""
    if count(module, x).macs > count(dense, x).macs:
        return True
    if not measured:
        return False
    before, after = medians([lambda: module(x), lambda: dense(x)], seconds=0.1)
    return after < CLEARLY * before


def dense_twin(module: nn.Module) -> nn.Module:
    """The ordinary layer (nn.Conv2d, nn.Linear, ...) with a replacement's dense weight.

    Args:
        module: A replacement, of one of the classes in REPLACEMENTS.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(module, "bias", None)
    layer: Layer = module.layer  # type: ignore[assignment]
    kind = layer.kind
    if kind == "Conv1D":  # an ordinary Linear, which joins with its neighbours
        return linear(as_matrix(layer, weight)[0], bias)
    names = {
        "Linear": ("in_features", "out_features"),
        "Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    }.get(kind, ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"))
    options = {name: getattr(module, name) for name in names}
    if "Conv" in kind:
        options["padding_mode"] = module.padding_mode
    if "Transpose" in kind:
        options["output_padding"] = module.output_padding
    if kind != "Embedding":
        options["bias"] = bias is not None
    new: nn.Module = getattr(nn, kind)(**options, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            new.bias.copy_(bias)  # type: ignore[operator]
    return new


# --- joining pairs ------------------------------------------------------------------------------------


def _join(model: nn.Module, flow: Dataflow) -> bool:
    """Replace pairs of modules by one each, in place, every module in at most one pair. Returns whether any was."""
    taken: set[nn.Module] = set()
    for first in list(flow.calls):
        second = flow.follower(first)
        if second is None or not taken.isdisjoint((first, second)):
            continue
        shapes = [call[1].shape for m in (first, second) if (call := flow.call(m))]
        new = next((made for join in JOINS if (made := join(first, second, shapes)) is not None), None)
        if new is not None:
            _put(model, first, new)
            _put(model, second, nn.Identity())
            taken |= {first, second}
    return bool(taken)


Shapes = Sequence[torch.Size]
"""The shapes of both modules' outputs."""


def fold_batch_norm(first: Any, second: Any, shapes: Shapes) -> nn.Module | None:
    """Fold a batch norm into the layer before it.

    Args:
        first: A module.
        second: Its follower.
        shapes: The shapes of both outputs.

    Returns:
        The joined layer; None if the two are not such a pair, or the norm has no running statistics.
    """
    if type(second) not in NORMS or second.running_mean is None:
        return None
    if type(first) in CONVOLUTIONS.values():
        return fuse_conv_bn_eval(first, second)
    if type(first) in TRANSPOSED.values() and first.groups == 1:
        return fuse_conv_bn_eval(first, second, transpose=True)
    if (
        type(first) is nn.Linear and len(shapes[0]) == 2
    ):  # of other inputs the norm's channels are not the Linear's outputs
        return fuse_linear_bn_eval(first, second)
    return None


def merge_depthwise(first: Any, second: Any, _: Shapes, largest: int = LARGEST) -> nn.Module | None:
    """Merge two depthwise convolutions along different axes.

    Args:
        first: A module.
        second: Its follower.
        largest: Largest number of positions of the merged kernel.

    Returns:
        The merged convolution; None if the two are not such a pair, or the kernel would be larger.
    """
    if not _depthwise_pair(first, second) or not _separate(first, second):
        return None
    if (first.weight[0] * second.weight[0]).numel() > largest:
        return None

    def both(name: str, neutral: int) -> Any:
        a, b = getattr(first, name), getattr(second, name)
        return a if isinstance(a, str) else tuple(v if v != neutral else w for v, w in zip(a, b, strict=True))

    options = {"output_padding": both("output_padding", 0)} if first.transposed else {}
    new = type(first)(
        *(first.in_channels, first.out_channels, both("kernel_size", 1), both("stride", 1), both("padding", 0)),
        dilation=both("dilation", 1),
        groups=first.groups,
        bias=second.bias is not None,
        padding_mode=first.padding_mode,
        device=first.weight.device,
        dtype=first.weight.dtype,
        **options,
    )
    with torch.no_grad():
        new.weight.copy_(first.weight * second.weight)
        if second.bias is not None:
            new.bias.copy_(second.bias)
    return new


def _depthwise_pair(first: Any, second: Any) -> bool:
    """Whether both are depthwise convolutions of the same kind, the first without bias."""
    kinds = (*CONVOLUTIONS.values(), *TRANSPOSED.values())
    if type(first) is not type(second) or type(first) not in kinds or first.bias is not None:
        return False
    return all(c.groups == c.in_channels == c.out_channels for c in (first, second))


def _separate(first: _ConvNd, second: _ConvNd) -> bool:
    """Whether along every axis at most one of two convolutions has a kernel, stride or padding."""
    named = any(isinstance(c.padding, str) for c in (first, second))
    if first.padding_mode != second.padding_mode or (named and first.padding != second.padding):
        return False
    idle = [_idle_axes(c) for c in (first, second)]
    return all(a or b for a, b in zip(*idle, strict=True))


def _idle_axes(conv: _ConvNd) -> list[bool]:
    around = (0,) * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
    found = zip(conv.kernel_size, conv.stride, around, conv.output_padding, strict=True)
    return [values == (1, 1, 0, 0) for values in found]


def merge_pointwise(first: Any, second: Any, shapes: Shapes) -> nn.Module | None:
    """Merge two Linears or two 1 x 1 convolutions.

    Args:
        first: A module.
        second: Its follower.
        shapes: The shapes of both outputs.

    Returns:
        The merged layer; None if the two are not such a pair, or it would not take fewer MACs.
    """
    if type(first) is not type(second) or not (type(first) is nn.Linear or _pointwise_pair(first, second)):
        return None
    linear = type(first) is nn.Linear
    groups = 1 if linear else first.groups
    positions = [
        s.numel() // (s[-1] if linear else m.out_channels) for s, m in zip(shapes, (first, second), strict=True)
    ]
    a, b = (m.weight.double().flatten(1).unflatten(0, (groups, -1)) for m in (first, second))
    weight = b @ a  # (groups, out, in)
    if weight.numel() * positions[1] >= a.numel() * positions[0] + b.numel() * positions[1]:
        return None
    new = copy.deepcopy(first)
    new.weight = nn.Parameter(weight.flatten(0, 1).reshape(-1, *first.weight.shape[1:]).to(first.weight))
    bias = 0 if second.bias is None else second.bias.double()
    if first.bias is not None:
        bias = bias + (b @ first.bias.double().view(groups, -1, 1)).flatten()
    new.bias = nn.Parameter(bias.to(first.weight)) if isinstance(bias, Tensor) else None
    if linear:
        new.out_features = second.out_features
    else:
        new.out_channels = second.out_channels
        new.stride = tuple(s * t for s, t in zip(first.stride, second.stride, strict=True))
    return new


def _pointwise_pair(first: Any, second: Any) -> bool:
    """Whether both are 1 x 1 convolutions with the same groups, the second without padding."""
    if type(first) not in CONVOLUTIONS.values() or first.groups != second.groups:
        return False
    padded = not isinstance(second.padding, str) and any(second.padding)
    return not padded and all(set(c.kernel_size) == {1} for c in (first, second))


JOINS: tuple[Callable[[Any, Any, Shapes], nn.Module | None], ...] = (fold_batch_norm, merge_depthwise, merge_pointwise)
