"""Export to ONNX, torch.export and safetensors; every file is loaded again and compared with the model.

ONNX is written from torch.export's graph (dynamo=True), which takes 0.6 to 1.7 s for small models. The older exporter
(dynamo=False) takes 0.01 to 0.08 s, but does not support aten::mT, which cores of Linear layers and generated weights
need, and fixes the batch size of stages with shared kernels (tucker).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from rankopt.core.errors import RankoptError
from rankopt.core.files import write_beside
from rankopt.core.records import Task
from rankopt.decompositions.plan import multiplied_out
from rankopt.export.fuse import fuse
from rankopt.export.onnx_session import check_exporter, open_session, quiet_exporter
from rankopt.model.forward import batch_size, call_arguments, hooked, inference, map_tensors, run, take
from rankopt.model.inputs import collect_batches, one_example
from rankopt.model.recurrent import Recurrent
from rankopt.model.speed import ForwardTimes, Program, batch_times, forward_times

SUFFIXES = {"onnx": ".onnx", "torch.export": ".pt2", "state_dict": ".safetensors"}
"""Formats and the suffixes of their files."""

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the output's largest value."""

EXAMPLES = 8
"""Examples that are compared, and traced if the batch is dynamic."""


@dataclass(frozen=True)
class Parity:
    """Difference of outputs from the PyTorch model's.

    Attributes:
        absolute: The largest absolute difference.
        relative: The largest difference relative to the output's largest value.
        examples: Number of examples compared.
    """

    absolute: float
    relative: float
    examples: int


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: The file.
        parity: Difference of its outputs from the model's.
        forward: The program loaded from the file.
        programs: What was timed: the dense and the compressed model, and the file.
        times: Their times, in this order; one entry for each batch.
    """

    path: Path
    parity: Parity
    forward: Program
    programs: tuple[str, ...] = ()
    times: tuple[ForwardTimes, ...] = ()


def check_request(to: str, fuse: bool, batch: str, dense: bool) -> int | str:
    """Check the options of an export.

    Args:
        to: Format, a key of SUFFIXES.
        fuse: Whether to fuse layers; for programs only.
        batch: A number, or "dynamic".
        dense: Whether to multiply factors out; for weights only.

    Returns:
        The batch size, or "dynamic".

    Raises:
        RankoptError: If an option is invalid or does not go with another.
    """
    if to not in SUFFIXES:
        raise RankoptError(f"unknown format {to!r}: choose from {', '.join(SUFFIXES)}")
    if to == "state_dict" and fuse:
        raise RankoptError("--fuse goes with onnx and torch.export: rankopt.load could not read such weights")
    if dense and to != "state_dict":
        raise RankoptError("--dense goes with --to state_dict; for programs --fuse multiplies out where that pays")
    if batch != "dynamic" and (not batch.isdecimal() or int(batch) < 1):
        raise RankoptError(f"--batch is {batch!r}: give a number from 1, or dynamic")
    return batch if batch == "dynamic" else int(batch)


def export_run(
    task: Task, small: nn.Module, to: str, path: Path, fused: bool, batch: int | str, multiply: bool
) -> Exported:
    """Export a task's compressed model, check it on the task's calibration inputs, and time it if it is a program.

    Args:
        task: The task with the dense model.
        small: The compressed model.
        to: Format, a key of SUFFIXES.
        path: File to write.
        fused: Whether to write what `fuse` makes of the model.
        batch: Batch size, or "dynamic".
        multiply: Whether to multiply factors out ("state_dict" only).

    Raises:
        RankoptError: As `export` and `export_weights`.
    """
    inputs = collect_batches(task.model, task.calibration, EXAMPLES if batch == "dynamic" else int(batch))[0]
    if to == "state_dict":
        return export_weights(task.model, small, path, inputs, multiply)
    made = export(small, to, path, inputs, batch, fused)
    models = [copy.deepcopy(model).cpu() for model in (task.model, small)]
    runs = f"{'onnxruntime' if to == 'onnx' else to}{', fused' if fused else ''}"
    if batch == "dynamic":
        times = forward_times(models, first_examples(inputs, 1), [made.forward], seconds=1.0)
    else:
        times = [batch_times(models, first_examples(inputs, int(batch)), int(batch), [made.forward], seconds=1.0)]
    return dataclasses.replace(made, programs=("PyTorch, dense", "PyTorch, compressed", runs), times=tuple(times))


def export(
    model: nn.Module, to: str, path: str | Path, inputs: Any, batch: int | str = "dynamic", fused: bool = False
) -> Exported:
    """Write a model as a program, load the file and compare its outputs with the model's.

    Args:
        model: Model to export; it is not changed.
        to: "onnx" or "torch.export".
        path: File to write.
        inputs: A batch as the model takes it; its first 8 examples are traced and compared.
        batch: Batch size of the program, or "dynamic": any size, along the first dimension of every tensor whose
            first dimension is the batch's.
        fused: Whether to write what `fuse` makes of the model.

    Raises:
        RankoptError: If the model cannot be traced, or an output differs by more than 1e-4 relative to its largest
            value. No file is left then.
    """
    small = copy.deepcopy(model).eval().cpu().requires_grad_(requires_grad=False)
    dynamic = batch == "dynamic"
    x = first_examples(inputs, EXAMPLES if dynamic else int(batch))
    if not dynamic and batch_size(x) < int(batch):
        raise RankoptError(f"a calibration batch holds {batch_size(x)} examples, too few to check batches of {batch}")
    write = {"onnx": _write_onnx, "torch.export": _write_program}[to]
    written = fuse(small, x) if fused else small
    with inference(small), inference(written), quiet_exporter(FutureWarning):
        program = _trace(written, x, dynamic)
        cases = [x, one_example(small, x)] if dynamic else [x]
        return _checked(Path(path), lambda p: write(program, p), LOADERS[to], lambda y: run(small, y), cases)


def export_weights(dense: nn.Module, small: nn.Module, path: str | Path, inputs: Any, multiply: bool) -> Exported:
    """Write a compressed model's weights as safetensors, load and compare them.

    Args:
        dense: The model before compression.
        small: The compressed model.
        path: File to write.
        inputs: A batch as the model takes it; its first 8 examples are compared.
        multiply: Whether to multiply the factors out, so that the file fits the dense model.

    Raises:
        RankoptError: As `export`.
    """
    dense, small = (copy.deepcopy(m).eval().cpu() for m in (dense, small))
    written = multiplied_out(dense, small) if multiply else small

    def load(path: Path) -> Program:
        again = copy.deepcopy(dense if multiply else small)
        load_model(again, path)
        return lambda y: run(again.eval(), y)

    x = first_examples(inputs, EXAMPLES)
    with inference(small), inference(dense):
        return _checked(Path(path), lambda p: save_model(written, str(p)), load, lambda y: run(small, y), [x])


def first_examples(inputs: Any, n: int) -> Any:
    """The first n examples of a batch, on the CPU.

    Args:
        inputs: A batch as a model takes it.
        n: Number of examples; all if the batch has fewer.

    Returns:
        Copies, so that programs do not keep the whole batch alive.
    """
    return map_tensors(take(inputs, slice(n)), lambda t: t.cpu().clone())


# --- writing and reading -----------------------------------------------------------------------------


def _trace(model: nn.Module, x: Any, dynamic: bool) -> torch.export.ExportedProgram:
    """Trace a model; raises RankoptError if it cannot be traced."""
    n = batch_size(x)
    if dynamic and n < 2:
        raise RankoptError("one example cannot show which dimension is the batch: give --batch 1, or larger batches")
    args, kwargs = call_arguments(x)

    def sizes(value: Any) -> dict[int, Any] | None:
        """The dynamic dimensions of an input."""
        if not isinstance(value, Tensor):
            return None
        return {0: torch.export.Dim.DYNAMIC} if dynamic and value.ndim and len(value) == n else {}

    shapes = tree_map(sizes, dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))
    if packed := _given_packed_sequences(model, x):
        raise RankoptError(
            f"{packed} is given packed sequences, whose lengths no graph can hold: export a model that pads instead"
        )
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        hint = "; a fixed size may do: --batch 1" if dynamic else ""
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RankoptError(f"torch.export cannot trace the model ({reason}){hint}") from error


def _given_packed_sequences(model: nn.Module, x: Any) -> str:
    """The name of the first recurrent module called with a PackedSequence; empty if there is none."""
    found: list[str] = []

    def look(name: str, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], PackedSequence):
            found.append(name)

    recurrent = [n for n, m in model.named_modules() if isinstance(m, (nn.RNNBase, Recurrent))]
    with hooked(model, recurrent, on_input=look):
        run(model, x)
    return found[0] if found else ""


def _write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    check_exporter()
    try:
        written = torch.onnx.export(program, dynamo=True, verbose=False)
        assert written is not None
        written.save(path, external_data=False)
    except OSError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RankoptError(f"the traced model cannot become ONNX ({reason})") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message.

    Args:
        error: The error.
    """
    return str(error).strip().split("\n")[0]


