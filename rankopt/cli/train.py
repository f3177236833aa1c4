"""`rankopt train`: fine-tune the model of a run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli.app import app, clear_errors
from rankopt.cli.progress import ProgressBar
from rankopt.core.progress import StopCondition, graceful_interrupt


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    task: Annotated[str, typer.Option(help="the task whose model it was; its file is run")],
    out: Annotated[Path | None, typer.Option(help="the folder for the trained model [RUN/trained]")] = None,
    epochs: Annotated[float | None, typer.Option(help="over the task's train; may be a fraction [10]")] = None,
    rate: Annotated[float | None, typer.Option(help="largest learning rate [0.01; from scratch 0.1]")] = None,
    layerwise: Annotated[
        int | None, typer.Option(help="before: so many steps, each layer towards the dense one's output [0]")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="KEY=VALUE of rankopt.Recipe, repeatable: distill=1, ema=0.99, clip=5, ..."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="a task whose model's predictions are learnt instead")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="the plan on an untrained network")] = False,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights")] = 0,
    minutes: Annotated[float | None, typer.Option(help="stop after so many, to go on later with --resume")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a training that stopped")] = False,
) -> None:
    """Train the model of a run folder, and write the result as a run folder of its own."""
    with clear_errors("the training is kept: go on with --resume"):
        from rankopt.core.errors import RankoptError
        from rankopt.core.options import parse_pairs, typed_options
        from rankopt.experiments.tasks import load_task
        from rankopt.report.html import write_report
        from rankopt.report.training import lines
        from rankopt.search.train_run import FROM_SCRATCH, train_run
        from rankopt.training.recipe import Recipe

        base = FROM_SCRATCH if from_scratch else Recipe()
        given = typed_options(parse_pairs(option or []), dataclasses.asdict(base), "the recipe")
        given |= {k: v for k, v in {"epochs": epochs, "rate": rate, "layerwise": layerwise}.items() if v is not None}
        recipe = dataclasses.replace(base, **given, seed=seed)
        if teacher is not None and not recipe.distill:
            raise RankoptError("--teacher is not listened to with distill=0: give --option distill=0.5, say")
        found, other = load_task(task), None if teacher is None else load_task(teacher)
        out, bar, patience = out or run / "trained", ProgressBar(), StopCondition(minutes)
        with graceful_interrupt(patience, bar.say):
            result = train_run(
                run,
                found,
                recipe,
                out,
                teacher=other,
                from_scratch=from_scratch,
                resume=resume,
                stop=patience,
                progress=bar,
                note=bar.note,
            )
        typer.echo("\n".join(lines(result.info)))
        typer.echo(f"written: {out}; report: {write_report(out)}")
