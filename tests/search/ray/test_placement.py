"""Where Ray places trials: pretended GPUs, shares of them, and what a trial costs besides its evaluation."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from rankopt.core.errors import RankoptError
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Study
from rankopt.search.ray.runner import RaySearch
from rankopt.strategies.registry import make_strategy

ray = pytest.importorskip("ray")

BUDGET = {"params": 0.3}


@pytest.fixture(scope="module")
def cluster():
    """Four cores and two GPUs, which are not there."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    started = not ray.is_initialized()
    assert started, "another test's cluster is still up"
    ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Placed:
    """Notes when and where each evaluation ran."""

    def __init__(self, log, seconds):
        self.log, self.seconds = log, seconds

    def __call__(self, proposal):
        start = time.time()
        time.sleep(self.seconds)
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
        with open(self.log, "a") as file:  # noqa: PTH123
            file.write(f"{start} {time.time()} {os.getpid()} {torch.get_num_threads()} {gpus}\n")
        return sum(proposal) / 100, None


def rows(digits, log: Path, runner, trials=8, seconds=1.0):
    problem = digits.problem(BUDGET)
    study = Study(problem, make_strategy("random", problem, 0), trials)
    runner(study, Placed(str(log), seconds))
    assert len(study.trials) == trials
    return [(float(r[0]), float(r[1]), *r[2:]) for r in (line.split() for line in log.read_text().splitlines())]


def at_once(found, key=lambda row: True):
    """The most evaluations that ran at one time."""
    chosen = [row for row in found if key(row)]
    return max(sum(a[0] <= b[0] < a[1] for a in chosen) for b in chosen)


@pytest.mark.slow  # on a busy machine workers start too late to meet
def test_halves_of_gpus_take_two_trials_each(digits, cluster, tmp_path):
    found = rows(digits, tmp_path / "log", RaySearch(4, gpus_per_trial=0.5))
    assert {row[4] for row in found} == {"0", "1"} and len({row[2] for row in found}) <= 4
    assert 2 < at_once(found) <= 4
    for gpu in "01":
        assert at_once(found, lambda row, gpu=gpu: row[4] == gpu) <= 2


@pytest.mark.slow
def test_whole_gpus_bound_the_trials_at_once(digits, cluster, tmp_path):
    found = rows(digits, tmp_path / "log", RaySearch(4, gpus_per_trial=1), trials=4)
    assert {row[4] for row in found} <= {"0", "1"} and at_once(found) <= 2
    found = rows(digits, tmp_path / "log2", RaySearch(2, gpus_per_trial=2), trials=2, seconds=0.2)
    assert {row[4] for row in found} == {"0,1"} and at_once(found) == 1


def test_more_gpus_than_a_machine_has_are_refused(digits, cluster):
    problem = digits.problem(BUDGET)
    study = Study(problem, make_strategy("random", problem, 0), 2)
    with pytest.raises(RankoptError, match="3 GPUs, Ray sees 2"):
        RaySearch(1, gpus_per_trial=3)(study, Placed("", 0))


@pytest.mark.slow
def test_trials_on_the_cpu_do_not_fight_over_cores(digits, cluster, tmp_path):
    from rankopt.core.files import available_cores

    found = rows(digits, tmp_path / "log", RaySearch(2), trials=4, seconds=0.5)
    assert {int(row[3]) for row in found} == {max(1, available_cores() // 2)}
    assert at_once(found) <= 2 and len({row[2] for row in found}) <= 2, "workers are used again"


@pytest.mark.slow
def test_the_model_travels_once_for_each_worker(digits, cluster, tmp_path, monkeypatch):
    """20 MB beside the evaluation: pickled once here, unpickled once in each worker."""
    import rankopt.search.ray.runner as module

    packed = []
    monkeypatch.setattr(module, "pack", lambda e, pack=module.pack: packed.append(pack(e)) or packed[-1])

    problem = digits.problem(BUDGET)
    study = Study(problem, make_strategy("random", problem, 0), 6)
    evaluator = Evaluator.of(digits, problem)
    evaluator.score = Loaded(str(tmp_path / "loads"))
    RaySearch(2)(study, evaluator)
    assert len(packed) == 1 and len(packed[0][0].pickled) > 20e6
    assert 1 <= len((tmp_path / "loads").read_text().split()) <= 2 and len(study.trials) == 6


class Loaded:
    """A score that notes each time it is unpickled."""

    def __init__(self, log):
        self.log, self.weight = log, torch.zeros(5 << 20)

    def __setstate__(self, state):
        self.__dict__ |= state
        with open(self.log, "a") as file:  # noqa: PTH123
            file.write(f"{os.getpid()}\n")

    def __call__(self, model):
        return 0.5
