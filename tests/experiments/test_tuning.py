"""Study files in TOML: valid and invalid contents, and searches over hyperparameters."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

from rankopt.cli.main import app
from rankopt.core.errors import RankoptError, StudyError
from rankopt.experiments.config import read_study
from rankopt.experiments.tasks import load_task
from rankopt.experiments.tuning import FILE, TuningStudy
from rankopt.search.compress import run_search
from rankopt.search.runners import RunnerSettings
from rankopt.search.settings import SearchSettings
from rankopt.training.loop import divergence
from tests.helpers import ROOT
from tests.helpers.command import run as command

BASE = 'task = "digits"\nbudget = { params = 0.3 }\nspace = "quick.toml"\n'
RANGES = """
searches = 3
objectives = ["score", "params", "milliseconds"]
training = { epochs = 0.2, optimizer = "adamw", rate = 0.0005, eval_mode = true }
[hyperparameters]
budget.params = { low = 0.2, high = 0.5, log = true }
space.families = [["svd_out", "cp_merged"], ["svd_out"]]
training.epochs = { low = 0, high = 0.4, step = 0.2 }
training.rate = { low = 0.0001, high = 0.001, log = true }
training.distill = { low = 0, high = 1 }
"""
CASES = (
    BASE.replace("budget = { params = 0.3 }\n", "")
    + """
