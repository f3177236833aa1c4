"""What --help says: commands in the order of their use, in panels, and no default that markup swallows."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from typer.main import get_command

from rankopt.cli.main import app

ORDER = ["inspect", "search", "report", "apply", "export", "train", "sweep", "benchmark", "hardware", "run", "cache"]
PANELS = ["Compress a model", "Use a finished run", "Compare", "Experiments"]


def test_commands_in_the_order_of_their_use():
    command = [sys.executable, "-m", "rankopt.cli", "--help"]  # a process of its own: imports decide the order
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^│ (\w+)  ", shown, re.M) == ORDER
    assert re.findall(r"^╭─ (.*?) ─", shown, re.M) == ["Options", *PANELS]


@pytest.mark.parametrize("name", ORDER)
def test_options(name):
    """Rich takes [text] for a style and shows nothing; more than six options in one panel are hard to read."""
    panels = {}
    for option in get_command(app).commands[name].params:
        assert not re.search(r"\[[a-z#/@]", option.help or ""), option.name
        if option.param_type_name == "option":
            panels.setdefault(option.rich_help_panel, []).append(option.name)
    assert all(len(names) <= 7 for names in panels.values()), panels
