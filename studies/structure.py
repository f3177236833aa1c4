"""Count modules, levels, arrows and circles of the package, and of its rooms: the shape of the house.

    python studies/structure.py              # this checkout
    python studies/structure.py ../old       # another one, for a comparison

An arrow is a module that imports another (inside functions too). A module's level is the longest chain of imports below
it; modules on a circle share one. Prints a Markdown table; needs grimp, which import-linter brings.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

import grimp

Arrows = Mapping[Hashable, set[Hashable]]


def circles(arrows: Arrows) -> list[set[Hashable]]:
    """Groups of two or more that reach each other (Tarjan 1972)."""
    order: dict[Hashable, int] = {}
    lowest: dict[Hashable, int] = {}
    stack: list[Hashable] = []
    found: list[set[Hashable]] = []

    def visit(node: Hashable) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(arrows[node], key=str):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            group = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            found.append(group)

    for node in arrows:
        if node not in order:
            visit(node)
    return [group for group in found if len(group) > 1]


def levels(arrows: Arrows) -> int:
    """The longest chain of imports, a circle counting as one."""
    groups = circles(arrows)
    group_of: dict[Hashable, Hashable] = {node: min(group, key=str) for group in groups for node in group}
    depth: dict[Hashable, int] = {}

    def measure(node: Hashable) -> int:
        members = [n for n in arrows if group_of.get(n, n) == node]
        below = {group_of.get(o, o) for n in members for o in arrows[n]} - {node}
        if node not in depth:
            depth[node] = 1 + max((measure(o) for o in below), default=0)
        return depth[node]

    return max((measure(group_of.get(n, n)) for n in arrows), default=0)


def shape(modules: Iterable[str], arrows: Arrows) -> tuple[int, int, int, int]:
    """(modules, levels, arrows, circles)."""
    return len(list(modules)), levels(arrows), sum(map(len, arrows.values())), len(circles(arrows))


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
        number, deep, drawn, round_ = shape(found, found)
        print(f"| {name} | {number} | {deep} | {drawn} | {round_} |")
    flat = [m for m in files - packages if m.count(".") == 1]
    print(f"\n{len(flat)} modules lie flat in the package.")
    for group in circles(arrows):
        print("circle:", ", ".join(sorted(map(str, group))))


if __name__ == "__main__":
    main()
