"""Memory that is freed and allocated again."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from rankopt.core.allocator import keep_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these settings")
LARGE = 12 << 20  # numbers of 4 bytes: 48 MiB


def page_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(LARGE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    """Bytes of this process in main memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_freed_memory_is_taken_again_without_page_faults():
    with keep_freed_memory():
        page_faults(16)  # until no small block lies in the way
        kept = page_faults(4)
        with keep_freed_memory():
            pass
        kept += page_faults(4)
    assert kept < page_faults(4) / 4


def test_it_goes_back_at_the_end():
    with keep_freed_memory():
        blocks = [torch.ones(LARGE // 48) for _ in range(192)]
        last = blocks[-1]
        full = resident()
        del blocks
        assert resident() > full - LARGE
    assert resident() < full - 2 * LARGE
    assert last.sum() == LARGE // 48


def test_also_after_an_error():
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        page_faults(16)  # until no small block lies in the way
        kept = page_faults(4)
        _ = 1 / 0
    assert kept < page_faults(4) / 4
