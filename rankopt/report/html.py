"""A run as one self-contained HTML page, report.html: it loads no script, font or picture from elsewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from rankopt.core.budget import amount
from rankopt.core.files import write_beside
from rankopt.core.result_record import BudgetEntry, Metric, Part, ResultInfo, TrialRow
from rankopt.core.run_folder import REPORT, read_result, report_damage
from rankopt.report import pictures, training
from rankopt.report.pictures import NAMES
from rankopt.search.summary import (
    change_lines,
    comparison_rows,
    energy_lines,
    max_drop_text,
    measured_lines,
    method_text,
    n_evaluated,
    percent,
    rank_text,
    reliability_notes,
    speed_text,
)

TEMPLATE = "report.html.j2"


def write_report(run: Path) -> Path:
    """Write a run folder's report.html.

    Args:
        run: The folder of a finished run, or one that `Result.save` wrote.

    Returns:
        The page's path.

    Raises:
        StudyError: If the folder does not hold a finished run, or its files are damaged.
    """
    from rankopt.search.storage.local import FILE as STUDY
    from rankopt.search.storage.local import read_trials

    info = read_result(run)
    # A folder that `compress(...).save(folder)` wrote has a result, but no study.
    trials = read_trials(run) if (run / STUDY).is_file() else []
    with report_damage(run):
        try:
            page = render(info, trials, str(run))
        except UndefinedError as error:
            raise KeyError(str(error)) from error
    path = run / REPORT
    # A name may hold lone surrogates, from a file name that is not UTF-8; these cannot be encoded.
    write_beside(path, lambda p: p.write_text(page, encoding="utf-8", errors="replace"))
    return path


def environment() -> Environment:
    """The Jinja environment of all pages: escapes everything but Markup, and refuses undefined names."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"percent": percent, "rank": rank_text, "method": method_text, "seconds": _seconds}
    return env


def render(info: ResultInfo, trials: Sequence[TrialRow], run: str) -> str:
    """Render a run's page. Names, reasons and errors come from users' files; the template escapes them.

    Args:
        info: The content of result.json.
        trials: The trials of study.db; empty if there is none.
        run: The run folder, for the commands that the page shows.

    Returns:
        The page's source.
    """
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            info=info,
            verdict=verdict(info),
            rows=comparison_rows(info),
            changes=change_lines(info),
            latency=[*measured_lines(info), *energy_lines(info)],
            trained=training.lines(info),
            slower=slower(info),
            question=max_drop_text(info),
            notes=reliability_notes(info),
            names=NAMES,
            budget=[_budget_row(metric, b) for metric, b in info["budget"].items()],
            pictures=_pictures(info, trials),
            colour=pictures.colours([x["method"] for x in info["layers"]]),
            evaluated=n_evaluated(info),
            devices=sorted({t["device"] for t in trials if t["device"]}),
            failed=[t for t in trials if t["state"] == "failed"],
            apply=f"rankopt apply {shlex.quote(run)} --task {shlex.quote(info['task'] or 'FILE.py:function')} --check",
            load=f"model = rankopt.load(model, {run!r})",
        )
    )


def verdict(info: ResultInfo) -> str:
    """The result in one sentence: share of the budgeted costs, score or objective, whether the budget is met, speed.

    Args:
        info: The content of result.json.
    """
    parts = [
        ", ".join(f"{percent(b['achieved'] / b['dense'], 1)} of the {NAMES[m]}" for m, b in info["budget"].items())
    ]
    dense, small = info["score"]["dense"], info["score"]["compressed"]
    part: Part = "test" if small["test"] is not None else "validation"
    if small[part] is not None:
        before = "" if dense[part] is None else f" (dense {percent(dense[part])})"
        parts.append(f"{part} score {percent(small[part])}{before}")
    else:
        found = info["objective"]
        parts.append(f"objective {found['best']:.3g}" + (f" (dense {found['dense']:.3g})" if "dense" in found else ""))
    met = all(b["achieved"] <= b["target"] for b in info["budget"].values())
    parts.append("budget met" if met else "budget NOT met")
    sentence = f"{', '.join(parts)}; one forward pass is {_speed(info).lower()} here."
    return re.sub(r" (?=[%×])|(?<=×) ", "\u00a0", sentence)  # a line must not end between a number and its unit


def slower(info: ResultInfo) -> str | None:
    """How much slower the compressed model is than the dense one.

    Args:
        info: The content of result.json.

    Returns:
        Text such as "2.50 × slower"; None if it is not slower.
    """
    text = _speed(info)
    return text.lower() if "SLOWER" in text else None


def _speed(info: ResultInfo) -> str:
    return speed_text(info["milliseconds"])


def _budget_row(metric: Metric, b: BudgetEntry) -> dict[str, str]:
    """The column of a metric in the table of the budget, as text by row."""
    # A budget was given as a number if that number is the target, else as a fraction of dense.
    absolute = b["requested"] == b["target"] or b["requested"] > 1
    return {
        "metric": NAMES[metric],
        "requested": amount(metric, round(b["requested"])) if absolute else f"{percent(b['requested'], 1)} of dense",
        "at most": amount(metric, b["target"]),
        "achieved": amount(metric, b["achieved"]),
        "used": percent(b["achieved"] / b["target"]),
        "dense": amount(metric, b["dense"]),
    }


def _pictures(info: ResultInfo, trials: Sequence[TrialRow]) -> dict[str, Markup]:
    """The pictures that have something to show, by name."""
    draw, done = pictures.draw, pictures.finished(trials, "objective")
    drawn = {"size": draw(pictures.size, info, trials)}
    if len(done) > 1:
        drawn["progress"] = draw(pictures.progress, info, trials)
    if len(pictures.finished(done, "predicted")) > 1:
        drawn["prediction"] = draw(pictures.prediction, info, trials)
    rows = info["layers"]
    drawn["layers"] = draw(pictures.layers, rows, height=pictures.layers_height(rows))
    if t := info.get("training"):
        drawn["losses"] = draw(training.losses, t)
        if t["epochs"] and t["epochs"][0]["score"] is not None:
            drawn["scores"] = draw(training.scores, t, info["score"]["dense"]["validation"])
    return {name: Markup(svg) for name, svg in drawn.items()}


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.2g} s" if value < 10 else f"{value:.1f} s"
