"""A study of hyperparameters as a page, a CSV file and pictures.

The pictures show importance (fANOVA), parallel coordinates, slices and the Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from rankopt.core.files import write_beside
from rankopt.core.names import short
from rankopt.core.records import METRICS
from rankopt.experiments.config import OBJECTIVES, Hyperparameter
from rankopt.experiments.tuning import TuningStudy
from rankopt.report import pictures
from rankopt.report.html import environment
from rankopt.report.pictures import ACCENT, FAINT, INK, NAMES, POINT
from rankopt.report.tables import write_csv

PAGE, CSV, TEMPLATE = "hyperparameters.html", "hyperparameters.csv", "hyperparameters.html.j2"


KEPT = ("score", "objective", *METRICS, "milliseconds", "seconds", "error")


LABELS = {
    **NAMES,
    "score": "validation score",
    "objective": "objective (less is better)",
    "milliseconds": "milliseconds",
}


class SearchRow(NamedTuple):
    """A finished search.

    Attributes:
        number: Its number.
        settings: Its hyperparameters, by name.
        values: Its objectives, by name.
    """

    number: int
    settings: dict[str, Any]
    values: dict[str, float]


class SearchTable(NamedTuple):
    """What the pictures show.

    Attributes:
        hyperparameters: The hyperparameters of the study.
        objectives: Names of its objectives.
        rows: The finished searches.
        best: Number of the best search.
        front: Numbers of the searches on the Pareto front.
        importance: By objective and hyperparameter, its share in the variance; empty with few searches.
    """

    hyperparameters: tuple[Hyperparameter, ...]
    objectives: tuple[str, ...]
    rows: list[SearchRow]
    best: int
    front: set[int]
    importance: dict[str, dict[str, float]]

    def signed(self, row: SearchRow, objective: str) -> float:
        """A search's value of an objective, negated if it is maximised: less is better."""
        return -row.values[objective] if OBJECTIVES[objective] == "maximize" else row.values[objective]


def table(searches: TuningStudy) -> SearchTable:
    """Collect what the pictures show.

    Args:
        searches: The searches of a study, at least one of them finished.
    """
    rows = [
        SearchRow(t.number, t.params, dict(zip(searches.objectives, t.values, strict=True)))
        for t in searches.finished()
    ]
    importance = {name: searches.importance(i) for i, name in enumerate(searches.objectives)}
    front = {t.number for t in searches.study.best_trials}
    hyperparameters = searches.study_file.hyperparameters
    return SearchTable(hyperparameters, searches.objectives, rows, searches.best().number, front, importance)


def write(searches: TuningStudy) -> list[Path]:
    """Write hyperparameters.csv (one row a search), hyperparameters.html and the pictures as PNG.

    Args:
        searches: The searches of a study, at least one of them finished.

    Returns:
        The paths of the files, the page first.
    """
    out, found = searches.out, table(searches)
    write_csv(out / CSV, _rows(searches))
    write_beside(out / PAGE, lambda p: p.write_text(render(searches, found), encoding="utf-8", errors="replace"))
    paths = [out / PAGE, out / CSV]
    for name, (paint, size) in _pictures(found).items():
        paths.append(out / f"{name}.png")
        write_beside(paths[-1], partial(pictures.png, paint=_alone, content=(paint, found), size=size))
    slices = len(found.hyperparameters)
    paths.append(out / "slices.png")
    size = (3.0 * min(slices, 3), 2.3 * math.ceil(slices / 3))
    write_beside(paths[-1], lambda p: pictures.png(p, _slices, found, size))
    return paths


def _rows(searches: TuningStudy) -> Iterator[Sequence[Any]]:
    """The rows of the CSV file, one a search, after the names of the columns."""
    yield ("search", *searches.distributions, *KEPT)
    for t in searches.done():
        yield [t.number, *(t.params[name] for name in searches.distributions), *(t.user_attrs.get(k) for k in KEPT)]


def render(searches: TuningStudy, found: SearchTable) -> str:
    """Render the page.

    Args:
        searches: The searches of a study.
        found: The same, as the pictures show them.

    Returns:
        The page's source.
    """
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
            strategy=searches.study_file.experiment.search.strategy,
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


def _verdict(searches: TuningStudy, found: SearchTable) -> str:
    best = searches.best()
    values = ", ".join(f"{label(n)} {text(v)}" for n, v in zip(found.objectives, best.values, strict=True))
    one = f"{len(searches.done())} of {searches.study_file.searches} searches; the best, number {best.number}: {values}"
    return f"{one}; {len(found.front)} on the Pareto front." if len(found.objectives) > 1 else one + "."


