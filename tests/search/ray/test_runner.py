"""Trials on Ray Tune: the same results as in this process, and no failure in a worker ends the search."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError, StudyError
from rankopt.decompositions.plan import apply
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Evaluator
from rankopt.search.fidelity import FULL_FIDELITY, FidelitySchedule
from rankopt.search.job import Job
from rankopt.search.loop import Study, best, search
from rankopt.search.ray import runner as module
from rankopt.search.ray.runner import RaySearch
from rankopt.search.ray.session import keep_logs
from rankopt.search.ray.tune_options import TuneOptions
from rankopt.search.ray.worker import Limits
from rankopt.search.runners import RunnerSettings, make_runner, pool_of, trainer_of
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import read_trials
from rankopt.strategies.registry import make_strategy
from rankopt.training.finetune import finetune

ray = pytest.importorskip("ray")
tune = pytest.importorskip("ray.tune")

SPACE = SearchSpace(families=("svd_out",), points=6, steps=0)
SPACE_FILE = 'families = ["svd_out"]\npoints = 6\nsteps = 0\n'
BUDGET = {"params": 0.3}

TASK_FILE = """
import time
import torch
from torch import nn
from rankopt import Task
from neighbour import SCALE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return SCALE * self.b(torch.relu(self.a(x)))

class Close:
    def __init__(self, x, target, seconds):
        self.x, self.target, self.seconds = x, target, seconds

    def __call__(self, model):
        assert isinstance(model, Net)
        time.sleep(self.seconds)
        return 1 / (1 + (model(self.x) - self.target).square().mean().item())

def task(seconds=0.0):
    net, x = Net().eval(), torch.randn(64, 16)
    with torch.no_grad():
        close = Close(x, net(x), seconds)
    return Task(net, x[:1], (part for part in x.split(32)), score=close)  # a generator does not pickle

def slow():
    return task(0.5)
