"""`rankopt run` of a study with cases: each searched and trained in a folder of its own, one table of them all."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.progress import Display, StopCondition
from rankopt.core.records import Task
from rankopt.core.run_folder import RESULT, folder_lock, read_result
from rankopt.experiments.config import Case, StudyFile
from rankopt.experiments.experiment import TRAINED, run_in_folder
from rankopt.experiments.tasks import load_task
from rankopt.search.loop import Runner, RunUntil

JSON = "cases.json"

Row = Mapping[str, Any]
"""A finished case, as in cases.json."""


class CaseStarted(NamedTuple):
    """A case begins: it was not finished before."""

    name: str


class CaseFinished(NamedTuple):
    """A case is done; folder holds its result."""

    name: str
    folder: Path


def run_cases(
    study: StudyFile,
    out: Path,
    runner: Runner,
    cache_folder: Path | None,
    patience: StopCondition,
    display: Display,
    only: Sequence[str] = (),
) -> Iterator[CaseStarted | CaseFinished]:
    """Do the cases in their order, or go on with them. Yields an event where one begins and where it is done.

    patience: asked before every case and after every step of a training. only: the names of those to do, if not all:
    so several processes may share a study's folder. Raises RankoptError for a name that no case has.
    """
    names = [case.name for case in study.cases]
    if unknown := [name for name in only if name not in names]:
        raise RankoptError(f"unknown case {unknown[0]!r}; the cases are {', '.join(names)}")
    task = cache(load_task)
    rows = _known(out)
    for case in study.cases:
        folder = out / case.name
        if only and case.name not in only:
            continue
        if rows.get(case.name, {}).get("settings") == case.request.described(case.task) and _finished(case, folder):
            continue
        if patience():
            break
        yield CaseStarted(case.name)
        until = RunUntil(runner, patience.end)
        found = run_in_folder(case.request, task(case.task), folder, until, cache_folder, patience, display)
        if found is None:
            break
        row = _row(case, task(case.task), folder, found)
        with folder_lock(out, wait=True):
            rows = _known(out) | {case.name: row}  # other processes may have written theirs
            _write(study, out, rows)
        yield CaseFinished(case.name, found)


def finished_cases(study: StudyFile, out: Path) -> list[Row]:
    """The study's finished cases in the order of its file. Raises StudyError if cases.json is damaged."""
    rows = _known(out)
    return [rows[case.name] for case in study.cases if case.name in rows]


def _known(out: Path) -> dict[str, Row]:
    path = out / JSON
    try:
        return {row["case"]: row for row in json.loads(path.read_text())["cases"]} if path.is_file() else {}
    except (ValueError, LookupError, TypeError) as error:
        raise StudyError(f"{path} is damaged: remove it, the folders beside it hold what it says") from error


def _finished(case: Case, folder: Path) -> bool:
    return (folder / TRAINED / RESULT if case.request.training.trains else folder / RESULT).is_file()


def _row(case: Case, task: Task, folder: Path, found: Path) -> Row:
    """A finished case: shares of the dense model's costs, scores (test ones if there are) and where it was made.

    From scratch there is neither an untrained score nor a dense one: the task's own model may never have been trained.
    """
    info, search = read_result(found), read_result(folder)
    part = "test" if task.test else "validation"
    cost = info["cost"]
    return {
        "case": case.name,
        "part": part,
        "params": cost["compressed"]["params"] / cost["dense"]["params"],
        "macs": cost["compressed"]["macs"] / cost["dense"]["macs"],
        "dense": None if case.request.from_scratch else info["score"]["dense"][part],
        "untrained": None if case.request.from_scratch else search["score"]["compressed"][part],
        "score": info["score"]["compressed"][part],
        "interval": info["intervals"]["compressed"][part],
        "seconds": sum(search["seconds"].values()) + (info["training"]["seconds"] if found != folder else 0),
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}",
        "settings": case.request.described(case.task),
    }


def _write(study: StudyFile, out: Path, rows: Mapping[str, Row]) -> None:
    """Write cases.json."""
    own = [rows[case.name] for case in study.cases if case.name in rows]
    content = {"study": study.path.name, "cases": own}
    write_beside(out / JSON, lambda p: p.write_text(json.dumps(content, indent=1)))
