"""Running a model: its inputs, batches, hooks and main output, in eval mode without gradients."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rankopt.core.errors import TaskError

Where = TypeVar("Where", str, nn.Module)


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
    found = [tensor for _, tensor in _tensors_in(out, "")]
    return next((t for t in found if t.ndim), found[0] if found else None)  # a scalar is a loss


def outputs(out: Any) -> dict[str, Tensor]:
    """Every floating-point tensor that a model returned, the main output first.

    Args:
        out: What the model returned: a tensor, or tuples, lists, mappings and dataclasses of them.

    Returns:
        The place of each tensor, such as "logits" or "1.boxes" ("" for a plain tensor), and the tensor.
    """
    found = dict(_tensors_in(out, ""))
    main = find_output(out)
    return {k: v for k, v in found.items() if v is main} | found


def _tensors_in(out: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(out, Tensor):
        if out.is_floating_point() and out.numel():
            yield name, out
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(out, Mapping):
        parts = out.items()
    elif isinstance(out, (tuple, list)):
        parts = enumerate(out)
    elif dataclasses.is_dataclass(out):
        parts = ((f.name, getattr(out, f.name)) for f in dataclasses.fields(out))
    for key, value in parts:
        yield from _tensors_in(value, f"{name}.{key}" if name else str(key))


# --- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Undivided:
    """An input without an axis of examples, such as a graph: it counts as one example, and is never cut.

    Attributes:
        inputs: The input, as `run` takes it.
    """

    inputs: Any


class Examples(list[Any]):
    """An argument that is a list with one item per example, such as images of different sizes."""


def model_input(batch: Any) -> Any:
    """The model's input in a batch.

    Args:
        batch: The input itself (a tensor or mapping), or a tuple or list that begins with it, as a DataLoader gives.

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


def map_tensors(x: Any, function: Any, leaf: type | tuple[type, ...] = Tensor) -> Any:
    """Apply a function to every tensor of a nested input.

    Args:
        x: Tensors in tuples, named tuples, lists, mappings and dataclasses; other values stay.
        function: Tensor -> what replaces it.
        leaf: What else is given to the function as a whole.
    """

    def inside(value: Any) -> Any:
        return map_tensors(value, function, leaf)

    if isinstance(x, leaf):
        return function(x)
    if isinstance(x, Mapping):
        return _with_columns(x, {k: inside(v) for k, v in x.items()})
    if isinstance(x, (tuple, list)):
        mapped = [inside(v) for v in x]
        return type(x)(*mapped) if hasattr(x, "_fields") else type(x)(mapped)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: inside(getattr(x, f.name)) for f in dataclasses.fields(x) if f.init})
    return x


def input_tensors(x: Any) -> list[Tensor]:
    """The tensors of a nested input, in order.

    Args:
        x: As `map_tensors` takes it.
    """
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(x, keep)
    return found


