"""The command line; train and run are in modules of their own."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rankopt import commands
from rankopt.core import RankoptError
from rankopt.progress import Bar, Patience, Watched, console, track

app = typer.Typer(
    help="Choose a tensor decomposition and its rank for every layer of a PyTorch model, under one budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TaskName = Annotated[str, typer.Argument(help="a built-in task (digits) or FILE.py:function; the file is run")]
SpaceName = Annotated[str, typer.Option("--space", help="a search space by name, or a .toml file")]
CacheFolder = Annotated[Path | None, typer.Option("--cache", help="where candidates are kept [RANKOPT_CACHE]")]


@contextmanager
def clear_errors(kept: str = "every finished trial is kept: go on with --resume") -> Iterator[None]:
    """One line for what a user can mend, exit code 2; Ctrl-C says how to go on."""
    try:
        yield
    except RankoptError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(f"stopped; {kept}", markup=False)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno is None:
            raise
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@app.command()
def inspect(
    task: Annotated[str, typer.Argument(help="a task as for search; with --bonds a run folder, too")],
    space: SpaceName = "default",
    bonds: Annotated[
        bool, typer.Option("--bonds", help="of factorised layers: spectra, effective ranks, images")
    ] = False,
    run_task: Annotated[
        str | None, typer.Option("--task", help="of a run folder: the task whose model it was; its file is run")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the page that --bonds writes [bonds.html in the run's folder]")
    ] = None,
    cache: CacheFolder = None,
) -> None:
    """Show a task's layers: shape, parameters, MACs, what each may become, what stays dense and why.

    With --bonds: what the bonds of a run's layers hold, or of each layer's most accurate candidate in the space.
    """
    with clear_errors():
        from rankopt.frontier import dense_candidate
        from rankopt.inventory import count, inventory, unfolded
        from rankopt.prepare import mark_dense
        from rankopt.report.text import inspection
        from rankopt.rounding import in_each_precision
        from rankopt.space import load_space
        from rankopt.tasks import load_task

        if bonds:
            _inspect_bonds(task, run_task, space, out, cache)
            return
        if run_task or out:
            raise RankoptError("--task and --out go with --bonds")
        found, allowed = load_task(task), load_space(space)
        layers = mark_dense(
            inventory(unfolded(found.model, found.example_input, allowed.split_qkv), found.example_input), allowed
        )
        free = [x for x in layers if x.reason is None]
        families = {x.name: [f for f in allowed.families if allowed.ranks(f, x)] for x in free}
        for x in free:
            families[x.name] += [c.precision for c in in_each_precision(x, dense_candidate(x), allowed.precisions)]
        Console(width=max(100, Console().width), markup=False, emoji=False).print(
            inspection(layers, count(found.model, found.example_input), families)
        )


def _inspect_bonds(what: str, task: str | None, space: str, out: Path | None, cache: Path | None) -> None:
    from rankopt.interpret import bonds_of_run, bonds_of_space
    from rankopt.report.bonds import FILE, table, write_bonds
    from rankopt.space import load_space
    from rankopt.tasks import load_task

    if Path(what).is_dir():
        if task is None:
            raise RankoptError(f"{what} is a run folder: give the task whose model it was with --task")
        rows, folder = bonds_of_run(Path(what), load_task(task), track), Path(what)
    else:
        if task is not None:
            raise RankoptError(f"--task goes with a run folder, and there is no folder {what}")
        rows, folder = bonds_of_space(load_task(what), load_space(space), cache, track), _folder(what, "bonds")
    _print(table(rows))
    _print(f"page: {write_bonds(out or folder / FILE, what, rows)}")


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
        from rankopt.fidelity import WHOLE, Ladder
        from rankopt.job import open_folder, run_search
        from rankopt.prepare import prepare
        from rankopt.settings import Settings
        from rankopt.space import load_space
        from rankopt.strategies import parse_pairs, read_options
        from rankopt.tasks import load_task

        options = read_options(strategy, parse_pairs(option or []))
        where = _conditions(latency_on, budget)
        if (max_drop is None) == (not budget):
            raise RankoptError("give --budget (how small) or --max-drop (how good), and not both")
        ladder = Ladder.parse(fidelities) if fidelities else WHOLE
        limits = (trial_timeout, trial_memory)
        question = None
        wanted: Any = budget
        found = load_task(task)
        if max_drop is not None:
            given: list[Any] = [strategy != "knapsack", option, trials, resume, workers, ray_address, gpus_per_trial]
            given += [*limits, tensorboard, fidelities, storage]
            _check_inverse(found, max_drop, minimize, any(given))
        elif minimize is not None:
            raise RankoptError("--minimize goes with --max-drop")
        out = out or _folder(task, strategy if max_drop is None else "max-drop")
        runner = _runner(workers, ray_address, gpus_per_trial, limits, out / "logs", tensorboard)
        allowed = load_space(space)
        if allowed.rounds > 1 and (max_drop is not None or refine or fidelities or storage or latency_on):
            raise RankoptError(
                f"search space {space!r} asks for {allowed.rounds} rounds: not with --max-drop, --refine, "
                "--fidelities, --storage or --latency-on"
            )
        open_folder(out, resume, "*" if storage else "study.db")
        settings = Settings(strategy, trials, seed, resume, refine, options, ladder, storage)
        if allowed.rounds > 1:
            from rankopt.rounds import run_rounds

            result = run_rounds(found, allowed, wanted, settings, out, cache, Watched(runner, out), track=track)
            _print(result.summary())
            _report(out, html)
            return
        prepared = prepare(found, allowed, cache, track, budget=wanted, latency_on=where)
        if max_drop is not None:
            from rankopt.inverse import OPTIONS, smallest

            answer = smallest(prepared, max_drop, minimize or "params", track)
            wanted, runner, question = answer.budget, answer.run, answer.question
            settings = dataclasses.replace(settings, options=OPTIONS)
        result = run_search(
            prepared,
            prepared.problem(wanted),
            settings,
            out,
            Watched(runner, out),
            track=track,
            question=question,
        )
        _print(result.summary())
        if prepared.family_seconds:
            spent = ", ".join(f"{k} {v:.0f}" for k, v in sorted(prepared.family_seconds.items(), key=lambda x: -x[1]))
            _print(f"seconds of fitting per family, summed over workers: {spent}")
        _report(out, html)
        if result.info["trials"]["interrupted"]:
            raise KeyboardInterrupt


def _report(out: Path, html: bool) -> None:
    if html:
        from rankopt.report.html import write_report

        _print(f"report: {write_report(out)}")


def _conditions(latency_on: str | None, budget: Any) -> Any:
    from rankopt.budget import limited
    from rankopt.hardware import Conditions

    if latency_on and "latency" not in limited(budget):
        raise RankoptError("--latency-on goes with --budget latency=...")
    return Conditions.parse(latency_on) if latency_on else None


def _folder(task: str, what: str) -> Path:
    return Path("runs") / f"{Path(task.rpartition(':')[0] or task).stem}-{what}"


def _check_inverse(task: Any, max_drop: float, minimize: str | None, others: bool) -> None:
    from rankopt.inverse import check_question

    check_question(task, max_drop, minimize or "params")
    if others:
        raise RankoptError(
            "--max-drop evaluates knapsack plans of several budgets, here and now: it takes no --strategy, --option, "
            "--trials, --resume, --fidelities, --storage, --workers, or what goes with workers"
        )


@app.command()
def sweep(
    task: TaskName,
    budgets: Annotated[str, typer.Option(help="METRIC=FROM:TO:HOW_MANY, equal ratios apart, or METRIC=A,B,C")],
    evaluate: Annotated[str, typer.Option(help="knees (and the ends), all or none")] = "knees",
    out: Annotated[Path | None, typer.Option(help="the folder for sweep.csv and sweep.png [runs/TASK-sweep]")] = None,
    space: SpaceName = "default",
    cache: CacheFolder = None,
) -> None:
    """The front of size against score: one calibration, the exact allocation for every budget."""
    with clear_errors("what was fitted is kept: the same command goes on"):
        import rankopt.sweep as sweeps
        from rankopt.job import open_folder
        from rankopt.prepare import prepare
        from rankopt.report.sweep import table, write
        from rankopt.tasks import load_task

        found = load_task(task)
        sweeps.check_evaluate(evaluate)
        loosest = sweeps.loosest(found, budgets)
        out = out or _folder(task, "sweep")
        open_folder(out, resume=False)
        prepared = prepare(found, space, cache, track, budget=[loosest])
        result = sweeps.sweep(prepared, budgets, evaluate, track)
        write(out, result)
        _print(table(result))
        _print(f"written: {out / 'sweep.csv'}, {out / 'sweep.png'}")
        _print(f"a model of one of them, in seconds: rankopt search {task} --budget METRIC=VALUE")


@app.command()
def hardware(
    task: TaskName,
    latency_on: Annotated[
        str, typer.Option(help="the conditions that are timed")
    ] = "cpu,batch=1,threads=1,runtime=eager",
    out: Annotated[
        Path | None, typer.Option(help="the table to write or add to, for table=FILE elsewhere [one in the cache]")
    ] = None,
    space: SpaceName = "default",
    cache: CacheFolder = None,
) -> None:
    """Time a task's layers and all that they may become on this machine, for latency budgets here or elsewhere."""
    with clear_errors("what was timed is kept: the same command goes on"):
        from rankopt.hardware import Conditions
        from rankopt.prepare import time_task
        from rankopt.report.hardware import table
        from rankopt.space import load_space
        from rankopt.tasks import load_task

        layers, found = time_task(load_task(task), load_space(space), Conditions.parse(latency_on), cache, track, out)
        _print(table(layers, found))
        if out:
            _print(f"written: {out}; use it with --latency-on {found.conditions},table={out}")


