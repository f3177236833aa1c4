"""Pools of processes: what calls share travels once, with registered decompositions and the task files behind them."""

import os
import sys

import pytest

import rankopt
from rankopt.candidates.pool import NotSentError, local_pool, pack, release_workers
from rankopt.core.task_file import LOADED, load_file

TASK = """
import enum
import functools
from rankopt.decompositions.svd import SvdOut
from torch import nn

class Level(enum.Enum):
    LOW = 1

@functools.cache
def limit(level):
    return level.value

class Mine(SvdOut):
    name = "mine"

    def __init__(self, level=Level.LOW):
        super().__init__()
        self.level = level
"""


@pytest.fixture
def task_file(tmp_path):
    (tmp_path / "mine.py").write_text(TASK)
    module = load_file(tmp_path / "mine.py")
    rankopt.register(module.Mine())
    yield module
    rankopt.DECOMPOSITIONS.registered.clear()
    del sys.modules[module.__name__], LOADED[module.__name__]


def in_worker(shared, number):
    mine = rankopt.DECOMPOSITIONS["mine"]
    module = sys.modules[type(mine).__module__]
    assert mine.level is module.Level.LOW and module.limit(mine.level) == 1
    shared.append(number)
    return number, os.getpid(), len(shared), type(mine).__module__


def test_decompositions_of_a_task_file_are_known_to_local_processes_under_their_own_name(task_file):
    """They were pickled by value, which an enum or a cached function in the same file did not survive."""
    try:
        found = list(local_pool(2)(in_worker, [(i,) for i in range(6)], 0, []))
    finally:
        release_workers()
    assert sorted(number for number, *_ in found) == [*range(6)]
    pids = [pid for _, pid, _, _ in found]
    assert os.getpid() not in pids
    for pid in set(pids):
        assert sorted(n for _, p, n, _ in found if p == pid) == [*range(1, pids.count(pid) + 1)], "unpickled once"
    assert {name for *_, name in found} == {task_file.__name__}


def test_what_cannot_be_pickled_is_said():
    with pytest.raises(NotSentError, match=r"the task cannot be sent to other processes .*generator"):
        pack((number for number in range(3)), other_machines=False)
