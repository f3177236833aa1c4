"""Inputs as people have them: which parts of a batch are the forward's arguments, and how examples are cut out of it.

Batches are read into what `forward.run` takes: a tensor, a tuple of positional arguments or a dict of keyword
arguments. Where the first dimension is not that of the examples, `forward.Examples` or `forward.Undivided` say so.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from itertools import chain, filterfalse
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.core.files import available_memory, gigabytes
from rankopt.model.forward import (
    Examples,
    Undivided,
    batch_size,
    call_arguments,
    find_output,
    inference,
    input_tensors,
    map_batched,
    map_tensors,
    model_input,
    run,
    take,
    to_device,
)

CALIBRATION_EXAMPLES = 2048
"""The most examples that are taken from a task's calibration batches."""


UNDIVIDED = (
    "no single example can be cut out of the input (a graph, for example): the whole batch counts as one example, and "
    "MACs are counted of all of it"
)


Reading = Callable[[Signature, Any], Any]
"""The forward's arguments in a batch, for its signature; None if the batch cannot be read in this way."""


# --- calibration batches -------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """The inputs of a task's calibration batches, held in memory.

    Attributes:
        batches: Inputs, as `forward.run` takes them.
        unused: Columns of the batches that the forward does not take; they were dropped.
    """

    batches: list[Any]
    unused: tuple[str, ...] = ()


def check_batches(calibration: Any) -> None:
    """Check that an object is an iterable of batches.

    Args:
        calibration: What a task gives as calibration data.

    Raises:
        TaskError: It is a single tensor or mapping, or not iterable.
    """
    if isinstance(calibration, (Tensor, Mapping)) or not isinstance(calibration, Iterable):
        raise TaskError(f"calibration is a {type(calibration).__name__}: give batches, for example x.split(64)")


def read_calibration(model: nn.Module, calibration: Iterable[Any], limit: int) -> Calibration:
    """Read the inputs of the first examples of an iterable of batches.

    Args:
        model: The model that they are for; it is run on the first batch.
        calibration: Batches, as `Task.calibration`.
        limit: The most examples to take; the last batch is cut.

    Raises:
        TaskError: There is no example, `calibration` is not an iterable of batches, or the model does not run on it.
    """
    first, batches = peek(calibration)
    return Calibration(first_examples(map(reader(model, first), batches), limit), _unused(model, first))


def peek(calibration: Any) -> tuple[Any, Iterator[Any]]:
    """The first batch that holds an example, and an iterator over all that do, this one included.

    Args:
        calibration: Batches, as `Task.calibration`; they may come from a generator.

    Raises:
        TaskError: There is no example, or `calibration` is not an iterable of batches.
    """
    check_batches(calibration)
    batches = filterfalse(_is_empty, calibration)
    first = next(batches, None)
    if first is None:
        raise TaskError("the calibration set is empty: give at least one batch of inputs")
    return first, chain([first], batches)


def first_examples(inputs: Iterable[Any], limit: int) -> list[Any]:
    """Inputs with some of the examples only.

    Args:
        inputs: Inputs, as `forward.run` takes them.
        limit: The most examples to take; the last input is cut.
    """
    taken: list[Any] = []
    for x in inputs:
        taken.append(take(x, slice(limit)))
        limit -= batch_size(x)
        if limit <= 0:
            break
    return taken


def collect_batches(model: nn.Module, calibration: Iterable[Any], limit: int) -> list[Any]:
    """The batches of `read_calibration`.

    Args:
        model: As there.
        calibration: As there.
        limit: As there.
    """
    return read_calibration(model, calibration, limit).batches


def _is_empty(batch: Any) -> bool:
    tensors = input_tensors(batch)
    return bool(tensors) and tensors[0].ndim > 0 and len(tensors[0]) == 0


# --- reading a batch -----------------------------------------------------------------------------


def reader(model: nn.Module, batch: Any) -> Callable[[Any], Any]:
    """Find out how a model takes its batches, from the forward's signature and by running it.

    Args:
        model: The model.
        batch: The first batch: a tensor, mapping, tuple, list, named tuple or dataclass.

    Returns:
        A function from batches like this one to inputs as `forward.run` takes them.

    Raises:
        TaskError: The model does not run on the batch.
    """
    reading, first = _first_that_runs(model, batch, BATCHES, "a calibration batch")
    mark, taken = _marker(model, first), inspect.signature(model.forward)

    def read(other: Any) -> Any:
        x = reading(taken, other)
        if x is None:
            raise TaskError("a calibration batch is built in another way than the first one: give all in the same form")
        return mark(plain(x))

    return read


def first_example(model: nn.Module, batch: Any) -> Any:
    """The input of the first example of a calibration batch.

    Args:
        model: The model.
        batch: A batch, as in `Task.calibration`.
    """
    return take(reader(model, batch)(batch), slice(1))


def keywords(model: nn.Module, x: Any) -> Any:
    """A mapping's columns that the forward takes; other inputs as they are.

    Args:
        model: The model.
        x: An input.
    """
    return (_by_name(inspect.signature(model.forward), x) or x) if isinstance(x, Mapping) else x


def _by_name(taken: Signature, x: Any) -> Any:
    """A mapping's columns, or a record's fields, as the forward's arguments of these names."""
    return {k: v for k, v in (_columns(x) or {}).items() if _accepts(taken, k)} or None


