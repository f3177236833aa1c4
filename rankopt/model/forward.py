"""Running a model: its inputs, batches and main output, in eval mode without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rankopt.core.errors import TaskError


def class_axis(z: Tensor) -> int | None:
    """Where classes lie in an output: (b, classes, *space) as in torch's losses, but (b, tokens, classes)."""
    if z.ndim < 2:
        return None
    axis = 2 if z.ndim == 3 else 1
    return axis if z.shape[axis] > 1 else None


def main_output(out: Any) -> Tensor:
    """The tensor of a model's output: itself, .logits, or the first in a tuple, list or dict. Else TaskError."""
    found = find_output(out)
    if found is None:
        raise TaskError(
            f"the model returns {type(out).__name__}, where rankopt reads a tensor, .logits, or the first of a tuple, "
            "list or dict: return one of these, or give the task an objective of its own"
        )
    return found


def find_output(out: Any) -> Tensor | None:
    """As main_output; None if there is no such tensor."""
    if isinstance(out, Tensor):
        return out
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits
    values = list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, (tuple, list)) else []
    return find_output(values[0]) if values else None


# --- running a model -----------------------------------------------------------------------------


def model_input(batch: Any) -> Any:
    """The input in a batch: a tensor or dict as it is, the first item of a tuple or list."""
    _refuse_packed(batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise TaskError("a calibration batch is an empty tuple: give (input, ...) or a tensor")
        return batch[0]
    return batch


def _refuse_packed(x: Any) -> None:
    """A tuple whose first dimension is not the batch."""
    if isinstance(x, PackedSequence):
        raise TaskError("an input is a PackedSequence: give the padded tensor and the lengths, and pack in the forward")


def run(model: nn.Module, x: Any) -> Any:
    """Call the model with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def to_device(x: Any, model: nn.Module) -> Any:
    """Move the tensors of an input to the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return map_tensors(x, lambda t: t.to(device))


def map_tensors(x: Any, function: Any) -> Any:
    """Apply a function to every tensor of a nested input."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {k: map_tensors(v, function) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        mapped = [map_tensors(v, function) for v in x]
        return type(x)(*mapped) if hasattr(x, "_fields") else type(x)(mapped)
    return x


def batch_size(x: Any) -> int:
    """The first dimension of the first tensor of an input."""
    _refuse_packed(x)
    sizes: list[int] = []
    map_tensors(x, lambda t: sizes.append(len(t) if t.ndim else 1))
    if not sizes:
        raise TaskError("the input holds no tensor: give a tensor, or a tuple or dict with one")
    return sizes[0]


def one_example(x: Any) -> Any:
    """The first example of a batched input: every tensor with the batch's first dimension is cut to 1."""
    n = batch_size(x)
    return map_tensors(x, lambda t: t[:1] if t.ndim and len(t) == n else t)


@contextmanager
def inference(model: nn.Module, fused: bool = False) -> Iterator[None]:
    """Eval mode without gradients; without attention's fused path, which hides its layers, unless asked for."""
    modes = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(fast and fused)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


CALIBRATION_EXAMPLES = 2048  # at most so many are taken from a task's calibration batches


def check_batches(calibration: Any) -> None:
    """Raise TaskError for what is no iterable of batches."""
    if isinstance(calibration, torch.Tensor) or not isinstance(calibration, Iterable):
        raise TaskError(f"calibration is a {type(calibration).__name__}: give batches, for example x.split(64)")


def collect_batches(calibration: Iterable[Any], limit: int) -> list[Any]:
    """The first `limit` examples of an iterable of batches, held in memory. Raises TaskError if there is none."""
    check_batches(calibration)
    batches: list[Any] = []
    examples = 0
    for batch in calibration:
        x = model_input(batch)
        n = batch_size(x)
        if n == 0:
            continue
        if examples + n > limit:
            keep = limit - examples
            x = map_tensors(x, lambda t, n=n, keep=keep: t[:keep] if t.ndim and len(t) == n else t)
        batches.append(x)
        examples += min(n, limit - examples)
        if examples >= limit:
            break
    if not batches:
        raise TaskError("the calibration set is empty: give at least one batch of inputs")
    return batches
