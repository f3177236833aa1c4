"""`rankopt search`: the best plan within a budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankopt.cli.app import (
    COMPRESS,
    TaskName,
    app,
    default_folder,
    echo,
    latency_conditions,
    readable_errors,
    write_page,
)
from rankopt.cli.progress import LiveRunner, show_progress
from rankopt.core.errors import RankoptError
from rankopt.search.runners import RunnerSettings, make_runner
from rankopt.search.settings import SearchSettings

if TYPE_CHECKING:
    from rankopt.candidates.latency_table import Conditions
    from rankopt.candidates.search_space import SearchSpace
    from rankopt.core.records import Task
    from rankopt.search.loop import Runner
    from rankopt.search.result import Result

# Panels of --help
BUDGET, STRATEGY, EVALUATION, LATENCY = "Budget", "Strategy", "Evaluation", "Latency"
RAY, OUTPUT = "Ray Tune", "Output"


@app.command(rich_help_panel=COMPRESS)
def search(  # noqa: PLR0913  # a parameter for every option
    task: TaskName,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            help="METRIC=VALUE, repeatable: params=0.5, macs=30%, bytes=500KB, latency=5ms",
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
    strategy: Annotated[
        str,
        typer.Option(
            help="knapsack, optuna, rl, lasso, lasso-train, evbmf, greedy, energy, uniform or random",
            rich_help_panel=STRATEGY,
        ),
    ] = "knapsack",
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
        str, typer.Option("--space", help="a search space by name, or a .toml file", rich_help_panel=STRATEGY)
    ] = "default",
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
            help="with --budget latency=0.6 or 5ms: where it counts",
            show_default="cpu,batch=1,threads=1,runtime=eager",
            rich_help_panel=LATENCY,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(help="evaluate with this many Ray Tune workers; 0: in this process", rich_help_panel=RAY),
    ] = 0,
    ray_address: Annotated[str | None, typer.Option(help="a running Ray cluster, or auto", rich_help_panel=RAY)] = None,
    gpus_per_trial: Annotated[
        float, typer.Option(help="GPUs of one Ray trial, may be a fraction", rich_help_panel=RAY)
    ] = 0.0,
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
        typer.Option("--tensorboard", help="write Ray's TensorBoard files to OUT/logs", rich_help_panel=RAY),
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
) -> None:
    """Search for the best plan within a budget and write the run folder."""
    from rankopt.core.options import parse_pairs

    with readable_errors():
        settings = SearchSettings.parse(
            strategy,
            parse_pairs(option or []),
            fidelities or None,
            trials=trials,
            seed=seed,
            refine=refine,
            storage=storage,
            resume=resume,
        )
        _run(
            _Job(
                task=task,
                budget=budget,
                max_drop=max_drop,
                minimize=minimize,
                latency_on=latency_on,
                space=space,
                settings=settings,
                runner=RunnerSettings(workers, ray_address, gpus_per_trial, trial_timeout, trial_memory, tensorboard),
                out=out or default_folder(task, strategy if max_drop is None else "max-drop"),
                cache=cache,
                html=html,
            )
        )


@dataclass(frozen=True)
class _Job:
    """The options of `rankopt search`, as given."""

    task: str
    budget: list[str] | None
    max_drop: float | None
    minimize: str | None
    latency_on: str | None
    space: str
    settings: SearchSettings
    runner: RunnerSettings
    out: Path
    cache: Path | None
    html: bool


def _run(job: _Job) -> None:
    """Check the options, search, and write the run folder and its report."""
    from rankopt.candidates.search_space import load_space
    from rankopt.experiments.tasks import load_task
    from rankopt.search.compress import open_run_folder

    conditions = latency_conditions(job.latency_on, job.budget)
    if (job.max_drop is None) == (not job.budget):
        raise RankoptError("give --budget (how small) or --max-drop (how good), and not both")
    task = load_task(job.task)
    _check_max_drop(job, task)
    runner = make_runner(job.runner, job.out / "logs")
    space = load_space(job.space)
    _check_rounds(job, space)
    open_run_folder(job.out, job.settings)
    if space.rounds > 1:
        result = _search_in_rounds(job, task, space, runner)
        echo(result.summary())
    else:
        result = _search_once(job, task, space, runner, conditions)
        echo(result.summary())
        _echo_fitting_times(result)
    write_page(job.out, job.html)
    if result.info["trials"]["interrupted"]:
        raise KeyboardInterrupt


def _check_max_drop(job: _Job, task: Task) -> None:
    """Raise RankoptError if --max-drop makes no sense, or goes with options that it has no use for."""
    from rankopt.search.max_drop import check_max_drop

    if job.max_drop is None:
        if job.minimize is not None:
            raise RankoptError("--minimize goes with --max-drop")
        return
    check_max_drop(task, job.max_drop, job.minimize or "params")
    default = SearchSettings(seed=job.settings.seed, refine=job.settings.refine)
    if job.settings != default or job.runner.any_given:
        raise RankoptError(
            "--max-drop evaluates knapsack plans of several budgets, here and now: it takes no --strategy, --option, "
            "--trials, --resume, --fidelities, --storage, --workers, or what goes with workers"
        )


def _check_rounds(job: _Job, space: SearchSpace) -> None:
    """Raise RankoptError for options that a search in several rounds has no use for."""
    refined = job.settings.refine or job.settings.fidelities != SearchSettings().fidelities
    if space.rounds > 1 and (job.max_drop is not None or refined or job.settings.storage or job.latency_on):
        raise RankoptError(
            f"search space {job.space!r} asks for {space.rounds} rounds: not with --max-drop, --refine, "
            "--fidelities, --storage or --latency-on"
        )


def _search_in_rounds(job: _Job, task: Task, space: SearchSpace, runner: Runner) -> Result:
    """Search with short trainings in between, as the search space asks."""
    from rankopt.search.multi_stage import run_multi_stage

    return run_multi_stage(
        task,
        space,
        job.budget or [],
        job.settings,
        job.out,
        job.cache,
        LiveRunner(runner, job.out),
        progress=show_progress,
    )


def _search_once(job: _Job, task: Task, space: SearchSpace, runner: Runner, conditions: Conditions | None) -> Result:
    """Search within the budget, or within the smallest one that keeps the score."""
    from rankopt.candidates.prepare import prepare
    from rankopt.search.compress import run_search
    from rankopt.search.max_drop import OPTIONS, smallest_model

    prepared = prepare(task, space, job.cache, show_progress, budget=job.budget, latency_on=conditions)
    if job.max_drop is None:
        problem = prepared.problem(job.budget or [])
        return run_search(prepared, problem, job.settings, job.out, LiveRunner(runner, job.out), show_progress)
    answer = smallest_model(prepared, job.max_drop, job.minimize or "params", show_progress)
    return run_search(
        prepared,
        prepared.problem(answer.budget),
        dataclasses.replace(job.settings, options=OPTIONS),
        job.out,
        LiveRunner(answer.run, job.out),
        show_progress,
        max_drop=answer.report,
    )


def _echo_fitting_times(result: Result) -> None:
    """Print what fitting took, family by family; nothing if all candidates came from the cache."""
    if seconds := result.info["family_seconds"]:
        spent = ", ".join(f"{k} {v:.0f}" for k, v in sorted(seconds.items(), key=lambda x: -x[1]))
        echo(f"seconds of fitting per family, summed over workers: {spent}")
