"""A user's Python file as a module: run here, and run again under the same name in another process.

What a process is sent refers to the module's classes and functions by name. Only what the running program changed in
the module since it was imported is sent by value.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import cloudpickle

from rankopt.core.errors import TaskError
from rankopt.core.files import digest

DIGESTED = 1 << 24  # bytes of a variable's pickle above which a change inside of it is not seen


SOURCES = 20 << 20  # most bytes of source that are sent to another machine


Variable = tuple[str, str, str]
"""Where a variable is kept: its module, the class in it (empty for none), and its name."""


@dataclass(frozen=True)
class TaskFile:
    """A file that was run as a module.

    Attributes:
        name: The module's name.
        path: The file.
        source: Its content when it was run.
        digests: The variables of the module, and of those that it imported from its folder, as they were then.
    """

    name: str
    path: Path
    source: bytes
    digests: Mapping[Variable, Any] = field(compare=False)

    @property
    def folder(self) -> Path:
        """The file's folder."""
        return self.path.parent

    def changes(self) -> dict[Variable, Any]:
        """Find the variables that changed since the file was run, of its module and of those beside it."""
        known = {module for module, _, _ in self.digests}
        variables = (v for module in known if module in sys.modules for v in _variables(sys.modules[module]))
        return {key: value for key, value in variables if self.digests.get(key) != _digest(value)}

    def is_named_in(self, pickled: bytes) -> bool:
        """Whether a pickle refers to the file's module, or to one that it imported from its folder.

        Args:
            pickled: The pickle.
        """
        return any(name.encode() in pickled for name in {self.name, *(module for module, _, _ in self.digests)})

    def sources(self) -> dict[str, bytes]:
        """Read the Python files beside the file, and those of the packages in its folder that are imported.

        Returns:
            Path relative to the folder -> content.

        Raises:
            TaskError: If they are too large to be sent to other machines.
        """
        packages = {Path(str(m.__file__)).relative_to(self.folder).parts[0] for m in _beside(self.folder)}
        files = [*self.folder.glob("*.py"), *(f for p in packages for f in (self.folder / p).rglob("*.py"))]
        if sum(f.stat().st_size for f in files) > SOURCES:
            raise TaskError(
                f"the Python files in {self.folder} are more than {SOURCES >> 20} MB, too much to send to other "
                f"machines: put {self.path.name} and what it imports into a folder of their own"
            )
        return {str(f.relative_to(self.folder)): f.read_bytes() for f in files} | {self.path.name: self.source}


LOADED: dict[str, TaskFile] = {}
"""Name of a module -> the file that was run last under it."""


def load_file(path: Path) -> ModuleType:
    """Run a file as a module of its own, which is also a package of the file's folder: for `from .nets import Net`.

    Args:
        path: The file.

    Raises:
        TaskError: If its code raises an error or ends the program.
    """
    path, source = path.resolve(), path.read_bytes()
    name = module_name(path)
    module = run_source(name, path, source)
    digests = {key: _digest(value) for m in (module, *_beside(path.parent)) for key, value in _variables(m)}
    LOADED[name] = TaskFile(name, path, source, digests)
    return module


def file_module(path: Path) -> ModuleType:
    """The module of a file, which is run unless it was already, as it is now.

    Args:
        path: The file.

    Raises:
        TaskError: If its code raises an error or ends the program.
    """
    name = module_name(path)
    if (known := LOADED.get(name)) and name in sys.modules and known.source == path.read_bytes():
        return sys.modules[name]
    return load_file(path)


def module_name(path: Path) -> str:
    """The name that a file's module gets: readable, and no other file's, since pickles refer to it in all processes.

    Args:
        path: The file.
    """
    where = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    return "_".join(("rankopt_task", re.sub(r"\W", "_", path.stem), where))


def run_source(name: str, path: Path, source: bytes) -> ModuleType:
    """Run a file's content as a module.

    Args:
        name: The module's name.
        path: The file; its neighbours can be imported.
        source: The content, which may have been read earlier.

    Raises:
        TaskError: If its code raises an error or ends the program.
    """
    folder = str(path.parent)
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[folder])
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # The file may import its neighbours, as in a script, and what lies in the working folder, as under `python -m`.
    sys.path[:] = [folder, *(p for p in sys.path if p != folder)]
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    with as_a_script(path, f"{path} does not run"):
        exec(compile(source, path, "exec"), vars(module))  # the user's own file
    return module


@contextmanager
def as_a_script(path: Path, failure: str) -> Iterator[None]:
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


