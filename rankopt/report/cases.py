"""A study's cases as a table, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from rankopt.core.files import write_beside
from rankopt.experiments.cases import CaseRow
from rankopt.report import pictures
from rankopt.search.summary import percent, render, with_interval

MARKDOWN, PNG = "cases.md", "cases.png"


HEAD = ("case", "params", "MACs", "dense", "untrained", "result (95 %)", "points", "seconds")


def table(rows: Sequence[CaseRow]) -> str:
    """The cases as text, at most 100 columns wide.

    Args:
        rows: The finished cases.
    """
    drawn = Table()
    for column in HEAD:
        first = column == HEAD[0]
        drawn.add_column(column, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in rows:
        drawn.add_row(*_cells(row))
    return render(drawn)


def write(folder: Path, study: Path, rows: Sequence[CaseRow], total: int) -> None:
    """Write cases.md, and cases.png if there are scores.

    Args:
        folder: Where to write them.
        study: Path of the study's file, which the text names.
        rows: The finished cases, at least one.
        total: Number of cases that the study has.
    """
    lines = [
        f"# {study.stem}: {len(rows)} of {total} cases",
        "",
        f"Made by `rankopt run {study.name}`; settings and seeds are there. Scores are on {rows[0]['part']} data,",
        "read once a case and once before its training; points: above dense. Seconds: search and training; fits may",
        "come from the cache.",
        "",
        f"| {' | '.join(HEAD)} | date, machine |",
        "|---" * (len(HEAD) + 1) + "|",
    ]
    lines += [f"| {' | '.join(_cells(row))} | {row['date']}, {row['machine']} |" for row in rows]
    write_beside(folder / MARKDOWN, lambda p: p.write_text("\n".join([*lines, ""])))
    if scored := [row for row in rows if row["score"] is not None]:
        size = (6.4, 1.3 + 0.42 * len(scored))
        write_beside(folder / PNG, lambda p: pictures.png(p, _paint, scored, size))


def _cells(row: CaseRow) -> list[str]:
    score, dense = row["score"], row["dense"]
    change = None if score is None or dense is None else 100 * (score - dense)
    return [
        row["case"],
        percent(row["params"], 1),
        percent(row["macs"], 1),
        percent(row["dense"]),
        percent(row["untrained"]),
        with_interval(row["score"], row["interval"]),
        "–" if change is None else f"{change:+.2f}",
        f"{row['seconds']:,.0f}",
    ]


def _paint(figure: Any, rows: Sequence[CaseRow]) -> None:
    """Draw a line per case: dense, untrained and trained score. Every row has a score."""
    ax = figure.add_subplot()
    y = range(len(rows))
    for at, row in enumerate(rows):
        low, high = row["interval"] or [row["score"] or 0.0] * 2
        ax.plot([100 * low, 100 * high], [at, at], color=pictures.POINT, lw=4, alpha=0.3, solid_capstyle="butt")
    marks: tuple[tuple[Literal["dense", "untrained", "score"], str, dict[str, Any]], ...] = (
        ("dense", "dense", {"marker": "|", "s": 160, "color": pictures.INK}),
        ("untrained", "untrained", {"marker": "o", "s": 36, "facecolor": "white", "edgecolor": pictures.POINT}),
        ("score", "result (bar: 95 %)", {"marker": "o", "s": 40, "color": pictures.ACCENT, "lw": 0}),
    )
    for key, label, style in marks:
        points = [(100 * value, at) for at, row in enumerate(rows) if (value := row[key]) is not None]
        if points:
            ax.scatter(*zip(*points, strict=True), label=label, zorder=3, **style)
    ax.set_yticks(
        y, [f"{row['case']}\nparams {percent(row['params'], 1)}, MACs {percent(row['macs'], 1)}" for row in rows]
    )
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"{rows[0]['part']} score, %")
    ax.figure.legend(loc="outside upper left", ncols=3)
