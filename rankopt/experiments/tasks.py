"""Loading tasks by name: built-in ones, or a function of the user's own file.

`digits` is built in; `mytasks.py:resnet` runs the file mytasks.py and calls its function `resnet`, which returns a
`rankopt.Task`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from rankopt.core.errors import TaskError
from rankopt.core.records import Task

BUILT_IN = ("digits",)


HELP = f"name a built-in task ({', '.join(BUILT_IN)}) or FILE.py:function"


def load_task(name: str) -> Task:
    """Load a task.

    Args:
        name: A built-in task, or FILE.py:function. The file is the user's own code and is run.

    Raises:
        TaskError: If there is no such task, its code fails, or it returns something else than a `Task` of a module.
    """
    if name in BUILT_IN:
        function = getattr(importlib.import_module(f"rankopt.experiments.{name}"), name)
    else:
        file, colon, attribute = name.rpartition(":")
        if not colon or not file.endswith(".py"):
            raise TaskError(f"unknown task {name!r}: {HELP}")
        function = getattr(_load_module(Path(file)), attribute, None)
        if not callable(function):
            raise TaskError(f"{file} has no function {attribute!r}: {HELP}")
    try:
        task: Any = function()
    except Exception as error:
        raise TaskError(f"task {name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} returned {type(task).__name__}: return rankopt.Task(...)")
    if not isinstance(task.model, nn.Module):
        raise TaskError(f"task {name!r} has a model of type {type(task.model).__name__}: give an nn.Module")
    task.name = name
    return task


def _load_module(path: Path) -> ModuleType:
    """Run a file as a module of its own."""
    if not path.is_file():
        raise TaskError(f"there is no file {path}: {HELP}")
    name = f"rankopt_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TaskError(f"{path} does not run: {type(error).__name__}: {error}") from error
    return module
