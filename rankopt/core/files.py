"""Atomic file writes, content hashes, and the cores and memory that are free."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankopt.core.errors import RankoptError

_UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(_UMASK)


def digest(*parts: Any) -> str:
    """A hash of some content, as 32 hexadecimal digits: the same in every process and on every machine.

    Args:
        parts: Tensors, bytes, and values that json can write (others count as their `str`).
    """
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            t = part.detach().cpu().contiguous()
            state.update(f"{t.dtype}{tuple(t.shape)}".encode())
            state.update(
                t.flatten().view(torch.uint8).numpy().tobytes() if t.numel() and t.ndim else repr(t.tolist()).encode()
            )
        elif isinstance(part, bytes):
            state.update(part)
        else:
            state.update(json.dumps(part, sort_keys=True, default=str).encode())
        state.update(b"|")
    return state.hexdigest()[:32]


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Context: an empty file beside a path, which is removed at the end if it is still there.

    Its name is random, so that neither another process or thread nor a link that was prepared can meet it.

    Args:
        path: The path.

    Yields:
        The temporary file.

    Raises:
        OSError: It cannot be made.
    """
    handle, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: to a temporary file beside it, which then takes its name.

    A reader never sees half a file, and a full disk leaves the old one intact. The file keeps its mode.

    Args:
        path: The file.
        write: Writes the content to the path that it is given.

    Raises:
        RankoptError: The file cannot be written, or is a symbolic link.
    """
    check_no_link(path)
    try:
        with temporary_beside(path) as beside:
            write(beside)
            # mkstemp and safetensors make files that only their owner may read.
            beside.chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_UMASK)
            beside.replace(path)
    except (OSError, SafetensorError) as error:
        remedy = "; make room there, then try again" if is_disk_full(error) else ""
        raise RankoptError(f"{path} cannot be written: {error}{remedy}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room on a disk, or that its quota is used up.

    Args:
        error: An error of the operating system, SQLite or safetensors.
    """
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return True
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def check_no_link(path: Path, failure: type[RankoptError] = RankoptError) -> None:
    """Check that a path to be written is no symbolic link: one in a folder from elsewhere may lead anywhere.

    Args:
        path: The path; the folders that lead to it may be links.
        failure: The error to raise.

    Raises:
        RankoptError: `failure`, a subclass: it is a link.
    """
    if path.is_symlink():
        raise failure(f"{path} is a symbolic link, which rankopt does not follow: remove it, or choose another folder")


def append_text(path: Path, text: str) -> None:
    """Append text to a file, which is made if it is missing.

    Args:
        path: The file.
        text: The text.

    Raises:
        OSError: It cannot be written, or is a symbolic link.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="replace") as file:
        file.write(text)


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file that may come from elsewhere.

    Args:
        path: The file.
        most: The largest size that is read, in bytes.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is larger, or no regular file: reading a pipe or a device may never end.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes, the most that is read")
    return content


def open_regular(path: Path) -> BinaryIO:
    """Open a file that may come from elsewhere for reading.

    Args:
        path: The file.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is no regular file: reading a pipe or a device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    return os.fdopen(descriptor, "rb")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Context: a file of tensors that may come from elsewhere.

    Args:
        path: A safetensors file.

    Yields:
        The file, as `safetensors.safe_open` gives it.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is damaged, or no regular file.
    """
    open_regular(path).close()
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def available_memory() -> int | None:
    """Bytes of main memory that this process may still take; None where the system does not say (only Linux does).

    The least of what the machine has free, caches included, and what the limits of a container leave.
    """
    found = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, ValueError, KeyError):
        return None
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((Path(folder) / name).read_text()) for name in (limit, used))
            cached = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
            found.append(most - now + int(cached.get("inactive_file", 0)))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(min(found), 0)


def gigabytes(size: float) -> str:
    """A number of bytes as text, such as "1.2 GB".

    Args:
        size: Bytes.
    """
    return f"{size / 1e9:,.3g} GB" if size >= 1e8 else f"{size / 1e6:,.3g} MB"


def without_folder(task: str) -> str:
    """A task's name without the folder of its file: projects may move, and be run from anywhere.

    Args:
        task: Name of the task, as "folder/file.py:function".
    """
    file, colon, function = task.rpartition(":")
    return Path(file).name + colon + function


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
