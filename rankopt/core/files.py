"""Files that are written in one piece, content hashes, and the cores of this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rankopt.core.errors import RankoptError


def digest(*parts: Any) -> str:
    """A short content hash of tensors, bytes and whatever json can write."""
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


_UMASK = os.umask(0)
os.umask(_UMASK)


def write_beside(path: Path, write: Any) -> None:
    """Write a file beside its place and rename it: a reader never sees half a file, and a full disk spoils nothing."""
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
