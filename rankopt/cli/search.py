"""`rankopt search`: the best plan within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankopt.cli.app import (
    COMPRESS,
    EFFORT,
    RAY,
    CpusPerTrial,
    Device,
    GpusPerTrial,
    RayAddress,
    TaskName,
    Workers,
    app,
    default_folder,
    echo,
    loaded,
    readable_errors,
    write_page,
)
from rankopt.cli.parameters import complete_family, complete_space, complete_strategy
from rankopt.core.errors import RankoptError

if TYPE_CHECKING:
    from rankopt.search.result import Result

# Panels of --help
BUDGET, STRATEGY, CANDIDATES, EVALUATION, LATENCY = (
    "Budget",
    "Strategy",
    "Candidates",
    "Evaluation",
    "Latency and energy",
)
TUNE, OUTPUT = "Ray Tune: logs and schedulers", "Output"


def _list_strategies(wanted: bool) -> None:
    """Print every strategy with what it does and its options, and end the command."""
    if not wanted:
        return
    from rankopt.strategies.registry import STRATEGIES, strategy_class, strategy_options

    for name in STRATEGIES:
        try:
            text = (strategy_class(name).__doc__ or "").strip().partition("\n")[0]
            options = [f"    --option {option}={default}" for option, default in strategy_options(name).items()]
        except RankoptError as error:  # another package's
            text, options = f"cannot be used: {error}", []
        echo("\n".join([f"{name}: {text}", *options]))
    raise typer.Exit


@app.command(rich_help_panel=COMPRESS)
def search(  # noqa: PLR0913  # a parameter for every option
    task: TaskName,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            help="METRIC=VALUE, repeatable: params=0.5, macs=30%, bytes=500KB, latency=5ms, energy=0.7",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="instead of a budget: the smallest model that loses at most this much score (0.01)",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    minimize: Annotated[
        str | None,
        typer.Option(help="with --max-drop: params, macs or bytes", show_default="params", rich_help_panel=BUDGET),
    ] = None,
    as_fast: Annotated[
        bool,
        typer.Option(
            "--as-fast",
            help="search again within the same budget, for a model that is not slower than dense, both fused",
            rich_help_panel=BUDGET,
        ),
    ] = False,
    strategy: Annotated[
        str,
        typer.Option(
            help="knapsack, optuna, rl, thompson, lasso, lasso-train, differentiable, lc, evbmf, greedy, energy, "
            "uniform, random, MODULE:CLASS or FILE.py:CLASS",
            rich_help_panel=STRATEGY,
            autocompletion=complete_strategy,
        ),
    ] = "knapsack",
    list_strategies: Annotated[  # noqa: ARG001  # its callback does the work
        bool,
        typer.Option(
            "--list-strategies",
            help="list the strategies with their options, and end",
            callback=_list_strategies,
            is_eager=True,
        ),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="KEY=VALUE of the strategy's own, repeatable", rich_help_panel=STRATEGY),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="distinct plans to evaluate in total", show_default="30", rich_help_panel=STRATEGY),
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same plans", rich_help_panel=STRATEGY)] = 0,
    space: Annotated[
        str,
        typer.Option(
            "--space",
            help="a search space by name, or a .toml file",
            rich_help_panel=CANDIDATES,
            autocompletion=complete_space,
        ),
    ] = "default",
    families: Annotated[
        str | None,
        typer.Option(
            help="decompositions instead of the space's, as svd_out,cp_merged",
            rich_help_panel=CANDIDATES,
            autocompletion=complete_family,
        ),
    ] = None,
    keep_dense: Annotated[
        list[str] | None,
        typer.Option(help="a layer to leave dense, may have * and ?; repeatable", rich_help_panel=CANDIDATES),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(help=EFFORT, show_default="normal for knapsack, else thorough", rich_help_panel=CANDIDATES),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="instead of an effort: how long preparing may take", rich_help_panel=CANDIDATES),
    ] = None,
    fidelities: Annotated[
        str | None,
        typer.Option(
            help="stop bad trials early: shares of the examples as 0.1,0.5; last train=STEPS scores trained",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="refit the chosen plan layer after layer, against the dense model (minutes)",
            rich_help_panel=EVALUATION,
        ),
    ] = False,
    latency_on: Annotated[
        str | None,
        typer.Option(
            help="with --budget latency=0.6 or 5ms, or energy=0.7 or 20mJ: where it counts",
            show_default="cpu,batch=1,threads=1,runtime=eager",
            rich_help_panel=LATENCY,
        ),
    ] = None,
    device: Device = None,
    workers: Workers = 0,
    ray_address: RayAddress = None,
    gpus_per_trial: GpusPerTrial = 0.0,
    cpus_per_trial: CpusPerTrial = 1.0,
    trial_timeout: Annotated[
        float | None,
        typer.Option(help="seconds until a worker's trial is stopped, and failed", rich_help_panel=RAY),
    ] = None,
    trial_memory: Annotated[
        float | None,
        typer.Option(help="GB that a worker's trial may take beyond model and data", rich_help_panel=RAY),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="write Ray's TensorBoard files to OUT/logs", rich_help_panel=TUNE),
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="with --fidelities: Ray Tune's asha or median stops trials",
            show_default="rankopt's own",
            rich_help_panel=TUNE,
        ),
    ] = None,
    log_to: Annotated[
        list[str] | None, typer.Option(help="mlflow or wandb, repeatable: log trials there", rich_help_panel=TUNE)
    ] = None,
    dashboard: Annotated[
        bool,
        typer.Option("--dashboard", help="start Ray's dashboard and print its address", rich_help_panel=TUNE),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="the run folder", show_default="runs/TASK-STRATEGY", rich_help_panel=OUTPUT)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run folder", rich_help_panel=OUTPUT)] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            help="SQLAlchemy URL of a study that several processes share",
            show_default="OUT/study.db",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="where candidates are kept", show_default="RANKOPT_CACHE", rich_help_panel=OUTPUT),
    ] = None,
    html: Annotated[bool, typer.Option(help="write report.html", rich_help_panel=OUTPUT)] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="show no progress", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Search for the best plan within a budget and write the run folder."""
    with readable_errors(
        "fits and finished trials are kept: the same command goes on, with --resume once there are trials"
    ):
        from rankopt.core.options import parse_pairs
        from rankopt.search.job import Job, run_job
        from rankopt.search.runners import RunnerSettings

        folder = out or default_folder(task, strategy if max_drop is None else "max-drop")
        job = Job.parse(
            budget,
            max_drop=max_drop,
            minimize=minimize,
            latency_on=latency_on,
            strategy=strategy,
            options=parse_pairs(option or []),
            trials=trials,
            seed=seed,
            space=space,
            families=[name.strip() for name in families.split(",")] if families else None,
            keep_dense=keep_dense,
            effort=effort,
            minutes=minutes,
            fidelities=fidelities,
            refine=refine,
            out=folder,
            resume=resume,
            storage=storage,
            cache=cache,
            as_fast=as_fast,
            runner=RunnerSettings(
                workers,
                ray_address,
                gpus_per_trial,
                trial_timeout,
                trial_memory,
                tensorboard,
                cpus_per_trial,
                scheduler,
                tuple(log_to or ()),
                dashboard,
            ),
        )
        result = run_job(loaded(task, device), job, progress=not quiet)
        echo(result.summary())
        _echo_fitting_times(result)
        write_page(folder, html)
        if result.info["trials"]["interrupted"]:
            raise KeyboardInterrupt


def _echo_fitting_times(result: Result) -> None:
    """Print what fitting took, family by family; nothing if all candidates came from the cache."""
    if seconds := result.info["family_seconds"]:
        spent = ", ".join(f"{k} {v:.0f}" for k, v in sorted(seconds.items(), key=lambda x: -x[1]))
        echo(f"seconds of fitting per family, summed over workers: {spent}")
