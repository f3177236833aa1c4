"""The signals that end a program: SIGTERM (kill, a batch system) and SIGHUP (a closed terminal) end it like Ctrl-C."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


_received: list[int] = []


def received() -> bool:
    """Whether a signal has asked this process to end."""
    return bool(_received)


def exit_status() -> int:
    """The exit status that a shell expects of a command that a signal ended: 128 and the signal's number."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


@contextmanager
def on_stop_signals(act: Callable[[], None], take_default: bool = True) -> Iterator[None]:
    """Context: a stop signal calls a function. Signals that are ignored, as SIGHUP under nohup, stay so.

    Args:
        act: The function.
        take_default: Also the signals that end the process by the system's default. False in a library's function: a
            program whose part it is would not end, but go on after it.
    """
    leave = (signal.SIG_IGN,) if take_default else (signal.SIG_IGN, signal.SIG_DFL)

    def handle(number: int, frame: Any) -> None:  # noqa: ARG001  (a signal handler's arguments)
        _received.append(number)
        _leave_lost_terminal()
        act()

    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    before = {s: handler for s, handler in before.items() if handler not in leave}
    for s in before:
        signal.signal(s, handle)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def interrupt() -> None:
    """Raise KeyboardInterrupt, as Python does on Ctrl-C."""
    raise KeyboardInterrupt


def _leave_lost_terminal() -> None:
    """Send output nowhere if its terminal was closed: every later message would raise an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                discard_output(descriptor)


def discard_output(descriptor: int) -> None:
    """Send what is written to a file descriptor nowhere.

    Args:
        descriptor: The descriptor: 1 for standard output, 2 for standard error.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
