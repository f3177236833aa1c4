"""The report's pictures: matplotlib figures as inline SVG, narrow enough for a phone, or as PNG.

A painter is a function (ax, *content) that draws on matplotlib axes; `draw` and `png` give it the figure.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import axes, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from rankopt.core.budget import SCALES
from rankopt.core.names import labels
from rankopt.core.records import BUDGETS, DENSE, Candidate
from rankopt.core.result_record import LayerRow, ResultInfo, TrialRow
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.search.summary import percent, rank_text

Axes = axes.Axes
"""Matplotlib's axes, for annotations elsewhere."""


NAMES = {
    "params": "parameters",
    "macs": "MACs",
    "bytes": "bytes",
    "latency": "latency",
    "energy": "energy",
    "memory": "memory",
    "disk": "file size",
}
"""What a metric is called in texts and on axes."""


WIDTH = 4.2
"""Width of a picture in inches: on a phone, 10 pt text stays about as large as the page's small print."""


INK, FAINT, GRID, ACCENT, BAD = "#24292f", "#7d8690", "#e6e8eb", "#c2410c", "#b91c1c"


POINT = "#3b6ea5"


COLOURS = (
    *("#3b6ea5", "#5fb3ce", "#2a9d8f", "#8ab17d", "#e9a23b", "#d1603d", "#8e5ea2", "#c77dba", "#6b705c"),
    *("#1d3557", "#b5a642", "#7f4f24", "#e5989b", "#4d908e", "#9a031e"),
)


Number = Literal["objective", "predicted", "score"]
"""A key of a trial under which there is a number, or None."""


STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rankopt",
    "text.parse_math": False,  # a $ in a user's name is no formula
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.2,
    "savefig.transparent": True,
}


def colours(methods: Sequence[str]) -> dict[str, str]:
    """The colour of each method; the same in every report, whichever methods a plan uses.

    Args:
        methods: The methods of a plan; families that are not registered here get colours, too.
    """
    known = [*DECOMPOSITIONS, *sorted(set(methods) - set(DECOMPOSITIONS) - {DENSE})]
    return {DENSE: FAINT} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(known)}


def draw(
    paint: Callable[..., None], *arguments: Any, height: float = 3.1, width: float = WIDTH, name: str | None = None
) -> str:
    """Run a painter on new axes.

    Args:
        paint: The painter, called as paint(ax, *arguments).
        arguments: What it shows.
        height: Height of the picture in inches.
        width: Its width in inches.
        name: Prefix of the ids; needed where a page has several pictures of one painter.

    Returns:
        An <svg> element whose ids no other picture of the page shares.
    """
    file = io.StringIO()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib may lack a font for a name's script; the browser has one
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot(), *arguments)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name or paint.__name__}-", svg)


def on_axes(ax: Axes | None, paint: Callable[..., None], *arguments: Any, height: float = 3.6) -> Axes:
    """Run a painter on axes that the user goes on with, as the plots of a result do.

    Args:
        ax: The axes; None for those of a new figure of pyplot, which notebooks show.
        paint: The painter, called as paint(ax, *arguments).
        arguments: What it shows.
        height: Height of a new figure in inches.
    """
    from matplotlib import pyplot

    # Outside of the style: the first figure starts the backend, whose settings would end with the style.
    figure = ax.figure.figure if ax else pyplot.figure(figsize=(6.4, height), layout="constrained")
    with style.context(["default", STYLE]):
        ax = ax or figure.add_subplot()
        paint(ax, *arguments)
        figure.draw_without_rendering()  # ticks are made now, in this style, rather than when the figure is shown
    return ax


