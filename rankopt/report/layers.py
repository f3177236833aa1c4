"""The table of layers on a report's page: its groups, and each layer's frontier as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rankopt.core.budget import amount
from rankopt.core.names import groups
from rankopt.core.result_record import FrontierPoint, FrontiersFile, LayerRow, Metric
from rankopt.report.pictures import ACCENT, FAINT, GRID, NAMES
from rankopt.search.summary import counted, percent, rank_text

WIDTH, HEIGHT, EDGE = 560, 150, 10
"""Size of a frontier's picture, and the room around its points."""


@dataclass(frozen=True)
class Frontier:
    """A layer's candidates on the page.

    Attributes:
        picture: An <svg> element without text, whose size follows the page.
        text: What its axes are, and how many candidates it shows.
    """

    picture: Markup
    text: str


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one module on the page.

    Attributes:
        name: The module; empty where the model is short enough to need no groups.
        layers: The layers.
        text: How many they are, and what they keep together.
    """

    name: str
    layers: Sequence[LayerRow]
    text: str


def layer_groups(rows: Sequence[LayerRow]) -> list[LayerGroup]:
    """Group the layers of a long model.

    Args:
        rows: The layers of result.json.
    """
    found = []
    for group in groups([row["name"] for row in rows]):
        members = [rows[i] for i in group.members]
        n, params, dense = len(members), sum(x["params"] for x in members), sum(x["dense_params"] for x in members)
        kept = f", {percent(params / dense, 0)} of {dense:,} parameters kept" if dense else ""
        found.append(LayerGroup(group.name, members, f"{counted(n, 'layer')}{kept}"))
    return found


def frontier_pictures(
    rows: Sequence[LayerRow], frontiers: FrontiersFile | None, colours: Mapping[str, str]
) -> dict[str, Frontier]:
    """Draw the frontiers of a run's layers.

    Args:
        rows: The layers of result.json.
        frontiers: The content of frontiers.json, if there is one.
        colours: Method -> colour.

    Returns:
        By layer name; layers that had to stay dense have none.
    """
    if frontiers is None:
        return {}
    found = frontiers["layers"]
    return {
        row["name"]: _frontier(points, row, frontiers["metric"], colours)
        for row in rows
        if (points := found.get(row["name"]))
    }


def _frontier(points: Sequence[FrontierPoint], row: LayerRow, metric: Metric, colours: Mapping[str, str]) -> Frontier:
    """One frontier: cost to the right, predicted rise of the objective upwards, on a logarithmic scale."""
    positive = [p["loss"] for p in points if p["loss"] > 0] or [1.0]
    low, high = min(positive) / 2, max(positive)  # what loses nothing is drawn below all others
    most = max(p["cost"] for p in points) or 1

    def place(p: FrontierPoint) -> tuple[float, float]:
        up = math.log(max(p["loss"], low) / low) / math.log(high / low)
        return EDGE + p["cost"] / most * (WIDTH - 2 * EDGE), HEIGHT - EDGE - up * (HEIGHT - 2 * EDGE)

    chosen = (row["method"], list(row["rank"]), row.get("form"), row.get("precision"))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
    axes = f"M{EDGE / 2},0 V{HEIGHT - EDGE / 2} H{WIDTH}"
    drawn = [
        f'<path d="{axes}" fill="none" stroke="{FAINT}"/>',
        f'<polyline points="{line}" fill="none" stroke="{GRID}" stroke-width="2"/>',
    ]
    for p in sorted(points, key=lambda p: _label(p) == chosen):  # the chosen one is on top
        x, y = place(p)
        star = _label(p) == chosen
        ring = f' stroke="{ACCENT}" stroke-width="4"' if star else ""
        rank = f", rank {rank_text(p['rank'])}" if p["rank"] else ""
        text = escape(
            f"{'chosen: ' * star}{p['method']}{rank}: {amount(metric, p['cost'])} {NAMES[metric]}, rise {p['loss']:.2g}"
        )
        drawn.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{8 if star else 5}" fill="{colours.get(p["method"], GRID)}"{ring}>'
            f"<title>{text}</title></circle>"
        )
    return Frontier(
        Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'),
        f"{len(points)} candidates that no other beats. To the right: {NAMES[metric]}, 0 to {amount(metric, most)}. "
        f"Upwards: the predicted rise of the objective, {min(positive):.2g} to {high:.2g} on a logarithmic scale; at "
        "the bottom none. Ringed: the chosen one.",
    )


def _label(p: FrontierPoint) -> tuple[str, list[int], str, str]:
    return p["method"], list(p["rank"]), p["form"], p["precision"]