# --- another process -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SentFile:
    """A task file on its way to another process.

    Attributes:
        name: The module's name.
        path: The file.
        source: Its content when it was run here.
        neighbours: What `TaskFile.sources` found, for a process on another machine; empty for this one.
    """

    name: str
    path: Path
    source: bytes
    neighbours: Mapping[str, bytes]

    def load(self, scratch: Path) -> None:
        """Run the file, where it lies if it also lies on this machine.

        Args:
            scratch: Folder to write it and its neighbours to if it does not.

        Raises:
            TaskError: If its code raises an error or ends the program.
        """
        path = self.path
        if self.neighbours and not _all_equal(path.parent, self.neighbours):
            path = scratch / self.name / path.name
            for relative, content in self.neighbours.items():
                target = scratch / self.name / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        run_source(self.name, path, self.source)


def send_files(dumps: Callable[[Any], bytes], content: Any, other_machines: bool) -> tuple[list[SentFile], bytes]:
    """Pickle something for another process, with the task files that it needs there.

    Args:
        dumps: Pickles.
        content: What is pickled.
        other_machines: Whether the process may be on a machine that lacks the files.

    Returns:
        The files to run first, and the pickle of (what changed in their modules, content).
    """
    changes: dict[Variable, Any] = {}
    needed: list[TaskFile] = []
    while True:
        payload = dumps((changes, content))
        more = [f for f in LOADED.values() if f not in needed and f.is_named_in(payload)]
        if not more:
            break
        needed += more
        changes |= {key: value for f in more for key, value in f.changes().items() if _succeeds(dumps, value)}
    return [SentFile(f.name, f.path, f.source, f.sources() if other_machines else {}) for f in needed], payload


@dataclass(frozen=True)
class Parcel:
    """Something on its way to another process, with the task files that have to run there before it is unpickled.

    Attributes:
        files: The task files.
        pickled: The pickle of (what changed in these files' modules, the content).
        digest: A hash of both.
    """

    files: list[SentFile]
    pickled: bytes
    digest: str = ""

    @classmethod
    def pack(cls, content: Any, other_machines: bool) -> Self:
        """Pickle something. Task files travel as files; only what lies in `__main__` goes by value.

        Args:
            content: What is pickled.
            other_machines: Whether the process may be on a machine that lacks the files.
        """
        files, pickled = send_files(cloudpickle.dumps, content, other_machines)
        return cls(files, pickled, digest([str(f.path) for f in files], *(f.source for f in files), pickled))

    def open(self, scratch: Path) -> Any:
        """Run the task files and unpickle the content.

        Args:
            scratch: Folder for task files that are not on this machine.
        """
        for file in self.files:
            file.load(scratch)
        changes, content = pickle.loads(self.pickled)
        restore(changes)
        return content


def restore(changes: Mapping[Variable, Any]) -> None:
    """Set variables of modules and classes.

    Args:
        changes: As `TaskFile.changes` found them.
    """
    for (module, owner, name), value in changes.items():
        found = importlib.import_module(module)
        setattr(getattr(found, owner) if owner else found, name, value)


# --- variables -----------------------------------------------------------------------------------------


def _beside(folder: Path) -> Iterator[ModuleType]:
    """The modules that were imported from a folder; not what is installed in an environment below it, nor rankopt."""
    for module in list(sys.modules.values()):
        file, name = getattr(module, "__file__", None), getattr(module, "__name__", "")
        if not isinstance(file, str) or name.partition(".")[0] in ("rankopt", "__main__"):
            continue
        if Path(file).is_relative_to(folder) and not {"site-packages", "dist-packages"} & set(Path(file).parts):
            yield module


def _variables(module: ModuleType) -> Iterator[tuple[Variable, Any]]:
    """A module's variables and those of its classes: not methods and other descriptors, nor imported modules."""
    for name, value in list(vars(module).items()):
        if name.startswith("__") or isinstance(value, ModuleType):
            continue
        if not isinstance(value, type):
            yield (module.__name__, "", name), value
        elif value.__module__ == module.__name__:
            for attribute, inner in list(vars(value).items()):
                if not attribute.startswith("__") and not hasattr(type(inner), "__get__"):
                    yield (module.__name__, name, attribute), inner


class _Hash:
    """A file that keeps only a hash of what is written."""

    def __init__(self) -> None:
        self.hash, self.size = hashlib.blake2b(), 0

    def write(self, part: Any) -> int:
        self.size += len(part)
        if self.size > DIGESTED:
            raise OverflowError
        self.hash.update(part)
        return len(part)


def _digest(value: Any) -> Any:
    """Something that changes with a value: a hash of its pickle, or where that is not to be had, its identity."""
    found = _Hash()
    try:
        pickle.Pickler(found, protocol=5).dump(value)
    except Exception:  # noqa: BLE001  # whatever a user's object raises when it is pickled
        return id(value)
    return found.hash.digest()


def _succeeds(dumps: Callable[[Any], bytes], value: Any) -> bool:
    try:
        dumps(value)
    except Exception:  # noqa: BLE001  # open files, generators and such: made where they are needed
        return False
    return True


def _all_equal(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether a folder has these files with these contents."""
    files = {folder / relative: content for relative, content in contents.items()}
    return all(f.is_file() and f.read_bytes() == content for f, content in files.items())
