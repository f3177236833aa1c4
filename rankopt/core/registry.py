"""Registries of named classes, to which other packages add theirs through entry points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import TypeVar

from rankopt.core.errors import RankoptError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Read-only mapping from names to what is registered under them.

    Entry points are looked up when a name that is not built in is first asked for. Packages cannot replace a built-in
    name. Looking up an unknown name raises a RankoptError that lists the valid ones.

    Args:
        what: What is registered, for messages: "strategy".
        group: The entry point group in which packages register theirs.
        built_in: Name -> what rankopt registers itself.
    """

    def __init__(self, what: str, group: str, built_in: Mapping[str, T]) -> None:
        self.what, self.group, self.built_in = what, group, dict(built_in)

    @cached_property
    def _all(self) -> dict[str, T]:
        added = {e.name: e for e in entry_points(group=self.group) if e.name not in self.built_in}
        return {**self.built_in, **{name: e.load() for name, e in added.items()}}

    def __getitem__(self, name: str) -> T:
        if name in self.built_in:
            return self.built_in[name]
        if name not in self._all:
            raise RankoptError(f"unknown {self.what} {name!r}: choose from {', '.join(self)}")
        return self._all[name]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
