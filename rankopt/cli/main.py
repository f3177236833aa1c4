"""The `rankopt` command: imports every group of commands and starts the application."""

from __future__ import annotations

import logging
import sys

# Commands are registered as their modules are imported: in the order in which --help shows them.
from rankopt.cli import inspect, search, runs, train, compare, experiments  # noqa: F401  # isort: skip
from rankopt.cli.app import app
from rankopt.core.signals import discard_output, interrupt, on_stop_signals


def main() -> None:
    """Entry point of the `rankopt` command."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    with on_stop_signals(interrupt):
        try:
            app()
        finally:
            _flush()


def _flush() -> None:
    """Write what is left for standard output now: Python would print an error at its end if nobody reads it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(1)