def _with_columns(x: Mapping[Any, Any], columns: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the same class, where it can be: a tokenizer's encoding has attributes, too."""
    if type(x) is dict or not isinstance(x, MutableMapping):
        return columns
    new = copy.copy(x)
    new.update(columns)
    return new


def to_device(x: Any, model: nn.Module) -> Any:
    """Copy the tensors of an input to the model's device: a forward may write into them.

    Args:
        x: A nested input.
        model: The model that is to be run on it; on the CPU if it has no parameters.
    """
    device = device_of(model)
    return map_tensors(x, lambda t: t.to(device, copy=True))


def device_of(model: nn.Module) -> torch.device:
    """Find the device of a model's first parameter; the CPU for a model without parameters.

    Args:
        model: The model.
    """
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def move(model: nn.Module, device: str) -> None:
    """Move a model, in place.

    Args:
        model: The model.
        device: Where to, as torch names it.

    Raises:
        TaskError: There is no such device, or the model does not move.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise TaskError(f"unknown device {device!r}: cpu, cuda, or cuda:1 of several GPUs") from None
    gpus = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
        raise TaskError(f"device {device}: torch finds {gpus or 'no'} GPU(s) with CUDA on this machine")
    try:
        model.to(wanted)
    except Exception as error:  # whatever a model's own to() raises
        raise TaskError(f"the model cannot be moved to {device}: {error}") from error
    if (found := device_of(model)).type != wanted.type:
        raise TaskError(f"the model was moved to {device} and is on {found}: its own to() does not move it")


def device_name(device: torch.device) -> str:
    """Name a device for a report: a GPU by its number on the machine, whatever CUDA_VISIBLE_DEVICES hides.

    Args:
        device: The device.
    """
    if device.type != "cuda":
        return str(device)
    index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = visible[index] if index < len(visible) and visible[index] else index
    return f"cuda:{number} ({torch.cuda.get_device_name(device)})"


def batch_size(x: Any) -> int:
    """The number of examples of an input: the first dimension of its first tensor, unless it is marked otherwise.

    Args:
        x: A nested input.

    Raises:
        TaskError: The input holds no tensor, or is a PackedSequence.
    """
    _refuse_packed(x)
    sizes: list[int] = []
    map_tensors(x, lambda v: sizes.append(_length(v)), (Tensor, Examples))
    if not sizes:
        raise TaskError("the input holds no tensor: give a tensor, or a tuple or mapping with one")
    return 1 if isinstance(x, Undivided) else sizes[0]


def _length(value: Tensor | Examples) -> int:
    return 1 if isinstance(value, Tensor) and not value.ndim else len(value)


def map_batched(x: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to what has one row or item per example in an input.

    Args:
        x: A nested input. Tensors whose first dimension is not its batch size (a table, a scalar) stay; `Undivided`
            stays as it is.
        function: Tensor, or list of examples -> what replaces it.
    """
    if isinstance(x, Undivided):
        return x
    n = batch_size(x)

    def each(value: Tensor | Examples) -> Any:
        scalar = isinstance(value, Tensor) and not value.ndim
        return value if scalar or len(value) != n else function(value)

    return map_tensors(x, each, (Tensor, Examples))


def take(x: Any, part: slice | Tensor) -> Any:
    """A batch with some of its examples only.

    Args:
        x: A nested input. Tensors whose first dimension is not its batch size stay whole.
        part: Which examples: a slice, or their indices.
    """

    def some(rows: Any) -> Any:
        if isinstance(rows, Tensor):
            return rows[part]
        return type(rows)(rows[part] if isinstance(part, slice) else [rows[i] for i in part.tolist()])

    return map_batched(x, some)


def join(batches: Sequence[Any]) -> Any | None:
    """Several batches as one, in their order; None where they cannot be one.

    Batches can be one if all that they hold is tensors with a row for each example, of equal types and shapes but for
    the rows: not where texts are padded to the longest one of a batch.

    Args:
        batches: Nested inputs.
    """
    layouts = [_layout(x) for x in batches]
    if layouts[0] is None or any(layout != layouts[0] for layout in layouts):
        return None
    columns = iter([torch.cat(rows) for rows in zip(*map(input_tensors, batches), strict=True)])
    return map_tensors(batches[0], lambda _: next(columns))


def _layout(x: Any) -> Any | None:
    """The structure of a batch, with the type and shape of a row of each tensor; None where not all have examples."""
    if isinstance(x, Undivided):
        return None
    n, leaves = batch_size(x), list[Any]()

    def keep(value: Tensor | Examples) -> None:
        rows = isinstance(value, Tensor) and value.ndim and len(value) == n
        leaves.append((value.dtype, value.device, value.shape[1:]) if isinstance(value, Tensor) and rows else None)

    structure = map_tensors(x, keep, (Tensor, Examples))
    return None if None in leaves else (structure, leaves)


# --- running a model -----------------------------------------------------------------------------


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an input stands for.

    Args:
        x: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
    """
    if isinstance(x, Undivided):
        return call_arguments(x.inputs)
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x) if isinstance(x, (tuple, list)) else (x,)), {}


def run(model: nn.Module, x: Any) -> Any:
    """Call a model.

    Args:
        model: The model.
        x: An input, as `call_arguments` takes it.
    """
    args, kwargs = call_arguments(x)
    return model(*args, **kwargs)


ONE_THREAD = threading.RLock()
"""Held while rankopt runs, trains or copies a model: threads of a process take turns.

torch's random state, its choice of attention kernels and its hooks that count operations belong to the process, and a
module's mode and hooks to all who hold the module. A thread that changes them would change what the others compute.
"""


@contextmanager
def inference(model: nn.Module, fused: bool = False, reseed: bool = True) -> Iterator[None]:
    """Context: eval mode without gradients, and the same random numbers every time. Modes are restored.

    Other threads wait, see `ONE_THREAD`.

    Args:
        model: The model that is run.
        fused: Leave torch's fused attention path on. It is off by default, as it calls no submodules, so that hooks on
            an attention's layers would see nothing.
        reseed: False leaves the random numbers as they come, where the caller seeds them, or records a CUDA graph.
    """
    with ONE_THREAD:
        modes = {m: m.training for m in model.modules()}
        fast = torch.backends.mha.get_fastpath_enabled()
        model.eval()
        torch.backends.mha.set_fastpath_enabled(fast and fused)
        try:
            with torch.no_grad(), random_numbers() if reseed else nullcontext():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def random_numbers(seed: int = 0) -> Iterator[None]:
    """Context: torch's and Python's random numbers of a seed, so that a forward that draws some repeats itself.

    Args:
        seed: Another seed gives other numbers. The state before is restored.
    """
    with ONE_THREAD:
        state = random.getstate()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            # Without a GPU, torch.manual_seed would keep a note of each call for the time when there is one.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            random.seed(seed)
            try:
                yield
            finally:
                random.setstate(state)


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
