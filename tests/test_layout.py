"""Imports run one way, and optional packages stay behind their one door."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rankopt"

# Who may import whom at the top of a file: lower numbers know nothing of higher ones.
ORDER = [
    {"core", "attention", "parity", "timing"},
    {"kinds", "recurrent"},
    {"unfold", "precision"},
    {"inventory", "registry", "uncertainty"},
    {"calibration", "dataflow", "memory", "energy"},
    {"decompositions"},
    {"fuse", "space", "frontier", "budget", "evaluate", "sensitivity", "training", "bonds", "recipe"},
    {"allocation", "channels"},
    {"candidates", "walk", "distill"},
    {"checkpoint"},
    {"strategies", "environment", "hardware", "rounding"},
    {"plan", "footprint"},
    {"latency"},
    {"prepare", "refine", "renormalise", "search", "store"},
    {"store_shared", "promise"},
    {"fidelity", "finetune", "initialise"},
    {"settings", "progress"},
    {"result"},
    {"job", "tasks"},
    {"rounds", "interpret", "retrain"},
    {"request"},
    {"study", "export"},
    {"ray_session"},
    {"ray_worker"},
    {"search_ray", "sweep", "inverse", "benchmark", "hyperparameters"},
    {"report"},
    {"commands", "cases"},
    {"cli"},
]
DOORS = {
    "ray": {"search_ray.py", "ray_session.py", "ray_worker.py"},
    "optuna": {"strategies/optuna.py", "store.py", "store_shared.py", "study.py", "hyperparameters.py"},
    "matplotlib": {"report/pictures.py"},
    "gymnasium": {"environment.py"},
    "onnxruntime": {"export.py", "hardware.py"},
    "onnxscript": {"export.py"},
    "pynvml": {"energy.py"},
}


def imports(path: Path, *, top_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "rankopt" else set()
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_run_one_way():
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    for path in PACKAGE.rglob("*.py"):
        if part(path) == "__init__":
            continue
        for name in imports(path, top_only=True):
            if name.startswith("rankopt."):
                other = name.split(".")[1]
                assert other == part(path) or level[other] < level[part(path)], f"{path.name} imports {name}"


def test_optional_packages_have_one_door():
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path, top_only=False):
            door = DOORS.get(name.split(".")[0])
            assert door is None or str(path.relative_to(PACKAGE)) in door, f"{path.name} imports {name}"
