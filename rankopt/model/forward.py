"""Running a model: its inputs, batches, hooks and main output, in eval mode without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rankopt.core.errors import TaskError

Where = TypeVar("Where", str, nn.Module)


CALIBRATION_EXAMPLES = 2048
"""The most examples that are taken from a task's calibration batches."""


# --- outputs -------------------------------------------------------------------------------------


def class_axis(z: Tensor) -> int | None:
    """The dimension of an output that holds the classes.

    Args:
        z: The model's output: (batch, classes, *space), as torch's losses take it, or (batch, tokens, classes).

    Returns:
        The dimension; None if the output has fewer than two dimensions or a single class.
    """
    if z.ndim < 2:
        return None
    axis = 2 if z.ndim == 3 else 1
    return axis if z.shape[axis] > 1 else None


def main_output(out: Any) -> Tensor:
    """The tensor in a model's output that objectives and losses read.

    Args:
        out: A tensor, an object with `.logits`, or a tuple, list or dict whose first entry is one of these.

    Raises:
        TaskError: The output holds no such tensor.
    """
    found = find_output(out)
    if found is None:
        raise TaskError(
            f"the model returns {type(out).__name__}, where rankopt reads a tensor, .logits, or the first of a tuple, "
            "list or dict: return one of these, or give the task an objective of its own"
        )
    return found


def find_output(out: Any) -> Tensor | None:
    """Like `main_output`, but None if there is no such tensor.

    Args:
        out: What a module returned.
    """
    if isinstance(out, Tensor):
        return out
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits
    values = list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, (tuple, list)) else []
    return find_output(values[0]) if values else None


# --- inputs --------------------------------------------------------------------------------------


def model_input(batch: Any) -> Any:
    """The model's input in a batch.

    Args:
        batch: The input itself (a tensor or dict), or a tuple or list that begins with it, as a DataLoader gives.

    Raises:
        TaskError: The batch is an empty tuple or a PackedSequence.
    """
    _refuse_packed(batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise TaskError("a calibration batch is an empty tuple: give (input, ...) or a tensor")
        return batch[0]
    return batch


def _refuse_packed(x: Any) -> None:
    """A PackedSequence is a tuple, but its first dimension is not the batch."""
    if isinstance(x, PackedSequence):
        raise TaskError("an input is a PackedSequence: give the padded tensor and the lengths, and pack in the forward")


def map_tensors(x: Any, function: Any) -> Any:
    """Apply a function to every tensor of a nested input.

    Args:
        x: Tensors in tuples, named tuples, lists and dicts; other values stay.
        function: Tensor -> what replaces it.
    """
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {k: map_tensors(v, function) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        mapped = [map_tensors(v, function) for v in x]
        return type(x)(*mapped) if hasattr(x, "_fields") else type(x)(mapped)
    return x


def to_device(x: Any, model: nn.Module) -> Any:
    """Move the tensors of an input to the model's device.

    Args:
        x: A nested input.
        model: The model that is to be run on it; on the CPU if it has no parameters.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return map_tensors(x, lambda t: t.to(device))


def batch_size(x: Any) -> int:
    """The first dimension of the first tensor of an input.

    Args:
        x: A nested input.

    Raises:
        TaskError: The input holds no tensor, or is a PackedSequence.
    """
    _refuse_packed(x)
    sizes: list[int] = []
    map_tensors(x, lambda t: sizes.append(len(t) if t.ndim else 1))
    if not sizes:
        raise TaskError("the input holds no tensor: give a tensor, or a tuple or dict with one")
    return sizes[0]


def map_batched(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to those tensors of a batch that have one row per example.

    Args:
        x: A nested input. Tensors whose first dimension is not its batch size (a table, a scalar) stay.
        function: Tensor -> what replaces it.
    """
    n = batch_size(x)
    return map_tensors(x, lambda t: function(t) if t.ndim and len(t) == n else t)


def take(x: Any, part: slice) -> Any:
    """A batch with some of its examples only.

    Args:
        x: A nested input. Tensors whose first dimension is not its batch size stay whole.
        part: Which examples.
    """
    return map_batched(x, lambda t: t[part])


def one_example(x: Any) -> Any:
    """A batch of the first example only.

    Args:
        x: A nested input.
    """
    return take(x, slice(1))


def check_batches(calibration: Any) -> None:
    """Check that an object is an iterable of batches.

    Args:
        calibration: What a task gives as calibration data.

    Raises:
        TaskError: It is a single tensor, or not iterable.
    """
    if isinstance(calibration, torch.Tensor) or not isinstance(calibration, Iterable):
        raise TaskError(f"calibration is a {type(calibration).__name__}: give batches, for example x.split(64)")


def collect_batches(calibration: Iterable[Any], limit: int) -> list[Any]:
    """The inputs of the first examples of an iterable of batches, held in memory.

    Args:
        calibration: Batches, as `Task.calibration`.
        limit: The most examples to take; the last batch is cut.

    Raises:
        TaskError: There is no example, or `calibration` is not an iterable of batches.
    """
    check_batches(calibration)
    batches: list[Any] = []
    examples = 0
    for batch in calibration:
        x = model_input(batch)
        n = batch_size(x)
        if n == 0:
            continue
        if examples + n > limit:
            x = take(x, slice(limit - examples))
        batches.append(x)
        examples += min(n, limit - examples)
        if examples >= limit:
            break
    if not batches:
        raise TaskError("the calibration set is empty: give at least one batch of inputs")
    return batches


# --- running a model -----------------------------------------------------------------------------


def run(model: nn.Module, x: Any) -> Any:
    """Call a model.

    Args:
        model: The model.
        x: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
    """
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


@contextmanager
def inference(model: nn.Module, fused: bool = False) -> Iterator[None]:
    """Context: eval mode without gradients. Every module's mode is restored.

    Args:
        model: The model that is run.
        fused: Leave torch's fused attention path on. It is off by default, as it calls no submodules, so that hooks on
            an attention's layers would see nothing.
    """
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


@contextmanager
def hooked(
    model: nn.Module,
    where: Iterable[Where],
    on_input: Callable[[Where, tuple[Any, ...]], Any] | None = None,
    on_output: Callable[[Where, tuple[Any, ...], dict[str, Any], Any], Any] | None = None,
    outermost: bool = False,
) -> Iterator[None]:
    """Context: hooks on modules of a model, removed at the end also when an error is raised.

    Args:
        model: The model.
        where: The modules to hook, or their names; each hook gets the module or name that was given here.
        on_input: Called before a module's forward with (module or name, positional arguments); what it returns, unless
            None, replaces the arguments.
        on_output: Called after a module's forward with (module or name, positional arguments, keyword arguments,
            output); what it returns, unless None, replaces the output.
        outermost: Call `on_input` before the module's other hooks, and `on_output` also if its forward raises.
    """

    def before(place: Where, hook: Callable[[Where, tuple[Any, ...]], Any]) -> Callable[..., Any]:
        return lambda _, args: hook(place, args)

    def after(place: Where, hook: Callable[[Where, tuple[Any, ...], dict[str, Any], Any], Any]) -> Callable[..., Any]:
        return lambda _, args, kwargs, out: hook(place, args, kwargs, out)

    with ExitStack() as handles:
        for place in where:
            module = model.get_submodule(place) if isinstance(place, str) else place
            if on_input:
                handles.enter_context(module.register_forward_pre_hook(before(place, on_input), prepend=outermost))
            if on_output:
                handles.enter_context(
                    module.register_forward_hook(after(place, on_output), with_kwargs=True, always_call=outermost)
                )
        yield