def png(path: Path, paint: Callable[..., None], content: Any, size: tuple[float, float] = (6.4, 5.6)) -> None:
    """Run a painter on a new white figure and write it as PNG.

    Args:
        path: The file to write.
        paint: The painter, called as paint(figure, content).
        content: What it shows.
        size: Width and height in inches.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure, content)
        figure.savefig(path, format="png", dpi=150, transparent=False)


def finished(trials: Sequence[TrialRow], *keys: Number) -> list[TrialRow]:
    """The trials that have a finite number under every key.

    Args:
        trials: The trials of a run.
        keys: What is to be shown of them.
    """
    return [t for t in trials if all((x := t[k]) is not None and math.isfinite(x) for k in keys)]


def numbers(trials: Sequence[TrialRow], key: Number) -> list[float]:
    """What trials have under a key.

    Args:
        trials: Trials that `finished` returned for this key.
        key: The key.
    """
    return [x for t in trials if (x := t[key]) is not None]


def chosen_trial(info: ResultInfo, trials: Sequence[TrialRow]) -> TrialRow:
    """The trial that the search chose: the best one, unless that missed its budget when it was measured.

    Args:
        info: The content of result.json.
        trials: The trials with an objective, at least one.
    """
    number = info["objective"].get("trial")
    return min(trials, key=lambda t: (t["number"] != number, t["objective"], t["number"]))


# --- painters ----------------------------------------------------------------------------------------


def _ticks(metric: str) -> Any:
    """Numbers on an axis of costs."""
    if metric not in SCALES:
        return EngFormatter(sep="")
    text = EngFormatter(SCALES[metric], sep=" ")
    return FuncFormatter(lambda value, _: text(value / 1e9))


def size(ax: Any, info: ResultInfo, trials: Sequence[TrialRow]) -> None:
    """Draw score (objective, if there is no score) against the budget's first metric.

    Args:
        ax: Matplotlib axes.
        info: The content of result.json.
        trials: The trials; may be empty.
    """
    metric, budget = next(iter(info["budget"].items()))
    dense, score = info["score"]["dense"]["validation"], info["score"]["compressed"]["validation"]
    key: Number = "objective" if score is None else "score"
    chosen = info["objective"]["best"] if score is None else score
    done = finished(trials, key)
    costs = [float(t["cost"][BUDGETS.index(metric)]) for t in done]
    points = list(zip(costs, numbers(done, key), strict=True))
    ax.axvline(budget["target"], color=ACCENT, lw=1, ls="--")
    ax.text(budget["target"], 1.02, "budget", color=ACCENT, ha="center", transform=ax.get_xaxis_transform())
    if key == "score":
        points = _score_axis(ax, points, [v for v in (dense, chosen) if v is not None])
    else:
        objective_axis(ax, "y", [y for _, y in points])
    if len(points) > 1:
        ax.scatter(*zip(*points, strict=True), s=32, color=POINT, alpha=0.6, lw=0)
    if key == "score" and dense is not None:
        ax.plot([budget["dense"], budget["achieved"]], [dense, chosen], color=FAINT, lw=1, ls=":")
        ax.scatter(budget["dense"], dense, s=50, color=INK, marker="s", zorder=3)
        _name(ax, (budget["dense"], dense), f"dense {percent(dense)}", "right", above=dense >= chosen)
    else:
        ax.axvline(budget["dense"], color=INK, lw=1, ls=":")
        ax.text(budget["dense"], 1.02, "dense", ha="center", transform=ax.get_xaxis_transform())
    _star(ax, budget["achieved"], chosen)
    label = f"chosen {percent(chosen)}" if key == "score" else "chosen"
    _name(ax, (budget["achieved"], chosen), label, "left", above=key != "score" or chosen > (dense or 0))
    ax.set(xlim=(0, 1.08 * budget["dense"]), xlabel=NAMES[metric], ylabel="validation score" if key == "score" else key)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(_ticks(metric))


def progress(ax: Any, info: ResultInfo, trials: Sequence[TrialRow]) -> None:
    """Draw the objective over the trials, with the best so far and the failed ones.

    Args:
        ax: Matplotlib axes.
        info: The content of result.json.
        trials: The trials, at least one with an objective.
    """
    done = finished(trials, "objective")
    values = numbers(done, "objective")
    x = [t["number"] for t in done]
    ax.scatter(x, values, s=32, color=POINT, alpha=0.6, lw=0, label="trial")
    least = [min(values[: i + 1]) for i in range(len(values))]
    ax.step([*x, trials[-1]["number"]], [*least, least[-1]], where="post", color=POINT, lw=1.5, label="best so far")
    failed = [t["number"] for t in trials if t["state"] == "failed"]
    if failed:
        ax.scatter(
            failed, [0.97] * len(failed), marker="x", color=BAD, transform=ax.get_xaxis_transform(), label="failed"
        )
    chosen = chosen_trial(info, done)
    _star(ax, chosen["number"], *numbers([chosen], "objective"), label="chosen")
    objective_axis(ax, "y", values)
    ax.margins(y=0.1)
    ax.set(xlabel="trial", ylabel="objective (less is better)")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(ax, 4)


def prediction(ax: Any, info: ResultInfo, trials: Sequence[TrialRow]) -> None:
    """Draw the measured objective of each trial against the predicted rise, the sum of its layers' losses.

    Args:
        ax: Matplotlib axes.
        info: The content of result.json.
        trials: The trials, at least one with both numbers.
    """
    done = finished(trials, "objective", "predicted")
    x, y = numbers(done, "predicted"), numbers(done, "objective")
    ends = [min(x + y), max(x + y)]
    ax.plot(ends, ends, color=FAINT, lw=1, ls="--", label="as predicted")
    ax.scatter(x, y, s=32, color=POINT, alpha=0.6, lw=0, label="trial")
    chosen = chosen_trial(info, done)
    _star(ax, *numbers([chosen], "predicted"), *numbers([chosen], "objective"), label="chosen")
    objective_axis(ax, "x", x + y)
    objective_axis(ax, "y", x + y)
    ax.set(xlabel="predicted rise of the objective", ylabel="measured objective")
    _legend(ax, 3)


def layers(ax: Any, rows: Sequence[LayerRow]) -> None:
    """Draw a bar per layer: dense parameters (light), parameters kept (solid), and the rank at its end.

    Args:
        ax: Matplotlib axes.
        rows: The layers of result.json.
    """
    colour = colours([x["method"] for x in rows])
    least, most = min(max(1, min(x["params"], x["dense_params"])) for x in rows), max(x["dense_params"] for x in rows)
    scale = "linear" if most < 20 * least else "square-root" if most < 2000 * least else "logarithmic"
    _length_axis(ax, scale, least, max(1, most))
    for y, row in enumerate(rows):
        dense = row["method"] == DENSE
        ax.barh(y, row["dense_params"], 0.68, color=colour[row["method"]], alpha=0.28, lw=0)
        ax.barh(y, row["params"], 0.68, color=colour[row["method"]], lw=0)
        share = f" · {row['params'] / max(row['dense_params'], 1):.0%}"
        label = DENSE if dense else rank_text(row["rank"]).replace(" ", "") + share
        end = max(row["dense_params"], row["params"])
        ax.annotate(label, (end, y), (4, 0), textcoords="offset points", va="center", color=FAINT if dense else INK)
    rows_axis(ax, labels([x["name"] for x in rows]))
    ax.set_xlabel("parameters" + ("" if scale == "linear" else f", {scale} scale"))


def modules(ax: Any, groups: Sequence[Any]) -> None:
    """Draw a bar per module of a long model: dense parameters (light), and those kept, by method.

    Args:
        ax: Matplotlib axes.
        groups: The modules, as `layer_groups` returns them.
    """
    colour = colours([x["method"] for group in groups for x in group.layers])
    for y, group in enumerate(groups):
        dense, end = sum(x["dense_params"] for x in group.layers), 0
        ax.barh(y, dense, 0.68, color=FAINT, alpha=0.28, lw=0)
        for method in colour:
            kept = sum(x["params"] for x in group.layers if x["method"] == method)
            ax.barh(y, kept, 0.68, left=end, color=colour[method], lw=0)
            end += kept
        ax.annotate(f"{end / max(dense, 1):.0%}", (max(dense, end), y), (4, 0), textcoords="offset points", va="center")
    _length_axis(ax, "linear", 1, max(sum(x["dense_params"] for x in group.layers) for group in groups))
    rows_axis(ax, labels([group.name for group in groups]))
    ax.set_xlabel("parameters")


def layers_with_methods(ax: Any, rows: Sequence[LayerRow]) -> None:
    """Draw `layers`, with a legend of the methods: a page has its table for that.

    Args:
        ax: Matplotlib axes.
        rows: The layers of result.json.
    """
    layers(ax, rows)
    for method in dict.fromkeys(x["method"] for x in rows):
        ax.barh(0, 0, color=colours([x["method"] for x in rows])[method], label=method)
    _legend(ax, 4)


def frontier(ax: Any, layer: str, metric: str, candidates: Sequence[Candidate], chosen: Candidate) -> None:
    """Draw a layer's frontier: predicted rise of the objective against cost, by method.

    Args:
        ax: Matplotlib axes.
        layer: The layer's name.
        metric: The metric of the cost.
        candidates: The frontier.
        chosen: The candidate that the plan has.
    """
    positive = [c.loss for c in candidates if c.loss > 0]
    floor = min(positive, default=1.0) / 3  # dense and exact candidates lose nothing, which a logarithm cannot show
    shown = {id(c): max(c.loss, floor) for c in candidates}
    ax.plot([c.cost[metric] for c in candidates], [shown[id(c)] for c in candidates], color=GRID, lw=1.5, zorder=1)
    colour = colours([c.method for c in candidates])
    for method in dict.fromkeys(c.method for c in candidates):
        some = [c for c in candidates if c.method == method]
        x, y = [c.cost[metric] for c in some], [shown[id(c)] for c in some]
        ax.scatter(x, y, s=32, color=colour[method], lw=0, label=method, zorder=2)
    _star(ax, chosen.cost[metric], shown[id(chosen)], label="chosen")
    for c in candidates:
        if c.loss <= 0:
            at = c.cost[metric], floor
            ax.annotate("no loss", at, (-8, 0), textcoords="offset points", ha="right", va="center")
    objective_axis(ax, "y", list(shown.values()))
    ax.set(xlabel=f"{NAMES[metric]} of {layer or 'the model'}", ylabel="predicted rise of the objective")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(_ticks(metric))
    _legend(ax, 4)


def layers_height(rows: Sequence[Any]) -> float:
    """Height in inches of the picture of the layers.

    Args:
        rows: The layers of result.json, or modules.
    """
    return 0.6 + 0.235 * len(rows)


# --- their parts -------------------------------------------------------------------------------------


def rows_axis(ax: Any, names: Sequence[str], **text: Any) -> None:
    """Make the y axis one of named rows, the first on top.

    Args:
        ax: Matplotlib axes.
        names: Their names.
        text: Properties of the labels.
    """
    ax.set_yticks(range(len(names)), names, **text)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _length_axis(ax: Any, scale: str, least: int, most: int) -> None:
    """Scale the x axis such that both the least and the most parameters of a layer can be seen."""
    if scale == "logarithmic":
        ax.set_xscale("log")
        ax.set_xlim(least / 3, most)
        ax.xaxis.set_major_locator(LogLocator(numticks=4))
        ax.xaxis.set_minor_locator(NullLocator())
    elif scale == "square-root":
        ax.set_xscale("function", functions=(lambda v: np.sqrt(np.abs(v)), np.square))
        ax.set(xlim=(0, most), xticks=_square_root_ticks(most))
    else:
        ax.set_xlim(0, most)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _square_root_ticks(most: int) -> list[float]:
    """Round numbers that lie apart on an axis of square roots; no even steps are round there."""
    ticks = [math.inf]
    for tick in (m * 10.0**k for k in range(math.ceil(math.log10(most)), -1, -1) for m in (5, 2, 1)):
        apart = 0.2 * math.sqrt(most)
        if apart**2 <= tick <= most and math.sqrt(ticks[-1]) - math.sqrt(tick) >= apart:
            ticks.append(tick)
    return [0.0, *reversed(ticks[1:])]


def _score_axis(ax: Any, points: list[tuple[float, float]], shown: Sequence[float]) -> list[tuple[float, float]]:
    """Limit the axis to scores near those `shown`, so that they stay apart; lower ones are counted on the edge.

    Returns the points within the limits.
    """
    scores = [y for _, y in points]
    top = max([*scores, *shown])
    low = min(shown)
    room = max(top - low, 0.01)
    floor = max(min([low, *scores]) - 0.4 * room, low - max(0.02, 2 * room))
    below = [(x, floor) for x, y in points if y < floor]
    if below:
        ax.scatter(*zip(*below, strict=True), s=32, color=POINT, alpha=0.6, lw=0, marker="v", clip_on=False)
        text = f"{len(below)} trial{'s'[: len(below) > 1]} below {percent(floor, 1)}"
        ax.annotate(text, max(below), (8, 3), textcoords="offset points", color=INK)
    ax.set_ylim(floor, top + 0.25 * room)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %"))
    return [(x, y) for x, y in points if y >= floor]


def objective_axis(ax: Any, which: str, values: Sequence[float]) -> None:
    """Scale an axis of objectives: logarithmic if the values are positive and far apart, with plain numbers.

    Args:
        ax: Matplotlib axes.
        which: "x" or "y".
        values: What is drawn along the axis.
    """
    axis = getattr(ax, f"{which}axis")
    if values and min(values) > 0 and max(values) > 10 * min(values):
        getattr(ax, f"set_{which}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 200 * min(values) else (1,), numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))


def _star(ax: Any, x: float, y: float, *, label: str | None = None) -> None:
    ax.scatter(x, y, s=150, color=ACCENT, marker="*", lw=0.8, edgecolor="white", zorder=4, label=label)


def _name(ax: Any, at: tuple[float, float], text: str, side: str, above: bool) -> None:
    """Write a text beside a point, on the side that the line between dense and chosen model leaves free."""
    offset = (8 if side == "left" else 4, 8 if above else -8)
    ax.annotate(text, at, offset, textcoords="offset points", ha=side, va="bottom" if above else "top")


def _legend(ax: Any, columns: int) -> None:
    """Write the legend above the axes; within them where other axes share the figure."""
    if len(ax.figure.axes) == 1:
        ax.figure.legend(loc="outside upper left", ncols=columns)
    else:
        ax.legend()
