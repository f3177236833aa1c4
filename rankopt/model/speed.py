"""The time of a forward pass, measured in one way for searches, reports and exports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from rankopt.core.timing import in_turn, threads
from rankopt.model.forward import inference, run


def forward_times(
    models: Sequence[nn.Module], x: Any, programs: Sequence[Callable[[], Any]] = (), seconds: float = 1.0
) -> list[list[int]]:
    """Time forward passes of models and of exported programs, in turns, on one thread, with torch's fused attention.

    Args:
        models: The models, on one device.
        x: Their input, on that device.
        programs: Calls of programs on the same input.
        seconds: How long to go on at least, see `in_turn`.

    Returns:
        For each its nanoseconds in every round.
    """
    with threads(1), ExitStack() as stack:  # more make small operations slower where others use the cores too
        for model in models:
            stack.enter_context(inference(model, fused=True))
        return in_turn([*(partial(run, model, x) for model in models), *programs], 10, seconds)
