"""The `rankopt` command: imports every group of commands and starts the application."""

from __future__ import annotations

import logging
import sys

from rankopt.cli import compare, experiments, inspect, runs, search, train  # noqa: F401  # in the order of --help
from rankopt.cli.app import app


def main() -> None:
    """Entry point of the `rankopt` command."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    app()
