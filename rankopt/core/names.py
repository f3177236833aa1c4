"""Names of layers for readers: short ones that stay different, and groups of a long model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_NAME = 19
"""Characters of a layer's name that are shown in a picture."""

LONG_MODEL = 40
"""Layers from which on a model is shown in groups."""


@dataclass(frozen=True)
class Group:
    """Layers of one module.

    Attributes:
        name: The module's name; of one layer alone, the layer's.
        members: Their places among all layers.
    """

    name: str
    members: tuple[int, ...]


def groups(names: Sequence[str]) -> list[Group]:
    """Group the layers of a long model by the modules that hold them.

    Of all depths in the tree of modules, that one is taken at which neither the groups nor the layers of the largest
    group are many: the blocks of a transformer, for example.

    Args:
        names: The full names, in the model's order.

    Returns:
        The groups by their first layer; for a model of at most LONG_MODEL layers, one without a name.
    """
    if len(names) <= LONG_MODEL:
        return [Group("", tuple(range(len(names))))]
    paths = [name.split(".") for name in names]
    depths = [_grouped(paths, depth) for depth in range(1, max(map(len, paths)))]
    best = min(depths, key=lambda found: max(len(found), *map(len, found.values())), default=_grouped(paths, 1))
    return [Group(name, tuple(members)) for name, members in best.items()]


def _grouped(paths: Sequence[Sequence[str]], depth: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        found.setdefault(".".join(path[:depth]), []).append(i)
    return found


def short(name: str, most: int = LONGEST_NAME) -> str:
    """Shorten a name to its end.

    Args:
        name: The full name.
        most: Characters that are kept.
    """
    name = (name or "(the model)").encode(errors="replace").decode()  # lone surrogates have no glyph
    return name if len(name) <= most else "…" + name[1 - most :]


def labels(names: Sequence[str], most: int = LONGEST_NAME) -> list[str]:
    """Shorten layers' names such that they stay different.

    The modules that hold all of them are left out. In names that are still long, modules are cut to their first letter
    and number, from the left: `e.l.11.a.self.query`.

    Args:
        names: The full names, all different.
        most: Characters that a label has at most.
    """
    paths = [name.split(".") for name in names]
    least = min(map(len, paths)) - 1 if len(paths) > 1 else 0
    shared = next((i for i in range(least) if len({path[i] for path in paths}) > 1), least)
    found = [short(_initials(path[shared:], most), most) for path in paths]
    seen: Counter[str] = Counter()
    for i, label in enumerate(found):
        seen[label] += 1
        found[i] += f" ({seen[label]})" * (seen[label] > 1)
    return found


def _initials(path: list[str], most: int) -> str:
    """A dotted name with as few modules cut to their first letter and number as make it short enough."""
    for i in range(len(path) - 1):
        if len(".".join(path)) <= most:
            break
        path = [*path[:i], re.sub(r"^(\D).*?(\d*)$", r"\1\2", path[i]), *path[i + 1 :]]
    return ".".join(path)
