"""`rankopt sweep`, `benchmark` and `hardware`: budgets, strategies and devices compared."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli.app import (
    COMPARE,
    EFFORT,
    CacheFolder,
    CpusPerTrial,
    Device,
    Effort,
    GpusPerTrial,
    RayAddress,
    SpaceName,
    TaskName,
    Workers,
    app,
    default_folder,
    echo,
    loaded,
    readable_errors,
)
from rankopt.cli.parameters import complete_strategy
from rankopt.search.progress import console, show_progress
from rankopt.search.runners import RunnerSettings, make_runner, pool_of, session

COMPARED = "What is compared"  # a panel of --help


@app.command(rich_help_panel=COMPARE)
def sweep(  # noqa: PLR0913  # a parameter for every option
    task: TaskName,
    budgets: Annotated[str, typer.Option(help="METRIC=FROM:TO:HOW_MANY, equal ratios apart, or METRIC=A,B,C")],
    evaluate: Annotated[str, typer.Option(help="knees (and the ends), all or none")] = "knees",
    out: Annotated[
        Path | None, typer.Option(help="the folder for sweep.csv and sweep.png", show_default="runs/TASK-sweep")
    ] = None,
    space: SpaceName = "default",
    effort: Annotated[str | None, typer.Option(help=EFFORT, show_default="the space's, or normal")] = None,
    cache: CacheFolder = None,
    device: Device = None,
    workers: Workers = 0,
    ray_address: RayAddress = None,
    gpus_per_trial: GpusPerTrial = 0.0,
    cpus_per_trial: CpusPerTrial = 1.0,
) -> None:
    """Trace score against size: one calibration, then the exact allocation for every budget."""
    with readable_errors("what was fitted is kept: the same command goes on"):
        import rankopt.search.sweep as sweeps
        from rankopt.candidates.prepare import prepare
        from rankopt.candidates.search_space import load_space
        from rankopt.core.run_folder import folder_lock, open_folder
        from rankopt.report.sweep import table, write

        found = loaded(task, device)
        sweeps.check_evaluate(evaluate)
        loosest = sweeps.loosest(found, budgets)
        out = out or default_folder(task, "sweep")
        runner = make_runner(RunnerSettings(workers, ray_address, gpus_per_trial, cpus_per_trial=cpus_per_trial), out)
        open_folder(out, resume=None)
        with folder_lock(out), session(runner):
            adjusted = load_space(space).adjusted(effort=effort)
            prepared = prepare(found, adjusted, cache, show_progress, pool_of(runner), [loosest])
            result = sweeps.sweep(prepared, budgets, evaluate, show_progress, runner)
            write(out, result)
        echo(table(result))
        echo(f"written: {out / 'sweep.csv'}, {out / 'sweep.png'}")
        own = [*(["--space", space] if space != "default" else []), *(["--effort", effort] if effort else [])]
        echo(
            f"a model of one of them, in seconds: {shlex.join(['rankopt', 'search', task, *own])} --budget METRIC=VALUE"
        )


@app.command(rich_help_panel=COMPARE)
def benchmark(  # noqa: PLR0913  # a parameter for every option
    task: TaskName,
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget",
            help="a problem, repeatable: params=0.3, or jointly params=0.3,macs=0.5",
            rich_help_panel=COMPARED,
        ),
    ],
    strategies: Annotated[
        str,
        typer.Option(
            help="all, or a list as knapsack,optuna:sampler=gp,MODULE:CLASS,FILE.py:CLASS:KEY=VALUE",
            rich_help_panel=COMPARED,
            autocompletion=complete_strategy,
        ),
    ] = "all",
    trials: Annotated[
        int,
        typer.Option(help="distinct plans for each strategy; one-shot strategies have one", rich_help_panel=COMPARED),
    ] = 30,
    seeds: Annotated[int, typer.Option(help="runs of each, with seeds 0, 1, ...", rich_help_panel=COMPARED)] = 3,
    out: Annotated[
        Path | None, typer.Option(help="the folder for benchmark.*", show_default="runs/TASK-benchmark")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on; budgets, strategies and seeds may be added")] = False,
    space: SpaceName = "default",
    effort: Effort = None,
    cache: CacheFolder = None,
    device: Device = None,
    workers: Workers = 0,
    ray_address: RayAddress = None,
    gpus_per_trial: GpusPerTrial = 0.0,
    cpus_per_trial: CpusPerTrial = 1.0,
) -> None:
    """Compare strategies under equal numbers of evaluations."""
    with readable_errors("every finished run is kept: go on with --resume"):
        import rankopt.search.benchmark as benchmarks
        from rankopt.candidates.prepare import prepare
        from rankopt.candidates.search_space import load_space
        from rankopt.core.run_folder import folder_lock, open_folder
        from rankopt.report.benchmark import cell_line, text, write

        names = benchmarks.read_strategies(strategies)
        out = out or default_folder(task, "benchmark")
        runner = make_runner(RunnerSettings(workers, ray_address, gpus_per_trial, cpus_per_trial=cpus_per_trial), out)
        open_folder(out, resume, benchmarks.FILE)

        def print_cell(cell: benchmarks.Cell) -> None:
            console.print(cell_line(cell), markup=False, highlight=False, soft_wrap=True)

        with folder_lock(out), session(runner):
            adjusted = load_space(space).adjusted(effort=effort).with_effort(benchmarks.usual_effort(names))
            prepared = prepare(
                loaded(task, device), adjusted, cache, show_progress, pool_of(runner), budget[0].split(",")
            )
            data = benchmarks.benchmark(
                prepared, budget, names, trials, seeds, out, resume, print_cell, show_progress, runner
            )
            write(out, data)
        echo(text(data))
        echo(f"written: {', '.join(str(p) for p in sorted(out.glob('benchmark*.*')))}")


@app.command(rich_help_panel=COMPARE)
def hardware(
    task: TaskName,
    latency_on: Annotated[
        str, typer.Option("--on", "--latency-on", help="the conditions to measure under")
    ] = "cpu,batch=1,threads=1,runtime=eager",
    energy: Annotated[bool, typer.Option("--energy", help="measure energy, too, for budgets on it")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="the table to write or add to, for table=FILE elsewhere", show_default="one in the cache"),
    ] = None,
    space: SpaceName = "default",
    cache: CacheFolder = None,
) -> None:
    """Measure a task's layers and their candidates here, for latency and energy budgets here or elsewhere."""
    with readable_errors("what was timed is kept: the same command goes on"):
        from rankopt.candidates.latency_table import Conditions
        from rankopt.candidates.prepare import time_task
        from rankopt.candidates.search_space import load_space
        from rankopt.core.records import MEASURED
        from rankopt.experiments.tasks import load_task
        from rankopt.report.hardware import table

        conditions = Conditions.parse(latency_on)
        metrics = MEASURED if energy else MEASURED[:1]
        layers, found = time_task(
            load_task(task), load_space(space), conditions, cache, show_progress, out, metrics=metrics
        )
        echo("\n\n".join(table(layers, costs) for costs in found))
        if out:
            echo(f"written: {out}; use it with --latency-on {conditions},table={out}")
