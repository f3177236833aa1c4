"""`rankopt search`: the best plan within a budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from rankopt.cli.app import (
    CacheFolder,
    SpaceName,
    TaskName,
    app,
    clear_errors,
    default_folder,
    echo,
    latency_conditions,
    write_page,
)
from rankopt.cli.progress import LiveRunner, show_progress
from rankopt.core.errors import RankoptError
from rankopt.search.runners import make_runner


@app.command()
def search(
    task: TaskName,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="METRIC=VALUE, repeatable: params=0.5, macs=30%, bytes=500KB, latency=5ms"),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="instead of a budget: the smallest model that loses at most this much score (0.01)"),
    ] = None,
    minimize: Annotated[str | None, typer.Option(help="with --max-drop: params, macs or bytes [params]")] = None,
    latency_on: Annotated[
        str | None,
        typer.Option(help="with --budget latency=0.6 or 5ms: where it counts [cpu,batch=1,threads=1,runtime=eager]"),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="knapsack, optuna, rl, lasso, lasso-train, evbmf, greedy, energy, uniform or random")
    ] = "knapsack",
    option: Annotated[
        list[str] | None, typer.Option("--option", help="KEY=VALUE of the strategy's own, repeatable")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="distinct plans to evaluate in total [30]")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same plans")] = 0,
    out: Annotated[Path | None, typer.Option(help="the run folder [runs/TASK-STRATEGY]")] = None,
    space: SpaceName = "default",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run folder")] = False,
    workers: Annotated[int, typer.Option(help="evaluate on Ray Tune with so many workers (0: in this process)")] = 0,
    ray_address: Annotated[str | None, typer.Option(help="a running Ray cluster, or auto")] = None,
    gpus_per_trial: Annotated[float, typer.Option(help="GPUs of one Ray trial, may be a fraction")] = 0.0,
    trial_timeout: Annotated[
        float | None, typer.Option(help="seconds until a worker's trial is stopped, and failed")
    ] = None,
    trial_memory: Annotated[
        float | None, typer.Option(help="GB that a worker's trial may take beyond model and data")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write Ray's TensorBoard files to OUT/logs")
    ] = False,
    fidelities: Annotated[
        str | None,
        typer.Option(help="stop bad trials early: shares of the examples as 0.1,0.5; last train=STEPS scores trained"),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of a study that several processes share [OUT/study.db]")
    ] = None,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="refit the chosen plan layer after layer, against the dense model (minutes)"),
    ] = False,
    cache: CacheFolder = None,
    html: Annotated[bool, typer.Option(help="write report.html")] = True,
) -> None:
    """Search for the best plan within a budget and write the run folder."""
    with clear_errors():
        from rankopt.candidates.prepare import prepare
        from rankopt.candidates.search_space import load_space
        from rankopt.core.options import parse_pairs
        from rankopt.core.run_folder import open_folder
        from rankopt.experiments.tasks import load_task
        from rankopt.search.compress import run_search
        from rankopt.search.evaluator import FULL_FIDELITY, FidelitySchedule, Settings
        from rankopt.strategies.registry import read_options

        options = read_options(strategy, parse_pairs(option or []))
        where = latency_conditions(latency_on, budget)
        if (max_drop is None) == (not budget):
            raise RankoptError("give --budget (how small) or --max-drop (how good), and not both")
        ladder = FidelitySchedule.parse(fidelities) if fidelities else FULL_FIDELITY
        limits = (trial_timeout, trial_memory)
        question = None
        wanted: Any = budget
        found = load_task(task)
        if max_drop is not None:
            given: list[Any] = [strategy != "knapsack", option, trials, resume, workers, ray_address, gpus_per_trial]
            given += [*limits, tensorboard, fidelities, storage]
            _check_max_drop(found, max_drop, minimize, any(given))
        elif minimize is not None:
            raise RankoptError("--minimize goes with --max-drop")
        out = out or default_folder(task, strategy if max_drop is None else "max-drop")
        runner = make_runner(workers, ray_address, gpus_per_trial, limits, out / "logs", tensorboard)
        allowed = load_space(space)
        if allowed.rounds > 1 and (max_drop is not None or refine or fidelities or storage or latency_on):
            raise RankoptError(
                f"search space {space!r} asks for {allowed.rounds} rounds: not with --max-drop, --refine, "
                "--fidelities, --storage or --latency-on"
            )
        open_folder(out, resume, "*" if storage else "study.db")
        settings = Settings(strategy, trials, seed, resume, refine, options, ladder, storage)
        if allowed.rounds > 1:
            from rankopt.search.multi_stage import run_multi_stage

            result = run_multi_stage(
                found, allowed, wanted, settings, out, cache, LiveRunner(runner, out), progress=show_progress
            )
            echo(result.summary())
            write_page(out, html)
            return
        prepared = prepare(found, allowed, cache, show_progress, budget=wanted, latency_on=where)
        if max_drop is not None:
            from rankopt.search.max_drop import OPTIONS, smallest_model

            answer = smallest_model(prepared, max_drop, minimize or "params", show_progress)
            wanted, runner, question = answer.budget, answer.run, answer.question
            settings = dataclasses.replace(settings, options=OPTIONS)
        result = run_search(
            prepared,
            prepared.problem(wanted),
            settings,
            out,
            LiveRunner(runner, out),
            progress=show_progress,
            question=question,
        )
        echo(result.summary())
        if prepared.family_seconds:
            spent = ", ".join(f"{k} {v:.0f}" for k, v in sorted(prepared.family_seconds.items(), key=lambda x: -x[1]))
            echo(f"seconds of fitting per family, summed over workers: {spent}")
        write_page(out, html)
        if result.info["trials"]["interrupted"]:
            raise KeyboardInterrupt


def _check_max_drop(task: Any, max_drop: float, minimize: str | None, others: bool) -> None:
    from rankopt.search.max_drop import check_question

    check_question(task, max_drop, minimize or "params")
    if others:
        raise RankoptError(
            "--max-drop evaluates knapsack plans of several budgets, here and now: it takes no --strategy, --option, "
            "--trials, --resume, --fidelities, --storage, --workers, or what goes with workers"
        )
