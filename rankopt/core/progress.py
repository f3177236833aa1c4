"""Progress displays, timings of stages, and ways to stop long-running work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from rankopt.core.signals import on_stop_signals

log = logging.getLogger(__name__)


Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""A progress display: (items, what is done with them, how many) -> an iterable over the same items.

Items that take unequally long come as `Work`: a display may predict the time left from it.
"""

Item = TypeVar("Item")


class Work(Generic[Item]):
    """Items and how much work each takes, in operations or any other unit.

    Args:
        items: The items; they may come in any order, and each after it is done, as from a pool of workers.
        of: Maps an item to its work.
        total: The work of all items.
    """

    def __init__(self, items: Iterable[Item], of: Callable[[Item], float], total: float) -> None:
        self.items, self.of, self.total = items, of, total

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """A progress display that shows nothing.

    Args:
        items: What is iterated over.
        what: What is done with them.
        total: How many there are.
    """
    return items


class Display(Protocol):
    """A progress display with a text beside it, such as the command line's `rankopt.search.progress.ProgressBar`."""

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        """Iterate over the items and show the progress; see `Progress`."""

    def note(self, text: str) -> None:
        """Change the text beside the current bar."""

    def say(self, text: str) -> None:
        """Print a line."""


class Clock(dict[str, float]):
    """Seconds that each stage of some work took."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context: add the time spent in it to a stage.

        Args:
            name: The stage.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self[name] = self.get(name, 0.0) + seconds
            log.debug("%s took %.1f s", name, seconds)


class Stoppable(Protocol):
    """Work that starts nothing new once `stopping` is True."""

    stopping: bool


class StopCondition:
    """Callable that tells whether to stop: after Ctrl-C (within `graceful_interrupt`), or after some minutes.

    Args:
        minutes: When to stop; None: only after Ctrl-C.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.stopping = False
        self.end = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    def __call__(self) -> bool:
        """Whether to stop now."""
        return self.stopping or time.monotonic() >= self.end


@contextmanager
def graceful_interrupt(study: Stoppable, say: Callable[[str], None], take_default: bool = True) -> Iterator[None]:
    """Context: the first Ctrl-C, SIGTERM or SIGHUP lets running work finish, the second raises KeyboardInterrupt.

    Outside the main thread, which alone receives signals, it does nothing.

    Args:
        study: The work; its `stopping` is set.
        say: Shows a message to the user.
        take_default: As in `on_stop_signals`: False where the program may not be the command line.
    """

    def stop() -> None:
        if study.stopping:
            raise KeyboardInterrupt
        study.stopping = True
        say("finishing what runs; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with on_stop_signals(stop, take_default):
        yield
