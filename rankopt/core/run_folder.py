"""The run folder: its file names, its lock, and reading result.json safely."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rankopt.core.errors import RankoptError, StudyError

RESULT_KEYS = {"task", "strategy", "seed", "seconds", "trials", "budget", "cost", "score", "milliseconds", "layers"}


LARGEST_JSON = 2**24  # bytes of a JSON file that is read: 10,000 layers take 5 MB


PLAN, WEIGHTS, RESULT = "plan.json", "model.safetensors", "result.json"


def read_json(path: Path, failure: type[RankoptError], if_missing: str) -> Any:
    try:
        size = path.stat().st_size
        content = json.loads(path.read_text()) if size <= LARGEST_JSON else None
    except FileNotFoundError:
        raise failure(f"there is no {path}: {if_missing}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise failure(f"{path} is damaged ({error}): run the search again with --resume") from error
    if size > LARGEST_JSON:
        raise failure(f"{path} is larger than {LARGEST_JSON:,} bytes: it is not one of rankopt's")
    return content


def read_result(folder: str | Path) -> dict[str, Any]:
    """A run's result.json. Raises StudyError if it is missing or damaged."""
    path = Path(folder) / RESULT
    info = read_json(path, StudyError, "name a finished run's folder, or finish it with --resume")
    if not isinstance(info, dict) or not info.keys() >= RESULT_KEYS:
        raise StudyError(f"{path} is damaged: it is not a rankopt result")
    return info


DAMAGE = ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError


@contextmanager
def report_damage(folder: str | Path) -> Iterator[None]:
    """Around what reads a result's entries: where one is not what it should be, a StudyError."""
    try:
        yield
    except RankoptError:
        raise
    except DAMAGE as error:
        path = Path(folder) / RESULT
        raise StudyError(f"{path} is damaged ({type(error).__name__}: {error}): make it anew with --resume") from error


def open_folder(out: Path, resume: bool, kept: str = "study.db") -> None:
    """Make a run folder. Raises StudyError if it holds something already and is not resumed, or cannot be made."""
    try:
        # Of a process that was killed while it wrote its first file, *.part is all there is.
        full = out.exists() and (not out.is_dir() or any(".part" not in p.name for p in out.iterdir()))
        if full and not resume:
            raise StudyError(f"{out} is not empty: pass --resume to go on with it, or choose another --out")
        if full and not any(out.rglob(kept)):
            raise StudyError(f"there is nothing to resume in {out}: it holds files, but no {kept}")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{out} cannot be used: {error}") from error


def process_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with suppress(OSError, IndexError):  # a zombie is dead, too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return True


def lock_folder(folder: Path, wait: bool = False) -> int:
    """Hold a folder against other processes until the descriptor is closed. Raises StudyError, unless it waits."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise StudyError(f"another process is at work in {folder}: wait for it, or choose another --out") from None
    except (ImportError, OSError):  # a file system without locks
        pass
    return descriptor


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """As `lock`, around what needs it."""
    descriptor = lock_folder(folder, wait)
    try:
        yield
    finally:
        os.close(descriptor)