@app.command()
def benchmark(
    task: TaskName,
    budget: Annotated[
        list[str], typer.Option("--budget", help="a problem, repeatable: params=0.3, or jointly params=0.3,macs=0.5")
    ],
    strategies: Annotated[str, typer.Option(help="all, or names as in knapsack,random,optuna:sampler=gp")] = "all",
    trials: Annotated[int, typer.Option(help="distinct plans for each strategy; one-shot strategies have one")] = 30,
    seeds: Annotated[int, typer.Option(help="runs of each, with seeds 0, 1, ...")] = 3,
    out: Annotated[Path | None, typer.Option(help="the folder for benchmark.* [runs/TASK-benchmark]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on; budgets, strategies and seeds may be added")] = False,
    space: SpaceName = "default",
    cache: CacheFolder = None,
) -> None:
    """Compare strategies under equal numbers of evaluations."""
    with clear_errors("every finished run is kept: go on with --resume"):
        import rankopt.benchmark as benchmarks
        from rankopt.job import open_folder
        from rankopt.prepare import prepare
        from rankopt.report.benchmark import cell_line, text, write
        from rankopt.tasks import load_task

        names = benchmarks.read_strategies(strategies)
        out = out or _folder(task, "benchmark")
        open_folder(out, resume, benchmarks.FILE)
        prepared = prepare(load_task(task), space, cache, track, budget=budget[0].split(","))

        def shown(cell: dict[str, Any]) -> None:
            console.print(cell_line(cell), markup=False, highlight=False, soft_wrap=True)

        data = benchmarks.benchmark(prepared, budget, names, trials, seeds, out, resume, shown, track)
        write(out, data)
        _print(text(data))
        _print(f"written: {', '.join(str(p) for p in sorted(out.glob('benchmark.*')))}")


