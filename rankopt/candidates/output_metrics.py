"""Output metrics: H = E[g gᵀ], which says how strongly the model's outputs respond to each output of a layer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.candidates.input_moments import add_gram, shrunk
from rankopt.candidates.probing import examples_are_apart
from rankopt.core.errors import TaskError
from rankopt.core.records import Layer
from rankopt.model.forward import batch_size, class_axis, hooked, inference, map_tensors, outputs, run, take, to_device
from rankopt.model.objective import Divergence

log = logging.getLogger(__name__)

SAVED_BYTES = 2**30
"""The most bytes that a forward saves for its backward, unless a single example takes more."""


def output_metrics(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], on_batch: Any = None
) -> dict[str, Tensor]:
    """Measure the output metric of each layer, H = E[g gᵀ] with g = d(vᵀ z)/d(output).

    z are all floating-point outputs of the model, and v seeded random directions, mean-free over classes, as a softmax
    ignores the mean.
    This is a Gauss-Newton metric in output space (Martens 2020, section 6). Unlike the Fisher matrix it does not
    vanish where the model is confident.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        on_batch: Called after every batch.

    Returns:
        By layer name, H as `shrunk` leaves it, float64 (groups, T, T) with trace T. Layers that no gradient reached are
        missing.

    Raises:
        TaskError: A backward takes more memory than a GPU has.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = defaultdict(int)
    generator = torch.Generator().manual_seed(0)

    def collect(layer: Layer, gradient: Tensor) -> None:
        axis = 1 - len(layer.own_shape)  # before those of the kernel
        channels = gradient.detach().movedim(axis, 0).reshape(layer.groups, layer.out_channels, -1)
        if layer.name not in sums:
            sums[layer.name] = channels.new_zeros(layer.groups, *2 * (layer.out_channels,), dtype=torch.float64)
        add_gram(sums[layer.name], channels)
        rows[layer.name] += channels.shape[-1]

    def watch(name: str, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a part of the forward under no_grad: no gradient reaches it
            return output
        if not output.requires_grad:  # a frozen model; the clone may be changed in place
            output = output.detach().requires_grad_().clone()
        # A hook on the tensor sees the gradient of this output even if a later layer changes it in place.
        output.register_hook(lambda gradient: None if gradient is None else collect(by_name[name], gradient))
        return output

    by_name = {layer.name: layer for layer in layers}
    try:
        pieces = _Pieces(model, batches)
        with (
            _parameters_apart(model, by_name),
            inference(model),
            hooked(model, by_name, on_output=watch),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False),
        ):
            for batch in batches:
                for piece in pieces(batch):
                    x = map_tensors(to_device(piece, model), _with_gradient)
                    directions = _directions(outputs(run(model, x)), generator)
                    if directions is not None:
                        directions.backward()
                if on_batch:
                    on_batch()
    except torch.OutOfMemoryError as error:
        raise TaskError(
            f"a backward takes more than the GPU's memory: give smaller calibration batches ({error})"
        ) from error
    except RuntimeError as error:  # a forward that takes gradients itself, or only runs without them
        log.warning("no gradients of the model's outputs can be taken (%s: %s)", type(error).__name__, error)
        sums.clear()
    used = [name for name, h in sums.items() if torch.isfinite(h).all() and h.abs().max() > 0]
    return {name: _unit_trace(shrunk(sums.pop(name) / rows[name], rows[name])) for name in used}


class _Pieces:
    """Cuts batches so that what a backward needs of a forward takes up to `SAVED_BYTES`, if that changes no gradient.

    Args:
        model: The model.
        batches: The batches.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.most = max(map(batch_size, batches), default=1)
        if self.most > 1 and (saved := _saved_bytes(model, take(batches[0], slice(1)))) * self.most > SAVED_BYTES:
            with suppress(TaskError):  # outputs that the default objective refuses
                if examples_are_apart(Divergence(model, batches[:1]), model):
                    self.most = max(1, SAVED_BYTES // saved)

    def __call__(self, batch: Any) -> Iterator[Any]:
        n = batch_size(batch)
        yield from [batch] if n <= self.most else (take(batch, slice(i, i + self.most)) for i in range(0, n, self.most))


def _saved_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes of the tensors that a forward saves for its backward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (place := t.untyped_storage().data_ptr()) not in own:
            found[place] = t.untyped_storage().nbytes()
        return t

    try:
        with inference(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = run(model, map_tensors(to_device(batch, model), _with_gradient))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it will be met again, and said
        return 0
    del kept
    return sum(found.values())


@contextmanager
def _parameters_apart(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Context: layers' weights take no gradient, which would be a third of the backward; others' are thrown away."""
    gradients = [(p, p.grad) for p in model.parameters() if p.is_leaf]
    weights = [p for p in (model.get_submodule(name).weight for name in layers) if p.is_leaf and p.requires_grad]
    try:
        for p in weights:
            p.requires_grad = False
        for p, _ in gradients:
            p.grad = None
        yield
    finally:
        for p in weights:
            p.requires_grad = True
        for p, gradient in gradients:
            p.grad = gradient


def _with_gradient(t: Tensor) -> Tensor:
    """A floating-point input that takes a gradient: reentrant checkpoints record nothing without one."""
    return t.detach().requires_grad_().clone() if t.is_floating_point() else t


def _directions(found: Mapping[str, Tensor], generator: torch.Generator) -> Tensor | None:
    """vᵀ z, over all outputs with a gradient; of several, each relative to its own size. None without one."""
    parts = []
    for z in found.values():
        if not z.requires_grad:
            continue
        v = torch.randn(z.shape, generator=generator).to(z)
        if (axis := class_axis(z)) is not None:
            v = v - v.mean(axis, keepdim=True)
        size = z.detach().float().std(correction=0).item() if len(found) > 1 else 1.0
        if size > 0:
            parts.append((z * v).sum() / size)
    return torch.stack(parts).sum() if parts else None


def _unit_trace(h: Tensor) -> Tensor:
    return h.div_(h.diagonal(dim1=-2, dim2=-1).mean())
