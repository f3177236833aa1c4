"""Kind 11: resuming, several processes, and the machine and task files as people have them."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rankopt import RankoptError, SearchSpace, StudyError, TaskError
from rankopt.candidates.cache import Cache
from rankopt.candidates.prepare import prepare
from rankopt.core.progress import graceful_interrupt
from rankopt.core.records import Task
from rankopt.core.run_folder import read_result
from rankopt.core.signals import STOP_SIGNALS, exit_status, on_stop_signals
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import open_run_folder, run_search
from rankopt.search.identity import identity
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import read_trials
from tests.helpers.command import run
from tests.strangers.models import SPACE, example_batch, sequential

BUDGET = {"params": 0.7}
TARGET = torch.randn(256, 10, generator=torch.Generator().manual_seed(1))


def loss(model, scale=1.0):
    return scale * (model(example_batch()) - TARGET).square().mean().item()


def task(**changes):
    batch = example_batch()
    given = Task(sequential(), batch[:1], [batch], objective=loss, score=lambda model: 0.5, name="a/b.py:c")
    return dataclasses.replace(given, **changes)


def search(task, out, trials, space=SPACE, **settings):
    found = SearchSettings("random", trials, **settings)
    open_run_folder(out, found)
    prepared = prepare(task, space, budget=BUDGET, workers=1)
    return run_search(prepared, prepared.problem(BUDGET), found, out)


# --- resuming ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The folder of a search with two trials."""
    folder = tmp_path_factory.mktemp("first") / "run"
    search(task(), folder, 2)
    return folder


def heavier():
    model = sequential()
    with torch.no_grad():
        model[0].weight *= 1.1
    return model


@pytest.mark.parametrize(
    ("changes", "space", "named"),
    [
        ({"objective": lambda m: loss(m, 1.01)}, SPACE, "its dense objective is"),
        ({"objective": None}, SPACE, "its dense objective is"),
        ({"score": lambda model: 0.51}, SPACE, "its dense score is 0.5, asked is 0.51"),
        ({"score": None}, SPACE, "its dense score is 0.5, asked is None"),
        ({"model": heavier()}, SPACE, "not the same weights"),
        ({"calibration": [example_batch()[:255]]}, SPACE, "not the same data"),
        ({"calibration": [-example_batch()]}, SPACE, "not the same data"),
        ({}, SearchSpace(families=("svd_out",), points=4, steps=11), "not the same space"),
    ],
)
def test_resuming_after_a_change_is_refused_and_the_change_is_named(tmp_path, first_run, changes, space, named):
    shutil.copytree(first_run, tmp_path / "run")
    before = read_trials(tmp_path / "run")
    with pytest.raises(StudyError, match=named):
        search(task(**changes), tmp_path / "run", 3, space, resume=True)
    assert read_trials(tmp_path / "run") == before


def test_joining_a_shared_study_with_another_objective_is_refused(tmp_path):
    storage = f"sqlite:///{tmp_path / 'team.db'}"
    search(task(), tmp_path / "a", 2, storage=storage)
    with pytest.raises(StudyError, match=r"its dense objective is .*asked is"):
        search(task(objective=lambda m: loss(m, 1.01)), tmp_path / "b", 3, storage=storage)
    assert search(task(name="b.py:c"), tmp_path / "c", 3, storage=storage).info["trials"]["distinct"] == 3
    others = search(task(model=heavier()), tmp_path / "d", 2, storage=storage)
    assert others.info["trials"]["finished"] == 2, "other weights make another study of the same storage"


def test_all_changes_are_named_at_once(tmp_path):
    search(task(), tmp_path / "run", 2)
    changed = task(model=heavier(), calibration=[2 * example_batch()], score=None)
    with pytest.raises(StudyError, match=r"not the same weights, not the same data, .*objective.*score"):
        search(changed, tmp_path / "run", 3, resume=True)


