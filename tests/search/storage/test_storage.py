"""A study that several processes share: claims, trials of others, and PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from rankopt.core import run_folder
from rankopt.core.errors import StudyError
from rankopt.core.run_folder import process_name
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Study, attempt, proposals, search
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import Store, create_study, read_trials, sqlite_url
from rankopt.search.storage.shared import SharedStore
from rankopt.strategies.registry import make_strategy

BUDGET = {"params": 0.3}
ABOUT = {"strategy": "random", "seed": 0}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'team.db'}"


def shared(digits, url, folder, **about):
    folder.mkdir(exist_ok=True)
    return SharedStore(url, folder, digits.problem(BUDGET), {**ABOUT, **about}, resume=True)


def study(digits, store, trials=6):
    problem = digits.problem(BUDGET)
    found = Study(problem, make_strategy("random", problem, 0), trials, store)
    found.resume()
    return found


def test_one_of_two_processes_claims_a_plan_and_the_other_sees_its_result(digits, url, tmp_path):
    one, two = (study(digits, shared(digits, url, tmp_path / name)) for name in "ab")
    evaluate = Evaluator.of(digits, digits.problem(BUDGET))
    first, second = one.next(), two.next()
    assert first != second and one.others() == {second} and two.others() == {first}
    told = one.finish(first, attempt(evaluate, first))
    third = two.next()
    assert [t.proposal for t in two.trials] == [first] and two.trials[0].objective == told.objective
    assert third not in (first, second) and two.others() == set()


def test_claims_of_a_process_that_died_are_void(digits, url, tmp_path):
    dead = shared(digits, url, tmp_path / "a")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    first = study(digits, dead).next()
    dead.storage.set_trial_user_attr(dead.claims[first], "owner", f"{process_name().rpartition(' ')[0]} {gone.pid}")
    living = study(digits, shared(digits, url, tmp_path / "b"))
    assert living.others() == set() and living.next() == first
    states = [t.state for t in living.store.study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING]
    assert living.store.trials()[0] == [], "a void claim is no failed trial"


@pytest.mark.parametrize("elsewhere", ["another container", "another start of the machine", "an earlier version"])
def test_the_claims_of_a_process_whose_ids_mean_nothing_here_hold(digits, url, tmp_path, elsewhere, monkeypatch):
    """Two containers may share a host name; the process ids of one are not those of the other."""
    far = shared(digits, url, tmp_path / "a")
    first = study(digits, far).next()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, space, _ = process_name().split()
    owners = {
        "another container": f"{host} {space.replace('pid:[', 'pid:[9')} {gone.pid}",
        "another start of the machine": f"{host} 0{space} {gone.pid}",
        "an earlier version": f"{host}:{gone.pid}",
    }
    far.storage.set_trial_user_attr(far.claims[first], "owner", owners[elsewhere])
    here = study(digits, shared(digits, url, tmp_path / "b"))
    assert here.others() == {first} and here.next() != first
    monkeypatch.setattr(run_folder, "_process_space", lambda: "")  # nothing is known of ids: heartbeats decide
    far.storage.set_trial_user_attr(far.claims[first], "owner", f"{host}  {gone.pid}")
    assert here.others() == {first}


def test_searches_that_differ_never_meet(digits, url, tmp_path):
    one, two = shared(digits, url, tmp_path / "a"), shared(digits, url, tmp_path / "b", seed=1)
    study(digits, one).next()
    assert two.claimed() == set()


@pytest.mark.parametrize("kind", ["url", "postgresql"])
def test_two_loops_evaluate_each_plan_once_and_end_with_the_same(digits, kind, request, tmp_path):
    url = request.getfixturevalue(kind)
    real, seen = Evaluator.of(digits, digits.problem(BUDGET)), []

    def evaluate(proposal):
        seen.append(proposal)
        return real(proposal)

    studies = [study(digits, shared(digits, url, tmp_path / name), 10) for name in "ab"]
    threads = [threading.Thread(target=search, args=(s, evaluate)) for s in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(seen) == len(set(seen)) == 10
    assert {t.proposal: t.objective for t in studies[0].trials} == {t.proposal: t.objective for t in studies[1].trials}
    assert len(studies[0].trials) == 10


def test_a_search_that_ends_knows_the_trial_that_was_recorded_last(digits, url, tmp_path):
    """The other claims the last plan just before this one looks for something to do, and is slow."""
    one, two = (study(digits, shared(digits, url, tmp_path / name), 2) for name in "ab")
    evaluate, last = Evaluator.of(digits, digits.problem(BUDGET)), []
    loop = proposals(one)
    first = next(loop)
    one.finish(first, attempt(evaluate, first))
    look = one.next

    def claimed_meanwhile():
        if not last:
            last.append(two.next())
            threading.Timer(0.5, lambda: two.finish(last[0], attempt(evaluate, last[0]))).start()
        return look()

    one.next = claimed_meanwhile
    assert list(loop) == [] and [t.proposal for t in one.trials] == [first, *last]


def test_the_run_folder_has_a_study_of_its_own_at_the_end(digits, url, tmp_path):
    problem = digits.problem(BUDGET)
    out = tmp_path / "run"
    out.mkdir()
    result = run_search(digits, problem, SearchSettings("random", 3, storage=url), out)
    rows = read_trials(out)
    assert len(rows) == 3 and min(r["objective"] for r in rows) == result.info["objective"]["best"]
    again = run_search(digits, problem, SearchSettings("random", 5, storage=url, resume=True), out)
    assert again.info["trials"]["finished"] == 5 and read_trials(out)[:3] == rows


def test_a_storage_that_is_away_for_a_while_is_waited_for(digits, url, tmp_path, monkeypatch):
    from optuna.exceptions import StorageInternalError

    import rankopt.search.storage.shared as module

    store, calls = shared(digits, url, tmp_path / "a"), []
    monkeypatch.setattr(module.time, "sleep", calls.append)

    get_trials = store.study.get_trials

    def flaky(**options):
        if len(calls) < 3:
            raise StorageInternalError("connection refused")
        return get_trials(**options)

    monkeypatch.setattr(store.study, "get_trials", flaky)
    assert store.claimed() == set() and len(calls) == 3
    monkeypatch.setattr(module, "PATIENCE", -1)
    calls.clear()
    with pytest.raises(StudyError, match="did not answer"):
        store.claimed()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no SQLAlchemy URL"),
        ("postgresql+psycopg://nobody:secret@127.0.0.1:1/none", "cannot be used"),
        ("mysql+nodriver://a@b/c", "cannot be used .Can't load plugin"),
    ],
)
def test_unusable_storages_are_refused(digits, tmp_path, url, message):
    pytest.importorskip("psycopg")
    with pytest.raises(StudyError, match=message) as caught:
        shared(digits, url, tmp_path / "a")
    assert "secret" not in str(caught.value)


def test_two_processes_do_not_search_in_one_folder(digits, tmp_path):
    code = f"""
