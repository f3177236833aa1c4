"""The loop, the store and resuming, with real evaluations of the digits network."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import signal
import sqlite3
import time
from itertools import product
from pathlib import Path

import optuna
import pytest
import torch
from rich.console import Console

from rankopt import StudyError
from rankopt.candidates.prepare import prepare
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Study, best, search
from rankopt.search.progress import LiveRunner
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import Store, read_trials
from rankopt.search.summary import budget_text
from rankopt.strategies.registry import make_strategy
from tests.helpers.spaces import QUICK


def run(digits, trials, store=None, strategy="random", evaluate=None, seed=0):
    problem = digits.problem({"params": 0.3})
    study = Study(problem, make_strategy(strategy, problem, seed), trials, store)
    study.resume()
    search(study, evaluate or Evaluator.of(digits, problem))
    return study


def keep(digits, folder, *, resume=False, **about):
    return Store(folder, digits.problem({"params": 0.3}), {"seed": 0, **about}, resume)


def test_failures_are_recorded_and_the_search_goes_on(digits, tmp_path):
    real = Evaluator.of(digits, digits.problem({"params": 0.3}))
    calls = []

    def sometimes(proposal):
        calls.append(proposal)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return (float("nan"), None) if len(calls) == 3 else real(proposal)

    study = run(digits, 5, keep(digits, tmp_path), evaluate=sometimes)
    assert [t.state for t in study.trials] == ["finished", "failed", "failed", "finished", "finished"]
    assert study.trials[1].error == "RuntimeError: out of memory"
    assert study.trials[2].error == "the objective is nan"
    assert best(study.trials).objective == min(t.objective for t in study.trials if t.objective is not None)
    assert [t["error"] for t in read_trials(tmp_path)][1:3] == ["RuntimeError: out of memory", "the objective is nan"]


def test_all_failing_stops_early_with_the_first_error(digits):
    def fail(proposal):
        raise RuntimeError(f"no such thing as {len(proposal)}")

    with pytest.raises(StudyError, match="every evaluation failed; the first said: RuntimeError: no such thing as"):
        run(digits, 50, evaluate=fail)


def test_study_opens_in_optuna(digits, tmp_path):
    study = run(digits, 4, keep(digits, tmp_path))
    opened = optuna.load_study(study_name="rankopt", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert opened.best_value == pytest.approx(best(study.trials).objective)
    assert [t.params for t in opened.trials] == [
        dict(zip(["conv1", "conv2", "conv3", "fc1", "fc2"][-len(t.proposal) :], t.proposal, strict=True))
        for t in study.trials
    ]


@pytest.mark.parametrize("strategy", ["random", "optuna"])
def test_resuming_continues_the_same_search(digits, tmp_path, strategy):
    whole = run(digits, 10, strategy=strategy)
    run(digits, 4, keep(digits, tmp_path), strategy=strategy)
    resumed = run(digits, 10, keep(digits, tmp_path, resume=True), strategy=strategy)
    assert [t.proposal for t in resumed.trials] == [t.proposal for t in whole.trials]
    assert [t.objective for t in resumed.trials] == pytest.approx([t.objective for t in whole.trials])
    assert len(read_trials(tmp_path)) == 10


def test_another_search_cannot_take_the_folder(digits, tmp_path):
    keep(digits, tmp_path, strategy="random")
    with pytest.raises(StudyError, match="its strategy is 'random', asked is 'optuna'"):
        keep(digits, tmp_path, resume=True, strategy="optuna")


def test_a_damaged_store_is_refused(digits, tmp_path):
    run(digits, 2, keep(digits, tmp_path))
    path = tmp_path / "study.db"
    path.write_bytes(b"not a database" + path.read_bytes()[14:])
    with pytest.raises(StudyError, match=r"study\.db cannot be used"):
        keep(digits, tmp_path, resume=True)
    with pytest.raises(StudyError, match=r"study\.db"):
        read_trials(tmp_path)


def search_slowly(folder, resume):
    """In a process of its own."""
    torch.set_num_threads(1)
    prepared = prepare(load_task("digits"), QUICK, workers=1)
    settings = SearchSettings("optuna", 12, seed=1, resume=resume)

    def slowly(study, evaluate):
        return search(study, lambda proposal: (time.sleep(0.15), evaluate(proposal))[1])

    run_search(prepared, prepared.problem({"params": 0.3}), settings, folder, slowly)


def test_kill_9_loses_nothing_and_changes_nothing(digits, tmp_path):
    """Killed again and again at random moments, the search ends with the plans of an undisturbed one."""
    out = tmp_path / "run"
    out.mkdir()
    processes = multiprocessing.get_context("forkserver")  # they share what they import
    processes.set_forkserver_preload([__name__])
    finished, kills = 0, 0
    for resume, wait in ((False, 0.4), (True, 0.2)):
        process = processes.Process(target=search_slowly, args=(out, resume))
        process.start()
        deadline = time.monotonic() + 600
        while count_trials(out) <= finished and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(wait)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        kept = count_trials(out)
        assert kept >= finished
        finished = kept
    assert kills >= 1 and finished >= 1
    process = processes.Process(target=search_slowly, args=(out, True))
    process.start()
    process.join()
    assert process.exitcode == 0
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    run_search(digits, digits.problem({"params": 0.3}), SearchSettings("optuna", 12, seed=1), undisturbed)
    one, other = ([(t["cost"], t["objective"]) for t in read_trials(f)] for f in (out, undisturbed))
    assert [c for c, _ in one] == [c for c, _ in other]
    assert [o for _, o in one] == pytest.approx([o for _, o in other])


def count_trials(folder: Path) -> int:
    try:
        with sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT count(*) FROM trials").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_transient_errors_are_retried_once(digits):
    real = Evaluator.of(digits, digits.problem({"params": 0.3}))
    calls = []

    def away(proposal):
        calls.append(proposal)
        if len(calls) in (2, 4, 5):
            raise OSError("the network drive is away")
        if len(calls) == 7:
            raise ValueError("a bug")
        return real(proposal)

    trials = run(digits, 5, evaluate=away).trials
    assert [t.error for t in trials] == [
        None, None, "OSError: the network drive is away (tried twice)", None, "ValueError: a bug",
    ]  # fmt: skip
    assert len(calls) == 7


def test_a_one_shot_search_that_failed_is_made_again(digits, tmp_path):
    def broken(study, evaluate):
        return search(study, lambda proposal: 1 / 0)

    problem = digits.problem({"params": 0.3})
    with pytest.raises(StudyError, match="the first said: ZeroDivisionError"):
        run_search(digits, problem, SearchSettings("uniform"), tmp_path, broken)
    result = run_search(digits, problem, SearchSettings("uniform", resume=True), tmp_path)
    assert result.info["trials"] | {"asked": 1} == {
        "asked": 1, "finished": 1, "failed": 0, "stopped": 0, "distinct": 1, "limit": 1, "outside": 0,
        "interrupted": False,
    }  # fmt: skip
    assert [t["state"] for t in read_trials(tmp_path)] == ["finished"]
    states = [t.state.name for t in Store(tmp_path, problem, {}, resume=True).study.trials]
    assert states == ["FAIL", "COMPLETE"], "the file remembers"


def test_a_search_that_runs_out_of_plans_says_so(digits, tmp_path):
    problem = digits.problem({"params": 0.9})
    few = dataclasses.replace(problem, frontiers=tuple(f[:1] for f in problem.frontiers[:-1]) + problem.frontiers[-1:])
    plans = sum(map(few.fits, product(*map(range, map(len, few.frontiers)))))
    result = run_search(digits, few, SearchSettings("random", trials=plans + 20), tmp_path)
    assert 1 <= result.info["trials"]["distinct"] <= plans
    assert f"0 failed (of {plans + 20}: the strategy proposed no further plan)" in budget_text(result.info)


def test_ctrl_c_once_ends_after_the_trial_and_twice_at_once(digits, tmp_path):
    real, signals = Evaluator.of(digits, digits.problem({"params": 0.3})), []
    before = signal.getsignal(signal.SIGINT)

    def press(study, evaluate, times):
        def evaluated(proposal):
            if len(study.trials) == 2:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
                    signals.append(proposal)
            return real(proposal)

        return search(study, evaluated)

    problem = digits.problem({"params": 0.3})
    watched = LiveRunner(lambda study, evaluate: press(study, evaluate, 1), tmp_path)
    result = run_search(digits, problem, SearchSettings("random", 9), tmp_path, watched)
    assert result.info["trials"]["finished"] == 3 and result.info["trials"]["interrupted"]
    watched = LiveRunner(lambda study, evaluate: press(study, evaluate, 0), tmp_path)
    run_search(digits, problem, SearchSettings("random", 9, resume=True), tmp_path, watched)
    log = (tmp_path / "search.log").read_text()
    assert log.count(" trial ") == 9 and "finishing what runs" in log and "3 of 9 trials are done" in log
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(KeyboardInterrupt):
        watched = LiveRunner(lambda study, evaluate: press(study, evaluate, 2), other)
        run_search(digits, problem, SearchSettings("random", 9), other, watched)
    assert len(read_trials(other)) == 2 and signal.getsignal(signal.SIGINT) is before


def test_the_live_line_says_how_it_goes(digits, tmp_path):
    screen, lines = Console(force_terminal=True, file=io.StringIO()), []

    def watched(study, evaluate):
        def looked(proposal):
            lines.append(watching.line())
            if len(study.trials) == 1:
                raise ValueError("on purpose")
            return evaluate(proposal)

        return search(study, looked)

    problem = digits.problem({"params": 0.3})
    watching = LiveRunner(watched, tmp_path, screen)
    run_search(digits, problem, SearchSettings("random", 4), tmp_path, watching)
    assert lines[0] == "0 of 4 trials, 1 running, best nothing yet, params ≤ 11,465"
    assert lines[2].startswith("2 of 4 trials, 1 running, 1 failed, best 0.") and "left" in lines[2]