def test_a_moved_task_and_another_thread_count_do_not_count(tmp_path):
    first = search(task(), tmp_path / "run", 2)
    noise = 1 + 1e-6 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    same = task(
        name="/elsewhere/b.py:c",
        objective=lambda m: loss(m, 1 + 1e-6),
        calibration=[example_batch().mul(noise)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]],
    )
    again = search(same, tmp_path / "run", 4, dataclasses.replace(SPACE, name="renamed"), resume=True)
    assert (first.info["trials"]["finished"], again.info["trials"]["finished"]) == (2, 4)


def test_the_identity_of_a_task_counts_every_input(tmp_path):
    """Also the second tensor of a batch, and one that only some batches have."""

    def data(*batches):
        model = sequential()
        prepared = SimpleNamespace(
            task=task(model=model), space=SPACE, statistics=SimpleNamespace(batches=batches),
            dense_objective=0.0, dense_score=None,
        )  # fmt: skip
        return identity(prepared)["data"]

    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    assert data((x, y)) == data((x[:1], y[:1]), (x[1:], y[1:]))
    assert data({"a": x, "b": y}) != data({"a": x, "b": y + 1})
    assert data(x, (x, y)) != data(x, (x, y + 1))


# --- storages ----------------------------------------------------------------------------------------

OPEN = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import alembic.config
from rankopt.search.storage.shared import SharedStore

def join(number):
    os.read(starts[0], 1)
    for round in range(3):
        folder = Path(sys.argv[1], f"{round}-{number}")
        folder.mkdir()
        asked = {"strategy": "random", "seed": 0}
        problem = SimpleNamespace(layers=[], frontiers=[])
        store = SharedStore(f"sqlite:///{sys.argv[1]}/{round}.db", folder, problem, asked, True)
        assert store.study.user_attrs == asked

starts = os.pipe()
children = []
for number in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        join(number)
        os._exit(0)
os.write(starts[1], b"go!!")
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_four_processes_open_one_new_sqlite_storage_at_once(tmp_path):
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("name", ["50%25 a#b?", "{x} & ü c:d"])
def test_a_run_folder_may_have_any_name(tmp_path, name):
    out = tmp_path / name
    result = search(task(), out, 2)
    assert len(read_trials(out)) == result.info["trials"]["finished"] == 2
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert search(task(), out, 3, resume=True).info["trials"]["finished"] == 3


def test_a_storage_that_cannot_be_used_is_refused_before_any_fit(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "study.db").write_text("no database")
    for out, message in (
        (full, "restore it from a copy"),
        (tmp_path / "new", "unable to open database file.*: mend that"),
    ):
        storage = {"storage": f"sqlite:///{tmp_path / 'missing' / 'x.db'}"} if out != full else {"resume": True}
        with pytest.raises(StudyError, match=message):
            open_run_folder(out, SearchSettings("random", 2, **storage))
    assert Path(full / "study.db").read_text() == "no database"


# --- task files --------------------------------------------------------------------------------------

TASK = """
import rankopt, torch
from torch import nn

def task():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    model = nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)).eval()
    return rankopt.Task(model, x[:1], [x])
"""
PARSE = "import argparse; p = argparse.ArgumentParser(); p.add_argument('--width', type=int, {}); "


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file below the working folder, which is `work`; the task's is beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    modules = dict(sys.modules)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return f"{path}:task"

    yield write
    for name in set(sys.modules) - set(modules):
        if name.startswith(("rankopt_task_", "stranger_")):
            del sys.modules[name]


