"""The command line, run in this process."""

from __future__ import annotations

import os
from pathlib import Path

from typer.testing import CliRunner

from rankopt.cli.main import app


def run(*arguments, code=0, cwd=None):
    """Run in this process; returns (stdout, stderr)."""
    before = Path.cwd()
    try:
        if cwd:
            os.chdir(cwd)
        outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    finally:
        os.chdir(before)
    assert outcome.exit_code == code, outcome.output + repr(outcome.exception)
    return outcome.stdout, outcome.stderr
