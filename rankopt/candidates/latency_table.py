"""Measuring forward passes: conditions, runtimes, and portable tables of what was measured."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from typing_extensions import TypedDict

from rankopt.candidates.instruments import LATENCY, Instrument
from rankopt.candidates.search_space import search_spaces_folder
from rankopt.core.environment import processor
from rankopt.core.errors import RankoptError
from rankopt.core.files import write_beside
from rankopt.core.schema import read_json
from rankopt.core.text import escaped, reason, shortened
from rankopt.core.timing import in_turn, threads
from rankopt.export.export import first_line
from rankopt.export.fuse import fuse
from rankopt.export.onnx_session import onnxruntime_version, open_session, quiet_exporter
from rankopt.model.forward import call_arguments, inference, input_tensors, map_tensors, run

FORMAT, VERSION = "rankopt-hardware", 1


RUNTIMES = ("eager", "compile", "graph", "onnxruntime")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


FUSED = ("no", "yes")


WARM_UP = 2  # calls before one is captured


LAYER_CALLS = 10
"""Forward passes of a layer in a row in one sample on a GPU: alone, its launch would count, which others hide."""


COMPILED = 1000  # functions that torch.compile keeps apart: beyond its limit of 8 it would run eagerly, without a word


LARGEST = 2**26  # bytes of the largest table that is read


MOST_BATCH, MOST_THREADS = 2**16, 2**10


Timed = Callable[[], Any]
"""One forward pass, or several in a row."""


@dataclass(frozen=True)
class Conditions:
    """The conditions under which latency and energy are measured.

    Attributes:
        device: "cpu" or "cuda".
        batch: Examples per forward pass.
        threads: CPU threads.
        runtime: "eager", "compile" (torch.compile), "graph" (a captured CUDA graph, which hides what launching
            kernels takes) or "onnxruntime" (needs the extra `export`).
        dtype: "float32", "bfloat16" or "float16".
        layout: Memory format of images and kernels, "contiguous" or "channels_last".
        fused: "yes" to measure what `rankopt.fuse` makes of the dense and of the compressed model.
        table: A file of times, or its name in search_spaces/hardware. If it was measured on another machine, its
            times are trusted and nothing is measured here.

    Raises:
        RankoptError: A value is unknown, or the device is missing and no table is given.
    """

    device: str = "cpu"
    batch: int = 1
    threads: int = 1
    runtime: str = "eager"
    dtype: str = "float32"
    layout: str = "contiguous"
    fused: str = "no"
    table: str = ""

    def __post_init__(self) -> None:
        known = {"runtime": RUNTIMES, "dtype": DTYPES, "layout": LAYOUTS, "fused": FUSED}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise RankoptError(f"latency conditions: {name}={getattr(self, name)!r}, choose from {list(values)}")
        if not (1 <= self.batch <= MOST_BATCH and 1 <= self.threads <= MOST_THREADS):
            raise RankoptError(
                f"latency conditions: batch and threads are 1 or more, at most {MOST_BATCH:,} and {MOST_THREADS:,}"
            )
        if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", self.device):
            raise RankoptError(f"latency conditions: no device {self.device!r}, choose cpu, cuda or cuda:1")
        if self.device != "cpu" and not self.table and not _has_gpu(self.device):
            raise RankoptError(f"latency conditions: device {self.device!r} is not here, and no table=FILE is given")
        if self.runtime == "onnxruntime" and (self.dtype, self.device) != ("float32", "cpu"):
            raise RankoptError("latency conditions: onnxruntime is timed in float32 on cpu")
        if self.runtime == "graph" and self.device == "cpu":
            raise RankoptError("latency conditions: runtime=graph captures a CUDA graph, give it device cuda")

    @classmethod
    def parse(cls, text: str) -> Conditions:
        """Parse conditions such as "cpu,batch=8,threads=2".

        Args:
            text: A device, if not the CPU, then KEY=VALUE pairs, separated by commas.

        Raises:
            RankoptError: A key is unknown, or a value is invalid.
        """
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
        shown += [k for k in ("dtype", "layout", "fused", "table") if getattr(self, k) != getattr(default, k)]
        return ",".join([self.device, *(f"{k}={getattr(self, k)}" for k in shown)])

    @property
    def measured(self) -> dict[str, Any]:
        """The conditions that times depend on: all but the table."""
        found = {k: v for k, v in dataclasses.asdict(self).items() if k != "table"}
        return found if self.fused == "yes" else {k: v for k, v in found.items() if k != "fused"}  # as in older tables

    @property
    def on(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def layer_calls(self) -> int:
        """Forward passes of a layer in one sample."""
        return LAYER_CALLS if self.on.type == "cuda" else 1

    def of_module(self, module: nn.Module) -> nn.Module:
        """Copy a module to the device, in the dtype and layout, in eval mode.

        Args:
            module: The module.
        """
        module = copy.deepcopy(module).to(self.device, DTYPES[self.dtype]).eval()
        return module.to(memory_format=torch.channels_last) if self.layout == "channels_last" else module  # type: ignore[call-overload]

    def of_input(self, x: Any) -> Any:
        """Move an input to the device, floating-point tensors in the dtype, 4-dimensional ones in the layout.

        Args:
            x: A nested input.
        """

        def convert(t: torch.Tensor) -> torch.Tensor:
            t = t.detach().to(self.device, DTYPES[self.dtype] if t.is_floating_point() else t.dtype)
            return t.contiguous(memory_format=LAYOUTS[self.layout]) if t.ndim == 4 else t.contiguous()

        return map_tensors(x, convert)


def _has_gpu(device: str) -> bool:
    return (torch.device(device).index or 0) < torch.cuda.device_count()


def machine(conditions: Conditions) -> str:
    """Describe this machine: processor or GPU, and versions of torch and the runtime.

    Args:
        conditions: Device and runtime.
    """
    if conditions.on.type == "cuda":
        if not _has_gpu(conditions.device):
            return f"a machine without {conditions.device}"
        name = torch.cuda.get_device_name(conditions.on)
    else:
        name = processor()
    runtime = f", onnxruntime {onnxruntime_version()}" if conditions.runtime == "onnxruntime" else ""
    return f"{name}, torch {torch.__version__.partition('+')[0]}{runtime}"


# --- timing --------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """What a forward pass takes.

    Attributes:
        ns: Median in nanoseconds, of energy in nanojoules.
        spread: Half the interquartile range, relative to the median.
    """

    ns: int
    spread: float

    @classmethod
    def of(cls, samples: Sequence[int]) -> Timing:
        """Summarise samples.

        Args:
            samples: Nanoseconds or nanojoules, at least two.
        """
        low, middle, high = statistics.quantiles(samples, n=4)
        return cls(round(middle), round((high - low) / 2 / middle, 4))


def timed(module: nn.Module, x: Any, conditions: Conditions) -> Timed:
    """Make a forward pass of a module in the conditions' runtime.

    Args:
        module: The module, already prepared by `Conditions.of_module`.
        x: Its input, already prepared by `Conditions.of_input`.
        conditions: Runtime, and threads for onnxruntime.

    Returns:
        A function that runs one forward pass.

    Raises:
        RankoptError: The runtime is not installed.
    """
    if conditions.runtime == "onnxruntime":
        return _in_onnxruntime(module, x, conditions)
    if conditions.runtime == "compile":
        module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    return lambda: run(module, x)


def _in_onnxruntime(module: nn.Module, x: Any, conditions: Conditions) -> Timed:
    """Export with torch's TorchScript exporter, which takes milliseconds instead of seconds, where it can."""
    file = io.BytesIO()
    args, kwargs = call_arguments(x)
    with quiet_exporter():
        try:
            torch.onnx.export(module, args, file, kwargs=kwargs, dynamo=False)  # type: ignore[arg-type]
        except torch.onnx.errors.OnnxExporterError:  # it does not support the operations of some families
            program = torch.onnx.export(module, args, kwargs=kwargs, dynamo=True, verbose=False)
            assert program is not None
            file = io.BytesIO()
            program.save(file)  # type: ignore[arg-type]
    session = open_session(file.getvalue(), conditions.threads)
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), input_tensors(x), strict=True)}
    return lambda: session.run(None, feed)


