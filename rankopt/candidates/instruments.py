"""Instruments for metrics that only a measurement tells, latency and energy: how to sample them, and how often."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rankopt.core.errors import RankoptError
from rankopt.core.result_record import Metric
from rankopt.core.timing import Sample, by_clock
from rankopt.model.energy import Meter, NotHereError, open_meter

NANO = 10**9
"""`Cost` counts billionths of seconds and of joules."""


WINDOWS = {"cpu": (0.02, 0.1), "cuda": (0.1, 0.2)}
"""By kind of device, seconds of calls before a sample of energy, and of the sample, at least."""


STANDS_STILL = 2.0
"""Seconds after which a counter of energy that does not move is given up."""


@dataclass(frozen=True)
class Instrument:
    """How a metric of `MEASURED` is measured.

    Attributes:
        metric: The metric.
        sampler: Makes what takes samples on a device.
        points: By runtime, how many ranks of a layer and family are measured: building a session or compiling takes
            seconds each.
        warm_up: Samples before, which do not count.
        rounds: Samples of a layer.
        repeats: Samples of a whole model while costs are measured.
        block: Rounds of measuring both models of a check between looks at the interval.
        fewest: Rounds of a check, at least.
        seconds: Time after which a check's interval is taken as it is.
        noise: A layer within this share of the dense layer's cost counts as equally cheap.
        of_example: Whether it is the cost of an example, not of a forward pass.
    """

    metric: Metric
    sampler: Callable[[torch.device], Sample]
    points: dict[str, int]
    warm_up: int
    rounds: int
    repeats: int
    block: int
    fewest: int
    seconds: float
    noise: float
    of_example: bool = False

    def open(self, device: torch.device) -> Sample:
        """Make what takes samples.

        Args:
            device: What computes.

        Returns:
            A function that measures a call.

        Raises:
            RankoptError: It cannot be measured here.
        """
        try:
            return self.sampler(device)
        except NotHereError as error:
            raise RankoptError(f"{self.metric} cannot be measured here, nor be a budget: {error}") from error


# --- time --------------------------------------------------------------------------------------------


class CudaEvents:
    """Times calls by events in the GPU's own stream, from the idle GPU to the end of the work.

    Args:
        device: The GPU.
        event: Makes an event.
        stream: Finds the stream that work on a GPU goes to.
        wait: Waits until a GPU is idle.
    """

    def __init__(
        self,
        device: torch.device,
        event: Callable[..., Any] = torch.cuda.Event,
        stream: Callable[[torch.device], Any] = torch.cuda.current_stream,
        wait: Callable[[torch.device], None] = torch.cuda.synchronize,
    ) -> None:
        self.device, self.event, self.stream, self.wait = device, event, stream, wait

    def __call__(self, call: Callable[[], Any]) -> int:
        start, end = (self.event(enable_timing=True) for _ in range(2))
        stream = self.stream(self.device)
        self.wait(self.device)
        start.record(stream)
        call()
        end.record(stream)
        self.wait(self.device)
        return round(start.elapsed_time(end) * 1e6)


def timer(device: torch.device) -> Sample:
    """Make what times calls on a device, in nanoseconds.

    Args:
        device: The device.
    """
    return CudaEvents(device) if device.type == "cuda" else by_clock


# --- energy ------------------------------------------------------------------------------------------


class EnergyOfCalls:
    """Measures calls by a counter of energy, over the time from one of its updates to another.

    Counters are updated every millisecond (RAPL) to 100 milliseconds (NVML), so a call is repeated all that time.

    Args:
        meter: The counter, in joules.
        wait: Waits until the calls' work is done.
        settle: Seconds of calls before: what a GPU drew earlier still shows in its counter for a while.
        seconds: Seconds to measure, at least.
        clock: A clock in seconds.
    """

    def __init__(
        self,
        meter: Meter,
        wait: Callable[[], Any],
        settle: float,
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.meter, self.wait, self.settle, self.seconds, self.clock = meter, wait, settle, seconds, clock

    def __call__(self, call: Callable[[], Any]) -> int:
        _, before = self._until_update(call, self.settle)
        done, after = self._until_update(call, self.seconds)
        return round((after - before) / done * NANO)

    def _until_update(self, call: Callable[[], Any], seconds: float) -> tuple[int, float]:
        """Repeat a call for some time, and on until the counter is updated. Returns how often, and the counter."""
        start, done, last = self.clock(), 0, self.meter()
        while True:
            call()
            self.wait()
            done += 1
            now, spent = self.meter(), self.clock() - start
            if now != last and spent >= seconds:
                return done, now
            if spent > seconds + STANDS_STILL:
                raise RankoptError("energy cannot be measured here: its counter stands still")
            last = now if spent < seconds else last


def energy_sampler(device: torch.device) -> Sample:
    """Make what measures the energy of calls on a device, in nanojoules.

    Args:
        device: The device.

    Raises:
        NotHereError: There is no counter that can be read.
    """
    gpu = (device.index or 0) if device.type == "cuda" else None
    _, meter = open_meter(gpu)
    wait = (lambda: None) if gpu is None else partial(torch.cuda.synchronize, device)
    return EnergyOfCalls(meter, wait, *WINDOWS[device.type])


LATENCY = Instrument(
    "latency",
    timer,
    points={"eager": 400, "graph": 400, "onnxruntime": 8, "compile": 3},
    warm_up=2,
    rounds=11,
    repeats=15,
    block=20,
    fewest=40,
    seconds=20.0,
    noise=0.02,
)


ENERGY = Instrument(
    "energy",
    energy_sampler,
    points={"eager": 4, "graph": 4, "onnxruntime": 4, "compile": 3},
    warm_up=0,
    rounds=3,
    repeats=5,
    block=4,
    fewest=12,
    seconds=60.0,
    noise=0.05,
    of_example=True,
)


INSTRUMENTS: dict[Metric, Instrument] = {x.metric: x for x in (LATENCY, ENERGY)}
"""By metric of `MEASURED`."""
