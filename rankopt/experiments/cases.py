"""Studies with cases: each is searched and trained in a folder of its own, and all go into one cases.json.

A case has a name, and states the settings in which it differs from the rest of the file:

```toml
task = "digits"
training = { epochs = 5 }

[[cases]]
name = "half"
budget.params = 0.5

[[cases]]
name = "quarter"
budget.params = 0.25
training.epochs = 10
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.progress import Display, StopCondition, graceful_interrupt
from rankopt.core.records import Task
from rankopt.core.result_record import Bounds, Part
from rankopt.core.run_folder import RESULT, check_no_links, claim, folder_lock, read_result
from rankopt.core.schema import read_json
from rankopt.core.text import few, reason
from rankopt.experiments.config import Case, StudyFile
from rankopt.experiments.elsewhere import experiment_job, machine, result_folder, status
from rankopt.experiments.experiment import run_in_folder, same_settings
from rankopt.experiments.tasks import load_task
from rankopt.search.loop import Runner, RunUntil
from rankopt.search.ray.away import Job, Update
from rankopt.search.runners import Crew, crew_of

JSON = "cases.json"
NAMED = 20  # cases in a message


class CaseRow(TypedDict):
    """A finished case, as in cases.json.

    Attributes:
        case: Name of the case.
        part: The data that the scores below are of: "test" if the task has a test score.
        params: Parameters of the compressed model, as a share of the dense model's.
        macs: Multiply-accumulates, likewise.
        dense: Score of the dense model; None from scratch, where the task's model may never have been trained.
        untrained: Score after the search, before the training; None from scratch.
        score: Score of the result.
        interval: 95 % interval of that score; None if the task does not give its number of examples.
        seconds: Duration of the search and the training.
        date: Day on which the case was finished.
        machine: Threads, architecture and torch version.
        settings: The case's settings, which say on a later call whether it is still the same case.
    """

    case: str
    part: Part
    params: float
    macs: float
    dense: float | None
    untrained: float | None
    score: float | None
    interval: Bounds | None
    seconds: float
    date: str
    machine: str
    settings: dict[str, Any]


class _Cases(TypedDict):
    """The content of cases.json."""

    cases: list[CaseRow]


class CaseStarted(NamedTuple):
    """A case begins, or is resumed.

    Attributes:
        name: Name of the case.
        minutes: About how long it takes; None if unknown.
    """

    name: str
    minutes: float | None = None


class CaseFinished(NamedTuple):
    """A case is done.

    Attributes:
        name: Name of the case.
        folder: The run folder that holds its result.
    """

    name: str
    folder: Path


class CaseFailed(NamedTuple):
    """A case ended with an error; the others go on.

    Attributes:
        name: Name of the case.
        error: Why.
    """

    name: str
    error: RankoptError


CaseEvent = CaseStarted | CaseFinished | CaseFailed


def chosen_cases(study: StudyFile, only: Sequence[str] = ()) -> list[Case]:
    """List the cases that some names stand for, in the study's order.

    Args:
        study: The study.
        only: Names of cases, with wildcards * and ?; empty for all.

    Raises:
        RankoptError: If no case has one of the names.
    """
    asked = [case for case in study.cases if not only or any(fnmatchcase(case.name, name) for name in only)]
    if unknown := [name for name in only if not any(fnmatchcase(case.name, name) for case in asked)]:
        names = few([case.name for case in study.cases], NAMED)
        raise RankoptError(f"unknown case {unknown[0]!r}; the cases are {names}")
    return asked


def case_crew(cases: Sequence[Case], runner: Runner) -> Crew | None:
    """Who does cases beside each other: the runner's Ray workers, if there are several cases.

    Args:
        cases: The cases.
        runner: The runner.

    Returns:
        The workers; None if the cases are done one after the other, with the runner for each one's search.
    """
    return crew_of(runner) if len(cases) > 1 else None


def run_cases(
    study: StudyFile,
    out: Path,
    runner: Runner,
    cache_folder: Path | None,
    stop: StopCondition,
    display: Display,
    only: Sequence[str] = (),
) -> Iterator[CaseEvent]:
    """Do the cases that are not finished; those that were stopped are resumed.

    Several cases are done beside each other if the runner has Ray workers: each worker does one case after the other,
    and the search of a case runs in its process. A case that another process is doing is left to it.

    Args:
        study: The study.
        out: Folder of the study, in which every case has a folder of its own. Several processes may share it.
        runner: Runs the searches.
        cache_folder: Folder of fitted candidates; None for the default.
        stop: Whether to stop, asked before every case and after every step of a training.
        display: Shows progress.
        only: Names of the cases to do, with wildcards * and ?; empty for all.

    Yields:
        An event where a case begins and one where it is done, or has failed.

    Raises:
        RankoptError: If no case has one of the names.
        StudyError: If cases.json is damaged, or the folder holds a link.
    """
    cases = chosen_cases(study, only)
    check_no_links(out)
    queue = _Queue(study, out, cases, display.say)
    if (crew := case_crew(cases, runner)) is not None:
        yield from _beside_each_other(queue, crew, cache_folder, stop, display)
    else:
        yield from _one_after_the_other(queue, runner, cache_folder, stop, display)


class _Queue:
    """The cases that nobody has done yet, for a process that does some of them."""

    def __init__(self, study: StudyFile, out: Path, cases: Sequence[Case], say: Callable[[str], None]) -> None:
        self.study, self.out, self.waiting, self.say = study, out, list(cases), say
        self.load = cache(load_task)  # several cases may share a task
        self.claims: dict[str, ExitStack] = {}

    def next(self) -> Case | None:
        """Claim the next case; None if there is none left."""
        while self.waiting:
            case = self.waiting.pop(0)
            if self._is_done(case):
                continue
            self.claims[case.name] = ExitStack()
            if not self.claims[case.name].enter_context(claim(self.out / f".{case.name}.claim")):
                self.say(f"{case.name}: another process is doing it")
            elif not self._is_done(case):  # by a process that had it until now
                return case
            self.release(case)
        return None

    def _is_done(self, case: Case) -> bool:
        known = read_rows(self.out).get(case.name)
        return bool(
            known and same_settings(known["settings"], case.settings) and is_finished(case, self.out / case.name)
        )

    def release(self, case: Case) -> None:
        """Let other processes have a case."""
        self.claims.pop(case.name).close()

    def finish(self, case: Case, task: Task, machine: str) -> CaseFinished:
        """Put a finished case into the table."""
        folder = self.out / case.name
        found = result_folder(case.experiment, folder)
        row = _case_row(case, task, folder, found, machine)
        with folder_lock(self.out, wait=True):
            write_rows(self.study, self.out, read_rows(self.out) | {case.name: row})  # others may have written theirs
        return CaseFinished(case.name, found)


def _one_after_the_other(
    queue: _Queue, runner: Runner, cache_folder: Path | None, stop: StopCondition, display: Display
) -> Iterator[CaseEvent]:
    while (case := queue.next()) is not None:
        try:
            if stop():
                return
            yield CaseStarted(case.name, case.minutes)
            task, until = queue.load(case.task), RunUntil(runner, stop.end)
            folder = queue.out / case.name
            if run_in_folder(case.experiment, task, folder, until, cache_folder, stop, display) is None:
                return
            yield queue.finish(case, task, machine())
        except RankoptError as error:
            yield CaseFailed(case.name, error)
        finally:
            queue.release(case)


def _beside_each_other(
    queue: _Queue, crew: Crew, cache_folder: Path | None, stop: StopCondition, display: Display
) -> Iterator[CaseEvent]:
    running: dict[Job, tuple[Case, Task]] = {}
    notes: dict[str, str] = {}
    events: list[CaseEvent] = []

    def next_job() -> Job | None:
        while (case := queue.next()) is not None:
            events.append(CaseStarted(case.name, case.minutes))
            try:
                task = queue.load(case.task)
                job = experiment_job(f"case {case.name}", case.experiment, task, queue.out / case.name, cache_folder)
            except RankoptError as error:
                events.append(CaseFailed(case.name, error))
                queue.release(case)
                continue
            running[job] = case, task
            return job
        return None

    def take(job: Job, update: Update) -> None:
        case, task = running[job]
        notes[case.name] = status(update)
        if not update.ended:
            return
        del running[job], notes[case.name]
        try:
            if update.error is not None:
                raise update.error
            if update.result is not None:
                events.append(queue.finish(case, task, update.result))
        except RankoptError as error:
            events.append(CaseFailed(case.name, error))
        queue.release(case)

    try:
        with graceful_interrupt(stop, display.say), closing(crew.do(next_job, stop)) as news:
            for job, update in news:
                take(job, update)
                display.note(" · ".join(f"{name}: {note}" for name, note in notes.items()) or "cases")
                while events:
                    yield events.pop(0)
    finally:
        for case, _ in running.values():
            queue.release(case)
    yield from events


def finished_cases(study: StudyFile, out: Path) -> list[CaseRow]:
    """Read the study's finished cases, in the order of its file.

    Args:
        study: The study.
        out: Folder of the study.

    Raises:
        StudyError: If cases.json is damaged.
    """
    rows = read_rows(out)
    return [rows[case.name] for case in study.cases if case.name in rows]


def read_rows(out: Path) -> dict[str, CaseRow]:
    """Read cases.json.

    Args:
        out: Folder of the study.

    Returns:
        Name -> row; empty if there is no such file.

    Raises:
        StudyError: If it is damaged.
    """
    path = out / JSON
    try:
        return {row["case"]: row for row in read_json(path, _Cases)["cases"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path} is damaged: remove it, the folders beside it hold what it says ({reason(error)})"
        ) from error


def is_finished(case: Case, folder: Path) -> bool:
    """Whether a case's folder holds its result.

    Args:
        case: The case.
        folder: Its folder.
    """
    return (result_folder(case.experiment, folder) / RESULT).is_file()


def _case_row(case: Case, task: Task, folder: Path, found: Path, machine: str) -> CaseRow:
    """Summarise a finished case, of which `folder` holds the search and `found` the result."""
    info, search = read_result(found), read_result(folder)
    part: Part = "test" if task.test else "validation"
    cost = info["cost"]
    return {
        "case": case.name,
        "part": part,
        "params": cost["compressed"]["params"] / cost["dense"]["params"],
        "macs": cost["compressed"]["macs"] / cost["dense"]["macs"],
        "dense": None if case.experiment.from_scratch else info["score"]["dense"][part],
        "untrained": None if case.experiment.from_scratch else search["score"]["compressed"][part],
        "score": info["score"]["compressed"][part],
        "interval": info["intervals"]["compressed"][part],
        "seconds": sum(search["seconds"].values()) + (info["training"]["seconds"] if found != folder else 0),
        "date": date.today().isoformat(),
        "machine": machine,
        "settings": case.settings,
    }


def write_rows(study: StudyFile, out: Path, rows: Mapping[str, CaseRow]) -> None:
    """Write cases.json.

    Args:
        study: The study.
        out: Its folder.
        rows: Name -> row; those of cases that the study does not have are left out.
    """
    own = [rows[case.name] for case in study.cases if case.name in rows]
    content = {"study": study.path.name, "cases": own}
    write_beside(out / JSON, lambda p: p.write_text(json.dumps(content, indent=1)))
