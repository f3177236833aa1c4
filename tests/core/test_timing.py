"""The number of threads comes back."""

from __future__ import annotations

import pytest
import torch

from rankopt.core.timing import threads


def test_threads_are_restored_also_after_an_error():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
