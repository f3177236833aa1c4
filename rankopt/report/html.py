"""A run as one HTML page that loads nothing: report.html."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from rankopt.core.budget import amount
from rankopt.core.files import write_beside
from rankopt.core.run_folder import read_result, report_damage
from rankopt.report import pictures, training
from rankopt.report.pictures import NAMES
from rankopt.search.summary import (
    before_after,
    changes,
    energy,
    evaluated,
    honesty,
    latency,
    method_text,
    percent,
    question,
    rank_text,
    speed,
)

FILE, TEMPLATE = "report.html", "report.html.j2"


DECIMALS = 2


def write_report(run: Path) -> Path:
    """Write a run folder's report.html and return its path. Raises StudyError if the folder is not a finished run's."""
    from rankopt.search.storage.local import FILE as STUDY
    from rankopt.search.storage.local import read_trials

    info = read_result(run)
    # What `compress(...).save(folder)` wrote has a result, but no study.
    trials = read_trials(run) if (run / STUDY).is_file() else []
    with report_damage(run):
        try:
            page = render(info, trials, str(run))
        except UndefinedError as error:
            raise KeyError(str(error)) from error
    path = run / FILE
    # A name may hold what UTF-8 cannot: half a character, from a file name that is not UTF-8.
    write_beside(path, lambda p: p.write_text(page, encoding="utf-8", errors="replace"))
    return path


def environment() -> Environment:
    """The templates' filters and folder."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"percent": percent, "rank": rank_text, "method": method_text, "seconds": _seconds}
    return env


def render(info: dict[str, Any], trials: Sequence[dict[str, Any]], run: str) -> str:
    """The page. Names, reasons and errors are not ours: the template escapes whatever is not Markup."""
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            info=info,
            verdict=verdict(info),
            rows=before_after(info),
            changes=changes(info),
            latency=[*latency(info), *energy(info)],
            trained=training.lines(info),
            slower=slower(info),
            question=question(info),
            honesty=honesty(info),
            names=NAMES,
            budget=[_budget_row(metric, b) for metric, b in info["budget"].items()],
            pictures=_pictures(info, trials),
            colour=pictures.colours([x["method"] for x in info["layers"]]),
            evaluated=evaluated(info),
            failed=[t for t in trials if t["state"] == "failed"],
            apply=f"rankopt apply {shlex.quote(run)} --task {shlex.quote(info['task'] or 'FILE.py:function')} --check",
            load=f"model = rankopt.load(model, {run!r})",
        )
    )


def verdict(info: dict[str, Any]) -> str:
    """The result in one sentence."""
    parts = [
        ", ".join(f"{percent(b['achieved'] / b['dense'], 1)} of the {NAMES[m]}" for m, b in info["budget"].items())
    ]
    dense, small = info["score"]["dense"], info["score"]["compressed"]
    part = "test" if small["test"] is not None else "validation"
    if small[part] is not None:
        before = "" if dense[part] is None else f" (dense {percent(dense[part], DECIMALS)})"
        parts.append(f"{part} score {percent(small[part], DECIMALS)}{before}")
    met = all(b["achieved"] <= b["target"] for b in info["budget"].values())
    parts.append("budget met" if met else "budget NOT met")
    sentence = f"{', '.join(parts)}; one forward pass is {_speed(info).lower()} here."
    return re.sub(r" (?=[%×])|(?<=×) ", "\u00a0", sentence)  # a line must not end between a number and its unit


def slower(info: dict[str, Any]) -> str | None:
    """By how much the smaller model is the slower one, if it is."""
    text = _speed(info)
    return text.lower() if "SLOWER" in text else None


def _speed(info: dict[str, Any]) -> str:
    return speed(info["milliseconds"]["dense"], info["milliseconds"]["compressed"])


def _budget_row(metric: str, b: dict[str, Any]) -> dict[str, str]:
    """A metric's name and what was asked and reached, ready to show."""
    # A target that is the number asked for was asked for as a number, else as a fraction of dense.
    absolute = b["requested"] == b["target"] or b["requested"] > 1
    return {
        "metric": NAMES[metric],
        "requested": amount(metric, round(b["requested"])) if absolute else f"{percent(b['requested'], 1)} of dense",
        "at most": amount(metric, b["target"]),
        "achieved": amount(metric, b["achieved"]),
        "used": percent(b["achieved"] / b["target"], DECIMALS),
        "dense": amount(metric, b["dense"]),
    }


def _pictures(info: dict[str, Any], trials: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """The pictures that have something to show."""
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
