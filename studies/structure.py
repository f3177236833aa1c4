"""Count modules, levels, arrows and circles of the package, and of its rooms: the shape of the house.

    python studies/structure.py              # this checkout
    python studies/structure.py ../old       # another one, for a comparison

An arrow is a module that imports another (inside functions too). A module's level is the longest chain of imports below
it; modules on a circle share one. Prints a Markdown table; needs grimp, which import-linter brings.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import numpy as np
from scipy.sparse.csgraph import connected_components

Arrows = Mapping[str, set[str]]


def circles(arrows: Arrows) -> list[set[str]]:
    """Groups of two or more that reach each other: the strongly connected components."""
    names = sorted(arrows)
    matrix = np.array([[other in arrows[name] for other in names] for name in names])
    _, labels = connected_components(matrix, connection="strong")
    groups: dict[int, set[str]] = defaultdict(set)
    for name, label in zip(names, labels, strict=True):
        groups[label].add(name)
    return [group for group in groups.values() if len(group) > 1]


def levels(arrows: Arrows) -> int:
    """The longest chain of imports, a circle counting as one."""
    group_of = {name: min(group) for group in circles(arrows) for name in group}
    below: dict[str, set[str]] = {group_of.get(name, name): set() for name in arrows}
    for name, others in arrows.items():
        node = group_of.get(name, name)
        below[node] |= {group_of.get(other, other) for other in others} - {node}
    depth: dict[str, int] = {}
    for node in TopologicalSorter(below).static_order():
        depth[node] = 1 + max((depth[other] for other in below[node]), default=0)
    return max(depth.values(), default=0)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)
    sys.path.insert(0, str(root))
    graph = grimp.build_graph("rankopt", cache_dir=None)
    packages = {m for m in graph.modules if (root / Path(*m.split(".")) / "__init__.py").is_file()}
    files = {m for m in graph.modules if m not in packages or graph.find_modules_directly_imported_by(m)}
    arrows = {m: set(graph.find_modules_directly_imported_by(m)) & files for m in files if m != "rankopt"}

    def room(module: str) -> str:
        return module.split(".")[1] if module != "rankopt" else "rankopt"

    rooms: dict[str, set[str]] = {room(m): set() for m in arrows}
    for module, others in arrows.items():
        rooms[room(module)] |= {room(o) for o in others if o != "rankopt"} - {room(module)}
    print("| of | number | levels | arrows | circles |\n|---|---|---|---|---|")
    for name, found in (("modules", arrows), ("rooms", rooms)):
        drawn = sum(map(len, found.values()))
        print(f"| {name} | {len(found)} | {levels(found)} | {drawn} | {len(circles(found))} |")
    flat = [m for m in files - packages if m.count(".") == 1]
    print(f"\n{len(flat)} modules lie flat in the package.")
    for group in circles(arrows):
        print("circle:", ", ".join(sorted(group)))


if __name__ == "__main__":
    main()
