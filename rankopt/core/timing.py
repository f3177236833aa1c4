"""Timing calls against each other, on a given number of threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Context: torch computes on `n` threads of the CPU; the number before is restored.

    Args:
        n: How many threads. With one, times do not depend on what else keeps the other cores busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def medians(functions: Sequence[Callable[[], Any]], seconds: float = 1.0) -> list[float]:
    """Median seconds of a call of each function, without gradients; the calls are interleaved.

    Args:
        functions: What to time.
        seconds: Go on for at least this long, and for at least 11 calls of each.
    """
    with torch.inference_mode():
        return [statistics.median(times) / 1e9 for times in in_turn(functions, 11, seconds)]


ENOUGH = 2000
"""Rounds after which the time of a short call is known well enough."""


Sample = Callable[[Callable[[], Any]], int]
"""Makes a call, perhaps several times, and returns what one takes: nanoseconds, or whatever is measured."""


def by_clock(call: Callable[[], Any], clock: Callable[[], int] = time.perf_counter_ns) -> int:
    """Time a call; on a GPU, until its work is done.

    Args:
        call: What to time.
        clock: A clock in nanoseconds.

    Returns:
        Nanoseconds.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def in_turn(
    calls: Sequence[Callable[[], Any]], rounds: int, seconds: float = 0.0, warm_up: int = 1, sample: Sample = by_clock
) -> list[list[int]]:
    """Measure several calls in rounds, each of which measures every call once.

    Interleaving makes the samples comparable: what slows the machine for a while slows all calls alike.

    Args:
        calls: What to measure.
        rounds: The least number of rounds that count.
        seconds: The least time to go on for, unless `ENOUGH` rounds were made before.
        warm_up: How many rounds to make first that do not count.
        sample: Measures a call.

    Returns:
        For each call its sample of every round.
    """
    found: list[list[int]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(found[0]) < warm_up + rounds or (len(found[0]) < ENOUGH and time.perf_counter() < end):
        for call, samples in zip(calls, found, strict=True):
            samples.append(sample(call))
    return [samples[warm_up:] for samples in found]


def _nothing() -> None:
    """On a CPU the work is done when the call returns."""