@app.command()
def run(
    study: Annotated[
        Path, typer.Argument(help="a study's .toml file: a search's settings, perhaps with cases or ranges")
    ],
    out: Annotated[Path | None, typer.Option(help="the folder for results [the file's out, or runs/STUDY]")] = None,
    budget_minutes: Annotated[float, typer.Option(help="start nothing after so many minutes; run again to go on")] = (
        float("inf")
    ),
    case: Annotated[
        list[str] | None, typer.Option(help="this case only, repeatable: so several processes share a study [all]")
    ] = None,
    cache: CacheFolder = None,
) -> None:
    """Do what a study's file says, or go on with it: one search, a list of cases, or hyperparameters searched for."""
    with clear_errors("every finished search is kept: the same command goes on"):
        from rankopt.cases import run_cases
        from rankopt.hyperparameters import run_study
        from rankopt.study import read_study
        from rankopt.tasks import load_task

        found = read_study(study)
        folder = out or found.out
        runner = _runner(found.workers, None, 0.0, (None, None), folder / "logs", False)
        runner = runner if found.hyperparameters else Watched(runner, folder)

        def told(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        if case and not found.cases:
            raise RankoptError(f"--case: {study} has no [[cases]]")
        where = (folder, runner, cache, Patience(budget_minutes), Bar())
        lines = (
            run_cases(found, *where, case or ())
            if found.cases
            else run_study(found, load_task(found.task), *where, told)
        )
        for line in lines:
            _print(line)


def _runner(
    workers: int,
    ray_address: str | None,
    gpus_per_trial: float,
    limits: tuple[float | None, float | None],
    logs: Path,
    tensorboard: bool,
) -> Any:
    """The search loop to use: in this process, or on Ray Tune."""
    from rankopt.search import search as in_process

    if workers < 0 or gpus_per_trial < 0:
        raise RankoptError("--workers and --gpus-per-trial must not be negative")
    if not workers and not ray_address and not gpus_per_trial:
        if any(limits) or tensorboard:
            raise RankoptError(
                "--trial-timeout, --trial-memory and --tensorboard go with --workers: "
                "in this process nothing can stop a trial"
            )
        return in_process
    from rankopt.ray_worker import Limits
    from rankopt.search_ray import RaySearch

    seconds, gigabytes = limits
    memory = None if gigabytes is None else int(gigabytes * 1e9)
    return RaySearch(max(workers, 1), ray_address, gpus_per_trial, Limits(seconds, memory), logs, tensorboard)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write a run's report.html and print the same as text."""
    with clear_errors():
        from rankopt.plan import read_result, sound
        from rankopt.report.html import write_report
        from rankopt.report.text import summary
        from rankopt.report.training import lines

        with sound(run):
            info = read_result(run)
            _print("\n".join([summary(info), *lines(info)]))
        _print(f"report: {write_report(run)}")


@app.command()
def apply(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    task: Annotated[str, typer.Option(help="the task whose model is rebuilt; its file is run")],
    check: Annotated[bool, typer.Option("--check", help="count the cost again and score the rebuilt model")] = False,
) -> None:
    """Rebuild a compressed model from plan.json and its weights."""
    with clear_errors():
        from rankopt.core import DENSE, SAME
        from rankopt.inventory import count
        from rankopt.plan import load, read_plan, read_result, sound
        from rankopt.tasks import load_task

        found = load_task(task)
        plan, _ = read_plan(run)
        model = load(found.model, run)
        changed = sum(c.method != DENSE for c in plan.choices)
        rounded = sum(c.precision != SAME for c in plan.choices)
        also = f", {rounded} stored in fewer bits" if rounded else ""
        _print(f"rebuilt {run}: {changed} of {len(plan.choices)} layers factorised{also}")
        if check:
            cost = count(model, found.example_input)
            if cost != plan.cost:
                raise RankoptError(f"the rebuilt model costs {cost}, the plan says {plan.cost}")
            _print(
                f"cost counted again: {cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes, as planned"
            )
            if plan.latency_on:
                _check_latency(found, model, plan)
            with sound(run):
                _check_scores(found, model, read_result(run))


def _check_latency(task: Any, model: Any, plan: Any) -> None:
    from rankopt.budget import show
    from rankopt.hardware import Conditions, machine
    from rankopt.promise import in_turns, interval

    conditions = Conditions.parse(plan.latency_on)
    dense, small = in_turns(task.model, model, task.example_input, conditions)
    low, high = interval([b / a for a, b in zip(dense, small, strict=True)])
    _print(
        f"latency measured again: {low:.1%} to {high:.1%} of dense (95 %), the plan says "
        f"{plan.cost.latency / max(plan.dense.latency, 1):.1%}; {show('latency', sorted(small)[len(small) // 2])} on "
        f"{conditions} ({machine(conditions)})"
    )


def _check_scores(task: Any, model: Any, info: dict[str, Any]) -> None:
    from rankopt.evaluate import call

    for part, function in (("validation", task.score), ("test", task.test)):
        value = call(f"the {part} score", function, model)
        if value is not None:
            before = info["score"]["compressed"][part]
            noted = "" if before is None else f" (the run noted {before:.2%})"
            _print(f"{part} score {value:.2%}{noted}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    task: Annotated[str, typer.Option(help="the task whose model is rebuilt; its file is run")],
    to: Annotated[str, typer.Option(help="onnx, torch.export or state_dict (safetensors)")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="the file [export.onnx, .pt2 or .safetensors in RUN]")] = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="fold batch norms, merge and multiply out what pays")] = False,
    batch: Annotated[str, typer.Option(help="of what size the program takes inputs, or dynamic: any")] = "dynamic",
    dense: Annotated[
        bool, typer.Option("--dense", help="state_dict: factors multiplied out, for the original architecture")
    ] = False,
) -> None:
    """Write the compressed model for use elsewhere, compare its outputs on calibration inputs, and time it."""
    with clear_errors("nothing was written"):
        import rankopt.export as exports
        from rankopt.plan import load
        from rankopt.report.text import exported
        from rankopt.tasks import load_task

        size = exports.check_request(to, fuse, batch, dense)
        found = load_task(task)
        small = load(found.model, run)
        made = exports.export_run(found, small, to, out or run / f"export{exports.SUFFIXES[to]}", fuse, size, dense)
        _print(exported(made))


app.command()(commands.train)


def _print(text: str) -> None:
    typer.echo(text)


def main() -> None:
    """Entry point of the `rankopt` command."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    app()


if __name__ == "__main__":
    main()
