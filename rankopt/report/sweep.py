"""A sweep over budgets as a table, a CSV file and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from rankopt.core.files import write_beside
from rankopt.core.records import METRICS, SAME, Choice
from rankopt.report import pictures
from rankopt.report.tables import write_csv
from rankopt.search.summary import percent, render, with_interval
from rankopt.search.sweep import Point, Sweep

CSV, PNG = "sweep.csv", "sweep.png"


MEASURED = ("predicted", "gap", "objective", "score")


COLUMNS = ("budget", "target", "kind", *METRICS, *MEASURED, "score_low", "score_high", "plan", "reason")


def write(folder: Path, found: Sweep) -> None:
    """Write sweep.png and, once that is there, sweep.csv (one row a budget, in the order asked).

    Args:
        folder: Where to write them.
        found: The sweep.
    """
    rows = [_row(p) for p in found.points]
    write_beside(folder / PNG, lambda p: pictures.png(p, _paint, found))
    write_csv(folder / CSV, [COLUMNS, *([row.get(name) for name in COLUMNS] for row in rows)])


def _row(point: Point) -> dict[str, Any]:
    """A budget's row, empty where nothing was measured. Its plan is layer:method:rank:precision, layer by layer."""
    row: dict[str, Any] = {k: getattr(point, k) for k in ("budget", "kind", *MEASURED)}
    row |= {"target": point.limit.target, "reason": " ".join(point.reason.split())}
    if point.plan:
        row |= {m: point.plan.cost[m] for m in METRICS}
        row["plan"] = " ".join(map(_choice, point.plan.choices))
    if point.interval:
        row["score_low"], row["score_high"] = point.interval
    return row


def _choice(c: Choice) -> str:
    rank = ["x".join(map(str, c.rank))] if c.rank else []
    return ":".join([c.name, c.method, *rank, *([c.precision] if c.precision != SAME else [])])


def table(found: Sweep) -> str:
    """The sweep as text, at most 100 columns wide.

    Args:
        found: The sweep.
    """
    metric = found.metric
    shown = Table(title=f"{found.task or 'model'}: the exact allocation for each budget", title_justify="left")
    shown.add_column("budget", overflow="fold")
    for name in (pictures.NAMES[metric], "of dense", "predicted", "objective", "score (95 %)"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    dense = with_interval(found.dense_score, found.dense_interval)
    shown.add_row("dense", f"{found.dense[metric]:,}", "100.0 %", "0", "", dense, "")
    for p in found.points:
        if p.plan is None:
            shown.add_row(p.budget, *[""] * 5, "infeasible")
            continue
        size, share = p.plan.cost[metric], p.plan.cost[metric] / found.dense[metric]
        objective = "" if p.objective is None else f"{p.objective:.4g}"
        score = "" if p.objective is None else with_interval(p.score, p.interval)
        kind = p.kind if p.kind != "between" else ""
        shown.add_row(p.budget, f"{size:,}", percent(share, 1), f"{p.predicted:.3g}", objective, score, kind)
    seconds = ", ".join(f"{k} {v:.1f}" for k, v in found.seconds.items())
    reasons = [p.reason for p in found.points if p.reason][:1]
    return render(shown, *reasons, f"{found.evaluated} plans evaluated; seconds {seconds}")


def _paint(figure: Any, found: Sweep) -> None:
    """Draw the score (if there is one) and the objective against the size."""
    met = sorted((p for p in found.points if p.plan), key=lambda p: p.limit.target)
    scored = [p for p in met if p.score is not None]
    axes = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    if scored:
        _paint_scores(axes[0], found, scored)
    ax = axes[-1]
    ax.plot(_shares(found, met), [p.predicted for p in met], ".-", color=pictures.FAINT, lw=1, label="predicted rise")
    measured = [p for p in met if p.objective is not None]
    if measured:
        ax.scatter(
            _shares(found, measured), [p.objective for p in measured], s=36, color=pictures.ACCENT, label="measured"
        )
    pictures.objective_axis(ax, "y", [v for p in met for v in (p.predicted, p.objective) if v is not None])
    ax.set(xlabel=f"% of the dense model's {pictures.NAMES[found.metric]}", ylabel="objective")
    ax.legend()
    impossible = [p.limit.target for p in found.points if p.plan is None]
    if impossible:
        for ax in axes:
            ax.axvspan(0, 100 * max(impossible) / found.dense[found.metric], color=pictures.GRID, lw=0)
        ax.annotate("infeasible", (0, 0), (2, 4), "axes fraction", "offset points", color=pictures.INK, fontsize=8)
    axes[0].set_title(f"{found.task or 'model'}: one calibration, {len(met)} budgets", loc="left", fontsize=10)
    axes[0].set_xlim(0, 103)


def _paint_scores(ax: Any, found: Sweep, scored: list[Point]) -> None:
    x, y = _shares(found, scored), [100 * (p.score or 0) for p in scored]
    bars = [p.interval or (p.score or 0, p.score or 0) for p in scored]
    spread = [[v - 100 * low for v, (low, _) in zip(y, bars, strict=True)]]
    spread += [[100 * high - v for v, (_, high) in zip(y, bars, strict=True)]]
    label = "evaluated" + (" (95 %)" if scored[0].interval else "")
    ax.errorbar(x, y, yerr=spread, fmt="o-", color=pictures.POINT, lw=1, capsize=2, label=label)
    if found.dense_score is not None:
        ax.axhline(100 * found.dense_score, color=pictures.INK, lw=1, ls=":", label="dense")
    ax.set(ylabel="validation score, %")
    ax.legend(loc="lower right")


def _shares(found: Sweep, points: list[Point]) -> list[float]:
    return [100 * p.plan.cost[found.metric] / found.dense[found.metric] for p in points if p.plan]
