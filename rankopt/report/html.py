"""A run as one self-contained HTML page, report.html: it loads no script, font or picture from elsewhere."""

from __future__ import annotations

import shlex
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from rankopt.core.budget import amount
from rankopt.core.files import write_beside
from rankopt.core.result_record import BudgetEntry, FrontiersFile, Metric, Part, ResultInfo, TrialRow
from rankopt.core.run_folder import REPORT, read_frontiers, read_result, report_damage
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.report import pictures, training
from rankopt.report.layers import LayerGroup, frontier_pictures, layer_groups
from rankopt.report.pictures import NAMES
from rankopt.search.summary import (
    as_fast_lines,
    change_lines,
    comparison_rows,
    energy_lines,
    faster_command,
    max_drop_text,
    measured_lines,
    method_text,
    n_evaluated,
    percent,
    rank_text,
    reliability_notes,
    slower,
    speed_text,
    speeds,
    unbroken,
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
            page = render(info, trials, str(run), read_frontiers(run))
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
    env.filters |= {"percent": percent, "rank": rank_text, "method": method_text, "seconds": _seconds, "cell": _cell}
    return env


def render(info: ResultInfo, trials: Sequence[TrialRow], run: str, frontiers: FrontiersFile | None = None) -> str:
    """Render a run's page. Names, reasons and errors come from users' files; the template escapes them.

    Args:
        info: The content of result.json.
        trials: The trials of study.db; empty if there is none.
        run: The run folder, for the commands that the page shows.
        frontiers: The content of frontiers.json, if there is one.

    Returns:
        The page's source.
    """
    colour = pictures.colours([x["method"] for x in info["layers"]])
    modules = layer_groups(info["layers"])
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
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
            faster=faster_command(info),
            as_fast=as_fast_lines(info),
            question=max_drop_text(info),
            notes=reliability_notes(info),
            names=NAMES,
            budget=[_budget_row(metric, b) for metric, b in info["budget"].items()],
            pictures=_pictures(info, trials, modules),
            colour=colour,
            groups=modules,
            frontiers=frontier_pictures(info["layers"], frontiers, colour),
            families=_families(info),
            made=made_rows(info),
            evaluated=n_evaluated(info),
            devices=sorted({t["device"] for t in trials if t["device"]}),
            failed=[t for t in trials if t["state"] == "failed"],
            apply=f"rankopt apply {shlex.quote(run)} --task {shlex.quote(info['task'] or 'FILE.py:function')} --check",
            load=f"model = rankopt.load(model, {run!r})",
            script=Markup(script),
            script_hash=b64encode(sha256(script.encode()).digest()).decode(),
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
    return unbroken(f"{', '.join(parts)}; {_speed(info)}.")


def _speed(info: ResultInfo) -> str:
    """How the times compare, in a sentence without a full stop; under a budget on latency as that was measured."""
    found = speeds(info)
    if "latency" in info.get("latency", {}):
        found = found[-1:]
    return f"{', '.join(f'{what} is {speed_text(times).lower()}' for what, times in found)} here"


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


def _pictures(info: ResultInfo, trials: Sequence[TrialRow], modules: Sequence[LayerGroup]) -> dict[str, Markup]:
    """The pictures that have something to show, by name."""
    draw, done = pictures.draw, pictures.finished(trials, "objective")
    drawn = {"size": draw(pictures.size, info, trials)}
    if len(done) > 1:
        drawn["progress"] = draw(pictures.progress, info, trials)
    if len(pictures.finished(done, "predicted")) > 1:
        drawn["prediction"] = draw(pictures.prediction, info, trials)
    rows = info["layers"]
    if len(modules) > 1:
        drawn["layers"] = draw(pictures.modules, modules, height=pictures.layers_height(modules))
    else:
        drawn["layers"] = draw(pictures.layers, rows, height=pictures.layers_height(rows))
    if t := info.get("training"):
        drawn["losses"] = draw(training.losses, t)
        if t["epochs"] and t["epochs"][0]["score"] is not None:
            drawn["scores"] = draw(training.scores, t, info["score"]["dense"]["validation"])
    return {name: Markup(svg) for name, svg in drawn.items()}


def _cell(text: str) -> Markup:
    """A number with its interval, which break only between the two."""
    value, bracket, interval = unbroken(text).partition(" (")
    return Markup("{} <span class='keep'>({}</span>").format(value, interval) if bracket else escape(value)


def _families(info: ResultInfo) -> dict[str, str]:
    """What the methods of a plan are, in a sentence; those that are not registered here are left out."""
    used = sorted({x["method"] for x in info["layers"] if x["method"] in DECOMPOSITIONS})
    return {name: (type(DECOMPOSITIONS[name]).__doc__ or "").strip().partition("\n")[0] for name in used}


def made_rows(info: ResultInfo) -> list[tuple[str, str]]:
    """With what a result was made: versions, date, machine, settings and search space.

    Args:
        info: The content of result.json.

    Returns:
        Rows (what, value); none for files of earlier versions.
    """
    found = info.get("environment")
    if not found:
        return []
    rows = [
        ("date", found["date"]),
        ("versions", f"rankopt {found['rankopt']}, PyTorch {found['torch']}, Python {found['python']}"),
        ("machine", f"{found['device']}; {found['processor']}, {found['cores']} cores; {found['system']}"),
        ("strategy", f"{info['strategy']}, seed {info['seed']}"),
    ]
    rows += [(f"option {key}", value) for key, value in info.get("options", {}).items()]
    rows += list(info.get("settings", {}).items())
    space = info.get("space", {})
    return [
        *rows,
        *((f"search space: {key}", _shown(value)) for key, value in space.items() if value not in (None, "")),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_shown(x)}" for key, x in value.items()) or "–"
    return ", ".join(map(_shown, value)) or "–" if isinstance(value, list) else str(value)


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.2g} s" if value < 10 else f"{value:.1f} s"
