"""Energy of an inference, measured by NVML (Nvidia GPUs) or RAPL (Intel and AMD CPUs, on Linux).

Both count all that the GPU or the CPU package draws, including idle power and what other processes use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankopt.core.errors import RankoptError
from rankopt.core.result_record import EnergyEntry
from rankopt.model.forward import inference, run, to_device
from rankopt.model.inputs import one_example

RAPL = Path("/sys/class/powercap")


GRAMS_PER_KWH = 481.0
"""CO₂ equivalents of electricity, world average of 2023 (Ember, Yearly Electricity Data, published 2024)."""


Meter = Callable[[], float]
"""A counter of joules, which never falls; counters of CPUs wrap around, so it must be read at least every minute."""


@dataclass(frozen=True)
class Energy:
    """Energy of one inference.

    Attributes:
        joules: None if the machine has no readable counter.
        grams: Grams of CO₂ equivalents; None like `joules`.
        source: What measured it, or why it could not be measured.
        inferences: How many inferences it is the mean of.
    """

    joules: float | None
    grams: float | None
    source: str
    inferences: int = 0

    def __str__(self) -> str:
        if self.joules is None or self.grams is None:
            return self.source
        return f"{self.joules:.3g} J, {self.grams:.2g} g CO₂ per inference ({self.source}, mean of {self.inferences:,})"


class NotHereError(RankoptError):
    """This machine has no energy counter that can be read; the message says why."""


def per_inference(
    inference: Callable[[], Any],
    seconds: float = 2.0,
    *,
    gpu: int | None = None,
    grams_per_kwh: float = GRAMS_PER_KWH,
    rapl: str | Path = RAPL,
) -> Energy:
    """Measure the energy of one call of a function: the mean of repeated calls, after one to warm up.

    Args:
        inference: The function.
        seconds: How long to repeat it; counters are updated every few to 100 milliseconds.
        gpu: Index of the GPU that computes; None for the CPU.
        grams_per_kwh: Grams of CO₂ equivalents per kilowatt-hour of electricity.
        rapl: Folder of the kernel's power-capping framework.
    """
    try:
        source, meter = open_meter(gpu, rapl)
    except NotHereError as error:
        return Energy(None, None, f"energy not available here: {error}")
    with torch.inference_mode():
        inference()
        _wait(gpu)
        done, start, end = 0, meter(), time.perf_counter() + seconds
        now = start
        while not done or time.perf_counter() < end:
            inference()
            _wait(gpu)
            now = meter()
            done += 1
    joules = (now - start) / done
    return Energy(joules, joules / 3.6e6 * grams_per_kwh, source, done)


def of_models(models: Sequence[nn.Module], example_input: Any) -> EnergyEntry:
    """Measure the energy of one example in two models, on the device they are on.

    Args:
        models: The dense and the compressed model.
        example_input: A tensor, or a tuple or dict of the forward's arguments; the first example is used.

    Returns:
        dense, compressed (joules), dense_grams, compressed_grams (CO₂ equivalents; each None if it cannot be measured
        here) and source (what measured it, or why not).
    """
    x = to_device(one_example(models[0], example_input), models[0])
    device = next(models[0].parameters()).device
    gpu = device.index or 0 if device.type == "cuda" else None
    found = []
    for model in models:
        with inference(model, fused=True):
            found.append(per_inference(partial(run, model, x), seconds=0.5, gpu=gpu))
    dense, small = found
    return {
        "dense": dense.joules,
        "compressed": small.joules,
        "dense_grams": dense.grams,
        "compressed_grams": small.grams,
        "source": small.source,
    }


def _wait(gpu: int | None) -> None:
    """Wait until the GPU, if any, has done its work."""
    if gpu is not None:
        torch.cuda.synchronize(gpu)


def open_meter(gpu: int | None, rapl: str | Path = RAPL) -> tuple[str, Meter]:
    """Find the counter of what computes.

    Args:
        gpu: Index of the GPU that computes; None for the CPU.
        rapl: Folder of the kernel's power-capping framework.

    Returns:
        Its name, and the counter.

    Raises:
        NotHereError: There is none that can be read.
    """
    return ("NVML", nvml_meter(gpu)) if gpu is not None else ("RAPL, CPU package", rapl_meter(Path(rapl)))


def nvml_meter(gpu: int) -> Meter:
    """Total energy of a GPU since its driver was loaded.

    Args:
        gpu: Its index in torch.

    Raises:
        NotHereError: The package, the driver or the counter is missing.
    """
    try:
        import pynvml
    except ImportError:
        raise NotHereError("nvidia-ml-py is not installed (pip install 'rankopt[energy]')") from None
    try:
        pynvml.nvmlInit()
        identifier = str(torch.cuda.get_device_properties(gpu).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identifier}")  # NVML numbers GPUs in another order
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, RuntimeError, AssertionError) as error:
        raise NotHereError(f"NVML does not tell the energy of GPU {gpu} ({error})") from error
    return lambda: 1e-3 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def rapl_meter(folder: Path) -> Meter:
    """Total energy of all CPU packages since the call.

    Args:
        folder: Folder of the kernel's power-capping framework.

    Raises:
        NotHereError: The kernel shows no counter, or not to this user.
    """
    counters = list(_packages(folder))
    if not counters:
        raise NotHereError(f"no RAPL counter of a CPU package in {folder} (virtual machines and other CPUs have none)")
    ranges = [int((c / "max_energy_range_uj").read_text()) for c in counters]

    def read() -> list[int]:
        return [int((c / "energy_uj").read_text()) for c in counters]

    try:
        last = read()
    except PermissionError as error:
        raise NotHereError(f"{error.filename} is only for root: run as root, or let this user read it") from error
    total = 0.0

    def meter() -> float:
        """Counters wrap around to 0 after max_energy_range_uj."""
        nonlocal last, total
        now = read()
        total += sum((b - a) % (size + 1) for a, b, size in zip(last, now, ranges, strict=True)) * 1e-6
        last = now
        return total

    return meter


def _packages(folder: Path) -> Iterator[Path]:
    """Folders of whole CPU packages. Those of their parts (cores, memory) would count twice."""
    for zone in sorted(folder.glob("*-rapl:*")):
        name = zone / "name"
        if name.is_file() and name.read_text().startswith("package") and (zone / "energy_uj").exists():
            yield zone
