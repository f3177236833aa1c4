"""`rankopt run`: experiments described by a TOML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankopt.cli.app import EXPERIMENTS, RAY, CacheFolder, app, echo, readable_errors, write_page
from rankopt.core.errors import RankoptError
from rankopt.core.progress import StopCondition
from rankopt.core.run_folder import folder_lock, read_result
from rankopt.core.signals import received
from rankopt.core.text import one_line
from rankopt.search.progress import LiveRunner, ProgressBar, console
from rankopt.search.runners import crew_of, make_runner, session

if TYPE_CHECKING:
    from rankopt.experiments.config import StudyFile
    from rankopt.search.loop import Runner

FILES = "the file's"
UNFINISHED = 3  # exit code where the time was over before all was done


@app.command(rich_help_panel=EXPERIMENTS)
def run(  # noqa: PLR0913  # a parameter for every option
    study: Annotated[
        Path,
        typer.Argument(
            help="a study's .toml file: the settings of a search, of cases, or of a search for hyperparameters"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="the folder for results", show_default="the file's out, or runs/STUDY")
    ] = None,
    budget_minutes: Annotated[
        float, typer.Option(help="start nothing after this many minutes; the same command goes on")
    ] = float("inf"),
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="this case only, or those of a pattern ('a-*'), repeatable: so several processes share a study",
            show_default="all",
        ),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="first take over cases from this copy of the folder for results, made elsewhere; repeatable"),
    ] = None,
    cache: CacheFolder = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Ray workers: for one search each does trials, for several cases or searches each does one of these",
            show_default=FILES,
            rich_help_panel=RAY,
        ),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="a running Ray cluster, or auto", show_default=FILES, rich_help_panel=RAY)
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(help="GPUs of one worker, may be a fraction", show_default=FILES, rich_help_panel=RAY),
    ] = None,
    cpus_per_trial: Annotated[
        float | None, typer.Option(help="CPUs of one worker", show_default=FILES, rich_help_panel=RAY)
    ] = None,
) -> None:
    """Run a study's file, or resume it: one search, a list of cases, or a search for hyperparameters.

    The exit code is 3 if the time was over before all was done.
    """
    with readable_errors("every finished search is kept: the same command goes on"):
        from rankopt.experiments.config import read_study

        found = read_study(study)
        if (case or merge) and not found.cases:
            raise RankoptError(f"{'--case' if case else '--merge'}: {study} has no [[cases]]")
        folder = out or found.out
        if merge:
            _merge(found, folder, merge)
        options: dict[str, Any] = {
            "workers": workers,
            "ray_address": ray_address,
            "gpus_per_trial": gpus_per_trial,
            "cpus_per_trial": cpus_per_trial,
        }
        given = {name: value for name, value in options.items() if value is not None}
        runner = make_runner(dataclasses.replace(found.runner, **given), folder)
        stop = StopCondition(budget_minutes)
        with session(runner):
            if found.hyperparameters:
                complete = _run_tuning(found, folder, runner, cache, stop)
            elif found.cases:
                complete = _run_cases(found, folder, LiveRunner(runner, folder), cache, stop, case or ())
            else:
                complete = _run_one(found, folder, LiveRunner(runner, folder), cache, stop)
        if received():
            raise KeyboardInterrupt
        if not complete:
            raise typer.Exit(UNFINISHED)


def _merge(study: StudyFile, out: Path, folders: Sequence[Path]) -> None:
    """Take over cases that got further elsewhere."""
    from rankopt.experiments.merge import merge

    for folder in folders:
        taken = merge(study, folder, out)
        echo(f"merged from {folder}: {', '.join(taken) or 'nothing that is not here already'}")


def _run_one(study: StudyFile, out: Path, runner: Runner, cache: Path | None, stop: StopCondition) -> bool:
    """One search, with its summary and report. Returns whether all is done, as the next two do."""
    from rankopt.experiments.tasks import load_task
    from rankopt.experiments.tuning import run_single
    from rankopt.search.summary import summary

    folder, complete = run_single(study, load_task(study.task), out, runner, cache, stop, ProgressBar())
    if folder:
        echo(summary(read_result(folder)))
        write_page(folder, html=True)
    if not complete:
        echo("not all was done: the same command goes on")
    return complete


def _run_tuning(study: StudyFile, out: Path, runner: Runner, cache: Path | None, stop: StopCondition) -> bool:
    """Many searches, their pages, and the best one repeated."""
    from rankopt.experiments.tasks import load_task
    from rankopt.experiments.tuning import TuningStudy
    from rankopt.report.html import write_report
    from rankopt.report.hyperparameters import write

    display = ProgressBar()
    with TuningStudy(study, load_task(study.task), out).open() as searches:
        several = crew_of(runner) is not None
        display.note("searches")
        text = (lambda: display.text) if several else (lambda: "searches")
        with display.lines(text, study.searches, len(searches.done()), alone=several) as advance:

            def report(text: str) -> None:
                advance()
                display.say(text)

            complete = searches.run(stop.end, runner, cache, report, display)
        if searches.finished():
            echo(f"written: {', '.join(map(str, write(searches)))}")
        if not complete:
            echo(f"the time is over with {len(searches.done())} of {study.searches} searches: the same command goes on")
        elif folder := searches.rerun_best(runner, cache, stop, display):
            echo(f"the best search, made again: {write_report(folder)}")
            return True
        else:
            echo("the best search was not made again: the same command goes on")
    return False


def _run_cases(
    study: StudyFile, out: Path, runner: Runner, cache: Path | None, stop: StopCondition, only: Sequence[str]
) -> bool:
    """All cases, or some, each with its report, and the table of all that are finished."""
    from rankopt.experiments.cases import CaseFailed, CaseStarted, case_crew, chosen_cases, finished_cases, run_cases
    from rankopt.report.cases import MARKDOWN, table, write
    from rankopt.report.html import write_report

    cases, display = chosen_cases(study, only), ProgressBar()
    several = case_crew(cases, runner) is not None
    say = display.say if several and console.is_terminal else echo  # which would write into the line of progress
    failed: list[CaseFailed] = []
    with _case_lines(display, len(cases), several) as advance:
        for event in run_cases(study, out, runner, cache, stop, display, only):
            if isinstance(event, CaseStarted):
                say(f"{event.name}:" if event.minutes is None else f"{event.name} (about {event.minutes:g} minutes):")
                continue
            advance()
            if isinstance(event, CaseFailed):
                display.say(f"{event.name}: failed, {one_line(' '.join(str(event.error).split()))}")
                failed.append(event)
                continue
            write_report(event.folder)
            with folder_lock(out, wait=True):  # several processes may share a study
                write(out, study.path, finished_cases(study, out), len(study.cases))
    if rows := finished_cases(study, out):
        echo(table(rows))
        echo(f"written: {out / MARKDOWN}")
    if len(rows) < len(study.cases):
        echo(f"{len(rows)} of {len(study.cases)} cases are done: the same command goes on")
    if failed:
        raise RankoptError("; ".join(f"case {x.name} failed: {x.error}" for x in failed))
    return {row["case"] for row in rows} >= {case.name for case in cases}


def _case_lines(display: ProgressBar, total: int, several: bool) -> AbstractContextManager[Callable[..., None]]:
    """Context: of several cases at a time a line says how far they are; a single one shows its own progress."""
    if several:
        display.note("cases")
        return display.lines(lambda: display.text, total, alone=True)
    return nullcontext(lambda: None)
