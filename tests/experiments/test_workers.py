"""Cases and searches beside each other: what comes out is what one process makes alone, whatever happens."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from rankopt.core.errors import RankoptError
from rankopt.core.files import digest
from rankopt.core.progress import StopCondition
from rankopt.core.run_folder import claim
from rankopt.experiments.cases import CaseFailed, CaseFinished, CaseStarted, finished_cases, run_cases
from rankopt.experiments.config import read_study
from rankopt.experiments.experiment import prepare_experiment
from rankopt.experiments.tasks import load_task
from rankopt.experiments.tuning import TuningStudy
from rankopt.search.loop import search
from rankopt.search.progress import ProgressBar
from rankopt.search.runners import RunnerSettings, make_runner
from tests.experiments.test_tuning import BASE, RANGES, result_folders, rows
from tests.helpers import ROOT
from tests.helpers.command import run as command
from tests.helpers.crews import PretendedCrew

CASES = """
task = "digits"
space = "quick.toml"
training = { epochs = 0.2, optimizer = "adamw", rate = 0.001 }
[[cases]]
name = "30%"
budget.params = 0.3
[[cases]]
name = "macs"
budget.macs = 0.5
training.epochs = 0
[[cases]]
name = "learnt"
strategy = "random"
trials = 2
budget.params = 0.5
teacher = "digits"
"""


@pytest.fixture
def write(tmp_path, quick_space):
    def made(text):
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return made


@pytest.fixture
def crew(monkeypatch):
    """Ray workers of the command line, pretended; call it with their number."""

    def made(*arguments):
        found = PretendedCrew(*arguments)
        monkeypatch.setattr("rankopt.cli.experiments.make_runner", lambda settings, folder: found)
        return found

    return made


def weights(out, case):
    return load_file(next(f for f in (out / case / "trained", out / case) if f.is_dir()) / "model.safetensors")


def same_results(a, b, cases):
    """Whether two folders hold the same table, except for times and machines, and the same weights."""
    tables = [json.loads((out / "cases.json").read_text())["cases"] for out in (a, b)]
    for row in (*tables[0], *tables[1]):
        for name in ("seconds", "date", "machine"):
            del row[name]
    assert tables[0] == tables[1] and [row["case"] for row in tables[0]] == cases
    for case in cases:
        one, other = weights(a, case), weights(b, case)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return True


# --- cases -------------------------------------------------------------------------------------------


def test_cases_beside_each_other_are_those_of_one_process(write, tmp_path, crew):
    path, alone, out = write(CASES), tmp_path / "alone", tmp_path / "out"
    command("run", path, "--out", alone)
    workers = crew(2, -1)
    stdout, _ = command("run", path, "--out", out)
    assert workers.most == 2 and workers.done == ["case macs", "case learnt", "case 30%"]
    assert "of 3 cases" not in stdout and "learnt:" in stdout and (out / "cases.png").is_file()
    assert same_results(alone, out, ["30%", "macs", "learnt"])
    files = [{p.relative_to(x).as_posix() for p in x.rglob("*") if p.name != "search.log"} for x in (alone, out)]
    assert files[0] == files[1], "the same folders, and nothing else is left"
    trained = json.loads((out / "30%" / "trained" / "result.json").read_text())["training"]
    assert trained["run"] == "..", "a place in the worker's folder means nothing here"
    assert command("run", path, "--out", out) and len(workers.done) == 3, "finished ones are not repeated"


def test_one_case_has_all_workers_for_its_search(write, tmp_path, crew):
    study, workers = read_study(write(CASES)), crew(2)
    workers.searches = []

    def runner(study, evaluate):
        workers.searches.append(study.limit)
        return search(study, evaluate)

    PretendedCrew.__call__ = lambda self, study, evaluate: runner(study, evaluate)
    try:
        list(run_cases(study, tmp_path / "out", workers, None, StopCondition(), ProgressBar(), ["macs"]))
    finally:
        del PretendedCrew.__call__
    assert workers.searches == [1] and not workers.done


@pytest.mark.parametrize("workers", [0, 2])
def test_a_case_that_fails_does_not_stop_the_others(workers, write, tmp_path, crew):
    path, out = write(CASES.replace("budget.macs = 0.5", "budget.macs = 0.0001")), tmp_path / "out"
    if workers:
        crew(workers)
    stdout, stderr = command("run", path, "--out", out, code=2)
    assert "2 of 3 cases are done" in stdout and "case macs failed: " in stderr and "least achievable" in stderr
    study = read_study(path)
    assert [row["case"] for row in finished_cases(study, out)] == ["30%", "learnt"]
    runner = PretendedCrew(2) if workers else search
    events = list(run_cases(study, out, runner, None, StopCondition(), ProgressBar()))
    assert [(type(e), e.name) for e in events] == [(CaseStarted, "macs"), (CaseFailed, "macs")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_case_of_another_process_is_left_to_it(workers, write, tmp_path):
    study, out = read_study(write(CASES)), tmp_path / "out"

    def run():
        runner = PretendedCrew(2) if workers else search
        events = run_cases(study, out, runner, None, StopCondition(), ProgressBar())
        return [e.name for e in events if isinstance(e, CaseFinished)]

    with claim(out / ".macs.claim") as ours:
        assert ours and run() == ["30%", "learnt"]
    assert run() == ["macs"]
    assert not list(out.glob(".*"))


def test_a_claim_is_of_one_process_at_a_time(tmp_path):
    with claim(tmp_path / "x") as first, claim(tmp_path / "x") as second:
        assert first and not second
    script = (
        "import os, sys, pathlib; from rankopt.core.run_folder import claim\n"
        "with claim(pathlib.Path(sys.argv[1])) as ours: assert ours; print('has it', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "x"], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"has it\n"
        with claim(tmp_path / "x") as ours:
            assert not ours
        process.kill()
        process.wait()
        with claim(tmp_path / "x") as ours:
            assert ours
    assert not (tmp_path / "x").exists()


def test_cases_that_are_stopped_go_on(write, tmp_path):
    study, out = read_study(write(CASES)), tmp_path / "out"
    stop = StopCondition()
    events = run_cases(study, out, PretendedCrew(1), None, stop, ProgressBar())
    for event in events:
        stop.stopping = isinstance(event, CaseFinished)
    assert [row["case"] for row in finished_cases(study, out)] == ["30%"]
    again = list(run_cases(study, out, PretendedCrew(2), None, StopCondition(), ProgressBar()))
    assert [e.name for e in again if isinstance(e, CaseFinished)] == ["macs", "learnt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_case_that_asked_for_a_gpu_is_not_done_on_the_cpu(write, tmp_path):
    study = read_study(write(CASES))
    events = run_cases(study, tmp_path / "out", PretendedCrew(2, 0, 1.0), None, StopCondition(), ProgressBar())
    failed = [e.error for e in events if not isinstance(e, CaseStarted)]
    assert len(failed) == 3 and all("CUDA" in str(error) for error in failed)


def test_limits_of_a_trial_are_refused_where_a_worker_does_a_whole_search(write, tmp_path):
    study = read_study(write(CASES))
    runner = make_runner(RunnerSettings(workers=2, trial_timeout=5))
    with pytest.raises(RankoptError, match="each worker does a whole search"):
        next(run_cases(study, tmp_path / "out", runner, None, StopCondition(), ProgressBar()))


def test_who_prepares_what_another_process_prepares_waits_for_it_and_can_be_stopped(write, tmp_path):
    experiment, task = read_study(write(CASES)).cases[0].experiment, load_task("digits")
    cache, stop, said = tmp_path / "cache", StopCondition(), []

    class Display(ProgressBar):
        def note(self, text):
            said.append(text)
            stop.stopping = True

    def prepared():
        return prepare_experiment(experiment, task, cache, Display(), search, stop)

    cache.mkdir(mode=0o700)
    name = digest("digits", experiment.space.settings())
    with claim(cache / f"{name}.turn"), pytest.raises(KeyboardInterrupt):
        prepared()
    assert said == ["waiting for another process that prepares the same"] and not list(cache.iterdir())
    stop.stopping = False
    assert prepared().candidates and not list(cache.glob("*.turn"))


# --- searches for hyperparameters ----------------------------------------------------------------------


def test_searches_beside_each_other_are_those_of_one_process(write, tmp_path, crew):
    """The first ten have random settings, which do not depend on results."""
    path, alone, out = write(BASE + RANGES), tmp_path / "alone", tmp_path / "out"
    command("run", path, "--out", alone)
    workers = crew(2, -1)
    stdout, stderr = command("run", path, "--out", out)
    assert workers.done == ["search 2", "search 1", "search 3", "the search"] and "search 3 of 3" in stderr
    assert rows(out) == rows(alone)
    (kept,), (expected,) = result_folders(out), result_folders(alone)
    assert kept.relative_to(out) == expected.relative_to(alone) and "the best search, made again" in stdout
    a, b = load_file(kept / "model.safetensors"), load_file(expected / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def tuned(path, out, at_once, order, killed_after=None):
    """The settings of all searches by their places; results come at once, in an order that depends on `order`."""
    chance, asked = random.Random(order), {}
    ended, study = 0, read_study(path)
    for _ in range(2):
        with TuningStudy(study, load_task("digits"), out).open() as searches:
            running = {}
            while True:
                while len(running) < at_once and (p := searches.next_position(running, at_once)) is not None:
                    running[p] = searches.ask(p, at_once)
                    asked.setdefault(p, []).append(running[p].params)
                if not running:
                    break
                trial = running.pop(chance.choice(list(running)))
                found = trial.params
                score = found["training.rate"] * 100 - found["training.distill"] ** 2
                measured = {"score": score, "params": 1000 * found["budget.params"], "milliseconds": 1.0}
                searches.record(trial, measured, lambda text: None)
                ended += 1
                if ended == killed_after:
                    break
    return [asked[p] for p in sorted(asked)]


def test_the_order_of_results_does_not_change_what_is_asked(write, tmp_path, at_once=3):
    path = write(BASE + RANGES.replace("searches = 3", "searches = 16"))
    first, second = (tuned(path, tmp_path / str(order), at_once, order) for order in (0, 1))
    assert first == second and len(first) == 16 and all(len(asked) == 1 for asked in first)
    killed = tuned(path, tmp_path / "killed", at_once, 2, killed_after=13)
    assert all(one[0] == x for one, asked in zip(first, killed, strict=True) for x in asked)
    assert sum(len(asked) for asked in killed) <= 16 + at_once - 1, "what was lost is made again, in its place"
    alone = tuned(path, tmp_path / "alone", 1, 0)
    assert alone[:10] == first[:10] and alone != first, "random settings are the same, chosen ones see less"


def test_a_kill_between_choosing_settings_and_using_them_changes_nothing(write, tmp_path):
    study, task = read_study(write(BASE + RANGES)), load_task("digits")
    asked = []
    for out in ("killed", "undisturbed"):
        with TuningStudy(study, task, tmp_path / out).open() as searches:
            searches.record(searches.ask(0), {"score": 1.0, "params": 1.0, "milliseconds": 1.0}, lambda text: None)
            if out == "killed":
                searches.study.enqueue_trial(searches.ask(1).params, user_attrs={"position": 1})
        with TuningStudy(study, task, tmp_path / out).open() as searches:
            assert searches.next_position((), 1) == 1 and len(searches.done()) == 1
            asked.append(searches.ask(1).params)
    assert asked[0] == asked[1]


# --- with Ray ----------------------------------------------------------------------------------------


LONG = CASES.replace("epochs = 0.2", "epochs = 6")


def begun(path, out, scratch, until):
    """Begin a run with two workers; returns it as soon as `until` is true."""
    environment = {**os.environ, "TMPDIR": str(scratch)}
    arguments = [sys.executable, "-m", "rankopt.cli", "run", path, "--out", out, "--workers", "2"]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while not until() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["worker", "driver", "interrupt"])
def test_what_is_killed_or_stopped_goes_on_to_the_same_results(kind, write, tmp_path):
    pytest.importorskip("ray")
    path, out, scratch = write(LONG), tmp_path / "out", tmp_path / "t"
    scratch.mkdir()

    def places():
        return list(scratch.glob("rankopt-*-away-*/work/30%/trained")) or list(
            scratch.glob("rankopt-*-away-*/work/trained")
        )

    process = begun(path, out, scratch, places)
    if kind == "worker":
        (place,) = places()
        os.kill(int(place.relative_to(scratch).parts[0].split("-")[1]), signal.SIGKILL)
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0 and "was lost" in said
    else:
        process.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGINT)
        _, said = process.communicate(timeout=600)
        assert process.returncode == (-signal.SIGKILL if kind == "driver" else 130), said
        assert kind == "driver" or "the same command goes on" in said
    if kind != "worker":
        assert not (out / "30%" / "trained" / "result.json").exists()
        command("run", path, "--out", out)
    command("run", path, "--out", tmp_path / "alone")
    assert same_results(out, tmp_path / "alone", ["30%", "macs", "learnt"])
    with suppress(FileNotFoundError):
        shutil.rmtree(scratch)
