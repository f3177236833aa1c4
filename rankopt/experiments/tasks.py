"""Loading tasks by name: built-in ones, or a function of the user's own file.

`digits` is built in; `mytasks.py:resnet` runs the file mytasks.py and calls its function `resnet`, which returns a
`rankopt.Task`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.core.errors import TaskError
from rankopt.core.records import Task
from rankopt.core.task_file import as_a_script, load_file

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
        if not Path(file).is_file():
            raise TaskError(f"there is no file {file}: {HELP}")
        module = load_file(Path(file))
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
    return task
