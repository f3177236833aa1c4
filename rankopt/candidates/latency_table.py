"""Timing modules on a machine: under which conditions, in which runtime, and a portable table of what was measured."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rankopt.candidates.search_space import search_spaces_folder
from rankopt.core.errors import RankoptError
from rankopt.core.files import write_beside
from rankopt.core.timing import in_turn
from rankopt.model.forward import inference, map_tensors, run

FORMAT, VERSION = "rankopt-hardware", 1


RUNTIMES = ("eager", "compile", "onnxruntime")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


WARM_UP, ROUNDS = 2, 11


LARGEST = 2**26  # bytes of a table that is read


Timed = Callable[[], Any]
"""One forward pass."""


@dataclass(frozen=True)
class Conditions:
    """Under which latency counts: "cpu,batch=1,threads=1,runtime=eager" are the defaults.

    device: "cpu" or "cuda". batch: examples of one forward pass. runtime: "eager", "compile" (torch.compile) or
    "onnxruntime" (extra `export`). layout: of images and kernels. table: a file of times, or a name in
    search_spaces/hardware: where it was measured on another machine, it is trusted and nothing is measured here.
    """

    device: str = "cpu"
    batch: int = 1
    threads: int = 1
    runtime: str = "eager"
    dtype: str = "float32"
    layout: str = "contiguous"
    table: str = ""

    def __post_init__(self) -> None:
        known = {"runtime": RUNTIMES, "dtype": DTYPES, "layout": LAYOUTS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise RankoptError(f"latency conditions: {name}={getattr(self, name)!r}, choose from {list(values)}")
        if self.batch < 1 or self.threads < 1:
            raise RankoptError("latency conditions: batch and threads are 1 or more")
        try:
            here = torch.device(self.device).type != "cuda" or torch.cuda.is_available() or self.table
        except RuntimeError as error:
            raise RankoptError(f"latency conditions: no device {self.device!r} ({error})") from error
        if not here:
            raise RankoptError(f"latency conditions: device {self.device!r} is not here, and no table=FILE is given")
        if self.runtime == "onnxruntime" and (self.dtype, self.device) != ("float32", "cpu"):
            raise RankoptError("latency conditions: onnxruntime is timed in float32 on cpu")

    @classmethod
    def parse(cls, text: str) -> Conditions:
        """ "cpu,batch=8,threads=2": a device first, then KEY=VALUE. Raises RankoptError."""
        words = [word.strip() for word in text.split(",") if word.strip()]
        device = words.pop(0) if words and "=" not in words[0] else "cpu"
        values: dict[str, Any] = {}
        known = [f.name for f in fields(cls) if f.name != "device"]
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or key not in known:
                raise RankoptError(f"latency conditions: {word!r} is none of {', '.join(f'{k}=' for k in known)}")
            values[key] = value
        try:
            values |= {k: int(values[k]) for k in ("batch", "threads") if k in values}
        except ValueError as error:
            raise RankoptError(f"latency conditions: batch and threads are whole numbers ({error})") from error
        return cls(device, **values)

    def __str__(self) -> str:
        default = Conditions()
        shown = ["batch", "threads", "runtime"]
        shown += [k for k in ("dtype", "layout", "table") if getattr(self, k) != getattr(default, k)]
        return ",".join([self.device, *(f"{k}={getattr(self, k)}" for k in shown)])

    @property
    def measured(self) -> dict[str, Any]:
        """What times depend on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "table"}

    def of_module(self, module: nn.Module) -> nn.Module:
        """A copy on the device, in the dtype and layout, ready for inference."""
        module = copy.deepcopy(module).to(self.device, DTYPES[self.dtype]).eval()
        return module.to(memory_format=torch.channels_last) if self.layout == "channels_last" else module  # type: ignore[call-overload]

    def of_input(self, x: Any) -> Any:
        """An input on the device, its floating tensors in the dtype, its images in the layout."""

        def convert(t: torch.Tensor) -> torch.Tensor:
            t = t.detach().to(self.device, DTYPES[self.dtype] if t.is_floating_point() else t.dtype)
            return t.contiguous(memory_format=LAYOUTS[self.layout]) if t.ndim == 4 else t.contiguous()

        return map_tensors(x, convert)