import sys, time
from rankopt.core.run_folder import lock_folder as lock
lock(__import__("pathlib").Path({str(tmp_path)!r}))
print("locked", flush=True)
time.sleep(3600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(StudyError, match="another process is at work"):
            Store(tmp_path, digits.problem(BUDGET), ABOUT, resume=False)
        process.kill()
    Store(tmp_path, digits.problem(BUDGET), ABOUT, resume=False)


# --- PostgreSQL ------------------------------------------------------------------------------------


def binaries() -> Path | None:
    """Where Debian or the PATH has PostgreSQL's server."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return places[-1] if places else None


@pytest.fixture(scope="module")
def postgresql():
    """A server of its own on a Unix socket, as another user where this one is root."""
    pytest.importorskip("psycopg")
    place = binaries()
    if place is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        if user:
            shutil.chown(folder, user)
        data, common = f"{folder}/data", {"user": user, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([place / "initdb", "-D", data, "-U", "rank", "-A", "trust", "-N"], check=True, cwd="/", **common)
        command = [place / "postgres", "-D", data, "-k", folder, "-h", "", "-F"]
        ready = [place / "pg_isready", "-h", folder]  # its socket exists before the server answers
        with subprocess.Popen(command, cwd="/", **common) as server:
            try:
                wait_for(lambda: subprocess.run(ready, check=False, **common).returncode == 0)
                assert server.poll() is None
                yield f"postgresql+psycopg://rank@/postgres?host={folder}"
            finally:
                server.send_signal(signal.SIGINT)  # SIGTERM would wait for connections that a failed test left


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start(tmp_path, name, trials, url):
    arguments = [tmp_path / name, 0, trials, 0, tmp_path / "log", url]
    command = [sys.executable, "-m", "tests.helpers.search_to_kill", *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])})


def starts(tmp_path):
    log = tmp_path / "log"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [line.split(maxsplit=2)[1:] for line in lines if line.startswith("start")]


@pytest.mark.slow
def test_two_processes_on_one_postgresql_study_and_one_of_them_killed(digits, postgresql, tmp_path):
    trials = 14
    one, two = (start(tmp_path, name, trials, postgresql) for name in "ab")
    wait_for(lambda: len({pid for pid, _ in starts(tmp_path)}) == 2)
    one.kill()
    assert two.wait(1200) == 0 and one.wait() != 0
    counts = Counter(plan for _, plan in starts(tmp_path))
    rows = read_trials(tmp_path / "b")
    assert len(rows) == trials and all(r["state"] == "finished" for r in rows)
    assert sum(counts.values()) - trials <= 1, "but for the one that ran in the killed process, each plan once"
    assert len({(*r["cost"], r["objective"]) for r in rows}) == trials


def test_a_new_study_is_what_optuna_itself_makes(tmp_path):
    ours, optunas = tmp_path / "a ? file", tmp_path / "b"
    create_study(ours, "search", {"seed": 1})
    study = optuna.create_study(storage=sqlite_url(optunas), study_name="search")
    study.set_user_attr("seed", 1)
    one, other = (list(sqlite3.connect(path).iterdump()) for path in (ours, optunas))
    assert one == other and any("alembic_version" in line for line in one)
