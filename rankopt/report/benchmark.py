"""A benchmark of strategies as Markdown, a CSV file and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from rankopt.core.files import write_beside
from rankopt.core.records import METRICS
from rankopt.core.statistics import difference
from rankopt.report import pictures
from rankopt.report.tables import write_csv
from rankopt.search.benchmark import Benchmark, Cell, ScoreRow, curve, ranks, results
from rankopt.search.comparison import critical_difference, groups, holm, mean_ranks, paired
from rankopt.search.summary import percent, render, with_interval

MARKDOWN, CSV, PNG, RANKS = "benchmark.md", "benchmark.csv", "benchmark.png", "benchmark_ranks.png"


REFERENCE = "knapsack"
"""The strategy that the others are compared with: the exact allocation, which takes one evaluation."""


COLUMNS = ("budget", "strategy", "seed", "trial", "objective", "best_so_far", "predicted", *METRICS)


TIMES = ("evaluation_seconds", "repeated", "copied_from", "error", "plan")


HEAD = ("strategy", "mean rank", "evaluations", "seconds before", "proposing", "evaluating")
"""Columns of the table over all budgets."""


PAIRED_HEAD = ("strategy", "better / equal / worse", "p", "p, adjusted")
"""Columns of the table of paired comparisons."""


PAIRED_NOTE = (
    "Two-sided p-values of Wilcoxon's signed-rank test on the best objectives, problem by problem, and adjusted for "
    "their number (Holm). Strategies that do not use their seed give the same in all seeds: between two of them p is "
    "too small."
)


PROBLEM_HEAD = ("strategy", "objective, median", "least to most", "score of the best")
"""Columns of the table of one budget."""


def write(folder: Path, data: Benchmark) -> None:
    """Write benchmark.md, benchmark.csv (one row a trial), benchmark.png and benchmark_ranks.png.

    Args:
        folder: Where to write them.
        data: The content of benchmark.json.
    """
    write_beside(folder / MARKDOWN, lambda p: p.write_text(markdown(data), encoding="utf-8"))
    write_csv(folder / CSV, _rows(data))
    budgets, strategies = len(data["settings"]["budgets"]), len(data["settings"]["strategies"])
    size = (7.6, 0.6 + max(2.9 * budgets, 0.25 * strategies + 1))
    write_beside(folder / PNG, lambda p: pictures.png(p, _paint, data, size))
    size = (7.6, 0.9 + 0.28 * strategies)
    write_beside(folder / RANKS, lambda p: pictures.png(p, _paint_ranks, data, size))


def _rows(data: Benchmark) -> Iterator[Sequence[Any]]:
    """The rows of the CSV file, one a trial, after the names of the columns."""
    yield (*COLUMNS, *TIMES)
    for cell in data["cells"]:
        place = [cell["budget"], cell["strategy"], cell["seed"]]
        least = curve(cell, len(cell["trials"]))
        for number, (t, best) in enumerate(zip(cell["trials"], least, strict=True)):
            numbers = [t["objective"], best if math.isfinite(best) else None, t["predicted"], *t["cost"]]
            rest = [t["seconds"], t["repeated"], cell["copied_from"], t["error"], " ".join(map(str, t["proposal"]))]
            yield [*place, number, *numbers, *rest]


# --- tables --------------------------------------------------------------------------------------------


def overall(data: Benchmark) -> list[tuple[str, ...]]:
    """The table over all budgets.

    Args:
        data: The content of benchmark.json.

    Returns:
        Rows under HEAD, best mean rank first, with its 95 % interval; evaluations and seconds are means of one run.
    """
    found = mean_ranks(ranks(data))
    rows = []
    for name in data["settings"]["strategies"]:
        cells = [c for c in data["cells"] if c["strategy"] == name]
        shown = f"{r.mean:.2f} ({r.low:.2f} to {r.high:.2f})" if (r := found.get(name)) else "–"
        count = f"{fmean(len(c['trials']) for c in cells):.4g}" if cells else "0"
        seconds = [f"{fmean(c['seconds'][k] for c in cells):.2f}" for k in ("measure", "strategy", "evaluation")]
        rows.append((r.mean if r else math.inf, (name, shown, count, *seconds)))
    return [row for _, row in sorted(rows, key=lambda x: x[0])]


def problem_rows(data: Benchmark, budget: str) -> list[tuple[str, ...]]:
    """The table of one budget.

    Args:
        data: The content of benchmark.json.
        budget: One of its budgets.

    Returns:
        Rows under PROBLEM_HEAD, least median objective first.
    """
    scores = {s["strategy"]: s for s in data["scores"] if s["budget"] == budget}
    top = max((score for s in scores.values() if (score := s["score"]) is not None), default=None)
    rows: list[tuple[float, str, str, str]] = []
    for name in data["settings"]["strategies"]:
        last = _ends(data, budget, name)
        shown = _score_text(scores[name], top) if name in scores else "–"
        spread = f"{min(last):.4g} to {max(last):.4g}" if last else "–"
        rows.append((median(last) if last else math.inf, name, spread, shown))
    return [(name, f"{m:.4g}", spread, shown) for m, name, spread, shown in sorted(rows)]


def _ends(data: Benchmark, budget: str, name: str) -> list[float]:
    cells = [c for c in data["cells"] if (c["budget"], c["strategy"]) == (budget, name)]
    return [curve(c, data["settings"]["trials"])[-1] for c in cells]


def _score_text(row: ScoreRow, top: float | None) -> str:
    """The score with its interval; "=" marks scores that differ from the best by no more than the noise."""
    if row["score"] is None or row["interval"] is None:
        return percent(row["score"])
    gap = difference(top, row["score"], row.get("examples"))
    return with_interval(row["score"], row["interval"]) + (" =" if gap and gap[0] <= 0 else "")


def against(data: Benchmark, reference: str) -> list[tuple[str, ...]]:
    """The table of paired comparisons with one strategy.

    Args:
        data: The content of benchmark.json.
        reference: The strategy.

    Returns:
        Rows under PAIRED_HEAD, in the order of the strategies.
    """
    found = results(data)
    others = {name: paired(values, found[reference]) for name, values in found.items() if name != reference}
    adjusted = holm({name: x.p for name, x in others.items()})
    return [
        (
            name,
            f"{x.better} / {len(found[name]) - x.better - x.worse} / {x.worse}",
            f"{x.p:.2g}",
            f"{adjusted[name]:.2g}",
        )
        for name, x in others.items()
    ]


def verdict(data: Benchmark) -> list[str]:
    """Sentences on what the ranks say: the critical difference, and what loses to the exact allocation.

    Args:
        data: The content of benchmark.json.
    """
    found = results(data)
    means, count = mean_ranks(ranks(data)), len(next(iter(found.values()), []))
    if len(means) < 2:
        return []
    said = [
        f"Mean ranks over {count} problems (budgets × seeds), with 95 % bootstrap intervals. Strategies whose mean "
        f"ranks differ by less than {critical_difference(len(means), count):.2f} do not differ (Nemenyi's test, 5 %)."
    ]
    if REFERENCE in means:
        behind = [name for name, r in means.items() if r.mean > means[REFERENCE].mean]
        said.append(f"Behind {REFERENCE}, which takes one evaluation: {', '.join(behind) or 'none'}.")
    return said


def notes(data: Benchmark) -> list[str]:
    """Sentences that explain the tables, and the failed runs.

    Args:
        data: The content of benchmark.json.
    """
    s, cells = data["settings"], data["cells"]
    dense = data.get("dense")
    copied = sorted({c["strategy"] for c in cells if c["copied_from"] is not None})
    failed = [f"{c['budget']} {c['strategy']} seed {c['seed']}: {c['error']}" for c in cells if c["error"]]
    fewer = sorted({c["strategy"] for c in cells if 1 < len(c["trials"]) < s["trials"]})
    found = [
        f"{s['trials']} evaluations for each, seeds 0 to {s['seeds'] - 1}; one-shot strategies have one plan. "
        "Less is better: the objective, and the rank of the best objective among the strategies.",
        "A plan is measured once, whoever proposes it, and counts for each with its seconds.",
    ]
    if dense:
        score = with_interval(dense["score"], dense["interval"])
        found.append(
            f"Score: {dense['part']}, of the best plan over all seeds, with its 95 % interval; = differs from the best "
            f"score by no more than the noise. Dense: {score}."
        )
    if copied:
        found.append(
            f"The seed does not matter to {', '.join(copied)}: run for seeds 0 and 1, the same plan, repeated."
        )
    if fewer:
        found.append(f"Ran out of new plans before {s['trials']}, in some runs: {', '.join(fewer)}.")
    return [*found, *(f"FAILED {text}" for text in failed)]


def _compared(data: Benchmark) -> list[str]:
    """The strategies that others are compared with: the exact allocation, and the best by mean rank."""
    means = mean_ranks(ranks(data))
    return [name for name in dict.fromkeys([REFERENCE, *list(means)[:1]]) if name in means and len(means) > 1]


def text(data: Benchmark) -> str:
    """The benchmark as text for the terminal, at most 100 columns wide.

    Args:
        data: The content of benchmark.json.
    """
    tables = [_table(f"{data['settings']['task'] or 'model'}: strategies, mean of a run", HEAD, overall(data))]
    tables += [_table(b, PROBLEM_HEAD, problem_rows(data, b)) for b in data["settings"]["budgets"]]
    return render(*tables, *verdict(data), *notes(data))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(data: Benchmark) -> str:
    """The benchmark as a Markdown page.

    Args:
        data: The content of benchmark.json.
    """
    parts = [f"# Strategies on {data['settings']['task'] or 'a model'}", _markdown_table(HEAD, overall(data))]
    parts += [*verdict(data), f"![mean ranks; bars join what does not differ]({RANKS})"]
    parts += [f"![best objective so far]({PNG})", *notes(data)]
    for name in _compared(data):
        parts += [f"## Paired with {name}", PAIRED_NOTE, _markdown_table(PAIRED_HEAD, against(data, name))]
    for budget in data["settings"]["budgets"]:
        parts += [f"## {budget}", _markdown_table(PROBLEM_HEAD, problem_rows(data, budget))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines)


# --- the picture ---------------------------------------------------------------------------------------


def _paint(figure: Any, data: Benchmark) -> None:
    """Draw the best objective so far over the evaluations: a panel a budget, median over seeds, range shaded."""
    settings = data["settings"]
    axes = figure.subplots(len(settings["budgets"]), 1, sharex=True, squeeze=False)[:, 0]
    for ax, budget in zip(axes, settings["budgets"], strict=True):
        _panel(ax, data, budget)
        ax.set_title(budget, loc="left", fontsize=10)
        ax.set_ylabel("best objective so far")
    axes[-1].set_xlabel(
        f"evaluations ({settings['task'] or 'model'}; median of {settings['seeds']} seeds, shaded: all)"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def _panel(ax: Any, data: Benchmark, budget: str) -> None:
    settings = data["settings"]
    seen: list[float] = []
    for i, name in enumerate(settings["strategies"]):
        curves = [curve(c, settings["trials"]) for c in data["cells"] if (c["budget"], c["strategy"]) == (budget, name)]
        if not curves:
            continue
        columns = list(zip(*curves, strict=True))
        x, middle = range(1, len(columns) + 1), [median(v) for v in columns]
        one_shot = all(len(c["trials"]) == 1 for c in data["cells"] if c["strategy"] == name)
        colour = pictures.COLOURS[i % len(pictures.COLOURS)]
        style = ":" if one_shot else "-" if i < len(pictures.COLOURS) else "--"
        label, z = name + (" (one plan)" * one_shot), 3 if one_shot else 2  # a dotted line is visible above a solid one
        ax.step(x, middle, where="post", color=colour, lw=1.8, ls=style, label=label, zorder=z)
        ax.fill_between(
            x, [min(v) for v in columns], [max(v) for v in columns], step="post", color=colour, alpha=0.15, lw=0
        )
        seen += [v for values in columns for v in values if math.isfinite(v)]
    pictures.objective_axis(ax, "y", seen)


def _paint_ranks(figure: Any, data: Benchmark) -> None:
    """Draw the mean ranks with their intervals; bars join strategies that do not differ (Demšar 2006, figure 1)."""
    means = mean_ranks(ranks(data))
    problems = len(next(iter(results(data).values()), []))
    difference = critical_difference(len(means), problems)
    ax = figure.subplots()
    at = {name: i for i, name in enumerate(means)}
    for name, r in means.items():
        ax.plot([r.low, r.high], [at[name]] * 2, color=pictures.POINT, lw=1.5)
        ax.plot(r.mean, at[name], "o", color=pictures.POINT, ms=5)
    right = len(means) + 0.3
    for i, (best, worst) in enumerate(groups(means, difference)):
        ax.plot([right + 0.25 * i] * 2, [at[best], at[worst]], color=pictures.INK, lw=3, solid_capstyle="butt")
    ax.set_yticks(list(at.values()), list(at))
    ax.invert_yaxis()
    ax.set_xlim(left=0.7)
    shown = f"{difference:.2f}" if math.isfinite(difference) else "–"
    ax.set_xlabel(f"mean rank over {problems} problems, 95 % interval; critical difference {shown}")


def cell_line(cell: Cell) -> str:
    """A finished run in one line.

    Args:
        cell: The run.
    """
    values = [objective for t in cell["trials"] if (objective := t["objective"]) is not None]
    best = f"best objective {min(values):.5g}" if values else "nothing finished"
    spent = cell["seconds"]
    seconds = spent["measure"] + spent["strategy"] + spent["evaluation"]
    tail = f", failed: {cell['error']}" if cell["error"] else ""
    run = f"{cell['budget']} {cell['strategy']} seed {cell['seed']}"
    return f"{run}: {best}, {len(cell['trials'])} evaluations, {seconds:.1f} s{tail}"
