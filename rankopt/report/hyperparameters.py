"""A study with hyperparameters as a page, a CSV and pictures: importance, parallel coordinates, slices, the front."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from rankopt.core.files import write_beside
from rankopt.core.records import METRICS
from rankopt.experiments.config import OBJECTIVES, Hyperparameter
from rankopt.experiments.tuning import Searches
from rankopt.report import pictures
from rankopt.report.html import environment
from rankopt.report.pictures import ACCENT, FAINT, INK, NAMES, POINT, short

PAGE, CSV, TEMPLATE = "hyperparameters.html", "hyperparameters.csv", "hyperparameters.html.j2"


KEPT = ("score", "objective", *METRICS, "milliseconds", "seconds", "error")


LABELS = {
    **NAMES,
    "score": "validation score",
    "objective": "objective (less is better)",
    "milliseconds": "milliseconds",
}


class SearchTable(NamedTuple):
    """What the pictures show. rows: a finished search each, with number, settings and its value by objective."""

    hyperparameters: tuple[Hyperparameter, ...]
    objectives: tuple[str, ...]
    rows: list[dict[str, Any]]
    best: int
    front: set[int]
    importance: dict[str, dict[str, float]]

    def signed(self, row: dict[str, Any], objective: str) -> float:
        """The value as something to minimise."""
        return -row[objective] if OBJECTIVES[objective] == "maximize" else row[objective]


def table(searches: Searches) -> SearchTable:
    """Raises no error with few searches: importances are then empty."""
    rows = [
        {"number": t.number, "settings": t.params, **dict(zip(searches.objectives, t.values, strict=True))}
        for t in searches.finished()
    ]
    importance = {name: searches.importance(i) for i, name in enumerate(searches.objectives)}
    front = {t.number for t in searches.study.best_trials}
    hyperparameters = searches.file.hyperparameters
    return SearchTable(hyperparameters, searches.objectives, rows, searches.best().number, front, importance)


def write(searches: Searches) -> list[Path]:
    """Write hyperparameters.csv (one row a search), .html and the pictures as PNG; returns the paths."""
    out, found = searches.out, table(searches)
    write_beside(out / CSV, lambda p: _write_csv(p, searches))
    write_beside(out / PAGE, lambda p: p.write_text(render(searches, found), encoding="utf-8", errors="replace"))
    paths = [out / PAGE, out / CSV]
    for name, (paint, size) in _pictures(found).items():
        paths.append(out / f"{name}.png")
        write_beside(paths[-1], lambda p, paint=paint, size=size: pictures.png(p, _alone, (paint, found), size))
    slices = len(found.hyperparameters)
    paths.append(out / "slices.png")
    size = (3.0 * min(slices, 3), 2.3 * math.ceil(slices / 3))
    write_beside(paths[-1], lambda p: pictures.png(p, _slices, found, size))
    return paths


def _write_csv(path: Path, searches: Searches) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("search", *searches.distributions, *KEPT))
        for t in searches.done():
            writer.writerow(
                [t.number, *(t.params[name] for name in searches.distributions), *(t.user_attrs.get(k) for k in KEPT)]
            )


def render(searches: Searches, found: SearchTable) -> str:
    """The page."""
    best = searches.best()
    drawn = {name: pictures.draw(paint, found, height=h, width=w) for name, (paint, (w, h)) in _pictures(found).items()}
    slices = [
        (h.name, Markup(pictures.draw(slice_of, found, h, height=2.6, name=f"slice{i}")))
        for i, h in enumerate(found.hyperparameters)
    ]
    trials = sorted(searches.finished(), key=lambda t: t.number not in found.front)
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=searches.task.name or "model",
            strategy=searches.file.request.strategy,
            verdict=_verdict(searches, found),
            objectives=found.objectives,
            names=[h.name for h in found.hyperparameters],
            best=best,
            front=found.front,
            trials=trials,
            failed=[t for t in searches.done() if t not in trials and "error" in t.user_attrs],
            text=text,
            pictures={name: Markup(svg) for name, svg in drawn.items()},
            slices=slices,
        )
    )


def _verdict(searches: Searches, found: SearchTable) -> str:
    best = searches.best()
    values = ", ".join(f"{label(n)} {text(v)}" for n, v in zip(found.objectives, best.values, strict=True))
    one = f"{len(searches.done())} of {searches.file.searches} searches; the best, number {best.number}: {values}"
    return f"{one}; {len(found.front)} on the Pareto front." if len(found.objectives) > 1 else one + "."


def text(value: Any) -> str:
    """A setting or value as a person writes it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") if isinstance(value, float) else str(value)


# --- painters ----------------------------------------------------------------------------------------