def _load_program(path: Path) -> Program:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda x: run(module, x)


def load_onnx(path: Path) -> Program:
    """Load an ONNX file into onnxruntime, on one thread of the CPU.

    Args:
        path: The file.

    Returns:
        A function from a model's input to the list of its output tensors.

    Raises:
        RankoptError: If onnxruntime is not installed.
    """
    session = open_session(path)
    names = [i.name for i in session.get_inputs()]

    def forward(x: Any) -> list[Tensor]:
        args, kwargs = call_arguments(x)
        by_name = bool(names) and set(names) <= kwargs.keys()
        leaves = tree_leaves((args, kwargs))
        tensors = [kwargs[name] for name in names] if by_name else [t for t in leaves if isinstance(t, Tensor)]
        outputs = session.run(None, {k: t.numpy() for k, t in zip(names, tensors, strict=True)})
        return [torch.as_tensor(out) for out in outputs]

    return forward


LOADERS: dict[str, Callable[[Path], Program]] = {"onnx": load_onnx, "torch.export": _load_program}
"""Loaders of programs by format."""


# --- checking ----------------------------------------------------------------------------------------


def _checked(
    path: Path, write: Callable[[Path], None], load: Callable[[Path], Program], model: Program, cases: Sequence[Any]
) -> Exported:
    """Write a file, load and compare it; it is moved to `path` only if its outputs are the model's."""
    found: list[tuple[Program, Parity]] = []

    def write_and_check(beside: Path) -> None:
        write(beside)
        try:
            forward = load(beside)
            outputs = [forward(x) for x in cases]
        except Exception as error:
            raise RankoptError(
                f"what was written does not run ({type(error).__name__}: {first_line(error)})"
            ) from error
        parities = [compare(out, model(x), batch_size(x)) for out, x in zip(outputs, cases, strict=True)]
        worst = max(parities, key=lambda p: p.relative)
        if not worst.relative <= TOLERANCE:
            raise RankoptError(
                f"the exported model's outputs differ from the model's by {worst.absolute:.2g} ({worst.relative:.2g} "
                f"of the largest, {TOLERANCE:g} is allowed): {path} was not written"
            )
        found.append((forward, Parity(worst.absolute, worst.relative, max(p.examples for p in parities))))

    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, write_and_check)
    forward, parity = found[0]
    return Exported(path, parity, forward)


def compare(outputs: Any, expected: Any, examples: int) -> Parity:
    """Compare all tensors of two outputs.

    Args:
        outputs: Any nesting of tensors.
        expected: The outputs to compare with.
        examples: Number of examples, for the record.

    Returns:
        The differences; infinite where the number or shapes of the tensors, or their infinities, differ.
    """
    pairs = [[t for t in tree_leaves(out) if isinstance(t, Tensor)] for out in (outputs, expected)]
    worst = Parity(0.0, 0.0, examples)
    if len(pairs[0]) != len(pairs[1]) or any(a.shape != b.shape for a, b in zip(*pairs, strict=True)):
        return Parity(torch.inf, torch.inf, examples)
    for output, reference in zip(*pairs, strict=True):
        a, b = output.double().flatten(), reference.double().flatten()
        same = (a == b) | (a.isnan() & b.isnan())
        absolute = (a - b)[~same].abs().nan_to_num(torch.inf, torch.inf).max().item() if not same.all() else 0.0
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        relative = absolute / largest if largest else absolute and torch.inf
        worst = Parity(max(worst.absolute, absolute), max(worst.relative, relative), examples)
    return worst
