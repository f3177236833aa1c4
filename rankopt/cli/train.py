"""`rankopt train`: fine-tune the model of a run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli.app import (
    FINISHED,
    RAY,
    CpusPerTrial,
    Device,
    GpusPerTrial,
    RayAddress,
    app,
    echo,
    loaded,
    readable_errors,
)
from rankopt.cli.parameters import complete_task
from rankopt.core.progress import StopCondition, graceful_interrupt
from rankopt.search.progress import ProgressBar

RECIPE, STOPPING = "How to train", "Stopping and resuming"  # panels of --help


@app.command(rich_help_panel=FINISHED)
def train(  # noqa: PLR0913  # a parameter for every option
    run: Annotated[Path, typer.Argument(help="a run folder")],
    task: Annotated[
        str,
        typer.Option(help="the task whose model it was; its file is run", autocompletion=complete_task),
    ],
    out: Annotated[
        Path | None, typer.Option(help="the folder for the trained model", show_default="RUN/trained")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="passes over the task's train; may be a fraction", show_default="10", rich_help_panel=RECIPE),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="largest learning rate", show_default="0.01; from scratch 0.1", rich_help_panel=RECIPE),
    ] = None,
    layerwise: Annotated[
        int | None,
        typer.Option(
            help="first train each layer for this many steps towards the dense one's output",
            show_default="0",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="stop after this many epochs without a better validation score; 0: never",
            show_default="0",
            rich_help_panel=STOPPING,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="KEY=VALUE of rankopt.Recipe, repeatable: distill=1, ema=0.99, clip=5, ...",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="a task whose model's predictions are learnt instead of the dense one's", rich_help_panel=RECIPE
        ),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="the plan on an untrained network", rich_help_panel=RECIPE)
    ] = False,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights", rich_help_panel=RECIPE)] = 0,
    minutes: Annotated[
        float | None,
        typer.Option(help="stop after this many, to go on later with --resume", rich_help_panel=STOPPING),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with a training that stopped", rich_help_panel=STOPPING)
    ] = False,
    device: Device = None,
    workers: Annotated[
        int, typer.Option(help="1: train in a Ray worker, of whose resources below; 0: here", rich_help_panel=RAY)
    ] = 0,
    ray_address: RayAddress = None,
    gpus_per_trial: GpusPerTrial = 0.0,
    cpus_per_trial: CpusPerTrial = 1.0,
) -> None:
    """Train the model of a run folder, and write the result as a run folder of its own."""
    with readable_errors("the training is kept: go on with --resume"):
        from rankopt.core.errors import RankoptError
        from rankopt.core.options import parse_pairs, typed_options
        from rankopt.experiments.tasks import load_task
        from rankopt.model.forward import device_of
        from rankopt.report.html import write_report
        from rankopt.report.training import lines
        from rankopt.search.runners import RunnerSettings, make_runner, session, trainer_of
        from rankopt.search.train_run import FROM_SCRATCH, train_run
        from rankopt.training.recipe import Recipe

        base = FROM_SCRATCH if from_scratch else Recipe()
        given = typed_options(parse_pairs(option or []), dataclasses.asdict(base), "the recipe")
        named = {"epochs": epochs, "rate": rate, "layerwise": layerwise, "patience": patience}
        given |= {k: v for k, v in named.items() if v is not None}
        recipe = dataclasses.replace(base, **given, seed=seed)
        if teacher is not None and not recipe.distill:
            raise RankoptError("--teacher is not listened to with distill=0: give --option distill=0.5, say")
        found = loaded(task, device)
        other = None if teacher is None else load_task(teacher, str(device_of(found.model)))
        out, display, stop = out or run / "trained", ProgressBar(), StopCondition(minutes)
        runner = make_runner(
            RunnerSettings(min(workers, 1), ray_address, gpus_per_trial, cpus_per_trial=cpus_per_trial)
        )
        with session(runner), graceful_interrupt(stop, display.say):
            result = train_run(
                run,
                found,
                recipe,
                out,
                teacher=other,
                from_scratch=from_scratch,
                resume=resume,
                stop=stop,
                progress=display,
                note=display.note,
                trainer=trainer_of(runner, on_ray=True),
            )
        echo("\n".join(lines(result.info)))
        echo(f"written: {out}; report: {write_report(out)}")