def _pictures(found: SearchTable) -> dict[str, tuple[Any, tuple[float, float]]]:
    """Name -> painter (ax, table) and size in inches, of those that have something to show."""
    axes = len(found.hyperparameters) + len(found.objectives)
    shown: dict[str, tuple[Any, tuple[float, float]]] = {"parallel": (parallel, (max(4.2, 1.25 * axes), 3.4))}
    if any(found.importance.values()):
        height = 0.9 + 0.22 * len(found.hyperparameters) * (1 + len(found.objectives))
        shown["importance"] = (importance, (4.6, height))
    shown["front" if len(found.objectives) > 1 else "progress"] = (
        (front, (4.6, 3.4)) if len(found.objectives) > 1 else (progress, (4.6, 3.1))
    )
    return shown


def _alone(figure: Any, content: tuple[Any, SearchTable]) -> None:
    paint, found = content
    paint(figure.add_subplot(), found)


def importance(ax: Any, found: SearchTable) -> None:
    """Bars per hyperparameter, the most important for the first objective at the top."""
    first = next(v for v in found.importance.values() if v)
    names = sorted(first, key=lambda n: first[n])
    colours = (POINT, ACCENT, FAINT, INK, *pictures.COLOURS[1:])
    shown = [(o, v) for o, v in found.importance.items() if v]
    height = 0.8 / len(shown)
    for i, (objective, values) in enumerate(shown):
        y = np.arange(len(names)) + (len(shown) / 2 - i - 0.5) * height
        bars = [values.get(n, 0.0) for n in names]
        ax.barh(y, bars, 0.92 * height, color=colours[i], label=label(objective))
        for at, value in zip(y, bars, strict=True):
            ax.annotate(f"{value:.2f}", (value, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), [label(h) for n in names for h in found.hyperparameters if h.name == n])
    ax.set(xlabel="share of the variance of ranks (fANOVA)", xlim=(0, 1.12 * max(max(v.values()) for _, v in shown)))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    if len(shown) > 1:
        ax.figure.legend(loc="outside upper left", ncols=2)


def parallel(ax: Any, found: SearchTable) -> None:
    """A line per search through its settings and values: the best quarter dark, the best with its colour."""
    order = sorted(found.rows, key=lambda r: -found.signed(r, found.objectives[0]))
    dark = len(order) - max(1, len(order) // 4)
    columns: list[Hyperparameter | str] = [*found.hyperparameters, *found.objectives]
    for i, row in enumerate(order):
        y = [_height(found, column, row, i) for column in columns]
        best = row["number"] == found.best
        colour, width = (ACCENT, 2.2) if best else (POINT, 1.2) if i >= dark else (FAINT, 0.8)
        ax.plot(range(len(columns)), y, color=colour, lw=width, alpha=1 if best else 0.7 if i >= dark else 0.35)
    for x, column in enumerate(columns):
        ax.axvline(x, color=INK, lw=0.8)
        for height, mark in _marks(found, column):
            ax.annotate(mark, (x, height), (3, 0), textcoords="offset points", va="center", fontsize=7.5, bbox=HALO)
    labels = [short(label(c)) for c in columns]
    ax.set_xticks(range(len(columns)), labels, rotation=22, ha="right")
    ax.set(yticks=[], xlim=(-0.15, len(columns) - 0.45), ylim=(-0.06, 1.06))
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(axis="x", length=0)


HALO = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}


def _height(found: SearchTable, column: Hyperparameter | str, row: dict[str, Any], at: int) -> float:
    """Where a search passes an axis, from 0 to 1; choices are spread a little, so that lines stay apart."""
    if isinstance(column, str):
        values = [r[column] for r in found.rows]
        return (row[column] - min(values)) / ((max(values) - min(values)) or 1)
    value = row["settings"][column.name]
    if column.choices:
        names = list(column.choices)
        return names.index(value) / max(len(names) - 1, 1) + 0.06 * _spread(at)
    d: Any = column.distribution
    low, high, value = (math.log(v) if d.log else v for v in (d.low, d.high, value))
    return (value - low) / ((high - low) or 1)


def _spread(at: int) -> float:
    """A number in [-0.5, 0.5], evenly spread over consecutive integers."""
    return (at * 0.618034) % 1 - 0.5


def _marks(found: SearchTable, column: Hyperparameter | str) -> list[tuple[float, str]]:
    """Heights and labels on an axis."""
    if isinstance(column, str):
        values = [r[column] for r in found.rows]
        return [(0.0, text(min(values))), (1.0, text(max(values)))]
    if column.choices:
        names = list(column.choices)
        return [(i / max(len(names) - 1, 1), n.replace(" ", "\n")) for i, n in enumerate(names)]
    d: Any = column.distribution
    return [(0.0, text(d.low)), (1.0, text(d.high))]


def label(column: Hyperparameter | str) -> str:
    """What an axis is called: "rate" for training.rate."""
    if isinstance(column, str):
        return LABELS[column].split(" (")[0]
    return column.name if column.name.startswith("budget.") else column.name.partition(".")[2]


