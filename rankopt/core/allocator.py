"""The C library's memory allocator, for loops that allocate the same large tensors again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT = {M_MMAP_THRESHOLD: 1 << 28, M_TRIM_THRESHOLD: (1 << 31) - 1}
"""Blocks of up to 256 MiB come from the heap, which does not shrink; gaps between larger ones would take too much."""

USUAL = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
"""What glibc itself sets after a block of 32 MiB was freed; the values before cannot be read."""

_lock, _users = Lock(), 0


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Context: memory that is freed stays with the process for the next allocation, and goes back at the end.

    By default glibc returns large blocks to the system and asks for them again. Each of their pages then costs a page
    fault, which took a fifth of the CPU time of training steps. Nothing changes with other allocators than glibc's.
    """
    global _users  # noqa: PLW0603  # the allocator is one for the whole process
    with _lock:
        _users += 1
        if _users == 1:
            _set(KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(USUAL)
                _trim()


def _set(values: dict[int, int]) -> None:
    libc = _glibc()
    if libc is not None:
        for name, value in values.items():
            libc.mallopt(name, value)


def _trim() -> None:
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # other libraries, such as musl and macOS's, lack it
    except (OSError, AttributeError, TypeError):  # TypeError: on Windows there is no CDLL(None)
        return None
    return libc
