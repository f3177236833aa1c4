"""Run folders: their file names, results and locks."""

from __future__ import annotations

import functools
import json
import math
import os
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import check_no_link, write_beside
from rankopt.core.result_record import FrontiersFile, ResultInfo
from rankopt.core.schema import read_json
from rankopt.core.text import in_one_line, reason

PLAN, WEIGHTS, RESULT, REPORT = "plan.json", "model.safetensors", "result.json", "report.html"


FRONTIERS = "frontiers.json"
"""The layers' candidates, for the report."""


AS_FAST = "as-fast"
"""The run folder, within one, of the model that is not slower than dense."""


WEIGHTS_BESIDE = "rankopt.safetensors"
"""The file of weights instead of WEIGHTS where a model's own save_pretrained writes a file of that name."""


DAMAGE = ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError
"""Errors that reading an entry of a damaged file may raise."""


# --- reading -------------------------------------------------------------------------------------


def write_result(folder: str | Path, info: ResultInfo) -> None:
    """Write a run's result.json; a reader never sees half of it.

    Args:
        folder: The run folder.
        info: The record.

    Raises:
        RankoptError: The file cannot be written.
    """
    write_beside(Path(folder) / RESULT, lambda path: path.write_text(json.dumps(info, indent=1)))


def write_frontiers(folder: str | Path, frontiers: FrontiersFile) -> None:
    """Write a run's frontiers.json.

    Args:
        folder: The run folder.
        frontiers: Its content.

    Raises:
        RankoptError: The file cannot be written.
    """
    write_beside(Path(folder) / FRONTIERS, lambda path: path.write_text(json.dumps(frontiers)))


def read_frontiers(folder: str | Path) -> FrontiersFile | None:
    """Read a run's frontiers.json; None where there is none, as in runs of earlier versions.

    Args:
        folder: The run folder.

    Raises:
        StudyError: The file is damaged.
    """
    path = Path(folder) / FRONTIERS
    try:
        return in_one_line(read_json(path, FrontiersFile))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({reason(error)}): delete it, or run the search again") from error


def read_result(folder: str | Path) -> ResultInfo:
    """Read a run's result.json, also that of an earlier version.

    Its texts are made printable. Values that are of the right type, but make no sense, are left to the code that reads
    them: put `report_damage` around it.

    Args:
        folder: The run folder.

    Raises:
        StudyError: The file is missing or damaged.
    """
    path = Path(folder) / RESULT
    try:
        return in_one_line(read_json(path, ResultInfo))
    except FileNotFoundError:
        raise StudyError(f"there is no {path}: name a finished run's folder, or finish it with --resume") from None
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({reason(error)}): run the search again with --resume") from error


@contextmanager
def report_damage(folder: str | Path) -> Iterator[None]:
    """Context in which entries of a result.json are read: damaged ones end in a StudyError.

    Args:
        folder: The run folder, for the message.

    Raises:
        StudyError: An entry does not have the type or content that the code expects.
    """
    try:
        yield
    except RankoptError:
        raise
    except DAMAGE as error:
        path = Path(folder) / RESULT
        raise StudyError(
            f"{path} is damaged ({type(error).__name__}: {error}): run the search again with --resume"
        ) from error


def check_same(
    kept: Mapping[str, Any],
    asked: Mapping[str, Any],
    path: str | Path,
    what: str,
    remedy: str,
    tolerances: Mapping[str, float] | None = None,
    hashes: Collection[str] = (),
) -> None:
    """Check that what was kept belongs to the job that is to be resumed.

    Args:
        kept: Settings under which the file was written; it may hold further entries.
        asked: Settings of the job now; each must be the same in `kept`.
        path: Where `kept` comes from, for the message.
        what: What it belongs to: "search", "study" or "training".
        remedy: What the user should do otherwise; a sentence without its full stop.
        tolerances: Setting -> relative difference up to which its numbers count as the same. Default: 0.
        hashes: Settings whose values say nothing to a reader.

    Raises:
        StudyError: Some settings differ. The message names them.
    """
    different = [
        f"not the same {key}" if key in hashes else f"its {key} is {kept.get(key)!r}, asked is {value!r}"
        for key, value in asked.items()
        if not _same(kept.get(key), value, (tolerances or {}).get(key, 0.0))
    ]
    if different:
        raise StudyError(f"{path} belongs to another {what}: {', '.join(different)}. {remedy}")