@pytest.mark.parametrize(
    "first",
    [
        PARSE.format("default=48") + "WIDTH = p.parse_args().width",
        "from .stranger_nets import WIDTH",
        "from . import stranger_nets; WIDTH = stranger_nets.WIDTH",
        "from stranger_nets import WIDTH",
        "from stranger_work import WIDTH",
        "import sys; WIDTH = 48 if len(sys.argv) == 1 else 1",
    ],
)
@pytest.mark.parametrize("file", ["tasks/mine.py", "tasks/my-own.task.py"])
def test_a_task_file_is_run_like_a_script_in_its_folder(write, monkeypatch, first, file):
    write("tasks/stranger_nets.py", "WIDTH = 48\n")
    write("work/stranger_work.py", "WIDTH = 48\n")
    monkeypatch.setattr(sys, "argv", arguments := ["rankopt", "search", "--budget", "params=0.5"])
    assert load_task(write(file, first + TASK)).model[0].out_features == 48
    assert sys.argv is arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PARSE.format("required=True") + "p.parse_args()",
            "does not run: it ends the program (exit status 2), as argp",
        ),
        ("import sys; sys.exit('no data')", "ends the program (exit status 'no data')"),
        ("from ..nets import Net", "does not run: ImportError: attempted relative import beyond top-level package. A "),
        ("import stranger_that_is_not_there", "working folder; set PYTHONPATH"),
        ("def task(): raise SystemExit", "failed: it ends the program (exit status None)"),
        ("def task(): import stranger_that_is_not_there", "working folder; set PYTHONPATH"),
    ],
)
def test_a_task_file_that_ends_the_program_or_lacks_a_module_is_named(write, text, message):
    name = write("tasks/mine.py", text)
    with pytest.raises(TaskError) as error:
        load_task(name)
    assert message in str(error.value) and name.removesuffix(":task") in str(error.value)


# --- folders -----------------------------------------------------------------------------------------


