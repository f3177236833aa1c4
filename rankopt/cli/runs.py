"""`rankopt report`, `apply` and `export`: what can be done with a finished run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankopt.cli.app import FINISHED, app, echo, readable_errors
from rankopt.cli.parameters import complete_task
from rankopt.core.budget import amount
from rankopt.core.errors import RankoptError
from rankopt.core.files import available_cores

if TYPE_CHECKING:
    from torch import nn

    from rankopt.core.records import Plan, Task
    from rankopt.core.result_record import Metric
    from rankopt.export.export import Exported


@app.command(rich_help_panel=FINISHED)
def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write a run's report.html and print the same as text."""
    with readable_errors():
        from rankopt.core.run_folder import read_result, report_damage
        from rankopt.report.html import write_report
        from rankopt.report.training import lines
        from rankopt.search.summary import summary

        with report_damage(run):
            info = read_result(run)
            echo("\n".join([summary(info), *lines(info)]))
        echo(f"report: {write_report(run)}")


@app.command(rich_help_panel=FINISHED)
def apply(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    task: Annotated[
        str,
        typer.Option(help="the task whose model is rebuilt; its file is run", autocompletion=complete_task),
    ],
    check: Annotated[bool, typer.Option("--check", help="count the cost again and score the rebuilt model")] = False,
) -> None:
    """Rebuild a compressed model from plan.json and its weights."""
    with readable_errors():
        from rankopt.core.records import DENSE, MEASURED, SAME
        from rankopt.core.run_folder import read_result, report_damage
        from rankopt.decompositions.plan import load, read_plan
        from rankopt.experiments.tasks import load_task
        from rankopt.model.counting import count

        found = load_task(task)
        plan, _ = read_plan(run)
        model = load(found.model, run)
        changed = sum(c.method != DENSE for c in plan.choices)
        rounded = sum(c.precision != SAME for c in plan.choices)
        also = f", {rounded} stored in fewer bits" if rounded else ""
        echo(f"rebuilt {run}: {changed} of {len(plan.choices)} layers factorised{also}")
        if check:
            cost = count(model, found.example_input)
            if cost != plan.cost:
                raise RankoptError(f"the rebuilt model costs {cost}, the plan says {plan.cost}")
            echo(
                f"cost counted again: {cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes, as planned"
            )
            if plan.latency_on:
                for metric in (m for m in MEASURED if plan.dense[m]):
                    try:
                        _measure_again(metric, found, model, plan)
                    except RankoptError as error:
                        echo(f"{metric} not measured again: {error}")
            with report_damage(run):
                _check_scores(found, model, read_result(run))


def _measure_again(metric: Metric, task: Task, model: nn.Module, plan: Plan) -> None:
    """Measure the rebuilt model beside the dense one and print what the plan says, too.

    Raises:
        RankoptError: The plan's conditions cannot be met here.
    """
    from rankopt.candidates.instruments import INSTRUMENTS
    from rankopt.candidates.latency_table import Conditions, machine
    from rankopt.core.statistics import interval
    from rankopt.search.latency_check import in_turns

    conditions = dataclasses.replace(Conditions.parse(plan.latency_on), table="")  # the table is not needed here
    if conditions.threads > available_cores():
        raise RankoptError(f"{conditions} asks for more threads than this machine has cores ({available_cores()})")
    dense, small = in_turns(task.model, model, task.example_input, conditions, instrument=INSTRUMENTS[metric])
    low, high = interval([b / a for a, b in zip(dense, small, strict=True)])
    echo(
        f"{metric} measured again: {low:.1%} to {high:.1%} of dense (95 %), the plan says "
        f"{plan.cost[metric] / max(plan.dense[metric], 1):.1%}; {amount(metric, sorted(small)[len(small) // 2])} on "
        f"{conditions} ({machine(conditions)})"
    )


def _check_scores(task: Task, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Score the rebuilt model and print what the run noted, too."""
    from rankopt.model.objective import call

    for part, function in (("validation", task.score), ("test", task.test)):
        value = call(f"the {part} score", function, model)
        if value is not None:
            before = info["score"]["compressed"][part]
            noted = "" if before is None else f" (the run noted {before:.2%})"
            echo(f"{part} score {value:.2%}{noted}")


@app.command(rich_help_panel=FINISHED)
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    task: Annotated[
        str,
        typer.Option(help="the task whose model is rebuilt; its file is run", autocompletion=complete_task),
    ],
    to: Annotated[str, typer.Option(help="onnx, torch.export or state_dict (safetensors)")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="the file", show_default="export.onnx, .pt2 or .safetensors in RUN")
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="fold batch norms; merge or multiply out layers where that pays")
    ] = False,
    batch: Annotated[str, typer.Option(help="the batch size that the program takes, or dynamic for any")] = "dynamic",
    dense: Annotated[
        bool, typer.Option("--dense", help="state_dict: factors multiplied out, for the original architecture")
    ] = False,
) -> None:
    """Write the compressed model for use elsewhere, compare its outputs on calibration inputs, and time it."""
    with readable_errors("nothing was written"):
        from rankopt.decompositions.plan import load
        from rankopt.experiments.tasks import load_task
        from rankopt.export import export as exports

        size = exports.check_request(to, fuse, batch, dense)
        found = load_task(task)
        small = load(found.model, run)
        made = exports.export_run(found, small, to, out or run / f"export{exports.SUFFIXES[to]}", fuse, size, dense)
        echo(exported(made))


def exported(made: Exported) -> str:
    """Describe an export in lines: the file, its parity with the model, its speed beside PyTorch's.

    Args:
        made: The export.
    """
    p = made.parity
    lines = [
        f"written: {made.path}, {made.path.stat().st_size:,} bytes",
        f"largest difference from PyTorch's outputs, {p.examples} calibration examples: {p.absolute:.2g} "
        f"({p.relative:.2g} of the largest)",
    ]
    for found in made.times:
        times = "; ".join(
            f"{name} {value:.2f} ms" + (f" ({low:.2f}–{high:.2f} of dense)" if i else "")
            for i, (name, value, (low, high)) in enumerate(
                zip(made.programs, found.milliseconds, found.ratios, strict=True)
            )
        )
        lines.append(f"one forward pass here, one thread, batch {found.examples}: {times}")
    return "\n".join(lines)
