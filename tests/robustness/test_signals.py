"""Signals at each stage of a search, and a clock that is moved: what was done is kept, and the search goes on."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time

import pytest

from rankopt.core.run_folder import read_result
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import read_trials

SIGNALLED = """
import importlib, os, sys

place, number = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
module, _, path = place.partition(":")
owner = importlib.import_module(module)
*classes, name = path.split(".")
for part in classes:
    owner = getattr(owner, part)
real = getattr(owner, name)

def once(*args, **kwargs):
    setattr(owner, name, real)
    os.kill(os.getpid(), number)
    return real(*args, **kwargs)

setattr(owner, name, once)
from rankopt.cli.main import main
main()
"""

STAGES = {
    "loading": "rankopt.experiments.tasks:load_task",
    "calibration": "rankopt.candidates.calibration:Statistics.ensure_cached",
    "fitting": "rankopt.candidates.prepare:fit_candidates",
    "sensitivity": "rankopt.candidates.probing:Prober.curves",
    "evaluation": "rankopt.search.evaluator:Evaluator.stages",
    "storing": "rankopt.search.storage.local:Store.add",
    "saving": "rankopt.search.result:Result.save",
    "reporting": "rankopt.report.html:write_report",
}

PREPARING = {"calibration", "fitting", "sensitivity"}
"""Stages that a search leaves out where the cache has what they make."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that all searches of this module use, which prepare the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_any_stage_ends_a_search_that_then_goes_on(stage, number, tmp_path, quick_space, cache):
    out = tmp_path / "run"
    cache = tmp_path / "cache" if stage in PREPARING else cache
    search = ["search", "digits", "--budget", "params=0.5", "--strategy", "random", "--trials", "3"]
    search += ["--space", str(quick_space), "--out", str(out), "--cache", str(cache)]
    command = [sys.executable, "-c", SIGNALLED, STAGES[stage], str(int(number)), *search]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 128 + number and "Traceback" not in stopped.stderr, stopped.stderr
    assert "--resume" in stopped.stderr, stopped.stderr
    kept = read_trials(out) if (out / "study.db").is_file() else []
    assert kept or stage not in ("evaluation", "storing", "saving", "reporting")
    command = [sys.executable, "-m", "rankopt.cli", *search, "--resume"]
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    trials = read_trials(out)
    assert len(trials) == 3 and [t["objective"] for t in trials[: len(kept)]] == [t["objective"] for t in kept]
    assert not read_result(out)["trials"]["interrupted"] and (out / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("storage", [False, True])
def test_a_clock_that_is_moved_back_and_forth_changes_nothing(digits, storage, tmp_path, monkeypatch):
    """Limits of time are measured on a clock that nobody sets; that of the day may jump by years."""
    problem = digits.problem({"params": 0.5})
    found = {}
    for name in ("calm", "moved"):
        url = f"sqlite:///{tmp_path / name}.db" if storage else None
        settings = SearchSettings("random", 4, timeout=3600.0, storage=url)
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            if name == "moved":
                jumps = itertools.cycle((0.0, 1e9, -1e9))
                patch.setattr(time, "time", lambda real=time.time, jumps=jumps: real() + next(jumps))
            run_search(digits, problem, settings, tmp_path / name)
        found[name] = [(t["cost"], t["objective"], t["state"]) for t in read_trials(tmp_path / name)]
    assert found["moved"] == found["calm"] and len(found["calm"]) == 4