training = { epochs = 0.5, optimizer = "adamw", rate = 0.001 }
[[cases]]
name = "30%"
budget.params = 0.3
[[cases]]
name = "half-macs"
budget.macs = 0.5
training.epochs = 0
seed = 3
[[cases]]
name = "scratch"
budget.params = 0.5
from_scratch = true
teacher = "digits"
"""
)


@pytest.fixture
def write(tmp_path, quick_space):
    """A study's file beside the quick search space."""

    def made(text, name="study.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return made


def invoke(*arguments, code=0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == code, outcome.output + repr(outcome.exception)
    return " ".join((outcome.stdout + outcome.stderr).split())


def result_folders(out):
    """Where the results of a study's kept searches are: of those that were trained, in a folder of their own."""
    folders = list(out.glob("search-*"))
    return [f / "trained" if (f / "trained").is_dir() else f for f in folders]


def rows(folder):
    """The searches of a study, without what differs from run to run."""
    with (folder / "hyperparameters.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    timed = ("milliseconds", "seconds", "search")
    return [{k: v for k, v in row.items() if k not in timed} for row in found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = 'digits'", "budget is missing"),
        ("budgets = 1\n" + BASE, "unknown key 'budgets'; the keys are task, budget, strategy"),
        (BASE + "trials = 'many'", "trials = 'many' is not what it should be"),
        (BASE + "strategy = 'knapsak'", "unknown strategy 'knapsak'"),
        (BASE + "options = { width = 1 }", "strategy 'knapsack' has no option 'width'"),
        (BASE + "searches = 3", "go with a table [hyperparameters]"),
        (
            BASE + "training = { steps = 3 }",
            "unknown setting 'training.steps'; known are training.epochs, training.optimizer",
        ),
        (BASE + "training = { distill = 3 }", "distill is 3: give a number from 0 to 1"),
        (BASE + "objectives = ['speed']\n[hyperparameters]\nspace.points = [2, 4]", "unknown objective 'speed'"),
        (
            BASE + "[hyperparameters]\nspace.pints = [2, 4]",
            "unknown hyperparameter 'space.pints'; known are space.families",
        ),
        (BASE + "[hyperparameters]\nspace.points = [2, 0]", "points and multiple are 1 or more"),
        (BASE + "[hyperparameters]\nspace.points = 3", "give choices as [a, b] or a range"),
        (BASE + "[hyperparameters]\nspace.points = { low = 3 }", "give choices as [a, b] or a range"),
        (BASE + "[hyperparameters]\nspace.points = { low = 9, high = 3 }", "hyperparameter space.points"),
        (BASE + "[hyperparameters]\nspace.families = [['svd_out'], ['cpp']]", "unknown decomposition 'cpp'"),
        (
            BASE + "[hyperparameters]\ntraining.rate = { low = 0.0, high = 1.0 }",
            "rate is 0.0: give a number from 1e-12",
        ),
        (BASE + "[hyperparameters]\nspace.points = ['a']", "space.points=a"),
        ("a = [", "cannot be read"),
        (BASE + "workers = -1", "workers are 0 or more"),
        (BASE + "[ray]\ngpus = 1", "unknown key ray.gpus; the keys are workers, address, gpus_per_trial"),
        (BASE + "[ray]\ncpus_per_trial = '2'", "ray.cpus_per_trial = '2' is not what it should be"),
        (BASE + "objectives = [['score']]\n[hyperparameters]\nspace.points = [2, 4]", "unknown objective ['score']"),
        (BASE + "[hyperparameters]\nspace.rounds = [1, 3]", "unknown hyperparameter 'space.rounds'"),
        (
            BASE + "training.layerwise = 5\n[hyperparameters]\ntraining.layerwise = { low = 0.5, high = 4 }",
            "a whole number",
        ),
        (BASE + "teacher = 'digits'\ntraining = { distill = 0 }", "not listened to with distill = 0"),
        (CASES + "[[cases]]\nname = 'a'", "budget is missing"),
        (CASES + "[[cases]]\nbudget.params = 0.5", "a case is a table with a name"),
        (CASES + "[[cases]]\nname = '../a'\nbudget.params = 0.5", "a case is a table with a name"),
        (CASES + "[[cases]]\nname = '30%'\nbudget.params = 0.5", "two cases have one name"),
        (
            CASES + "[[cases]]\nname = 'a'\nbudget.params = 0.5\nsteps = 3",
            "case a: unknown key 'steps'; the keys are task, budget, strategy",
        ),
        (CASES + "[[cases]]\nname = 'a'\nbudget.param = 0.5", "unknown budget metric 'param'"),
        (CASES + "[[cases]]\nname = 'a'\nbudget.params = 0.5\ntraining.eval_mode = 1", "give true or false"),
        (
            CASES + "[[cases]]\nname = 'a'\nfrom_scratch = true\nbudget.params = 1\ntraining.epochs = 0",
            "need a training",
        ),
        (CASES + "[hyperparameters]\nspace.points = [2, 4]", "do not go together"),
    ],
)
def test_clear_errors(write, text, message):
    with pytest.raises(RankoptError) as caught:
        read_study(write(text))
    assert message in str(caught.value) and "study.toml" in str(caught.value)


def test_the_examples_of_the_documentation_can_be_read(write):
    cases, example = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/reference/study-file.md").read_text(), re.S)
    names = [case.name for case in read_study(write(cases)).cases]
    assert names == ["svd_out-30%", "tt-30%", "svd_out-15%", "tt-15%"]
    found = read_study(write(example))
    assert len(found.hyperparameters) == 4 and found.searches == 40 and found.experiment.training.epochs == 5


def test_what_a_file_says(write):
    text = BASE.replace("{ params = 0.3 }", "['params=0.3', 'macs=50%']")
    text += "strategy = 'optuna'\noptions = { width = 0.7 }\ntrials = 9\nseed = 3\nfidelities = '0.5'\n"
    found = read_study(write(text + "[hyperparameters]\noptions.width = { low = 0, high = 2 }\nspace.points = [3, 5]"))
    experiment = found.experiment
    assert (experiment.budget, experiment.search.trials, experiment.search.seed) == (
        {"params": 0.3, "macs": "50%"},
        9,
        3,
    )
    assert (
        experiment.search.options == {"width": 0.7}
        and experiment.space.name == "quick"
        and experiment.search.fidelities.shares == (0.5, 1.0)
    )
    width, points = found.hyperparameters
    assert 0.5 in [width.distribution.high / 4] and width.distribution.step is None, "a fraction, though 0 to 2"
    changed = experiment.with_values({"options.width": 1.5, "space.points": points.from_optuna("5")})
    assert changed.search.options["width"] == 1.5 and changed.space.points == 5 and changed.budget == experiment.budget


def test_ray_is_set_in_the_file_or_on_the_command_line(write, tmp_path, monkeypatch):
    assert read_study(write(BASE)).runner == RunnerSettings()
    assert read_study(write(BASE + "workers = 3")).runner == RunnerSettings(workers=3)
    path = write(BASE + "[ray]\nworkers = 2\naddress = 'auto'\ngpus_per_trial = 0.5\ncpus_per_trial = 2")
    expected = RunnerSettings(2, "auto", 0.5, cpus_per_trial=2)
    assert read_study(path).runner == expected
    asked = []

    def refuse(settings, logs):
        asked.append(settings)
        raise RankoptError("no search today")

    monkeypatch.setattr("rankopt.cli.experiments.make_runner", refuse)
    command("run", path, "--out", tmp_path / "out", code=2)
    command("run", path, "--out", tmp_path / "out", "--workers", "4", "--gpus-per-trial", "1", code=2)
    assert asked == [expected, dataclasses.replace(expected, workers=4, gpus_per_trial=1.0)]


@pytest.mark.slow
def test_one_search_is_that_of_the_command(write, digits, tmp_path):
    path = write(BASE + "strategy = 'random'\ntrials = 3")
    shown = invoke("run", path, "--out", tmp_path / "out")
    assert "report.html" in shown
    info = json.loads((tmp_path / "out" / "result.json").read_text())
    expected = run_search(digits, digits.problem({"params": 0.3}), SearchSettings("random", 3)).info
    assert info["objective"] == expected["objective"] and info["trials"]["distinct"] == 3
    stopped = invoke("run", path, "--out", tmp_path / "late", "--budget-minutes", 0, code=2)
    assert "no evaluation finished" in stopped
    assert "report.html" in invoke("run", path, "--out", tmp_path / "late")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, _cache):
    """A study with five hyperparameters and three objectives, run in one go."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "quick.toml").write_text('families = ["svd_out", "cp_merged"]\npoints = 6\nsteps = 20\n')
    (folder / "study.toml").write_text(BASE + RANGES)
    shown = invoke("run", folder / "study.toml", "--out", folder / "out")
    return folder, shown


def test_searches(undisturbed):
    folder, shown = undisturbed
    out = folder / "out"
    assert "search 3 of 3" in shown and "the best search, made again" in shown
    found = rows(out)
    assert len(found) == 3
    first = {"budget.params": "0.3", "space.families": "svd_out cp_merged", "training.epochs": "0.2"}
    assert found[0].items() >= first.items(), "the file's own settings come first"
    for row in found:
        assert int(row["params"]) <= float(row["budget.params"]) * 38218
    best = max(found, key=lambda r: (float(r["score"]), -int(r["params"])))
    (kept,) = result_folders(out)
    info = json.loads((kept / "result.json").read_text())
    assert info["score"]["compressed"]["validation"] == pytest.approx(float(best["score"]))
    assert info["cost"]["compressed"]["params"] == int(best["params"])
    assert info["score"]["compressed"]["test"] is not None, "read for the chosen search alone"
    page = (out / "hyperparameters.html").read_text()
    assert all(name in page for name in ("Pareto front", "Parallel coordinates", "training.rate", "Importance"))
    assert page.count("<svg") == 3 + 5 and "http://" not in page.replace("http://www.w3.org", "")
    assert {p.stem for p in out.glob("*.png")} == {"importance", "parallel", "slices", "front"}


def test_the_kept_model_is_the_trained_one(undisturbed):
    """Rebuilt from its folder it scores what the study noted."""
    import rankopt

    folder, _ = undisturbed
    (kept,) = result_folders(folder / "out")
    task = load_task("digits")
    info = json.loads((kept / "result.json").read_text())
    model = rankopt.load(task.model, kept).eval()
    with torch.no_grad():
        assert task.score(model) == pytest.approx(info["score"]["compressed"]["validation"])


@pytest.mark.slow
def test_a_killed_study_goes_on_as_if_it_had_not_been(undisturbed, tmp_path):
    folder, _ = undisturbed
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rankopt.cli", "run", str(folder / "study.toml"), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("search 1"):
            break
    time.sleep(0.5)  # in the middle of the second
    process.send_signal(signal.SIGKILL)
    process.wait()
    invoke("run", folder / "study.toml", "--out", out)
    assert rows(out) == rows(folder / "out")


def test_the_time_limit_and_another_study(undisturbed, tmp_path):
    folder, _ = undisturbed
    out = tmp_path / "out"
    shown = invoke("run", folder / "study.toml", "--out", out, "--budget-minutes", 0, code=3)
    assert "the time is over with 0 of 3 searches: the same command goes on" in shown
    other = folder / "other.toml"
    other.write_text((BASE + RANGES).replace("high = 0.5", "high = 0.6"))
    assert "belongs to another study: its hyperparameters" in invoke("run", other, "--out", out, code=2)
    (out / FILE).write_bytes(b"not a database")
    assert "cannot be used" in invoke("run", folder / "study.toml", "--out", out, code=2)


def test_failed_searches_are_counted_and_shown(write, tmp_path):
    text = BASE.replace("0.3", "0.5") + "searches = 2\n[hyperparameters]\nbudget.params = [0.001, 0.5]"
    invoke("run", write(text), "--out", tmp_path / "out")
    found = [r["error"] for r in rows(tmp_path / "out")]
    hopeless = write(BASE + "searches = 5\n[hyperparameters]\nbudget.params = [0.001, 0.002]", "hopeless.toml")
    assert "every search failed" in invoke("run", hopeless, "--out", tmp_path / "none", code=2)
    assert len(found) == 2 and all(not e or "least achievable" in e for e in found)


def test_a_study_is_run_once_at_a_time(write, tmp_path):
    study, task = read_study(write(BASE + RANGES)), load_task("digits")
    with (
        TuningStudy(study, task, tmp_path / "out").open(),
        pytest.raises(StudyError, match="another process is at work"),
        TuningStudy(study, task, tmp_path / "out").open(),
    ):
        pass


def test_a_search_space_with_settings_of_its_own(write):
    base = BASE.replace('"quick.toml"', '{ base = "quick.toml", steps = 7 }')
    space = read_study(write(base)).experiment.space
    assert (space.families, space.points, space.steps) == (("svd_out", "cp_merged"), 6, 7)
    with pytest.raises(RankoptError, match=r"unknown setting 'space\.step'; known are space\.families"):
        read_study(write(base.replace("steps", "step")))


def test_a_score_is_needed_for_a_score(write, tmp_path):
    study, task = read_study(write(BASE + RANGES)), dataclasses.replace(load_task("digits"), score=None)
    with pytest.raises(RankoptError, match="the task gives no score"):
        TuningStudy(study, task, tmp_path)


@pytest.mark.slow
def test_a_search_that_breaks_is_one_that_failed(write, tmp_path, monkeypatch):
    """Else the same search would be made again, and break again, whenever the study goes on."""
    from rankopt.experiments import tuning as hyperparameters

    real, seen = hyperparameters.run_experiment, []

    def breaks_once(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            raise ValueError("no memory left")
        return real(*arguments)

    monkeypatch.setattr(hyperparameters, "run_experiment", breaks_once)
    objectives = '["score", "objective", "params", "macs", "bytes"]'  # each gets its bars in a picture
    text = BASE + RANGES.replace('["score", "params", "milliseconds"]', objectives).replace(
        "searches = 3", "searches = 5"
    )
    shown = invoke("run", write(text), "--out", tmp_path / "out")
    assert "search 2 of 5: failed, ValueError: no memory left" in shown and "the best search, made again" in shown


# --- cases ---------------------------------------------------------------------------------------------------


def test_cases(write, tmp_path):
    """What is in the table is what is in the folders; a case that is finished is not repeated, others go on."""
    path, out = write(CASES), tmp_path / "out"
    assert "0 of 3 cases are done" in invoke("run", path, "--out", out, "--budget-minutes", 0, code=3)
    shown = invoke("run", path, "--out", out, "--case", "scratch")
    assert "1 of 3 cases" in shown and not (out / "half-macs").exists()
    assert "unknown case 'half'; the cases are 30%, half-macs, scratch" in invoke(
        "run", path, "--out", out, "--case", "half", code=2
    )
    shown = invoke("run", path, "--out", out)
    assert "half-macs" in shown and "of 3 cases" not in shown
    first, second, third = json.loads((out / "cases.json").read_text())["cases"]
    info = json.loads((out / "30%" / "trained" / "result.json").read_text())
    assert (
        first["score"] == info["score"]["compressed"]["test"]
        and first["interval"] == info["intervals"]["compressed"]["test"]
    )
    assert first["untrained"] == json.loads((out / "30%" / "result.json").read_text())["score"]["compressed"]["test"]
    assert first["params"] <= 0.3 and second["macs"] <= 0.5 and second["untrained"] == second["score"]
    assert info["training"]["recipe"]["epochs"] == 0.5 and second["settings"]["seed"] == 3
    drawn = json.loads((out / "scratch" / "trained" / "result.json").read_text())["training"]
    assert drawn["from_scratch"] and drawn["teacher"] == "digits" and third["untrained"] is third["dense"] is None
    assert third["score"] < json.loads((out / "scratch" / "result.json").read_text())["score"]["compressed"]["test"]
    assert not (out / "half-macs" / "trained").exists()
    assert (out / "cases.md").read_text().count("\n| ") == 4
    assert (out / "cases.png").read_bytes().startswith(b"\x89PNG")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    shutil.rmtree(out / "half-macs")
    invoke("run", path, "--out", out)
    after = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert before.keys() == after.keys() and [p.parent.name for p in before if before[p] != after[p]] == ["half-macs"]
    (out / "cases.json").write_text("{}")
    assert "cases.json is damaged: remove it" in invoke("run", path, "--out", out, code=2)
    (out / "cases.json").unlink()
    for text in (("rate = 0.001", "rate = 0.002"), ("budget.params = 0.3", "budget.params = 0.29")):
        other = write(CASES.replace(*text), "other.toml")
        assert "holds a training with other settings" in invoke("run", other, "--out", out, code=2)


def test_the_time_stops_a_search_within_a_case(write, tmp_path):
    text = (
        CASES.split("[[cases]]")[0]
        + "[[cases]]\nname = 'long'\nstrategy = 'random'\ntrials = 5000\nbudget.params = 0.3"
    )
    path, out = write(text), tmp_path / "out"
    for minutes in (0.05, 0.07, 0.1, 0.15, 0.3, 0.6):  # on a busy machine not one trial may end within three seconds
        outcome = CliRunner().invoke(app, ["run", str(path), "--out", str(out), "--budget-minutes", str(minutes)])
        if outcome.exit_code == 3:  # the time was over
            break
        assert "no evaluation finished" in outcome.output
    assert "0 of 1 cases are done" in outcome.output


def test_a_case_fitted_with_other_settings_is_refused(write, tmp_path):
    """Trials of other fits are not the new plan's."""
    text, out = CASES.split("training = {")[0] + "[[cases]]\nname = 'a'\nbudget.params = 0.3", tmp_path / "out"
    invoke("run", write(text), "--out", out)
    invoke("run", write(text), "--out", out)
    other = write(text + "\nspace = { families = ['svd_out', 'cp_merged'], points = 6, steps = 7 }", "other.toml")
    (out / "cases.json").unlink()
    assert "belongs to another search" in invoke("run", other, "--out", out, code=2)


def test_a_file_may_be_named_from_anywhere(write, tmp_path, monkeypatch):
    """What was asked is the same from another folder."""
    path = write(CASES.replace('teacher = "digits"', 'teacher = "tasks.py:made"'))
    (tmp_path / "tasks.py").write_text("from rankopt.experiments.digits import make as made\n")
    there = [c.experiment.as_json(c.task) for c in read_study(path).cases]
    monkeypatch.chdir(tmp_path)
    assert [c.experiment.as_json(c.task) for c in read_study(Path(path.name)).cases] == there
    assert there[2]["teacher"] == "tasks.py:made"


@pytest.mark.slow
def test_a_case_whose_training_was_stopped_goes_on(write, tmp_path):
    """The weights are those of an undisturbed run."""
    text = CASES.replace("epochs = 0.5", "epochs = 3").split('[[cases]]\nname = "half')[0]
    path, out = write(text), tmp_path / "out"
    command = [sys.executable, "-m", "rankopt.cli", "run", str(path), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "30%" / "trained").is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.wait()
    search = (out / "30%" / "result.json").stat().st_mtime_ns
    invoke("run", path, "--out", out)
    assert (out / "30%" / "result.json").stat().st_mtime_ns == search, "not searched again"
    invoke("run", path, "--out", tmp_path / "undisturbed")
    a, b = (load_file(where / "30%" / "trained" / "model.safetensors") for where in (out, tmp_path / "undisturbed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- training ------------------------------------------------------------------------------------------------


def test_softened_divergence_is_hintons():
    """Its gradient tends to (z - z0) / n for high temperatures and logits of mean zero (Hinton 2015, eq. 4)."""
    torch.manual_seed(0)
    z, wanted = (x - x.mean(1, keepdim=True) for x in torch.randn(2, 5, 10, dtype=torch.float64))
    z.requires_grad_()
    divergence(z, wanted, 1e4).backward()
    torch.testing.assert_close(z.grad, (z - wanted).detach() / 10 / 5, rtol=1e-3, atol=1e-6)
    expected = F.kl_div(z.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    torch.testing.assert_close(divergence(z, wanted, 1.0), expected)


def test_an_unreadable_folder_is_named(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    study, task = read_study(write(BASE + RANGES)), load_task("digits")
    with pytest.raises(StudyError, match="not empty"), TuningStudy(study, task, tmp_path / "out").open():
        pass