def machine(conditions: Conditions) -> str:
    """What is timed, in words: the processor and the versions that matter."""
    if torch.device(conditions.device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        models = [x.partition(":")[2].strip() for x in lines if x.startswith(("model name", "Model"))]
        name = models[0] if models else platform.processor() or platform.machine()
    runtime = f", onnxruntime {_onnxruntime().__version__}" if conditions.runtime == "onnxruntime" else ""
    return f"{name}, torch {torch.__version__.partition('+')[0]}{runtime}"


# --- timing --------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Nanoseconds of a forward pass: the median, and half the distance of the quartiles over it."""

    ns: int
    spread: float

    @classmethod
    def of(cls, samples: Sequence[int]) -> Timing:
        low, middle, high = statistics.quantiles(samples, n=4)
        return cls(round(middle), round((high - low) / 2 / middle, 4))


@contextmanager
def conditions_hold(conditions: Conditions) -> Iterator[None]:
    """So many threads; all restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def timed(module: nn.Module, x: Any, conditions: Conditions) -> Timed:
    """A forward pass of the module (as it is: see Conditions.of_module) in the runtime."""
    if conditions.runtime == "onnxruntime":
        return _in_onnxruntime(module, x, conditions)
    if conditions.runtime == "compile":
        module = torch.compile(module)  # type: ignore[assignment]
    return lambda: run(module, x)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RankoptError("runtime=onnxruntime needs onnxruntime: pip install 'rankopt[export]'") from error
    return onnxruntime


def _in_onnxruntime(module: nn.Module, x: Any, conditions: Conditions) -> Timed:
    """By torch's TorchScript exporter, which takes milliseconds where the other takes a second, if it can."""
    ort = _onnxruntime()
    file = io.BytesIO()
    arguments = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(module, arguments[0], file, kwargs=arguments[1], dynamo=False)  # type: ignore[arg-type]
        except torch.onnx.errors.OnnxExporterError:  # some families' operations are unknown to it
            program = torch.onnx.export(module, arguments[0], kwargs=arguments[1], dynamo=True, verbose=False)
            assert program is not None
            file = io.BytesIO()
            program.save(file)  # type: ignore[arg-type]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = conditions.threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    tensors: list[Any] = []
    map_tensors(x, tensors.append)
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: session.run(None, feed)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def interleaved(passes: Sequence[Timed], conditions: Conditions, rounds: int = ROUNDS) -> list[list[int]]:
    """Nanoseconds of each pass in each of so many rounds, after a warm-up."""
    with conditions_hold(conditions), torch.inference_mode():
        return in_turn(passes, rounds, warm_up=WARM_UP)


def passes(modules: Sequence[nn.Module], x: Any, conditions: Conditions) -> list[Timed]:
    """Forward passes of modules, each as the conditions say, on one input."""
    x = conditions.of_input(x)
    found = []
    for module in modules:
        prepared = conditions.of_module(module)
        with conditions_hold(conditions), inference(prepared, fused=True):
            found.append(timed(prepared, x, conditions))
    return found


# --- the table -----------------------------------------------------------------------------------


@dataclass
class LatencyTable:
    """Times of layers and models under some conditions, by what they are: layer -> candidate -> [ns, spread].

    A layer is its module's text and the sizes of its inputs; "dense" is the layer itself. models: of a model's text,
    "dense" in nanoseconds, and plans as [sum of the layers' times, measured].
    """

    conditions: dict[str, Any]
    machine: str
    layers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    models: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> None:
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda p: p.write_text(json.dumps(content, indent=1)))


def find_table(name: str) -> Path:
    """A table by path, or by its name in search_spaces/hardware. Raises RankoptError."""
    path = Path(name) if name.endswith(".json") else search_spaces_folder() / "hardware" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in (search_spaces_folder() / "hardware").glob("*.json"))
        raise RankoptError(f"there is no table {name!r}: give a .json file or one of {', '.join(known) or '(none)'}")
    return path


def read_table(path: Path, conditions: Conditions) -> LatencyTable:
    """Raises RankoptError if it is damaged, or was measured under other conditions."""
    try:
        table = _sound_table(json.loads(path.read_text() if path.stat().st_size <= LARGEST else "null"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RankoptError(f"{path} is no table of times ({error}): make it anew with rankopt hardware") from error
    if table.conditions != conditions.measured:
        differ = [f"{k}={v}" for k, v in _items(table.conditions) if v != conditions.measured.get(k)]
        raise RankoptError(f"{path} was measured with {', '.join(differ)}: ask for that, or measure another table")
    return table


def _sound_table(content: Any) -> LatencyTable:
    """Raises whatever a content that is no table makes raise."""
    if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
        raise ValueError("its format or version is another")
    table = LatencyTable(**content)
    times = [ns for found in table.layers.values() for ns, _ in found.values()]
    times += [
        ns for model in table.models.values() for ns in (model["dense"], *(x for pair in model["plans"] for x in pair))
    ]
    if not all(isinstance(ns, int) and ns > 0 for ns in times):
        raise ValueError("times are whole numbers of nanoseconds")
    return table


def _items(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(found.items())