def captured(call: Timed, device: torch.device) -> Timed:
    """Capture a call's work on a GPU, to be replayed without launching its kernels one by one.

    Args:
        call: What to capture. The tensors that it works on must stay, so the result holds it.
        device: The GPU.

    Returns:
        A function that replays it, and returns the same output each time, with new values.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries set themselves up in the first calls, which no graph can hold
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        output = call()

    def replay(_keep: Timed = call) -> Any:
        graph.replay()
        return output

    return replay


def _repeated(call: Timed, count: int) -> Timed:
    def several() -> None:
        for _ in range(count):
            call()

    return several


def interleaved(
    passes: Sequence[Timed],
    conditions: Conditions,
    rounds: int | None = None,
    instrument: Instrument = LATENCY,
    count: int = 1,
) -> list[list[int]]:
    """Measure forward passes in turns, after a warm-up.

    Args:
        passes: The forward passes.
        conditions: Device, batch and number of threads.
        rounds: How often each pass is measured. Default: as often as a layer.
        instrument: What is measured.
        count: Forward passes in a row that each of `passes` stands for.

    Returns:
        Of each round what one forward pass takes, by pass.

    Raises:
        RankoptError: It cannot be measured here.
    """
    per = count * (conditions.batch if instrument.of_example else 1)
    sample = instrument.open(conditions.on)
    with threads(conditions.threads), torch.inference_mode():
        found = in_turn(passes, rounds or instrument.rounds, warm_up=instrument.warm_up, sample=sample)
    return [[max(1, round(one / per)) for one in samples] for samples in found]


def passes(modules: Sequence[nn.Module], x: Any, conditions: Conditions, count: int = 1) -> list[Timed]:
    """Make forward passes of modules under some conditions.

    Args:
        modules: The modules; copies of them run.
        x: Input of all of them.
        conditions: Device, dtype, layout and runtime.
        count: How many forward passes a call makes in a row.

    Raises:
        RankoptError: The runtime does not take a module.
    """
    if conditions.runtime == "compile":
        torch._dynamo.reset()
    x = conditions.of_input(x)
    return [_one_pass(_prepared(module, x, conditions), x, conditions, count) for module in modules]


def _prepared(module: nn.Module, x: Any, conditions: Conditions) -> nn.Module:
    module = conditions.of_module(module)
    return fuse(module, x, channels_last=conditions.layout == "channels_last") if conditions.fused == "yes" else module


def _one_pass(module: nn.Module, x: Any, conditions: Conditions, count: int) -> Timed:
    with threads(conditions.threads), inference(module, fused=True), torch.inference_mode():
        call = timed(module, x, conditions)
        call = _repeated(call, count) if count > 1 else call
        try:
            if conditions.runtime == "graph":
                return captured(call, conditions.on)
            if conditions.runtime == "compile":
                with torch._dynamo.config.patch(recompile_limit=COMPILED, accumulated_recompile_limit=COMPILED):
                    call()
        except Exception as error:
            raise RankoptError(
                f"runtime={conditions.runtime} does not take this model on {conditions.device} "
                f"({type(error).__name__}: {first_line(error)}): choose runtime=eager"
            ) from error
        return call


# --- the table -----------------------------------------------------------------------------------


class ModelTimes(TypedDict):
    """The times of a model in nanoseconds, or its energies in nanojoules.

    Attributes:
        dense: Time of the dense model.
        plans: Of some plans, the sum of the layers' times and the time of the whole model.
    """

    dense: int
    plans: list[tuple[int, int]]


@dataclass(kw_only=True)
class Measurements:
    """One metric of layers and models.

    Attributes:
        layers: By layer (its module's text and the sizes of its inputs) and candidate, [nanoseconds, spread], of energy
            [nanojoules, spread]; "dense" is the layer itself.
        models: By hash of a model, its times.

    Raises:
        RankoptError: A time is not above 0, or that of a dense layer or of a model's plans is missing.
    """

    layers: dict[str, dict[str, Timing]] = dataclasses.field(default_factory=dict)
    models: dict[str, ModelTimes] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        times = [t.ns for found in self.layers.values() for t in found.values()]
        times += [ns for m in self.models.values() for ns in (m["dense"], *(x for pair in m["plans"] for x in pair))]
        if min(times, default=1) < 1:
            raise RankoptError("times are whole numbers of nanoseconds, from 1 on")
        if not all("dense" in found for found in self.layers.values()):
            raise RankoptError("the time of a dense layer is missing")
        if not all(m["plans"] for m in self.models.values()):
            raise RankoptError("the times of a model's plans are missing")


@dataclass(kw_only=True)
class LatencyTable(Measurements):
    """What was measured of layers and models under some conditions: times, and perhaps energies. A JSON file.

    Attributes:
        conditions: See `Conditions.measured`.
        machine: See `machine`.
        energy: Energies of layers and models.
    """

    conditions: dict[str, str | int]
    machine: str
    energy: Measurements = dataclasses.field(default_factory=Measurements)

    def of(self, metric: str) -> Measurements:
        """The measurements of one metric.

        Args:
            metric: One of `MEASURED`.
        """
        return self.energy if metric == "energy" else self

    def save(self, path: Path) -> None:
        """Write the table.

        Args:
            path: The file; its folder is created if needed.
        """
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda p: p.write_text(json.dumps(content, indent=1)))


@dataclass(kw_only=True)
class _TableFile(LatencyTable):
    """A table as `LatencyTable.save` writes it."""

    format: Literal["rankopt-hardware"]
    version: Literal[1]


def find_table(name: str) -> Path:
    """Find a latency table.

    Args:
        name: Path of a .json file, or name of a table in search_spaces/hardware.

    Raises:
        RankoptError: There is no such table.
    """
    path = Path(name) if name.endswith(".json") else search_spaces_folder() / "hardware" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in (search_spaces_folder() / "hardware").glob("*.json"))
        raise RankoptError(f"there is no table {name!r}: give a .json file or one of {', '.join(known) or '(none)'}")
    return path


def read_table(path: Path, conditions: Conditions) -> LatencyTable:
    """Read a latency table.

    Args:
        path: The file.
        conditions: The conditions that it must have been measured under.

    Raises:
        RankoptError: The file is damaged, or the conditions differ.
    """
    try:
        table: LatencyTable = read_json(path, _TableFile, LARGEST)
    except (OSError, ValueError) as error:
        raise RankoptError(
            f"{path} is no table of times ({reason(error)}): measure it again with rankopt hardware"
        ) from error
    if table.conditions != conditions.measured:
        wrong = [f"{k}={v}" for k, v in sorted(table.conditions.items()) if v != conditions.measured.get(k)]
        differ = [shortened(escaped(text), 40) for text in wrong]
        raise RankoptError(f"{path} was measured with {', '.join(differ)}: ask for that, or measure another table")
    return table
