"""Atomic file writes, content hashes, and the number of usable cores."""

from __future__ import annotations

import hashlib
import json
import os
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

    A reader never sees half a file, and a full disk leaves the old one intact.

    Args:
        path: The file.
        write: Writes the content to the path that it is given.

    Raises:
        RankoptError: The file cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        beside.chmod(0o666 & ~_UMASK)  # safetensors writes files that only their owner may read
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise RankoptError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
