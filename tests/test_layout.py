"""Optional packages stay behind their one door, so that `import rankopt` is light."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rankopt"

DOORS = {
    "ray": {"search/ray/runner.py", "search/ray/session.py", "search/ray/worker.py"},
    "optuna": {
        "strategies/optuna.py",
        "search/storage/local.py",
        "search/storage/shared.py",
        "experiments/config.py",
        "experiments/tuning.py",
    },
    "matplotlib": {"report/pictures.py"},
    "gymnasium": {"strategies/gym_environment.py"},
    "onnxruntime": {"export/export.py", "candidates/latency_table.py"},
    "onnxscript": {"export/export.py"},
    "pynvml": {"model/energy.py"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_optional_packages_have_one_door():
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            door = DOORS.get(name.split(".")[0])
            assert door is None or str(path.relative_to(PACKAGE)) in door, f"{path} imports {name}"
