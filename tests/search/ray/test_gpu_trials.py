"""A trial on a GPU runs there or fails. The GPU is pretended: moves to it are noted, and fail when asked to."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import TaskError
from rankopt.experiments.tasks import load_task
from rankopt.report.html import render
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Study, search
from rankopt.search.ray.runner import RaySearch
from rankopt.search.ray.worker import Limits, Payload, Worker, WorkerError
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import read_trials
from rankopt.strategies.registry import make_strategy

SPACE = SearchSpace(families=("svd_out",), points=4, steps=0)
BUDGET = {"params": 0.3}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@dataclass
class OnPretendedGpu(Evaluator):
    """An evaluation that notes where it runs, and runs out of memory at some moves and evaluations.

    Attributes:
        log: A folder with a file for each move and evaluation, of all processes.
        full_at_moves: Numbers of the moves that fail.
        full_at_evaluations: Numbers of the evaluations that fail.
    """

    log: Path = Path()
    full_at_moves: tuple[int, ...] = ()
    full_at_evaluations: tuple[int, ...] = ()
    where: str = "cpu"

    def count(self, what):
        number = len(list(self.log.glob(f"{what}-*")))
        (self.log / f"{what}-{number}").write_text(f"{self.where} {os.getpid()}")
        return number

    @property
    def device(self):
        return self.where

    def to(self, device):
        if self.count("move") in self.full_at_moves:
            raise torch.OutOfMemoryError(FULL)
        self.where = device

    def stages(self, proposal):
        if self.count("evaluation") in self.full_at_evaluations:
            raise torch.OutOfMemoryError(FULL)
        yield from super().stages(proposal)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare(load_task("digits"), SPACE, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def cluster():
    """One core and one GPU, which is not there."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_searches_of_one_session_send_model_and_batches_once(digits, cluster, tmp_path):
    runner = RaySearch(1)
    with runner.session():
        for budget in (0.3, 0.5):
            problem = digits.problem({"params": budget})
            study = Study(problem, make_strategy("random", problem, 0), 2)
            runner(study, Evaluator.of(digits, problem))
            assert [problem.fits(t.proposal) and t.state for t in study.trials] == ["finished"] * 2
            expected = Evaluator.of(digits, problem)(study.trials[0].proposal)[0]
            assert study.trials[0].objective == pytest.approx(expected, rel=1e-4)
        assert len(runner.sent) == 1
    assert not runner.sent and runner.folder is None


def run(digits, log, moves=(), evaluations=(), trials=3):
    problem = digits.problem(BUDGET)
    given = vars(Evaluator.of(digits, problem))
    study = Study(problem, make_strategy("random", problem, 0), trials)
    RaySearch(1, gpus_per_trial=1)(
        study, OnPretendedGpu(**given, log=log, full_at_moves=moves, full_at_evaluations=evaluations)
    )
    return study.trials


def notes(log, what):
    return [tuple((log / f"{what}-{i}").read_text().split()) for i in range(len(list(log.glob(f"{what}-*"))))]


@pytest.mark.slow
def test_after_a_failed_move_no_plan_is_scored_on_the_cpu(digits, cluster, tmp_path):
    trials = run(digits, tmp_path, moves=(0, 1))
    assert [t.state for t in trials] == ["failed", "finished", "finished"]
    assert trials[0].error == f"OutOfMemoryError: {FULL} (tried twice)"
    assert [t.device for t in trials] == ["", "cuda", "cuda"]
    assert [device for device, _ in notes(tmp_path, "evaluation")] == ["cuda", "cuda"]
    assert len({pid for _, pid in notes(tmp_path, "move")}) == 3, "a worker went on after its move failed"


@pytest.mark.slow
def test_memory_that_runs_out_in_a_trial_costs_the_worker_and_not_the_plan(digits, cluster, tmp_path):
    trials = run(digits, tmp_path, evaluations=(1,))
    assert [(t.state, t.device) for t in trials] == [("finished", "cuda")] * 3
    found = notes(tmp_path, "evaluation")
    assert len(notes(tmp_path, "move")) == 2, "a worker set its evaluation up more than once"
    assert [device for device, _ in found] == ["cuda"] * 4
    assert found[0][1] == found[1][1] != found[2][1] == found[3][1], "the worker was not replaced"


# --- the worker itself, without Ray ----------------------------------------------------------------------


def worker(evaluate, monkeypatch, tmp_path, cuda=True):
    monkeypatch.setattr(Payload, "unpack", lambda self, problem, scratch: evaluate)
    made = Worker()
    made.logdir = str(tmp_path)
    made.setup({"proposal": (0,) * len(evaluate.problem.frontiers)}, Payload([], b""), None, [], 1, cuda, Limits())
    return made


def test_a_worker_keeps_nothing_of_a_set_up_that_failed(digits, monkeypatch, tmp_path):
    problem = digits.problem(BUDGET)
    evaluate = OnPretendedGpu(**vars(Evaluator.of(digits, problem)), log=tmp_path, full_at_moves=(0,))
    made = worker(evaluate, monkeypatch, tmp_path)
    with pytest.raises(WorkerError, match="out of memory"):
        made.step()
    assert made.evaluate is None and not notes(tmp_path, "evaluation")


@pytest.mark.parametrize(
    ("error", "replaced"),
    [
        (torch.OutOfMemoryError(FULL), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (ArithmeticError("of the task"), False),
    ],
)
def test_only_an_error_of_the_gpu_costs_the_worker(error, replaced, digits, monkeypatch, tmp_path):
    class Fails(OnPretendedGpu):
        def stages(self, proposal):
            raise error

    evaluate = Fails(**vars(Evaluator.of(digits, digits.problem(BUDGET))), log=tmp_path)
    made = worker(evaluate, monkeypatch, tmp_path)
    if replaced:
        with pytest.raises(WorkerError, match=str(error)[:9]):
            made.step()
    else:
        assert made.step()["done"]
    assert worker(evaluate, monkeypatch, tmp_path, cuda=False).step()["done"]


def test_a_model_that_does_not_move_is_refused(digits):
    class Stays(torch.nn.Linear):
        def to(self, device):
            return self

    evaluate = Evaluator.of(digits, digits.problem(BUDGET))
    evaluate.model = Stays(2, 2)
    with pytest.raises(TaskError, match=r"moved to meta and is on cpu"):
        evaluate.to("meta")
    evaluate.model = torch.nn.Linear(2, 2)
    evaluate.to("meta")


def test_the_study_and_the_report_say_where_trials_ran(digits, tmp_path):
    (tmp_path / "run").mkdir()
    settings = SearchSettings("random", 2)
    result = run_search(digits, digits.problem(BUDGET), settings, tmp_path / "run", search)
    rows = read_trials(tmp_path / "run")
    assert [row["device"] for row in rows] == ["cpu", "cpu"]
    assert "2 plans were evaluated on cpu, 0 failed" in render(result.info, rows, "run")
    for row in rows:
        row["device"] = ""  # a study of an earlier version
    assert "2 plans were evaluated, 0 failed" in render(result.info, rows, "run")
