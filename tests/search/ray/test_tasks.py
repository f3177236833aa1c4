"""Calls as Ray tasks: all results, in any order; few arguments at a time; a call whose worker dies is made again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankopt.search.ray.tasks import in_any_order

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.slow  # it starts Ray


def square(number, folder):
    if number == 3:
        raise ArithmeticError("three")
    if number == 2 and not (died := Path(folder) / "died").exists():
        died.touch()
        os._exit(1)
    return number**2


def test_calls_run_as_tasks(tmp_path):
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    made = []

    def arguments(numbers):
        for n in numbers:
            made.append(n)
            yield n, str(tmp_path)

    try:
        results = in_any_order(square, arguments([*range(3), *range(4, 20)]))
        first = next(results)
        assert len(made) <= 4, "arguments are made as they are needed"
        assert sorted([first, *results]) == sorted(n**2 for n in range(20) if n != 3)
        assert (tmp_path / "died").exists()
        with pytest.raises(ArithmeticError, match="three"):
            list(in_any_order(square, [(3, str(tmp_path))]))
    finally:
        ray.shutdown()