def test_without_a_home_folder_the_message_says_what_to_set(monkeypatch):
    for name in ("RANKOPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(RankoptError, match=r"~/\.cache/rankopt cannot be made .*home.*set RANKOPT_CACHE"):
        Cache()


@pytest.mark.parametrize("kind", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch, kind):
    def refuse(**_):
        raise OSError(kind, os.strerror(kind))

    def never(*_):
        raise AssertionError("calibrated")

    monkeypatch.setattr("rankopt.candidates.cache.TemporaryFile", refuse)
    monkeypatch.setattr("rankopt.candidates.calibration.calibrate", never)
    with pytest.raises(
        RankoptError, match=f"the cache {tmp_path} cannot be written .*{os.strerror(kind)}.*RANKOPT_CACHE"
    ):
        prepare(task(), SPACE, tmp_path, budget=BUDGET)


def test_a_disk_that_fills_up_while_the_cache_is_written_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = Cache(tmp_path)
    monkeypatch.setattr(Path, "replace", full)
    for write in (lambda: cache.write_json("a", 1), lambda: cache.write_tensors("b", {"x": torch.ones(2)})):
        with pytest.raises(
            RankoptError, match=f"the cache {tmp_path} cannot be written .*No space left.*RANKOPT_CACHE"
        ):
            write()
    assert not list(tmp_path.iterdir())


def test_a_complete_cache_may_be_read_only(tmp_path, monkeypatch):
    prepare(task(), SPACE, tmp_path, budget=BUDGET, workers=1)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("rankopt.candidates.cache.TemporaryFile", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    assert prepare(task(), SPACE, tmp_path, budget=BUDGET, workers=1).candidates


# --- signals and pipes -------------------------------------------------------------------------------

SLOW = """
import rankopt, time, torch
from torch import nn

def task():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)]).eval()

    def objective(model):
        time.sleep(0.05)
        return model(x).square().mean()

    return rankopt.Task(model, x[:1], [x], objective=objective)

def fitted():
    torch.manual_seed(0)
    x = torch.randn(64, 32, 8, 8)
    model = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)]).eval()
    return rankopt.Task(model, x[:1], [x])
"""


def started(tmp_path, function, *options, space, **streams):
    """`rankopt search` as a process of its own, whose workers carry a mark in their environment."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "space.toml").write_text(space)
    place = [f"{tmp_path / 'slow.py'}:{function}", "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    common = ["--budget", "params=0.7", "--space", str(tmp_path / "space.toml")]
    command = [sys.executable, "-m", "rankopt.cli", "search", *place, *common, *options]
    environment = {**os.environ, "RANKOPT_MARK": str(tmp_path)}
    return subprocess.Popen(command, env=environment, text=True, **streams)


def on_one_core():
    """In a child before it starts: candidates are then fitted without workers, whose start takes seconds."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def marked(tmp_path):
    """The processes that carry the mark, without zombies."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"RANKOPT_MARK={tmp_path}".encode() in (process / "environ").read_bytes().split(b"\0")
            if ours and "Z" not in (process / "stat").read_text().rpartition(")")[2].split()[0]:
                found.append(int(process.name))
        except OSError:
            pass
    return found


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@needs_proc
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGKILL, -9)]
)
def test_no_worker_outlives_a_search_that_is_ended_while_it_fits(tmp_path, number, code):
    long = 'families = ["cp", "tucker2"]\npoints = 30\nsteps = 100000\n'
    with started(tmp_path, "fitted", space=long, stderr=subprocess.PIPE) as process:
        wait_for(lambda: len(marked(tmp_path)) >= 5 or process.poll() is not None)  # also two trackers and two workers
        wait_for(lambda: list((tmp_path / "cache").glob("statistics-*")))
        process.send_signal(number)
        assert process.wait(60) == code
        if number == signal.SIGTERM:
            assert "stopped; fits and finished trials are kept: the same command goes on" in process.stderr.read()
    wait_for(lambda: not marked(tmp_path))


def test_sigterm_ends_a_search_like_ctrl_c(tmp_path):
    """What runs is finished and reported, and the run folder can be resumed."""
    space = 'families = ["svd_out"]\npoints = 8\nsteps = 0\n'
    options = ("--strategy", "random", "--trials")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": on_one_core}
    with started(tmp_path, "task", *options, "400", space=space, **pipes) as process:
        while "trial 1:" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "compressed" in said, errors
    done = len(read_trials(tmp_path / "run"))
    assert 2 <= done < 400 and read_result(tmp_path / "run")["trials"]["interrupted"]
    assert (tmp_path / "run" / "report.html").is_file()
    more = [*process.args[3:], "--resume"]
    more[more.index("400")] = str(done + 1)
    run(*more)
    assert len(read_trials(tmp_path / "run")) == done + 1


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_lets_work_finish_and_the_second_does_not(number):
    work, said = SimpleNamespace(stopping=False), []
    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    with pytest.raises(KeyboardInterrupt), graceful_interrupt(work, said.append):
        os.kill(os.getpid(), number)
        assert work.stopping and len(said) == 1 and exit_status() == 128 + number
        os.kill(os.getpid(), number)
    assert [signal.getsignal(s) for s in STOP_SIGNALS] == before


def test_signals_that_are_ignored_stay_ignored():
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signals(lambda: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        assert all(signal.getsignal(s) is not None for s in STOP_SIGNALS)
    finally:
        signal.signal(signal.SIGHUP, before)


def nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("arguments", [("inspect", "digits"), ("--help",), ("search", "--help")])
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(arguments):
    command = [sys.executable, "-m", "rankopt.cli", *arguments]
    outcome = subprocess.run(command, stdout=nobody_reads(), stderr=subprocess.PIPE, text=True, check=False)
    assert outcome.stderr == "" and outcome.returncode == ("--help" in arguments)  # rich's own way out


@pytest.mark.slow
def test_a_search_does_its_work_where_nobody_reads(tmp_path):
    space = 'families = ["svd_out"]\npoints = 4\nsteps = 0\n'
    writer = nobody_reads()
    assert started(tmp_path, "task", space=space, stdout=writer, stderr=writer, preexec_fn=on_one_core).wait(120) == 0
    assert (tmp_path / "run" / "report.html").is_file()
