"""Registries of named classes, to which other packages add theirs through entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.task_file import file_module

T = TypeVar("T")


def imported(name: str, what: str) -> Any:
    """Import what a user names, from an installed package, a module in the working directory or a file.

    Args:
        name: "module:Class", "FILE.py:Class", or "module:object.attribute".
        what: What it is to be, for messages.

    Raises:
        RankoptError: It cannot be imported.
    """
    module, _, attributes = name.rpartition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = file_module(Path(module)) if module.endswith(".py") else import_module(module)
        return attrgetter(attributes)(found)
    except Exception as error:  # whatever another module's import raises
        said = str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"
        raise RankoptError(
            f"{what} {name!r} cannot be imported ({said}): give MODULE:CLASS or FILE.py:CLASS"
        ) from error


def _sound(name: str, found: Any) -> None:
    """What is registered is taken as it is."""


def _none(name: str) -> None:
    """There are no variants."""


class Registry(Mapping[str, T]):
    """Mapping from names to what is registered under them: by rankopt, by `add` in this process, or by entry points.

    Entry points are looked up when a name that is not built in is first asked for, and each is loaded when it is used:
    a broken package does not get in the way of the others. Packages cannot replace a built-in name. Looking up an
    unknown name raises a RankoptError that lists the valid ones; one that cannot be used, a RankoptError that names its
    package.

    Args:
        what: What is registered, for messages: "strategy".
        group: The entry point group in which packages register theirs.
        built_in: Name -> what rankopt registers itself.
        fault: Says what is wrong with what is to be registered under a name; None if nothing is.
        variant: Makes rankopt's own of a name that is not listed, such as a listed one with a setting; None for any
            other name.

    Attributes:
        registered: Name -> what `add` registered. Other processes do not have it by themselves.
    """

    def __init__(
        self,
        what: str,
        group: str,
        built_in: Mapping[str, T],
        fault: Callable[[str, Any], str | None] = _sound,
        variant: Callable[[str], T | None] = _none,
    ) -> None:
        self.what, self.group, self.built_in, self.fault, self.variant = what, group, dict(built_in), fault, variant
        self.registered: dict[str, T] = {}
        self._loaded: dict[str, T] = {}

    def add(self, name: str, found: T) -> str:
        """Register something for this process. Where it was registered before, as by a notebook's cell, it is replaced.

        Args:
            name: Its name.
            found: What is registered.

        Returns:
            The name.

        Raises:
            RankoptError: The name is taken by something else, or what is given cannot be used.
        """
        if self.is_own(name):
            raise RankoptError(f"the {self.what} {name!r} is rankopt's own: give yours another name")
        if fault := self.fault(name, found):
            raise RankoptError(f"the {self.what} {name!r} cannot be registered: {fault}")
        if name in self.registered and _origin(self.registered[name]) != _origin(found):
            raise RankoptError(
                f"the {self.what} {name!r} is {self.registered[name]!r} already: give {found!r} another name"
            )
        self.registered[name] = found
        return name

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self.group) if e.name not in self.built_in}

    def is_own(self, name: str) -> bool:
        """Whether a name stands for something of rankopt itself.

        Args:
            name: The name.
        """
        return name in self.built_in or self.variant(name) is not None

    def __getitem__(self, name: str) -> T:
        if name in self.built_in:
            return self.built_in[name]
        if (own := self.variant(name)) is not None:
            return own
        if name in self.registered:
            return self.registered[name]
        if name not in self._added:
            raise RankoptError(
                f"unknown {self.what} {name!r}: choose from {', '.join(self)}; rankopt.register makes your own known"
            )
        if name not in self._loaded:
            self._loaded[name] = self._load(self._added[name])
        return self._loaded[name]

    def _load(self, entry: EntryPoint) -> T:
        package = entry.dist.name if entry.dist else entry.module
        try:
            found = entry.load()
        except Exception as error:  # whatever another package's import raises
            raise RankoptError(
                f"the {self.what} {entry.name!r} of package {package} cannot be loaded ({type(error).__name__}: "
                f"{error}): mend that package, or remove it"
            ) from error
        if fault := self.fault(entry.name, found):
            raise RankoptError(f"the {self.what} {entry.name!r} of package {package} cannot be used: {fault}")
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self.is_own(name) or name in self.registered or name in self._added)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.built_in, *self._added, *self.registered]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _origin(found: Any) -> tuple[str, ...]:
    """Where something is defined, and what tells one object of a class from another."""
    kind, state = (found, "") if isinstance(found, type) else (type(found), repr(sorted(vars(found).items())))
    return kind.__module__, kind.__qualname__, state
