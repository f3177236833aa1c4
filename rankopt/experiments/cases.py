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
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from typing_extensions import TypedDict

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.progress import Display, StopCondition
from rankopt.core.records import Task
from rankopt.core.result_record import Bounds, Part
from rankopt.core.run_folder import RESULT, check_no_links, folder_lock, read_result
from rankopt.core.schema import read_json
from rankopt.core.text import reason
from rankopt.experiments.config import Case, StudyFile
from rankopt.experiments.experiment import TRAINED, run_in_folder, same_settings
from rankopt.experiments.tasks import load_task
from rankopt.search.loop import Runner, RunUntil

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


def run_cases(
    study: StudyFile,
    out: Path,
    runner: Runner,
    cache_folder: Path | None,
    stop: StopCondition,
    display: Display,
    only: Sequence[str] = (),
) -> Iterator[CaseStarted | CaseFinished]:
    """Do the cases that are not finished, in their order; those that were stopped are resumed.

    Args:
        study: The study.
        out: Folder of the study, in which every case has a folder of its own.
        runner: Runs the searches.
        cache_folder: Folder of fitted candidates; None for the default.
        stop: Whether to stop, asked before every case and after every step of a training.
        display: Shows progress.
        only: Names of the cases to do, with wildcards * and ?; empty for all. Several processes may so share a study's
            folder.

    Yields:
        An event where a case begins and one where it is done.

    Raises:
        RankoptError: If no case has one of the names.
        StudyError: If cases.json is damaged, or a case's folder holds other settings or a link.
    """
    asked = {case.name for case in study.cases if not only or any(fnmatchcase(case.name, name) for name in only)}
    if unknown := [name for name in only if not any(fnmatchcase(case, name) for case in asked)]:
        names = [case.name for case in study.cases]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise RankoptError(f"unknown case {unknown[0]!r}; the cases are {', '.join(names[:NAMED])}{more}")
    check_no_links(out)
    load = cache(load_task)  # several cases may share a task
    rows = read_rows(out)
    for case in study.cases:
        folder = out / case.name
        if case.name not in asked:
            continue
        known = rows.get(case.name)
        if known and same_settings(known["settings"], case.settings) and is_finished(case, folder):
            continue
        if stop():
            break
        yield CaseStarted(case.name, case.minutes)
        task, until = load(case.task), RunUntil(runner, stop.end)
        found = run_in_folder(case.experiment, task, folder, until, cache_folder, stop, display)
        if found is None:
            break
        row = _case_row(case, task, folder, found)
        with folder_lock(out, wait=True):
            rows = read_rows(out) | {case.name: row}  # other processes may have written theirs
            write_rows(study, out, rows)
        yield CaseFinished(case.name, found)


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
    return (folder / TRAINED / RESULT if case.experiment.training.trains else folder / RESULT).is_file()


def _case_row(case: Case, task: Task, folder: Path, found: Path) -> CaseRow:
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
        "machine": f"{torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}",
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
