"""Ray's processes when something is killed: nothing lives on, and a line says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rankopt.core import run_folder
from rankopt.core.run_folder import process_name
from rankopt.search.ray import guard, session
from rankopt.search.ray.tune_options import TuneOptions

FAKE = """
import sys, time
file = open(sys.argv[1], "a")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / f"rankopt-{os.getpid()}-xyz"
    path.mkdir()
    return path


@pytest.fixture
def started():
    """Starts processes that stand for Ray's, by their arguments."""
    found = []

    def start(*command):
        found.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, start_new_session=True))
        assert found[-1].stdout.readline() == b"ready\n"
        return found[-1]

    yield start
    for process in found:
        process.kill()
        process.wait()


def service(started, folder, name="raylet"):
    """A process that runs a program of a name, with a file of the folder as an option."""
    folder.mkdir(exist_ok=True)
    program = folder.parent / name
    if not program.exists():
        program.symlink_to(sys.executable)
    return started(program, "-S", "-c", FAKE, folder / "log", f"--log_dir={folder}/logs")


def watcher(folder):
    command = [sys.executable, "-I", "-S", guard.__file__, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def alive(process):
    return process.poll() is None


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds processes in /proc")


def test_what_a_killed_search_leaves_behind_is_ended_and_nothing_else(folder, started):
    ours, other = service(started, folder), service(started, folder.parent / "rankopt-1-abc")
    reader = started(sys.executable, "-S", "-c", FAKE, folder / "log")  # tail -f of a user, say
    dog = watcher(folder)
    os.write(dog.stdin.fileno(), b"started\n")
    said = dog.communicate(timeout=120)[1]  # closes the pipe: the search is gone
    wait_until(lambda: not alive(ours))
    assert alive(other) and alive(reader) and said == b"" and not folder.exists()


def test_a_service_that_ends_before_the_search_is_named(folder, started):
    ours = service(started, folder, "gcs_server")
    dog = watcher(folder)
    os.write(dog.stdin.fileno(), b"started\n")
    time.sleep(2)
    ours.kill()
    ours.wait()
    time.sleep(1)
    said = dog.communicate(timeout=120)[1].decode()
    assert said.count("\n") == 1 and "its control service (GCS) was killed" in said and "--resume" in said


def test_an_ordered_end_says_nothing(folder, started):
    ours = service(started, folder)
    dog = watcher(folder)
    os.write(dog.stdin.fileno(), b"started\nclosing\n")
    ours.kill()
    ours.wait()
    assert dog.communicate(timeout=120)[1] == b""


@pytest.mark.parametrize("owner", ["ended", "alive", "of another container", "unknown"])
def test_the_next_start_ends_what_a_killed_one_left(folder, started, owner, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    place = process_name().rpartition(" ")[0]
    names = {"ended": f"{place} {gone.pid}", "alive": process_name(), "of another container": f"{place}0 {gone.pid}"}
    if owner != "unknown":
        (folder / session.OWNER).write_text(names[owner])
    ours = service(started, folder)
    session._sweep(folder.parent)
    if owner == "ended":
        wait_until(lambda: not alive(ours))
    assert folder.exists() == alive(ours) == (owner != "ended")
    monkeypatch.setattr(run_folder, "_process_space", lambda: "")
    assert not run_folder.has_ended(f"{place} {gone.pid}")


# --- with Ray -------------------------------------------------------------------------------------------

SEARCH = "search digits --budget params=0.3 --strategy random --trials 500 --workers 1 --no-html"


def search(tmp_path, quick_space):
    """A search on Ray whose second trial has ended, and Ray's processes."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "rankopt.cli", *SEARCH.split(), "--space", str(quick_space)]
    command += ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    seen = ""
    while "trial 1:" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    (folder,) = Path("/tmp").glob(f"rankopt-{process.pid}-*")
    return process, folder, dict(guard.processes(folder))


def nothing_left(folder, pids):
    def running(pid):
        return run_folder.process_alive(pid)

    wait_until(lambda: not folder.exists() and not any(map(running, pids)), 60)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raylet", "gcs_server", "search"])
def test_a_kill_ends_all_of_ray_and_says_what_to_do(what, tmp_path, quick_space):
    pytest.importorskip("ray")
    process, folder, pids = search(tmp_path, quick_space)
    os.kill(process.pid if what == "search" else next(p for p, name in pids.items() if name == what), signal.SIGKILL)
    rest = process.stderr.read()
    assert process.wait(120) == (-signal.SIGKILL if what == "search" else 1)
    assert what == "search" or ("error: Ray ended the search" in rest and "--resume" in rest), rest
    assert "Traceback" not in rest
    nothing_left(folder, pids)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_ends_a_search_on_ray_in_good_order(stop, tmp_path, quick_space):
    """As Ctrl-C: what runs is finished, and the result is written."""
    pytest.importorskip("ray")
    process, folder, pids = search(tmp_path, quick_space)
    process.send_signal(stop)
    rest = process.stderr.read()
    assert process.wait(300) == 128 + stop and "--resume" in rest and "Traceback" not in rest, rest
    assert (tmp_path / "run" / "result.json").is_file()
    nothing_left(folder, pids)


# --- what is asked of Ray ------------------------------------------------------------------------------


def test_the_dashboard_is_started_if_it_is_asked_for(monkeypatch, tmp_path, caplog):
    ray, asked = pytest.importorskip("ray"), []
    found = SimpleNamespace(dashboard_url="127.0.0.1:8265")
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["include_dashboard"]) or found)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for wanted, said in ((False, ""), (True, "http://127.0.0.1:8265")):
        (tmp_path / str(wanted)).mkdir()
        with session.started(None, 1, str(tmp_path / str(wanted)), wanted):
            assert bool(caplog.text) == wanted and said in caplog.text
    assert asked == [False, True]


def test_trials_are_logged_where_it_is_asked_for(monkeypatch):
    """The packages are pretended: what Ray's callbacks do with them is Ray's."""
    pytest.importorskip("ray.tune")
    monkeypatch.setattr("rankopt.search.ray.tune_options.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setattr("ray.air.integrations.wandb.wandb", ModuleType("wandb"))
    options = TuneOptions(tensorboard=True, log_to=("mlflow", "wandb"))
    names = [type(callback).__name__ for callback in options.callbacks()]
    assert names == ["TBXLoggerCallback", "MLflowLoggerCallback", "WandbLoggerCallback"]
    assert TuneOptions().callbacks() == []
