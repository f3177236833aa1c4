"""Loading tasks by name: built-in ones, or a function of the user's own file.

`digits` is built in; `mytasks.py:resnet` runs the file mytasks.py and calls its function `resnet`, which returns a
`rankopt.Task`; `mypackage.tasks:resnet` imports a module, from an installed package or from the working folder.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from rankopt.core.errors import TaskError
from rankopt.core.records import Task
from rankopt.core.task_file import as_a_script, load_file
from rankopt.model.forward import move

BUILT_IN = ("digits",)


HELP = f"name a built-in task ({', '.join(BUILT_IN)}), FILE.py:function or package.module:function"


def load_task(name: str, device: str | None = None) -> Task:
    """Load a task.

    Args:
        name: A built-in task, FILE.py:function or package.module:function. The file or module is the user's own code
            and is run.
        device: Where its model is moved to, as cuda or cuda:1. Default: it stays where the task put it.

    Raises:
        TaskError: If there is no such task, its code fails, it returns something else than a `Task` of a module, or
            there is no such device.
    """
    if name in BUILT_IN:
        function = getattr(importlib.import_module(f"rankopt.experiments.{name}"), name)
    else:
        file, _, attribute = name.rpartition(":")
        module = _module(file, name)
        function = getattr(module, attribute, None)
        if not callable(function):
            raise TaskError(f"{file} has no function {attribute!r}: {HELP}")
    with as_a_script(Path(name.rpartition(":")[0] or name), f"task {name!r} failed"):
        task: Any = function()
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} returned {type(task).__name__}: return rankopt.Task(...)")
    if not isinstance(task.model, nn.Module):
        raise TaskError(f"task {name!r} has a model of type {type(task.model).__name__}: give an nn.Module")
    task.name = name
    if device is not None:
        move(task.model, device)
    return task


def _module(file: str, task: str) -> ModuleType:
    """The module of a task's function: a file that is run, or a module that is imported."""
    if file.endswith(".py"):
        if not Path(file).is_file():
            raise TaskError(f"there is no file {file}: {HELP}")
        return load_file(Path(file))
    if not all(part.isidentifier() for part in file.split(".")):
        raise TaskError(f"unknown task {task!r}: {HELP}")
    if not {"", str(Path.cwd())} & set(sys.path):  # as under `python -m`
        sys.path.append(str(Path.cwd()))
    with as_a_script(Path(*file.split(".")).with_suffix(".py"), f"module {file} cannot be imported"):
        return importlib.import_module(file)
