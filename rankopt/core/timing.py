"""Calls timed against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# --- time ---------------------------------------------------------------------------------------------


def medians(functions: Sequence[Callable[[], Any]], seconds: float = 1.0) -> list[float]:
    """Median seconds of each function, called in turn."""
    with torch.inference_mode():
        return [statistics.median(times) / 1e9 for times in in_turn(functions, 11, seconds)]


def in_turn(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    seconds: float = 0.0,
    warm_up: int = 1,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[list[int]]:
    """Nanoseconds, by a clock, of each call in each of so many rounds, or of more until so many seconds are over.

    A round makes every call once: what slows the machine for a while slows all of them alike. The first `warm_up`
    rounds do not count. A GPU has done its work when a call ends.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
    spent: list[list[int]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(spent[0]) < warm_up + rounds or time.perf_counter() < end:
        for call, times in zip(calls, spent, strict=True):
            wait()
            start = clock()
            call()
            wait()
            times.append(clock() - start)
    return [times[warm_up:] for times in spent]


def _nothing() -> None:
    """A CPU has done its work when the call returns."""
