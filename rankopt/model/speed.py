"""The time of a forward pass, measured in one way for searches, reports and exports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from torch import nn

from rankopt.core.statistics import interval
from rankopt.core.timing import in_turn, threads
from rankopt.model.forward import inference, run
from rankopt.model.inputs import expanded

LARGEST_BATCH = 4096
"""Examples of the largest batch that is timed."""

SECONDS = 0.5
"""How long a batch is timed at least."""

LONGEST_PASS = 0.05
"""Seconds of a forward pass from which no larger batch is tried."""

FULL = 1.9
"""A device is full where twice the batch takes at least this many times as long."""

Program = Callable[[Any], Any]
"""Maps a model's input to its outputs."""


@dataclass(frozen=True)
class ForwardTimes:
    """Times of several models on the same input.

    Attributes:
        examples: Examples of the input.
        milliseconds: The median time of the first; of the others that times the median of their ratios to it, round by
            round, as what slows the machine for a while slows all alike.
        ratios: 95 % interval of each one's median ratio.
        rounds: How often each was timed, in turns.
    """

    examples: int
    milliseconds: tuple[float, ...]
    ratios: tuple[tuple[float, float], ...]
    rounds: int


def forward_times(
    models: Sequence[nn.Module], example: Any, programs: Sequence[Program] = (), seconds: float | None = None
) -> list[ForwardTimes]:
    """Time forward passes of one example, and of a batch that fills the device.

    They are timed in turns, on one thread, with torch's fused attention.

    Args:
        models: The models, on one device. The batch fills it for each of them.
        example: One example, on that device.
        programs: Exported programs that take the same inputs.
        seconds: How long to measure each batch at least, see `in_turn`. Default: SECONDS.

    Returns:
        The times of one example and, unless that fills the device or the model takes no larger batch, of a full one.
    """
    full = 1
    for model in models:
        full = full_batch(model, example, full)
    batches = sorted({1, full})
    return [batch_times(models, expanded(example, n), n, programs, seconds) for n in batches]


def batch_times(
    models: Sequence[nn.Module], x: Any, examples: int, programs: Sequence[Program] = (), seconds: float | None = None
) -> ForwardTimes:
    """Time forward passes of one batch, as `forward_times`.

    Args:
        models: The models, on one device.
        x: Their input.
        examples: How many examples it has.
        programs: Exported programs that take the same input.
        seconds: How long to measure at least. Default: SECONDS.
    """
    calls = [*(partial(run, model, x) for model in models), *(partial(program, x) for program in programs)]
    with threads(1), ExitStack() as stack:  # more make small operations slower where others use the cores too
        for model in models:
            stack.enter_context(inference(model, fused=True))
        times = in_turn(calls, 10, SECONDS if seconds is None else seconds)
    ratios = [[b / a for a, b in zip(times[0], t, strict=True)] for t in times]
    first = median(times[0]) / 1e6
    return ForwardTimes(examples, tuple(first * median(r) for r in ratios), tuple(map(interval, ratios)), len(times[0]))


def full_batch(model: nn.Module, example: Any, least: int = 1) -> int:
    """Find a batch that fills the device: from it on, twice as many examples take about twice as long.

    Args:
        model: The model.
        example: One example.
        least: A smaller one is not looked for: on a GPU each size takes seconds, in which cuDNN plans.

    Returns:
        `least` times a power of two. 1, too, where the model takes one example at a time.
    """
    size, before = least, 0.0
    with threads(1), inference(model, fused=True):
        while size <= LARGEST_BATCH:
            took = 0.0
            with suppress(Exception):  # the model may take no such batch, or memory not hold it
                took = min(in_turn([partial(run, model, expanded(example, size))], 3)[0]) / 1e9
            if not took or (before and took >= FULL * before):
                break
            if took > LONGEST_PASS:
                return size
            size, before = 2 * size, took
    return max(least, size // 2)
