"""Calibration statistics: input moments and output metrics of all layers, measured on real batches.

The error of a candidate weight Ŵ is measured as tr(H (W − Ŵ) S (W − Ŵ)ᵀ), with the input moment S = E[x xᵀ] and the
output metric H = E[g gᵀ], which says how strongly the model's outputs respond to each output of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.candidates.cache import Cache
from rankopt.core.errors import TaskError
from rankopt.core.progress import Progress
from rankopt.core.records import Layer
from rankopt.model.forward import (
    class_axis,
    find_output,
    hooked,
    inference,
    run,
    to_device,
)

CHUNK = 2**23  # elements of a patch matrix held at once (32 MB in float32)


def moments(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], on_batch: Any = None
) -> dict[str, Tensor]:
    """Measure the second moment of each layer's input, S = E[x xᵀ], over patches (convolutions) or vectors (Linear).

    Products are taken in the input's precision and summed in float64.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        on_batch: Called after every batch.

    Returns:
        By layer name, S as float64 (groups, patch, patch) on the model's device, with patch = in_channels // groups *
        height * width in the order that decompositions see. For an Embedding, whose input is one-hot, the diagonal
        (1, vocabulary) as in `frequencies`. Layers that no input reached are missing.

    Raises:
        TaskError: The model does not run on a batch, or the input of a layer is not finite.
    """
    by_name = {layer.name: layer for layer in layers}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(by_name, 0)

    def collect(name: str, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if not torch.isfinite(x).all():
            raise TaskError(f"the input of layer {name!r} is NaN or infinite on the calibration data")
        gram, rows = _gram(by_name[name], model.get_submodule(name), x.detach())
        sums[name] = sums[name] + gram if name in sums else gram
        counts[name] += rows

    try:
        with hooked(model, by_name, on_input=collect), inference(model):
            for batch in batches:
                run(model, to_device(batch, model))
                if on_batch:
                    on_batch()
    except (RuntimeError, TypeError) as error:
        raise TaskError(f"the model does not run on a calibration batch: {type(error).__name__}: {error}") from error
    tables = {layer.name for layer in layers if layer.kind == "Embedding"}
    reached = [name for name in sums if counts[name]]  # an idle expert is not
    return {name: frequencies(sums[name]) if name in tables else sums[name] / counts[name] for name in reached}


def frequencies(counts: Tensor) -> Tensor:
    """Estimate token probabilities from counts in the calibration data.

    With plain relative frequencies, a fit would sacrifice the rows of tokens that did not occur. Together these have
    a probability of about N₁ / N, N₁ being the number of tokens that occurred once (Good 1953). Here (N₁ + 1) / N is
    spread evenly over them, but none gets more than a token that occurred once.

    Args:
        counts: Occurrences of each token (1, vocabulary).

    Returns:
        Probabilities (1, vocabulary), none of them zero.
    """
    once, unseen = (counts == 1).sum(), (counts == 0).sum()
    each = ((once + 1) / unseen.clamp_min(1)).clamp_max(1).to(counts)
    counts = torch.where(counts == 0, each, counts)
    return counts / counts.sum()


def _gram(layer: Layer, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Sum of x xᵀ over patches, float64 (groups, patch, patch), and their number; for an Embedding the diagonal."""
    if layer.kind == "Embedding":
        return torch.bincount(x.flatten(), minlength=layer.patch).double()[None], x.numel()
    total = torch.zeros(layer.groups, layer.patch, layer.patch, dtype=torch.float64, device=x.device)
    rows = 0
    for part in columns(layer, module, x):
        total += outer(part, part)
        rows += part.shape[-1]
    return total, rows


def columns(layer: Layer, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the input vectors that a layer's outputs are computed from, a chunk at a time.

    Args:
        layer: The layer.
        module: Its module.
        x: Its input.

    Yields:
        Tensors (groups, patch, rows).
    """
    if not isinstance(module, _ConvNd):
        for part in x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // x.shape[-1])):
            yield part.T[None]
        return
    x = x if x.ndim == len(module.kernel_size) + 2 else x[None]
    positions = math.prod(x.shape[2:]) * (math.prod(module.stride) if module.transposed else 1)
    for part in x.split(max(1, CHUNK // (positions * layer.patch * layer.groups))):
        seen = patches(module, part)  # (b, groups * patch, positions)
        yield seen.unflatten(1, (layer.groups, layer.patch)).permute(1, 2, 0, 3).flatten(2)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum the outer products of columns, a bᵀ.

    Args:
        a: (groups, p, rows).
        b: (groups, q, rows).

    Returns:
        float64 (groups, p, q).
    """
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (a, b))
    return (a @ b.mT).double()


def patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """Extract the patches that a convolution's outputs are computed from.

    Args:
        conv: A convolution, transposed or not.
        x: Its input (b, c, *size).

    Returns:
        (b, c * kernel, positions), one patch per position of the output.
    """
    n = len(conv.kernel_size)
    if conv.transposed:
        seen, stride = _zeros_between(conv, x), (1,) * n
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        seen, stride = F.pad(x, conv._reversed_padding_repeated_twice, mode), conv.stride
    for i, (size, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        seen = seen.unfold(2 + i, (size - 1) * dilation + 1, stride[i])[..., ::dilation]
    if conv.transposed:  # what comes first in the input meets the kernel's end
        seen = seen.flip(tuple(range(-n, 0)))
    return seen.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n)).flatten(1, 1 + n).flatten(2)


def _zeros_between(conv: _ConvNd, x: Tensor) -> Tensor:
    """The input over which a transposed convolution is an ordinary one: stride - 1 zeros between, zeros around."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], conv.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    steps: list[Any] = [slice(None, None, step) for step in conv.stride]
    spread[..., *steps] = x
    around: list[int] = []
    for i in reversed(range(len(sizes))):
        before = conv.dilation[i] * (conv.kernel_size[i] - 1) - int(conv.padding[i])
        around += [before, before + conv.output_padding[i]]
    return F.pad(spread, around)


# --- output metrics: how strongly the model responds to a layer's output ---------------------------


def output_metrics(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], on_batch: Any = None
) -> dict[str, Tensor]:
    """Measure the output metric of each layer, H = E[g gᵀ] with g = d(vᵀ z)/d(output).

    z are the model's outputs and v seeded random directions, mean-free over classes, as a softmax ignores the mean.
    This is a Gauss-Newton metric in output space (Martens 2020, section 6). Unlike the Fisher matrix it does not
    vanish where the model is confident.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        on_batch: Called after every batch.

    Returns:
        By layer name, H as float64 (groups, T, T) with trace T. Layers that no gradient reached are missing.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def collect(layer: Layer, gradient: Tensor) -> None:
        axis = 1 - len(layer.own_shape)  # before those of the kernel
        channels = gradient.detach().movedim(axis, 0).reshape(layer.groups, layer.out_channels, -1)
        sums[layer.name] = sums.get(layer.name, 0) + outer(channels, channels)

    def watch(name: str, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:  # a frozen model; the clone may be changed in place
            output = output.detach().requires_grad_().clone()
        # A hook on the tensor sees the gradient of this output even if a later layer changes it in place.
        output.register_hook(lambda gradient: collect(by_name[name], gradient))
        return output

    by_name = {layer.name: layer for layer in layers}
    kept = [(p, p.grad) for p in model.parameters()]
    try:
        with (
            hooked(model, by_name, on_output=watch),
            inference(model),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False),
        ):
            for batch in batches:
                for p, _ in kept:
                    p.grad = None
                z = find_output(run(model, to_device(batch, model)))
                if z is not None and z.requires_grad and z.is_floating_point():
                    v = torch.randn(z.shape, generator=generator).to(z)
                    if (axis := class_axis(z)) is not None:
                        v = v - v.mean(axis, keepdim=True)
                    (z * v).sum().backward()
                if on_batch:
                    on_batch()
    finally:
        for p, gradient in kept:
            p.grad = gradient
    return {name: _unit_trace(h) for name, h in sums.items() if torch.isfinite(h).all() and h.abs().max() > 0}


def _unit_trace(h: Tensor) -> Tensor:
    return h / h.diagonal(dim1=-2, dim2=-1).mean()


def calibrate(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Measure input moments and output metrics.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        progress: Progress callback.

    Returns:
        Input moments S by layer name, and output metrics H by layer name. See `moments` and `output_metrics`.
    """
    total = 2 * len(batches)
    steps = iter(progress(range(total), "calibrating", total))
    s = moments(model, layers, batches, lambda: next(steps))
    h = output_metrics(model, layers, batches, lambda: next(steps))
    next(steps, None)
    return s, h


class Statistics(Mapping[str, tuple[Any, Any]]):
    """Calibration statistics by layer name: (input moment S, output metric H), each None where there is none.

    They are read from the cache, or measured and written there, when first needed.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        key: Content hash of model, layers and batches, under which results are cached.
        cache: The cache.
        progress: Progress callback.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        batches: Sequence[Any],
        key: str,
        cache: Cache,
        progress: Progress,
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.key, self.cache, self.progress = key, cache, progress
        self.tensors: dict[str, Any] = {}
        self._file_key = f"statistics-{key}"

    def ensure_cached(self) -> None:
        """Measure the statistics if they are not in the cache; otherwise leave reading them until they are needed."""
        if not self.cache.path(self._file_key, "safetensors").is_file():
            self.load()

    def load(self) -> None:
        """Read the statistics into memory, or measure them."""
        self.tensors = self.tensors or self.cache.read_tensors(self._file_key) or self._measure()

    def _measure(self) -> dict[str, Any]:
        s, h = calibrate(self.model, self.layers, self.batches, self.progress)
        found = {f"moment.{n}": t.cpu() for n, t in s.items()} | {f"metric.{n}": t.cpu() for n, t in h.items()}
        self.cache.write_tensors(self._file_key, found)
        return found

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        self.load()
        return self.tensors.get(f"moment.{name}"), self.tensors.get(f"metric.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)