def _same(kept: Any, asked: Any, tolerance: float) -> bool:
    """Whether two values are equal; numbers up to the tolerance, relative to the largest one beside them."""
    if isinstance(kept, list) and isinstance(asked, list) and len(kept) == len(asked):
        numbers = [abs(x) for x in (*kept, *asked) if isinstance(x, float)]
        near = tolerance * max(numbers, default=0.0)
        return all(
            abs(a - b) <= near if isinstance(a, float) and isinstance(b, float) else _same(a, b, tolerance)
            for a, b in zip(kept, asked, strict=True)
        )
    if isinstance(kept, float) and isinstance(asked, float):
        return math.isclose(kept, asked, rel_tol=tolerance, abs_tol=1e-3 * tolerance)
    return bool(kept == asked)


# --- folders and locks ---------------------------------------------------------------------------


def open_folder(out: Path, resume: bool | None, kept: str = "study.db") -> None:
    """Make a run folder, or check one that is to be resumed.

    Args:
        out: The folder.
        resume: Whether it may hold an earlier run. None: of a command that begins again and keeps only its logs.
        kept: The file, anywhere below the folder, without which there is nothing to resume.

    Raises:
        StudyError: The folder is not empty and not resumed, holds nothing to resume or a link, or cannot be made.
    """
    try:
        # A process that was killed while it wrote its first file leaves nothing but *.part, and Ray's logs.
        full = out.exists() and (not out.is_dir() or any(not _left_over(p, resume) for p in out.iterdir()))
        if full and not resume:
            go_on = "" if resume is None else "pass --resume to go on with it, or "
            raise StudyError(f"{out} is not empty: {go_on}choose another --out")
        if full and not any(out.rglob(kept)):
            raise StudyError(f"there is nothing to resume in {out}: it holds files, but no {kept}")
        check_no_links(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{out} cannot be used: {error}") from error


def check_no_links(folder: Path) -> None:
    """Check that nothing in a folder to be written to is a symbolic link.

    Args:
        folder: The folder, which may itself be a link, and need not exist.

    Raises:
        StudyError: Something is.
    """
    for path in folder.rglob("*"):
        check_no_link(path, StudyError)


def process_alive(pid: int) -> bool:
    """Whether a process runs on this machine.

    Args:
        pid: Its process id, as this process's container counts.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with suppress(OSError, IndexError):  # a zombie has ended, too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return True


def _left_over(path: Path, resume: bool | None) -> bool:
    """Whether a file is all that a command leaves that was killed before it wrote its first result."""
    return ".part" in path.name or (resume is None and path.name in ("logs", "sweep.png"))


@functools.cache
def _process_space() -> str:
    """What process ids mean here: a start of a machine, and a container (a namespace) on it. Empty if not known."""
    if sys.platform != "linux":
        return "machine"
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    return ""


def process_name() -> str:
    """A name of this process that no other process has, on any machine: host, start and container, and process id."""
    return f"{socket.gethostname()} {_process_space()} {os.getpid()}"


def has_ended(name: str) -> bool:
    """Whether a process is known to have ended. Of a process elsewhere, also in another container, nothing is known.

    Args:
        name: The process's `process_name`.
    """
    place, _, pid = name.rpartition(" ")
    here = process_name().rpartition(" ")[0]
    return bool(_process_space()) and place == here and pid.isdecimal() and not process_alive(int(pid))


def lock_folder(folder: Path, wait: bool = False) -> int:
    """Lock a folder against other processes. On a file system without locks, nothing is locked.

    Args:
        folder: The folder.
        wait: Wait for a process that has locked it, rather than raise.

    Returns:
        A file descriptor; closing it ends the lock.

    Raises:
        StudyError: Another process has locked the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise StudyError(f"another process is at work in {folder}: wait for it, or choose another --out") from None
    except (ImportError, OSError):  # no such module (Windows), or no locks on this file system
        pass
    return descriptor


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Context: `lock_folder`, until it ends.

    Args:
        folder: The folder.
        wait: Wait for a process that has locked it, rather than raise.

    Raises:
        StudyError: Another process has locked the folder.
    """
    descriptor = lock_folder(folder, wait)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Context: a piece of work is this process's own, unless another process has it. Who is killed has it no longer.

    Args:
        path: A file that stands for the work, and is there only as long as someone has it.

    Yields:
        Whether it is this process's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        descriptor = lock_folder(path)
    except (StudyError, FileNotFoundError):
        yield False
        return
    ours = False
    try:
        # It may be the file of a process that removed it in between: then a third process may have made another.
        ours = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        yield ours
    finally:
        if ours:
            path.unlink(missing_ok=True)
        os.close(descriptor)
