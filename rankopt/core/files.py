"""Atomic file writes, content hashes, and the cores and memory that are free."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: to a temporary file beside it, which then takes its name.

    A reader never sees half a file, and a full disk leaves the old one intact. The temporary file's name is random, so
    that threads and processes that write the same file at once do not write into each other's.

    Args:
        path: The file.
        write: Writes the content to the path that it is given.

    Raises:
        RankoptError: The file cannot be written.
    """
    beside = None
    try:
        handle, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
        os.close(handle)
        beside = Path(name)
        write(beside)
        beside.chmod(0o666 & ~_UMASK)  # only their owner may read the files of mkstemp and safetensors
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise RankoptError(f"{path} cannot be written: {error}") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


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