def slice_of(ax: Any, found: SearchTable, column: Hyperparameter) -> None:
    """The first objective over one hyperparameter."""
    objective, names = found.objectives[0], list(column.choices)
    shown = _within(found, objective)
    for i, row in enumerate(found.rows):
        value = row["settings"][column.name]
        x = names.index(value) + 0.3 * _spread(i) if names else value
        _point(ax, x, row, shown, chosen=row["number"] == found.best)
    if names:
        ax.set_xticks(range(len(names)), [n.replace(" ", "\n") for n in names], fontsize=7.5)
        ax.set_xlim(-0.5, len(names) - 0.5)
    elif getattr(column.distribution, "log", False):
        d: Any = column.distribution
        ax.set_xscale("log")
        ends = (d.low, math.sqrt(d.low * d.high), d.high)
        ax.set_xticks(ends, [f"{x:.2g}" for x in ends])
        ax.minorticks_off()
        ax.set_xlim(d.low / 1.15, d.high * 1.15)
    else:
        ax.locator_params(axis="x", nbins=4)
    ax.set(xlabel=label(column), ylabel=label(objective))
    ax.locator_params(axis="y", nbins=4)


def _within(found: SearchTable, objective: str) -> dict[int, tuple[float, str]]:
    """Search -> where it is drawn, and its marker: what is far below four fifths, on the edge."""
    sign = -1 if OBJECTIVES[objective] == "maximize" else 1
    values = sorted(sign * r[objective] for r in found.rows)
    good = values[: math.ceil(0.8 * len(values))]
    edge = good[-1] + 0.15 * (good[-1] - good[0])
    beyond = "v" if sign < 0 else "^"
    return {
        r["number"]: (sign * min(sign * r[objective], edge), "o" if sign * r[objective] <= edge else beyond)
        for r in found.rows
    }


def _point(ax: Any, x: float, row: dict[str, Any], shown: dict[int, tuple[float, str]], *, chosen: bool) -> None:
    y, marker = shown[row["number"]]
    size, colour, marker, alpha, order = (110, ACCENT, "*", 1, 3) if chosen else (26, POINT, marker, 0.6, 2)
    ax.scatter(x, y, s=size, color=colour, marker=marker, alpha=alpha, zorder=order, lw=0)


def _slices(figure: Any, found: SearchTable) -> None:
    count = len(found.hyperparameters)
    columns = min(count, 3)
    axes = figure.subplots(math.ceil(count / columns), columns, sharey=True, squeeze=False).flatten()
    for i, ax in enumerate(axes):
        if i < count:
            slice_of(ax, found, found.hyperparameters[i])
            ax.set(ylabel=ax.get_ylabel() if i % columns == 0 else "")
        else:
            ax.set_visible(False)


def front(ax: Any, found: SearchTable) -> None:
    """The first two objectives; a line along the searches that none beats in all."""
    one, two = found.objectives[:2]
    shown = _within(found, one)
    for row in found.rows:
        _point(ax, row[two], row, shown, chosen=False)
    best = sorted((r for r in found.rows if r["number"] in found.front), key=lambda r: r[two])
    x, y = [r[two] for r in best], [shown[r["number"]][0] for r in best]
    for at, height, row in zip(x, y, best, strict=True):
        ax.plot(at, height, shown[row["number"]][1], color=ACCENT, ms=5)
    # With more than two objectives the front is no line in two of them.
    ax.plot(x, y, "-" if len(found.objectives) == 2 else "", color=ACCENT, lw=1.2)
    ax.plot([], [], "o-" if len(found.objectives) == 2 else "o", color=ACCENT, lw=1.2, ms=5, label="Pareto front")
    ax.set(xlabel=LABELS[two], ylabel=LABELS[one])
    if two in NAMES:
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        ax.locator_params(axis="x", nbins=5)
    ax.figure.legend(loc="outside upper left")


def progress(ax: Any, found: SearchTable) -> None:
    """The objective over the searches, with the best so far."""
    objective = found.objectives[0]
    rows: Sequence[dict[str, Any]] = found.rows
    values = [r[objective] for r in rows]
    pick = max if OBJECTIVES[objective] == "maximize" else min
    ax.scatter([r["number"] for r in rows], values, s=26, color=POINT, alpha=0.6, lw=0, label="search")
    ax.step([r["number"] for r in rows], [pick(values[: i + 1]) for i in range(len(values))], where="post",
            color=ACCENT, lw=1.5, label="best so far")  # fmt: skip
    ax.set(xlabel="search", ylabel=LABELS[objective])
    ax.locator_params(axis="x", nbins=6, integer=True)
    ax.figure.legend(loc="outside upper left", ncols=2)
