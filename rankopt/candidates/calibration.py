"""Second moments of every layer's input, on real batches, in one pass."""

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
    inference,
    run,
    to_device,
)

CHUNK = 2**23  # elements of a patch matrix held at once (32 MB in float32)


def moments(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], on_batch: Any = None
) -> dict[str, Tensor]:
    """Second moment of each layer's input: S = E[x xᵀ] over patches (convolutions) or vectors (Linear).

    Returns name -> float64 (groups, patch, patch) on the model's device, patch = in_channels // groups *
    height * width in the order that families see; of an Embedding, whose input is one-hot, the diagonal
    (1, vocabulary) as in `frequencies`. Products are taken in the input's precision a chunk at a time and
    summed in float64. Raises TaskError naming the layer whose input is not finite.
    """
    modules = {name: model.get_submodule(name) for name in (layer.name for layer in layers)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(modules, 0)

    def collect(layer: Layer, module: nn.Module, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise TaskError(f"the input of layer {layer.name!r} is NaN or infinite on the calibration data")
        gram, rows = _gram(layer, module, x.detach())
        sums[layer.name] = sums[layer.name] + gram if layer.name in sums else gram
        counts[layer.name] += rows

    handles = [
        modules[layer.name].register_forward_pre_hook(lambda m, args, layer=layer: collect(layer, m, args[0]))
        for layer in layers
    ]
    try:
        with inference(model):
            for batch in batches:
                run(model, to_device(batch, model))
                if on_batch:
                    on_batch()
    except (RuntimeError, TypeError) as error:
        raise TaskError(f"the model does not run on a calibration batch: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    tables = {layer.name for layer in layers if layer.kind == "Embedding"}
    reached = [name for name in sums if counts[name]]  # others never were (an idle expert)
    return {name: frequencies(sums[name]) if name in tables else sums[name] / counts[name] for name in reached}


def frequencies(counts: Tensor) -> Tensor:
    """How often each token is expected, (1, vocabulary), from its counts in the calibration data.

    A token that was not seen would cost nothing, and its row would be given up, though it may well come next.
    What was not seen comes with a probability of about N₁ / N together, N₁ of the N tokens seen being of those seen
    once (Good 1953). It is spread evenly, with one added to N₁ so that it never is nothing; no token that was not
    seen counts more than one that was seen once.
    """
    once, unseen = (counts == 1).sum(), (counts == 0).sum()
    each = ((once + 1) / unseen.clamp_min(1)).clamp_max(1).to(counts)
    counts = torch.where(counts == 0, each, counts)
    return counts / counts.sum()


def _gram(layer: Layer, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Sum of x xᵀ over patches, float64 (groups, patch, patch), and how many patches it holds.

    Of an Embedding the diagonal, (1, vocabulary).
    """
    if layer.kind == "Embedding":
        return torch.bincount(x.flatten(), minlength=layer.patch).double()[None], x.numel()
    total = torch.zeros(layer.groups, layer.patch, layer.patch, dtype=torch.float64, device=x.device)
    rows = 0
    for part in columns(layer, module, x):
        total += outer(part, part)
        rows += part.shape[-1]
    return total, rows


def columns(layer: Layer, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What each output of a layer sees, (groups, patch, rows), a chunk at a time."""
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
    """a bᵀ summed over rows, (groups, p, rows) and (groups, q, rows) -> float64 (groups, p, q)."""
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (a, b))
    return (a @ b.mT).double()


def patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """The patches that each output of a convolution sees: (b, c, *size) -> (b, c * kernel, positions)."""
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


# --- how much the model feels each output ----------------------------------------------------------


def output_metrics(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], on_batch: Any = None
) -> dict[str, Tensor]:
    """Second moment of the model's response to each layer's output: H = E[g gᵀ], g = d(vᵀ z)/d(output).

    z are the model's outputs, v random directions (seeded), mean-free over classes as a softmax ignores the
    mean: a Gauss-Newton metric in output space (Martens 2020, section 6) that does not fade where the model
    is sure of itself, as the Fisher matrix does. Returns name -> float64 (groups, T, T), trace T; layers
    that no gradient reaches are left out.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def collect(layer: Layer, gradient: Tensor) -> None:
        axis = 1 - len(layer.own_shape)  # before those of the kernel
        channels = gradient.detach().movedim(axis, 0).reshape(layer.groups, layer.out_channels, -1)
        sums[layer.name] = sums.get(layer.name, 0) + outer(channels, channels)

    def watch(layer: Layer, output: Tensor) -> Tensor:
        if not output.requires_grad:  # a frozen model; the clone may be changed in place
            output = output.detach().requires_grad_().clone()
        # A hook on the tensor sees the gradient of this output even if a later layer changes it in place.
        output.register_hook(lambda gradient: collect(layer, gradient))
        return output

    handles = [
        model.get_submodule(layer.name).register_forward_hook(lambda m, a, out, layer=layer: watch(layer, out))
        for layer in layers
    ]
    kept = [(p, p.grad) for p in model.parameters()]
    try:
        with inference(model), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
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
        for handle in handles:
            handle.remove()
        for p, gradient in kept:
            p.grad = gradient
    return {name: _unit_trace(h) for name, h in sums.items() if torch.isfinite(h).all() and h.abs().max() > 0}


def _unit_trace(h: Tensor) -> Tensor:
    return h / h.diagonal(dim1=-2, dim2=-1).mean()


def calibrate(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Name -> S and name -> H; a layer that nothing reached is in neither."""
    total = 2 * len(batches)
    steps = iter(progress(range(total), "calibrating", total))
    s = moments(model, layers, batches, lambda: next(steps))
    h = output_metrics(model, layers, batches, lambda: next(steps))
    next(steps, None)
    return s, h


class Statistics(Mapping[str, tuple[Any, Any]]):
    """Name -> (input moment, output metric); read from the cache, or measured when the cache has none."""

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
        self.key, self.cache, self.progress = f"statistics-{key}", cache, progress
        self.tensors: dict[str, Any] = {}

    def load(self) -> None:
        """Have the statistics in memory."""
        self.tensors = self.tensors or self.cache.read_tensors(self.key) or self._measure()

    def _measure(self) -> dict[str, Any]:
        s, h = calibrate(self.model, self.layers, self.batches, self.progress)
        found = {f"moment.{n}": t.cpu() for n, t in s.items()} | {f"metric.{n}": t.cpu() for n, t in h.items()}
        self.cache.write_tensors(self.key, found)
        return found

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        self.load()
        return self.tensors.get(f"moment.{name}"), self.tensors.get(f"metric.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)
