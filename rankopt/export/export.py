"""How far two outputs of a model are apart.

Leaving rankopt and PyTorch: ONNX, torch.export and plain weights, each file checked against the model.

ONNX is made from torch.export's graph (dynamo=True), for small models of every family in 0.6 to 1.7 s. The exporter
before it (dynamo=False) takes 0.01 to 0.08 s, but knows no aten::mT, which Linears made of cores and generated weights
need, and fixes the batch in shared filters (tucker).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from rankopt.core.timing import medians
from rankopt.decompositions.plan import multiplied_out
from rankopt.export.fuse import fuse
from rankopt.model.forward import batch_size, collect_batches, inference, map_tensors, one_example, run
from rankopt.model.recurrent import Recurrent


@dataclass(frozen=True)
class Parity:
    """The largest difference of outputs from the PyTorch model's, and the same over each output's largest value."""

    absolute: float
    relative: float
    examples: int


def compare(outputs: Any, expected: Any, examples: int) -> Parity:
    """The differences of all tensors of two outputs; infinite where their number, shapes or infinities differ."""
    pairs = [[t for t in tree_leaves(out) if isinstance(t, Tensor)] for out in (outputs, expected)]
    worst = Parity(0.0, 0.0, examples)
    if len(pairs[0]) != len(pairs[1]) or any(a.shape != b.shape for a, b in zip(*pairs, strict=True)):
        return Parity(torch.inf, torch.inf, examples)
    for a, b in zip(*pairs, strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        same = (a == b) | (a.isnan() & b.isnan())
        absolute = (a - b)[~same].abs().nan_to_num(torch.inf, torch.inf).max().item() if not same.all() else 0.0
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        relative = absolute / largest if largest else absolute and torch.inf
        worst = Parity(max(worst.absolute, absolute), max(worst.relative, relative), examples)
    return worst


SUFFIXES = {"onnx": ".onnx", "torch.export": ".pt2", "state_dict": ".safetensors"}


TOLERANCE = 1e-4


EXAMPLES = 8  # are compared, and traced where the batch is dynamic


Forward = Callable[[Any], Any]
"""An exported program: a model's input -> its outputs."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and found to compute what the model does. forward: what was loaded from it.

    milliseconds: of a forward pass of `batch` examples, by what runs it; one thread, medians of calls in turn.
    """

    path: Path
    parity: Parity
    forward: Forward
    milliseconds: dict[str, float] = field(default_factory=dict)
    batch: int = 1


def check_request(to: str, fuse: bool, batch: str, dense: bool) -> int | str:
    """The batch size asked for, or "dynamic". Raises RankoptError for what does not go together."""
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
    """Export a task's compressed model, checked on the task's calibration inputs; programs are timed, too."""
    inputs = collect_batches(task.calibration, EXAMPLES if batch == "dynamic" else int(batch))[0]
    if to == "state_dict":
        return export_weights(task.model, small, path, inputs, multiply)
    made = export(small, to, path, inputs, batch, fused)
    x = first_examples(inputs, 1 if batch == "dynamic" else int(batch))
    spent = latencies([task.model, small], made.forward, x)
    runs = f"{'onnxruntime' if to == 'onnx' else to}{', fused' if fused else ''}"
    names = ("PyTorch, dense", "PyTorch, compressed", runs)
    return dataclasses.replace(made, milliseconds=dict(zip(names, spent, strict=True)), batch=batch_size(x))


def export(
    model: nn.Module, to: str, path: str | Path, inputs: Any, batch: int | str = "dynamic", fused: bool = False
) -> Exported:
    """Write a model as "onnx" or "torch.export", load the file and compare it with the model on real inputs.

    inputs: a batch, as the model takes it: its first 8 examples are traced and compared. batch: of what size the
    program takes inputs, or "dynamic": any, the first dimension of every tensor that has the batch's. fused: write
    what `fuse` makes of the model.
    Raises RankoptError where the model cannot be traced or an output differs by more than 1e-4, relative to the
    output's largest value; no file is then left.
    """
    small = copy.deepcopy(model).eval().cpu().requires_grad_(requires_grad=False)
    dynamic = batch == "dynamic"
    x = first_examples(inputs, EXAMPLES if dynamic else int(batch))
    if not dynamic and batch_size(x) < int(batch):
        raise RankoptError(f"a calibration batch holds {batch_size(x)} examples, too few to check batches of {batch}")
    write = {"onnx": _write_onnx, "torch.export": _write_program}[to]
    written = fuse(small, x) if fused else small
    with inference(small), inference(written), _quiet():
        program = _trace(written, x, dynamic)
        cases = [x, one_example(x)] if dynamic else [x]
        return _checked(Path(path), lambda p: write(program, p), LOADERS[to], lambda y: run(small, y), cases)


def export_weights(dense: nn.Module, small: nn.Module, path: str | Path, inputs: Any, multiply: bool) -> Exported:
    """Write a compressed model's weights as safetensors: its factors, or, multiplied out, for the dense architecture.

    dense: the model before compression. Loaded again and compared as by `export`. Raises RankoptError likewise.
    """
    dense, small = (copy.deepcopy(m).eval().cpu() for m in (dense, small))
    written = multiplied_out(dense, small) if multiply else small

    def load(path: Path) -> Forward:
        again = copy.deepcopy(dense if multiply else small)
        load_model(again, path)
        return lambda y: run(again.eval(), y)

    x = first_examples(inputs, EXAMPLES)
    with inference(small), inference(dense):
        return _checked(Path(path), lambda p: save_model(written, str(p)), load, lambda y: run(small, y), [x])


def first_examples(inputs: Any, n: int) -> Any:
    """The first n examples of a batch, or all if it has fewer, on the CPU; copies, as programs keep their examples."""
    size = batch_size(inputs)
    return map_tensors(inputs, lambda t: (t[:n] if t.ndim and len(t) == size else t).cpu().clone())


# --- writing and reading -----------------------------------------------------------------------------


def _trace(model: nn.Module, x: Any, dynamic: bool) -> torch.export.ExportedProgram:
    """The model as a graph. Raises RankoptError that says what stands in the way."""
    n = batch_size(x)
    if dynamic and n < 2:
        raise RankoptError("one example cannot show which dimension is the batch: give --batch 1, or larger batches")
    args, kwargs = ((), x) if isinstance(x, dict) else (tuple(x) if isinstance(x, (tuple, list)) else (x,), {})

    def sizes(value: Any) -> dict[int, Any] | None:
        """Which dimensions of an input may have any size."""
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
    """The first recurrent module that is called with a PackedSequence; empty if none is."""
    found: list[str] = []

    def look(name: str, given: Any) -> None:
        if isinstance(given, PackedSequence):
            found.append(name)

    recurrent = {n: m for n, m in model.named_modules() if isinstance(m, (nn.RNNBase, Recurrent))}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: look(n, args[0])) for n, m in recurrent.items()]
    try:
        run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    _needs_onnx()
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
    return str(error).strip().split("\n")[0]


def _needs_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RankoptError(f"ONNX needs packages that are not here ({error}): pip install 'rankopt[export]'") from None


def _load_program(path: Path) -> Forward:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda x: run(module, x)


def load_onnx(path: Path) -> Forward:
    """A file as onnxruntime runs it, on one thread of the CPU: a model's input -> list of its output tensors."""
    _needs_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def forward(x: Any) -> list[Tensor]:
        by_name = isinstance(x, dict) and set(names) <= x.keys()
        tensors = [x[name] for name in names] if by_name else [t for t in tree_leaves(x) if isinstance(t, Tensor)]
        outputs = session.run(None, {k: t.numpy() for k, t in zip(names, tensors, strict=True)})
        return [torch.as_tensor(out) for out in outputs]

    return forward


LOADERS: dict[str, Callable[[Path], Forward]] = {"onnx": load_onnx, "torch.export": _load_program}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed, and on torch's own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        logger.setLevel(level)


# --- checking ----------------------------------------------------------------------------------------


def _checked(
    path: Path, write: Callable[[Path], None], load: Callable[[Path], Forward], model: Forward, cases: Sequence[Any]
) -> Exported:
    """Write a file, load it, compare it; it gets its name only if it computes what the model does."""
    found: list[tuple[Forward, Parity]] = []

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


def latencies(models: Sequence[nn.Module], exported: Forward, x: Any, seconds: float = 2.0) -> list[float]:
    """Median milliseconds of a forward pass of each model, eager, and of an exported one: on one thread, in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    copies = [copy.deepcopy(m).eval().cpu() for m in models]
    x = map_tensors(x, lambda t: t.cpu())
    try:
        calls: list[Callable[[], Any]] = [lambda m=m: run(m, x) for m in copies]  # type: ignore[misc]
        return [1e3 * s for s in medians([*calls, lambda: exported(x)], seconds)]
    finally:
        torch.set_num_threads(threads)