def text(value: Any) -> str:
    """A setting or value as text: numbers with separators of thousands, or four digits.

    Args:
        value: The value.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") if isinstance(value, float) else str(value)


# --- painters ----------------------------------------------------------------------------------------


def _pictures(found: SearchTable) -> dict[str, tuple[Any, tuple[float, float]]]:
    """The pictures that have something to show: name -> (painter of (ax, table), size in inches)."""
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
    """Draw bars per hyperparameter, the most important for the first objective at the top.

    Args:
        ax: Matplotlib axes.
        found: The searches.
    """
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
    """Draw a line per search through its settings and values: the best quarter dark, the best in the accent colour.

    Args:
        ax: Matplotlib axes.
        found: The searches.
    """
    order = sorted(found.rows, key=lambda r: -found.signed(r, found.objectives[0]))
    dark = len(order) - max(1, len(order) // 4)
    columns: list[Hyperparameter | str] = [*found.hyperparameters, *found.objectives]
    for i, row in enumerate(order):
        y = [_height(found, column, row, i) for column in columns]
        best = row.number == found.best
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


def _height(found: SearchTable, column: Hyperparameter | str, row: SearchRow, at: int) -> float:
    """Where a search passes an axis, from 0 to 1; choices are spread a little, so that lines stay apart."""
    if isinstance(column, str):
        values = [r.values[column] for r in found.rows]
        return (row.values[column] - min(values)) / ((max(values) - min(values)) or 1)
    value = row.settings[column.name]
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
        values = [r.values[column] for r in found.rows]
        return [(0.0, text(min(values))), (1.0, text(max(values)))]
    if column.choices:
        names = list(column.choices)
        return [(i / max(len(names) - 1, 1), n.replace(" ", "\n")) for i, n in enumerate(names)]
    d: Any = column.distribution
    return [(0.0, text(d.low)), (1.0, text(d.high))]


def label(column: Hyperparameter | str) -> str:
    """What an axis is called: "rate" for training.rate.

    Args:
        column: A hyperparameter, or the name of an objective.
    """
    if isinstance(column, str):
        return LABELS[column].split(" (")[0]
    return column.name if column.name.startswith("budget.") else column.name.partition(".")[2]


def slice_of(ax: Any, found: SearchTable, column: Hyperparameter) -> None:
    """Draw the first objective over one hyperparameter.

    Args:
        ax: Matplotlib axes.
        found: The searches.
        column: The hyperparameter.
    """
    objective, names = found.objectives[0], list(column.choices)
    shown = _within(found, objective)
    for i, row in enumerate(found.rows):
        value = row.settings[column.name]
        x = names.index(value) + 0.3 * _spread(i) if names else value
        _point(ax, x, row, shown, chosen=row.number == found.best)
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
    """Each search's height and marker. One much worse than the best four fifths is drawn on the edge, as a triangle."""
    sign = -1 if OBJECTIVES[objective] == "maximize" else 1
    values = sorted(sign * r.values[objective] for r in found.rows)
    good = values[: math.ceil(0.8 * len(values))]
    edge = good[-1] + 0.15 * (good[-1] - good[0])
    beyond = "v" if sign < 0 else "^"
    return {
        r.number: (sign * min(sign * r.values[objective], edge), "o" if sign * r.values[objective] <= edge else beyond)
        for r in found.rows
    }


def _point(ax: Any, x: float, row: SearchRow, shown: dict[int, tuple[float, str]], *, chosen: bool) -> None:
    y, marker = shown[row.number]
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
    """Draw the first two objectives against each other, and the Pareto front.

    Args:
        ax: Matplotlib axes.
        found: The searches of a study with two or more objectives.
    """
    one, two = found.objectives[:2]
    shown = _within(found, one)
    for row in found.rows:
        _point(ax, row.values[two], row, shown, chosen=False)
    best = sorted((r for r in found.rows if r.number in found.front), key=lambda r: r.values[two])
    x, y = [r.values[two] for r in best], [shown[r.number][0] for r in best]
    for at, height, row in zip(x, y, best, strict=True):
        ax.plot(at, height, shown[row.number][1], color=ACCENT, ms=5)
    # With more than two objectives the front is not a line in the plane of the first two.
    ax.plot(x, y, "-" if len(found.objectives) == 2 else "", color=ACCENT, lw=1.2)
    ax.plot([], [], "o-" if len(found.objectives) == 2 else "o", color=ACCENT, lw=1.2, ms=5, label="Pareto front")
    ax.set(xlabel=LABELS[two], ylabel=LABELS[one])
    if two in NAMES:
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        ax.locator_params(axis="x", nbins=5)
    ax.figure.legend(loc="outside upper left")


def progress(ax: Any, found: SearchTable) -> None:
    """Draw the objective over the searches, with the best so far.

    Args:
        ax: Matplotlib axes.
        found: The searches.
    """
    objective = found.objectives[0]
    x, values = [r.number for r in found.rows], [r.values[objective] for r in found.rows]
    pick = max if OBJECTIVES[objective] == "maximize" else min
    ax.scatter(x, values, s=26, color=POINT, alpha=0.6, lw=0, label="search")
    best = [pick(values[: i + 1]) for i in range(len(values))]
    ax.step(x, best, where="post", color=ACCENT, lw=1.5, label="best so far")
    ax.set(xlabel="search", ylabel=LABELS[objective])
    ax.locator_params(axis="x", nbins=6, integer=True)
    ax.figure.legend(loc="outside upper left", ncols=2)
