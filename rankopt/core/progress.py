"""Progress callbacks, stage timings and stopping: what long-running work reports and listens to."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows progress: (items, what is being done, how many) -> the items."""


def silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """No progress display."""
    return items


class Display(Protocol):
    """A progress display with a text beside it; the command line and notebooks have one each."""

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        """Show the progress of going through the items."""

    def note(self, text: str) -> None:
        """Change the text beside the bar that is shown now."""

    def say(self, text: str) -> None:
        """Print a line."""


class Clock(dict[str, float]):
    """Seconds by stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start


class Stoppable(Protocol):
    """What ends when `stopping` is set, after what runs."""

    stopping: bool


class StopCondition:
    """Whether to stop: Ctrl-C (within `gently`), or the minutes are over."""

    def __init__(self, minutes: float | None = None) -> None:
        self.stopping = False
        self.end = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    def __call__(self) -> bool:
        return self.stopping or time.monotonic() >= self.end


@contextmanager
def graceful_interrupt(study: Stoppable, say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C once: what runs is finished, and nothing more is started. Twice: KeyboardInterrupt at once."""

    def stop(*_: Any) -> None:
        if study.stopping:
            raise KeyboardInterrupt
        study.stopping = True
        say("finishing what runs; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
