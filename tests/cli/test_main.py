"""The command line, as a person types it: a golden run, and clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import run


def test_golden_run(tmp_path, quick_space):
    """search, report, apply --check, resume: what one person does in one go."""
    out = tmp_path / "run"
    common = (*f"search digits --budget params=0.3 --strategy optuna --space {quick_space}".split(), "--out", out)
    stdout, _ = run(*common, "--trials", 4)
    assert "compressed" in stdout and "conv3" in stdout
    assert {p.name for p in out.iterdir()} == {
        "study.db", "plan.json", "model.safetensors", "result.json", "frontiers.json", "report.html", "search.log",
    }  # fmt: skip
    info = json.loads((out / "result.json").read_text())
    assert (info["task"], info["strategy"], info["seed"]) == ("digits", "optuna", 0)
    assert info["trials"]["distinct"] == 4
    assert info["budget"]["params"]["achieved"] <= info["budget"]["params"]["target"] == int(0.3 * 38218)
    assert max(map(len, stdout.splitlines()[:-2])) <= 100

    stdout, _ = run("report", out)
    assert "report.html" in stdout and "budget" in stdout

    stdout, _ = run("apply", out, "--task", "digits", "--check")
    assert f"{info['cost']['compressed']['params']:,} parameters" in stdout
    assert f"test score {info['score']['compressed']['test']:.2%}" in stdout

    _, stderr = run(*common, "--trials", 4, code=2)
    assert "is not empty: pass --resume" in stderr
    run(*common, "--trials", 6, "--resume")
    assert json.loads((out / "result.json").read_text())["trials"]["distinct"] == 6
    _, stderr = run(*common, "--budget", "macs=0.5", "--resume", code=2)
    assert "belongs to another search" in stderr


def test_inspect_shows_every_layer_within_100_columns():
    stdout, _ = run("inspect", "digits")
    for name in ("conv1", "conv2", "conv3", "fc1", "fc2", "38,218 parameters", "544,704 MACs"):
        assert name in stdout
    assert max(map(len, stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["digitz", "--budget", "params=0.3"],
            "unknown task 'digitz': name a built-in task (digits), FILE.py:function or package.module:function",
        ),
        (["none.py:task", "--budget", "params=0.3"], "there is no file none.py"),
        (["digits", "--budget", "params=1"], "ambiguous"),
        (["digits", "--budget", "params=0"], "not above 0"),
        (["digits", "--budget", "params=0.001"], "budget params=38 cannot be met:"),
        (["digits", "--budget", "params=99999999"], "above the dense model's 38,218"),
        (["digits", "--budget", "speed=2"], "unknown budget metric 'speed': choose from params, macs, bytes"),
        (["digits", "--budget", "params=0.3", "--strategy", "magic"], "unknown strategy 'magic': choose from knapsack"),
        (
            ["digits", "--budget", "params=0.3", "--space", "magic"],
            "unknown search space 'magic': choose from all, bits, cifar",
        ),
        (["digits", "--budget", "params=0.3", "--trials", "0", "--strategy", "random"], "give 1 or more"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, arguments, message):
    space = [] if "--space" in arguments else ["--space", tmp_path / "quick.toml"]
    (tmp_path / "quick.toml").write_text('families = ["svd_out"]\npoints = 4\nsteps = 0\n')
    _, stderr = run("search", *arguments, *space, "--out", tmp_path / "run", code=2)
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]


def test_a_refused_search_leaves_no_folder_behind(tmp_path, quick_space):
    run("search", "digits", "--budget", "params=0.001", "--space", quick_space, "--out", tmp_path / "run", code=2)
    run("search", "digits", "--budget", "params=0.3", "--space", quick_space, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def task(): return 3", "returned int: return rankopt.Task(...)"),
        ("def task(): raise KeyError('weights')", "KeyError: 'weights'"),
        ("def other(): pass", "has no function 'task'"),
        ("import nothing_like_this", "does not run: ModuleNotFoundError"),
    ],
)
def test_bad_task_files(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    _, stderr = run("inspect", f"{tmp_path / 'mine.py'}:task", code=2)
    assert message in stderr


def test_bad_spaces(tmp_path):
    for text, message in [
        ("familys = []", "unknown setting 'familys'"),
        ('families = ["magic"]', "unknown decomposition 'magic'"),
        ("points = [", "cannot be read"),
        ("fractions = [2.0]", "fractions lie in (0, 1]"),
        ("families = []", "names no family"),
    ]:
        path = tmp_path / "space.toml"
        path.write_text(text)
        _, stderr = run("inspect", "digits", "--space", path, code=2)
        assert message in stderr


def test_reports_and_apply_of_bad_folders(tmp_path):
    for command in (["report", tmp_path], ["apply", tmp_path, "--task", "digits"]):
        _, stderr = run(*command, code=2)
        assert "there is no" in stderr
    (tmp_path / "result.json").write_text('{"half": ')
    assert "damaged" in run("report", tmp_path, code=2)[1]


def test_the_installed_command_and_light_import(tmp_path):
    """`import rankopt` loads neither ray nor optuna nor matplotlib nor scikit-learn, and needs no network."""
    heavy = "ray optuna matplotlib sklearn pandas typer rich tensorly"
    code = f"import sys, rankopt; print([m for m in '{heavy}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.strip() == "[]"
    command = Path(sys.executable).with_name("rankopt")
    help_text = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in help_text for name in ("inspect", "search", "report", "apply"))


@pytest.mark.parametrize(
    "space", ["default", "all", "cifar", "thesis-cp", "thesis-tucker2", "thesis-tt", "tensor-networks"]
)
def test_every_space_that_comes_along_works(space):
    stdout, _ = run("inspect", "digits", "--space", space)
    assert "conv3" in stdout
