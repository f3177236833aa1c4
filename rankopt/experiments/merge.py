"""Taking over cases of a study that were run elsewhere, finished or not.

The folder of a case holds all that goes on from it: the plan, the weights, the checkpoint of its training, and the
trials of its search. Fits are not in it; a search that was stopped fits again where the cache does not have them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rankopt.core.errors import StudyError
from rankopt.core.files import check_no_link
from rankopt.core.run_folder import PLAN, folder_lock
from rankopt.experiments.cases import is_finished, read_rows, write_rows
from rankopt.experiments.config import Case, StudyFile
from rankopt.experiments.experiment import TRAINED, read_settings, same_settings
from rankopt.training import checkpoint

LARGEST = 10_000  # files of a case


def merge(study: StudyFile, source: Path, out: Path) -> list[str]:
    """Copy the cases that got further in another folder than in the study's own.

    Args:
        study: The study.
        source: A copy of the study's folder, or of the folder of one case.
        out: The study's folder.

    Returns:
        Names of the cases that were copied.

    Raises:
        StudyError: If the folder holds no case of the study, a case with other settings, a link, or damaged files.
    """
    theirs = [(case, folder) for case in study.cases if (folder := _folder_of(case, source)) is not None]
    if not theirs:
        names = ", ".join(case.name for case in study.cases)
        raise StudyError(f"{source} holds no case of {study.path.name}: give a folder that holds some of {names}")
    rows = read_rows(source)
    for case, folder in theirs:
        _check(case, folder)
        if (row := rows.get(case.name)) and not same_settings(row["settings"], case.settings):
            raise StudyError(f"{folder} holds case {case.name} with other settings: it belongs to another study")
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out, wait=True):
        taken = [(case, x) for case, x in theirs if _progress(case, x) > _progress(case, out / case.name)]
        for case, folder in taken:
            _replace(folder, out / case.name)
        known = {case.name: rows[case.name] for case, _ in taken if case.name in rows}
        if known:
            write_rows(study, out, read_rows(out) | known)
    return [case.name for case, _ in taken]


def _folder_of(case: Case, source: Path) -> Path | None:
    inside = source / case.name
    if inside.is_dir():
        return inside
    return source if source.is_dir() and source.resolve().name == case.name else None


def _check(case: Case, folder: Path) -> None:
    """Raise StudyError unless a folder may be taken over."""
    for number, path in enumerate(folder.rglob("*")):
        check_no_link(path, StudyError)
        if not (path.is_file() or path.is_dir()):
            raise StudyError(f"{path} is no file and no folder: {folder} is no folder of a case")
        if number > LARGEST:
            raise StudyError(f"{folder} holds more than {LARGEST:,} files: it is no folder of a case")
    settings = read_settings(folder)
    if settings is not None and not same_settings(settings, case.settings):
        raise StudyError(f"{folder} holds case {case.name} with other settings: it belongs to another study")


def _progress(case: Case, folder: Path) -> tuple[int, ...]:
    """How far a case got; more is greater."""
    if not folder.is_dir():
        return (0,)
    if is_finished(case, folder):
        return (4,)
    stopped = folder / TRAINED / checkpoint.FILE
    if stopped.is_file():
        metadata = checkpoint.load(stopped).metadata
        return (3, metadata["stage"], metadata["step"])
    return (2,) if (folder / PLAN).is_file() else (1,)


def _replace(source: Path, target: Path) -> None:
    """Copy a folder to the place of another; a stop in between leaves one of them whole."""
    # ~ is in no name of a case
    incoming, old = (target.with_name(f"{target.name}~{kind}") for kind in ("incoming", "old"))
    for left in (incoming, old):  # by a merge that was killed
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, incoming)
    if target.is_dir():
        target.rename(old)
    incoming.rename(target)
    shutil.rmtree(old, ignore_errors=True)
