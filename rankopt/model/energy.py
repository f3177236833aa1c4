"""Joules of an inference, where the machine tells: NVML on Nvidia's GPUs, RAPL on Intel's and AMD's CPUs under Linux.

Both count all that the GPU, or the CPU's package, draws: idle power and what else runs there included.
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
from rankopt.model.forward import inference, one_example, run, to_device

RAPL = Path("/sys/class/powercap")


GRAMS_PER_KWH = 481.0
"""CO₂ equivalents of electricity, world average of 2023 (Ember, Yearly Electricity Data, published 2024)."""


Meter = Callable[[], float]
"""Joules since some fixed time, never falling; to be read more often than every minute."""


@dataclass(frozen=True)
class Energy:
    """What one inference takes. joules, grams (of CO₂): None where the machine does not tell; source then says why."""

    joules: float | None
    grams: float | None
    source: str
    inferences: int = 0

    def __str__(self) -> str:
        if self.joules is None or self.grams is None:
            return self.source
        return f"{self.joules:.3g} J, {self.grams:.2g} g CO₂ per inference ({self.source}, mean of {self.inferences:,})"


class NotHereError(RankoptError):
    """A machine that does not tell its energy; the message says why."""


def per_inference(
    inference: Callable[[], Any],
    seconds: float = 2.0,
    *,
    gpu: int | None = None,
    grams_per_kwh: float = GRAMS_PER_KWH,
    rapl: str | Path = RAPL,
) -> Energy:
    """Energy of one call of a function, from calls for so many seconds (counters move every few to 100 ms).

    gpu: the index of the GPU that computes; None for the CPU. grams_per_kwh: of your electricity's CO₂.
    rapl: the folder of the kernel's power-capping framework.
    """
    try:
        source, meter = ("NVML", nvml_meter(gpu)) if gpu is not None else ("RAPL, CPU package", rapl_meter(Path(rapl)))
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


def of_models(models: Sequence[nn.Module], example_input: Any) -> dict[str, Any]:
    """Joules and grams of CO₂ of one example, dense and compressed; None where the machine does not tell."""
    x = to_device(one_example(example_input), models[0])
    device = next(models[0].parameters()).device
    gpu = device.index or 0 if device.type == "cuda" else None
    found = []
    for model in models:
        with inference(model, fused=True):
            found.append(per_inference(partial(run, model, x), seconds=1.0, gpu=gpu))
    dense, small = found
    grams = {"dense_grams": dense.grams, "compressed_grams": small.grams}
    return {"dense": dense.joules, "compressed": small.joules, **grams, "source": small.source}


def _wait(gpu: int | None) -> None:
    if gpu is not None:
        torch.cuda.synchronize(gpu)


def nvml_meter(gpu: int) -> Meter:
    """Total energy of a GPU since its driver was loaded. Raises NotHereError without package, driver or counter."""
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
    """Energy of all CPU packages. Raises NotHereError where the kernel shows no counter, or not to this user."""
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
        """Counters begin at 0 again after max_energy_range_uj."""
        nonlocal last, total
        now = read()
        total += sum((b - a) % (size + 1) for a, b, size in zip(last, now, ranges, strict=True)) * 1e-6
        last = now
        return total

    return meter


def _packages(folder: Path) -> Iterator[Path]:
    """Zones of whole CPU packages: their parts (cores, memory) would count twice."""
    for zone in sorted(folder.glob("*-rapl:*")):
        name = zone / "name"
        if name.is_file() and name.read_text().startswith("package") and (zone / "energy_uj").exists():
            yield zone
