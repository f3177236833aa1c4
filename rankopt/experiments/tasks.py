"""Loading tasks by name: built-in ones, or a function of the user's own file.

`digits` is built in; `mytasks.py:resnet` runs the file mytasks.py and calls its function `resnet`, which returns a
`rankopt.Task`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
        with _as_a_script(Path(file), f"{file} does not run"):
            module = _load_module(Path(file))
        function = getattr(module, attribute, None)
        if not callable(function):
            raise TaskError(f"{file} has no function {attribute!r}: {HELP}")
    with _as_a_script(Path(name.rpartition(":")[0] or name), f"task {name!r} failed"):
        task: Any = function()
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} returned {type(task).__name__}: return rankopt.Task(...)")
    if not isinstance(task.model, nn.Module):
        raise TaskError(f"task {name!r} has a model of type {type(task.model).__name__}: give an nn.Module")
    task.name = name
    return task


def _load_module(path: Path) -> ModuleType:
    """Run a file as a module of its own, which is also a package of the file's folder: for `from .nets import Net`."""
    if not path.is_file():
        raise TaskError(f"there is no file {path}: {HELP}")
    folder = str(path.parent.resolve())
    name = "rankopt_task_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[folder])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # The file may import its neighbours, as in a script, and what lies in the working folder, as under `python -m`.
    sys.path[:] = [folder, *(p for p in sys.path if p != folder)]
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    spec.loader.exec_module(module)
    return module


@contextmanager
def _as_a_script(path: Path, failure: str) -> Iterator[None]:
    """Context in which a task's code runs: without rankopt's own arguments. What it raises is a TaskError.

    Args:
        path: The task's file.
        failure: What failed, for the message.

    Raises:
        TaskError: The code raises an error, or ends the program.
    """
    arguments, sys.argv = sys.argv, [str(path)]
    try:
        yield
    except TaskError:
        raise
    except SystemExit as end:
        raise TaskError(
            f"{failure}: it ends the program (exit status {end.code!r}), as argparse does where arguments are missing; "
            "put what only a script does below if __name__ == '__main__':"
        ) from end
    except ImportError as error:
        raise TaskError(f"{failure}: {type(error).__name__}: {error}. {_import_help(path)}") from error
    except Exception as error:
        raise TaskError(f"{failure}: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = arguments


def _import_help(path: Path) -> str:
    """Where a task's imports are looked for."""
    return (
        f"A task's file may import what is installed and what lies in its folder ({path.parent.resolve()}) or in the "
        "working folder; set PYTHONPATH for others, and import a parent's modules by their full name"
    )