"""


def test_an_address_that_cannot_be_reached_is_refused_at_once(digits):
    from ray._private.services import find_gcs_addresses

    assert not ray.is_initialized(), "this test runs before the cluster of the others starts"
    elsewhere = find_gcs_addresses()  # somebody else's cluster on this machine, which auto would reach
    for address in ("127.0.0.1:1", "nonsense", *(() if elsewhere else ("auto",))):
        start = time.perf_counter()
        with pytest.raises(RankoptError, match=address):
            run(digits, runner=RaySearch(1, address))
        assert time.perf_counter() - start < 120
    with pytest.raises(RankoptError, match="Ray Client"):
        RaySearch(1, "ray://127.0.0.1:10001")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare(load_task("digits"), SPACE, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def run(
    prepared,
    strategy="random",
    trials=6,
    runner=search,
    around=lambda evaluate: evaluate,
    fidelities=FULL_FIDELITY,
    **study,
):
    problem = prepared.problem(BUDGET)
    asked = Study(problem, make_strategy(strategy, problem, seed=0), trials, **study)
    return runner(asked, around(Evaluator.of(prepared, problem, fidelities)))


class Faulty:
    """An evaluation that raises, gives NaN, or whose process dies, for some plans."""

    def __init__(self, evaluate, *, fails=(), dies=(), nan=()):
        self.evaluate, self.fails, self.dies, self.nan = evaluate, fails, dies, nan

    def __call__(self, proposal):
        if proposal in self.dies:
            os._exit(3)
        if self.fails == "all" or proposal in self.fails:
            raise ArithmeticError("on purpose")
        return (float("nan"), float("nan")) if proposal in self.nan else self.evaluate(proposal)


class Writing:
    """An evaluation that writes into everything it holds; its score: which worker, and what it found there."""

    def __init__(self, evaluate):
        self.evaluate = evaluate
        self.numbers = np.zeros(1 << 18)

    def __call__(self, proposal):
        objective, _ = self.evaluate(proposal)
        numbers = torch.from_numpy(self.numbers)
        before = numbers[-1].item()
        numbers += 1
        with torch.no_grad():
            e = self.evaluate
            built = apply(e.model, e.problem.layers, e.problem.candidates(proposal), e.factors)
            for parameter in built.parameters():
                parameter.zero_()
            self.evaluate.model.bn3.num_batches_tracked += 1
        return objective, 1000.0 * os.getpid() + before


@pytest.mark.parametrize("strategy", [pytest.param("random", marks=pytest.mark.slow), "optuna"])
def test_one_worker_gives_the_same_trials_as_this_process(digits, cluster, strategy):
    here, there = run(digits, strategy), run(digits, strategy, runner=RaySearch(1))
    assert [t.proposal for t in there] == [t.proposal for t in here]
    assert [t.objective for t in there] == pytest.approx([t.objective for t in here], rel=1e-4)
    assert [t.score for t in there] == pytest.approx([t.score for t in here], abs=0.01)
    assert [(t.number, t.cost, t.state) for t in there] == [(t.number, t.cost, t.state) for t in here]


@pytest.mark.slow
def test_two_workers_search_as_well(digits, cluster):
    trials = run(digits, "optuna", 8, RaySearch(2))
    problem = digits.problem(BUDGET)
    assert len(trials) == len({t.proposal for t in trials}) == 8
    assert all(problem.fits(t.proposal) for t in trials)
    assert best(trials).objective <= best(run(digits, "knapsack", 1)).objective * (1 + 1e-4)


@pytest.mark.slow
def test_a_strategy_that_runs_dry_ends_the_search(digits, cluster):
    assert len(run(digits, "knapsack", 5, RaySearch(2))) == 1


def test_failures_and_deaths_are_recorded_and_the_search_goes_on(digits, cluster):
    plans = [t.proposal for t in run(digits)]
    trials = run(
        digits, runner=RaySearch(2), around=lambda e: Faulty(e, fails=plans[1:2], dies=plans[3:4], nan=plans[4:5])
    )
    errors = {t.proposal: t.error for t in trials}
    assert set(errors) == set(plans)
    assert errors.pop(plans[1]) == "ArithmeticError: on purpose"
    assert errors.pop(plans[3]).startswith("worker died")
    assert errors.pop(plans[4]) == "the objective is nan"
    assert set(errors.values()) == {None}


class Treacherous:
    """An evaluation that harms its own process: the first time only, or with one plan."""

    def __init__(self, evaluate, harm, plan=None, once=None):
        self.evaluate, self.harm, self.plan, self.once = evaluate, harm, plan, once

    def __call__(self, proposal):
        if proposal == self.plan or (self.once and not self.once.exists()):
            if self.once:
                self.once.touch()
            self.harm()
        return self.evaluate(proposal)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def eat():
    assert [torch.zeros(1 << 24) for _ in range(40)]


@pytest.mark.slow  # tests/robustness/test_kills.py kills at random moments, too
def test_a_worker_killed_from_outside_changes_nothing(digits, cluster, tmp_path):
    calm = run(digits)
    trials = run(digits, runner=RaySearch(1), around=lambda e: Treacherous(e, kill, once=tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert [(t.proposal, t.state) for t in trials] == [(t.proposal, "finished") for t in calm]


@pytest.mark.timing  # a loaded machine may take longer than the limit for any evaluation
def test_a_limit_of_time_ends_a_trial_and_not_the_search(digits, cluster):
    plans = [t.proposal for t in run(digits)]
    runner = RaySearch(1, limits=Limits(seconds=20))
    trials = run(digits, runner=runner, around=lambda e: Treacherous(e, lambda: time.sleep(600), plans[2]))
    assert [t.proposal for t in trials] == plans
    assert [t.error for t in trials] == [None, None, "took longer than the limit of 20 s", None, None, None]


@pytest.mark.slow
def test_a_limit_of_memory_ends_a_trial_and_not_the_search(digits, cluster):
    plans = [t.proposal for t in run(digits)]
    runner = RaySearch(1, limits=Limits(memory=10**9))
    trials = run(digits, runner=runner, around=lambda e: Treacherous(e, eat, plans[2]))  # 2.7 GB
    assert [t.proposal for t in trials] == plans
    assert [t.state for t in trials].count("failed") == 1 and "memory" in trials[2].error


@pytest.mark.slow
def test_fidelities_stop_the_same_trials_as_in_this_process(digits, cluster):
    fidelities = FidelitySchedule.parse("0.1,0.4")
    here, there = (run(digits, "random", 9, runner, fidelities=fidelities) for runner in (search, RaySearch(1)))
    assert [(t.proposal, t.state) for t in there] == [(t.proposal, t.state) for t in here]
    assert "stopped" in {t.state for t in there}
    for a, b in zip(there, here, strict=True):
        assert a.rungs == pytest.approx(b.rungs, rel=1e-4)
        assert a.objective == (b.objective and pytest.approx(b.objective, rel=1e-4))
    many = run(digits, "random", 9, RaySearch(2), fidelities=fidelities)
    assert {t.proposal for t in many} == {t.proposal for t in here}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["asha", "median"])
def test_tunes_own_schedulers_stop_trials_at_low_fidelities(digits, cluster, name):
    runner = RaySearch(1, tune=TuneOptions(scheduler=name))
    trials = run(digits, "random", 12, runner, fidelities=FidelitySchedule.parse("0.1,0.4"))
    states = [t.state for t in trials]
    assert len(trials) == 12 and {"stopped", "finished"} == set(states)
    assert all(len(t.rungs) == 2 for t in trials if t.state == "finished")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheduler": "pbt"}, "pauses trials and changes what they do"),
        ({"scheduler": "hyperband"}, "choose from asha, median"),
        ({"scheduler": "best"}, "there is no scheduler 'best'"),
        ({"log_to": ("paper",)}, "cannot be logged to 'paper'"),
        ({"log_to": ("wandb",)}, "wandb is not installed"),
    ],
)
def test_what_tune_does_not_offer_here_is_refused(options, said, monkeypatch):
    monkeypatch.setattr("rankopt.search.ray.tune_options.find_spec", lambda name: None)
    with pytest.raises(RankoptError, match=said):
        make_runner(RunnerSettings(1, **options))


@pytest.mark.slow
def test_tunes_results_of_a_search_open_and_restore(digits, cluster, tmp_path):
    """As a ResultGrid, with readable names; a restored Tuner shows what was found, and evaluates nothing again."""
    found = run(digits, trials=4, runner=RaySearch(2, out=tmp_path))
    folder = str(tmp_path / "ray" / "search-0")
    results = tune.ResultGrid(tune.ExperimentAnalysis(folder))
    assert sorted(Path(r.path).name for r in results) == [f"plan-{i:04d}" for i in range(4)] and not results.errors
    assert sorted(r.metrics["objective"] for r in results) == sorted(t.objective for t in found)
    best_plan = results.get_best_result("objective", "min").config["proposal"]
    assert tuple(best_plan) == best(found).proposal

    class Worker(tune.Trainable):  # Tune asks for the same name
        def step(self):
            raise AssertionError("a trial was evaluated again")

    assert tune.Tuner.can_restore(folder)
    restored = tune.Tuner.restore(folder, Worker).fit()
    assert sorted(r.metrics["objective"] for r in restored) == sorted(t.objective for t in found)


def test_ray_that_was_started_for_trials_prepares_no_further_task(monkeypatch):
    """It has as many CPUs as there are workers; the next search of the session has all cores of this machine."""
    up = []

    @contextmanager
    def started(*_):
        up.append(True)
        yield
        up.clear()

    monkeypatch.setattr(module, "started", started)
    monkeypatch.setattr(module, "check_resources", lambda *_: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(up))
    runner = RaySearch(2)
    with runner.session():
        for _ in range(2):
            assert pool_of(runner) is None and trainer_of(runner) is finetune
            runner._start()
    assert pool_of(RaySearch(2, "auto")) is not None and trainer_of(RaySearch(2, gpus_per_trial=1)) is not finetune
    up.append(True)  # by the program
    with runner.session():
        for _ in range(2):
            assert pool_of(runner) is not None and trainer_of(runner) == runner.finetune
            runner._start()


def test_logs_of_workers_that_said_nothing_are_not_kept(tmp_path):
    source = tmp_path / "session_2026" / "logs"
    source.mkdir(parents=True)
    (source / "worker-1.err").write_text(":job_id:01000000\n:actor_name:Worker\n")
    (source / "worker-2.err").write_text(":job_id:01000000\nTraceback (most recent call last):\n")
    keep_logs(tmp_path, tmp_path / "ray", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["worker-2.err"]


def test_workers_collect_garbage_after_their_imports():
    code = "import gc, sys, rankopt.search.ray.preload; assert gc.isenabled() and 'ray.tune' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scheduler_needs_fidelities():
    with pytest.raises(RankoptError, match="--scheduler stops trials at low fidelities"):
        Job.parse({"params": 0.5}, strategy="random", runner=RunnerSettings(1, scheduler="asha"))


@pytest.mark.slow
def test_failures_alone_end_the_search_with_an_error(digits, cluster):
    with pytest.raises(StudyError, match=r"every evaluation failed.*on purpose"):
        run(digits, trials=30, runner=RaySearch(2), around=lambda e: Faulty(e, fails="all"))


@pytest.mark.slow
def test_an_error_of_the_study_reaches_the_caller(digits, cluster):
    def full(trial):
        if trial.number == 1:
            raise StudyError("no space left on device")

    with pytest.raises(StudyError, match="no space left"):
        run(digits, trials=30, runner=RaySearch(2), report=full)


@pytest.mark.slow
def test_writes_of_a_trial_reach_no_other_process(digits, cluster):
    before = {name: t.clone() for name, t in digits.task.model.state_dict().items()}
    writing = []
    trials = run(digits, runner=RaySearch(2), around=lambda e: writing.append(Writing(e)) or writing[0])
    expected = {t.proposal: t.objective for t in run(digits)}
    assert {t.proposal: t.objective for t in trials} == pytest.approx(expected, rel=1e-4)
    assert not writing[0].numbers.any()
    assert all(torch.equal(t, before[name]) for name, t in digits.task.model.state_dict().items())
    written = {}
    for t in trials:
        written.setdefault(int(t.score // 1000), []).append(t.score % 1000)
    assert os.getpid() not in written
    assert all(sorted(counts) == list(range(len(counts))) for counts in written.values())


def test_gpus_that_are_not_there_are_refused_at_once(digits, cluster):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    start = time.perf_counter()
    with pytest.raises(RankoptError, match="1 GPUs, Ray sees 0"):
        run(digits, runner=RaySearch(1, gpus_per_trial=1))
    assert time.perf_counter() - start < 120


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.tune", None)
    with pytest.raises(RankoptError, match=r"pip install 'rankopt\[ray\]'"):
        RaySearch(1)


@pytest.mark.parametrize("arguments", [(0,), (1, None, -1), (1, None, 1.5)])
def test_settings_without_sense_are_refused(arguments):
    with pytest.raises(RankoptError):
        RaySearch(*arguments)


@pytest.fixture
def task_file(tmp_path):
    (tmp_path / "neighbour.py").write_text("SCALE = 3.0\n")
    (tmp_path / "mine.py").write_text(TASK_FILE)
    return tmp_path / "mine.py"


@pytest.mark.slow
def test_a_task_of_the_users_own_file(task_file, cluster):
    prepared = prepare(load_task(f"{task_file}:task"), SPACE, cache=task_file.parent / "cache")
    result = run_search(prepared, prepared.problem({"params": 0.5}), SearchSettings("random", 3), runner=RaySearch(1))
    assert result.info["trials"]["finished"] == 3


class Unreadable(Faulty):
    """Arrives in a worker as what cannot be read there."""

    def __reduce__(self):
        return int, ("not a number",)


@pytest.mark.slow
def test_a_task_that_cannot_be_read_in_a_worker_says_so(digits, cluster):
    with pytest.raises(StudyError, match="invalid literal"):
        run(digits, trials=1, runner=RaySearch(1), around=Unreadable)


def command(tmp_path, task, trials):
    (tmp_path / "cheap.toml").write_text(SPACE_FILE)
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    options = f"--budget params=0.5 --strategy optuna --trials {trials} --workers 2 --no-html"
    folders = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", "--space", tmp_path / "cheap.toml"]
    return {
        "args": [sys.executable, "-m", "rankopt.cli", "search", task, *options.split(), *map(str, folders)],
        "env": {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")},
        "stderr": subprocess.PIPE,
        "text": True,
    }


@pytest.mark.slow
def test_the_command_starts_ray_quietly_and_leaves_nothing(tmp_path):
    asked = command(tmp_path, "digits", 4)
    asked["args"] += ["--tensorboard"]
    with subprocess.Popen(**asked, stdout=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=1500)
    assert process.returncode == 0, said
    assert len(said.splitlines()) < 40
    assert '"distinct": 4' in (tmp_path / "out" / "result.json").read_text()
    assert not {p.name for p in (tmp_path / "home").iterdir()} & {"ray_results", ".ray"}
    assert not list(Path("/tmp").glob(f"rankopt-{process.pid}-*"))
    assert not list((tmp_path / "temporary").glob("*ray*"))
    ours = {"study.db", "plan.json", "model.safetensors", "result.json", "frontiers.json", "search.log"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*ours, "logs", "ray"}
    assert len(list((tmp_path / "out" / "logs" / "tensorboard").glob("*/events.out.tfevents.*"))) == 4
    found = tune.ResultGrid(tune.ExperimentAnalysis(str(tmp_path / "out" / "ray" / "search-0")))
    objectives = [t["objective"] for t in read_trials(tmp_path / "out")]
    assert sorted(r.metrics["objective"] for r in found) == pytest.approx(sorted(objectives))
    assert sorted(Path(r.path).name for r in found) == [f"plan-000{i}" for i in range(4)]
    restored = tune.Tuner.restore(str(tmp_path / "out" / "ray" / "search-0"), trainable=_as_before())
    assert len(restored.get_results()) == 4 and not restored.get_results().errors


def _as_before():
    """Tuner.restore wants a trainable of the same name; nothing is left to run."""
    return type("Worker", (tune.Trainable,), {})


def interrupted(task_file, times):
    """Ctrl-C, as a terminal sends it, a number of times after the second trial. Returns (exit code, output)."""
    with subprocess.Popen(**command(task_file.parent, f"{task_file}:slow", 200), start_new_session=True) as process:
        seen = ""
        while "trial 1:" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        os.killpg(process.pid, signal.SIGINT)
        if times == 2:
            while "finishing what runs" not in seen:
                seen += process.stderr.readline()
            os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        return process.wait(600), rest


@pytest.mark.slow
def test_ctrl_c_once_finishes_what_runs_and_reports(task_file):
    code, rest = interrupted(task_file, 1)
    assert code == 130 and "--resume" in rest and len(rest.splitlines()) < 20
    info = json.loads((task_file.parent / "out" / "result.json").read_text())
    assert info["trials"]["interrupted"] and 2 <= info["trials"]["finished"] < 200
    assert (task_file.parent / "out" / "plan.json").is_file()


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once_and_keeps_the_trials(task_file):
    code, rest = interrupted(task_file, 2)
    assert code == 130 and "--resume" in rest and len(rest.splitlines()) < 20
    assert not (task_file.parent / "out" / "result.json").exists()
    assert len(read_trials(task_file.parent / "out")) >= 2
