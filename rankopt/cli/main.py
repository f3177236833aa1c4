"""The `rankopt` command: imports every group of commands and starts the application."""

from __future__ import annotations

import logging
import sys

# Commands are registered as their modules are imported: in the order in which --help shows them.
from rankopt.cli import inspect, search, runs, train, compare, experiments, cache  # noqa: F401  # isort: skip
from rankopt.cli.app import app
from rankopt.core.signals import discard_output, interrupt, on_stop_signals
from rankopt.core.text import printable


def main() -> None:
    """Entry point of the `rankopt` command."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with on_stop_signals(interrupt):
        try:
            app()
        finally:
            _flush()


class _Formatter(logging.Formatter):
    """Writes control characters as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _flush() -> None:
    """Write what is left for standard output now: Python would print an error at its end if nobody reads it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(1)
