"""The examples run as they lie there, and print what they came to."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import ROOT

SAYS = {
    "own_model.py": "loaded again: Cost(params=",
    "own_decomposition.py": "of the weights, error",
    "own_strategy.py": "shaken, seed 0",
    "gymnasium_agent.py": "Outside",
}


def test_all_examples_are_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_examples_run(name, tmp_path):
    if name == "gymnasium_agent.py":
        pytest.importorskip("sb3_contrib")
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
