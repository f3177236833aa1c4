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
    "ray_tune.py": "best of 4: ",
}

SLOW = {"ray_tune.py", "gymnasium_agent.py"}  # one starts Ray, the other trains an agent


def test_all_examples_are_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.parametrize(
    "name", [*sorted(SAYS.keys() - SLOW), *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_examples_run(name, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
