"""`import rankopt` stays light: heavy packages are imported where they are used."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("ray", "optuna", "matplotlib", "transformers", "gymnasium", "onnxruntime", "typer", "scipy")


def test_importing_rankopt_loads_no_heavy_package():
    code = f"import sys, rankopt; print(*[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