def _itself(_: Signature, x: Any) -> Any:
    """A tensor, or a sequence of positional arguments."""
    return x if isinstance(x, (Tensor, tuple, list)) and not hasattr(x, "_fields") else None


def _as_one(_: Signature, x: Any) -> Any:
    """A list, mapping or record as the forward's only argument."""
    return None if isinstance(x, Tensor) else (x,)


def _leading(taken: Signature, batch: Any) -> Any:
    """As many items of a batch as the forward has arguments without a default."""
    needed = [p for p in taken.parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    enough = isinstance(batch, (tuple, list)) and 1 < len(needed) <= len(batch)
    return tuple(batch[: len(needed)]) if enough else None


def _of_first(reading: Reading) -> Reading:
    """Read the first item of a tuple or list, as a DataLoader gives (input, target)."""

    def read(taken: Signature, batch: Any) -> Any:
        return reading(taken, model_input(batch)) if isinstance(batch, (tuple, list)) else None

    return read


def _not_sequence(reading: Reading) -> Reading:
    return lambda taken, batch: None if isinstance(batch, (tuple, list)) else reading(taken, batch)


ARGUMENTS: tuple[Reading, ...] = (_by_name, _itself, _as_one)
"""How an input can be given, the likeliest way first."""


BATCHES: tuple[Reading, ...] = (
    _by_name,
    _not_sequence(_itself),
    *map(_of_first, (_by_name, _itself)),
    _leading,
    _of_first(_as_one),
    _as_one,
)
"""How an input can be given in a batch, the likeliest way first."""


def _first_that_runs(model: nn.Module, batch: Any, readings: Sequence[Reading], what: str) -> tuple[Reading, Any]:
    """The first way of reading that the model runs on, and what it reads; raises TaskError."""
    taken = inspect.signature(model.forward)
    found = [(r, plain(x)) for r in readings if (x := r(taken, batch)) is not None and _binds(taken, x)]
    if not found:
        raise TaskError(
            f"{what} ({type(batch).__name__}) does not fit the model's forward{taken}: give a tensor, a tuple of "
            "positional arguments, or a mapping of keyword arguments"
        )
    errors: list[Exception] = []
    for reading, x in found:
        batch_size(x)  # raises TaskError if there is no tensor
        try:
            _rows(model, x)
        except Exception as error:  # noqa: BLE001  # whatever the forward raises
            errors.append(error)
        else:
            return reading, x
    raise TaskError(f"the model does not run on {what}: {type(errors[0]).__name__}: {errors[0]}") from errors[0]


def _binds(taken: Signature, x: Any) -> bool:
    """Whether the forward takes these arguments."""
    args, kwargs = call_arguments(x)
    try:
        taken.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _columns(x: Any) -> Mapping[Any, Any] | None:
    """The columns of a mapping, or the fields of a named tuple or dataclass; None of anything else."""
    if isinstance(x, Mapping):
        return x
    if hasattr(x, "_asdict"):
        return dict(x._asdict())
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return None


def _accepts(taken: Signature, name: Any) -> bool:
    """Whether a forward has a keyword argument of this name."""
    kinds = {p.name: p.kind for p in taken.parameters.values()}
    named = kinds.get(name) in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return isinstance(name, str) and (named or Parameter.VAR_KEYWORD in kinds.values())


def _unused(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """The columns of a mapping that the forward does not take."""
    taken = inspect.signature(model.forward)
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    unused = tuple(str(k) for k in x if not _accepts(taken, k)) if isinstance(x, Mapping) else ()
    return unused if unused and len(unused) < len(x) else ()


def plain(x: Any) -> Any:
    """An input of ordinary tensors without gradients.

    Args:
        x: A nested input. Subclasses of Tensor lose their type, unless they hold their data in a way of their own
            (nested tensors); tensors made in inference mode, which no gradient can pass, are copied.
    """
    return map_tensors(x, _plain)


def _plain(t: Tensor) -> Tensor:
    if type(t) is not Tensor and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__:
        t = t.as_subclass(Tensor)
    with torch.inference_mode(mode=False):
        return t.clone() if t.is_inference() else t.detach()


# --- one example ---------------------------------------------------------------------------------


def one_example(model: nn.Module, example_input: Any) -> Any:
    """The first example of an input.

    Args:
        model: The model; it is run on the input and on the example, unless the input is a tensor with one row.
        example_input: A tensor, or a tuple or mapping of the forward's arguments.

    Returns:
        The example; all of the input, as `Undivided`, if the model does not run on one example cut out of it, or gives
        another number of rows than expected.

    Raises:
        TaskError: The model does not run on the input.
    """
    if isinstance(example_input, Undivided) or (isinstance(example_input, Tensor) and len(example_input) == 1):
        return plain(example_input)
    _, x = _first_that_runs(model, example_input, ARGUMENTS, "example_input")
    return take(_marker(model, x)(x), slice(1))


def _marker(model: nn.Module, x: Any) -> Callable[[Any], Any]:
    """What marks inputs like this one as to where their examples are; found by cutting one out and running it."""
    ways: list[Callable[[Any], Any]] = [_unmarked]
    if lists := [v for v in _values(x) if _is_list(v)]:
        ragged = any(len({t.shape[:1] for t in found}) > 1 for found in lists)
        ways.insert(0 if ragged or batch_size(x) == 1 else 1, _with_lists_of_examples)
    elif batch_size(x) == 1:
        return _unmarked
    rows = _rows(model, x)
    for mark in ways:
        marked = mark(x)
        try:
            of_one = _rows(model, take(marked, slice(1)))
        except Exception:  # noqa: BLE001  # whatever the forward raises
            continue
        if rows is None or of_one is None or of_one * batch_size(marked) == rows:
            return mark
    return Undivided


def _unmarked(x: Any) -> Any:
    return x


def _with_lists_of_examples(x: Any) -> Any:
    """The arguments that are lists of tensors, such as images of different sizes, marked as lists of examples."""
    args, kwargs = call_arguments(x)
    marked = {k: Examples(v) if _is_list(v) else v for k, v in kwargs.items()}
    return marked or tuple(Examples(v) if _is_list(v) else v for v in args)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(t, Tensor) for t in value)


def _values(x: Any) -> list[Any]:
    args, kwargs = call_arguments(x)
    return [*args, *kwargs.values()]


def _rows(model: nn.Module, x: Any) -> int | None:
    """The first dimension of the model's main output; None if it has none."""
    with inference(model):
        z = find_output(run(model, to_device(x, model)))
    return len(z) if z is not None and z.ndim else None


def expanded(example_input: Any, batch: int) -> Any:
    """Repeat the first example of an input.

    Args:
        example_input: An input with the batch dimension first.
        batch: How many examples the result has.

    Raises:
        TaskError: The input cannot be repeated, as it has no axis of examples, or takes more than a quarter of the
            memory that is free.
    """
    if isinstance(example_input, Undivided) and batch > 1:
        raise TaskError(f"{UNDIVIDED}; it cannot be timed with batch={batch}: say batch=1")

    tensors: list[Tensor] = []
    map_tensors(example_input, tensors.append)
    size, free = batch * sum(t[:1].nbytes for t in tensors if t.ndim), available_memory()
    if free is not None and size > free / 4:
        raise TaskError(
            f"batch={batch}: this input takes {gigabytes(size)}, {gigabytes(free)} are free; lower the batch"
        )

    def repeat(rows: Any) -> Any:
        if isinstance(rows, list):
            return type(rows)(rows[:1] * batch)
        return rows[:1].expand(batch, *rows.shape[1:]).contiguous()

    return map_batched(example_input, repeat)
