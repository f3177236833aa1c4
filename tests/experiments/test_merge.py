"""Cases that were run elsewhere, for some minutes, and go on here."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rankopt.core.errors import StudyError
from rankopt.core.progress import StopCondition
from rankopt.experiments.cases import finished_cases, run_cases
from rankopt.experiments.config import read_study
from rankopt.experiments.merge import merge
from rankopt.search.progress import ProgressBar
from rankopt.search.runners import RunnerSettings, make_runner
from tests.helpers.command import run as command

TEXT = """
task = "digits"
space = "quick.toml"
training = { epochs = 2, optimizer = "adamw", rate = 0.001, ema = 0.9 }
minutes = 4
[[cases]]
name = "30%"
budget.params = 0.3
[[cases]]
name = "macs"
budget.macs = 0.5
minutes = 0.5
training.epochs = 0
"""


class StopAfter(StopCondition):
    """Stops when asked for the n-th time, which happens before every case and after every training step."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture
def study(quick_space, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TEXT)
    return read_study(path)


def run(study, out, steps=10**6, only=()):
    runner = make_runner(RunnerSettings(), out / "logs")
    return list(run_cases(study, out, runner, None, StopAfter(steps), ProgressBar(), only))


def weights(out, case="30%"):
    return load_file(out / case / "trained" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_case_that_was_stopped_moved_and_merged_ends_in_the_same_weights(study, tmp_path):
    there, moved, here, whole = (tmp_path / name for name in ("there", "moved", "here", "whole"))
    run(study, there, steps=12)
    assert (there / "30%" / "trained" / "checkpoint.safetensors").is_file() and not (there / "cases.json").exists()
    shutil.copytree(there / "30%", moved / "30%")
    assert merge(study, moved, here) == ["30%"]
    searched = (here / "30%" / "result.json").read_bytes()
    run(study, here)
    assert (here / "30%" / "result.json").read_bytes() == searched, "not searched again"
    run(study, whole)
    assert same(weights(here), weights(whole))
    assert [row["case"] for row in finished_cases(study, here)] == ["30%", "macs"]


def test_what_got_further_wins(study, tmp_path):
    short, long, done = (tmp_path / name for name in ("short", "long", "done"))
    run(study, short, steps=5)
    shutil.copytree(short, long)
    run(study, long, steps=9, only=["30%"])
    run(study, done, only=["30%"])
    row = json.loads((done / "cases.json").read_text())["cases"][0] | {"machine": "an H100"}
    (done / "cases.json").write_text(json.dumps({"study": "study.toml", "cases": [row]}))
    out = tmp_path / "out"
    assert merge(study, long, out) == ["30%"]
    assert merge(study, short, out) == []
    assert merge(study, done / "30%", out) == ["30%"], "the folder of one case"
    assert merge(study, long, out) == []
    assert same(weights(out), weights(done))
    shutil.rmtree(out)
    assert merge(study, done, out) == ["30%"]
    assert finished_cases(study, out) == [row], "with the machine that it ran on"
    assert {p.name for p in out.iterdir()} == {"30%", "cases.json"}


def test_folders_that_are_refused(study, tmp_path):
    done, out = tmp_path / "done", tmp_path / "out"
    run(study, done, steps=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"holds no case of study\.toml: give a folder that holds some of 30%, macs"):
        merge(study, tmp_path / "empty", out)
    (tmp_path / "other.toml").write_text(TEXT.replace("rate = 0.001", "rate = 0.002"))
    with pytest.raises(StudyError, match="with other settings: it belongs to another study"):
        merge(read_study(tmp_path / "other.toml"), done, out)
    (done / "30%" / "link").symlink_to("/etc/hostname")
    with pytest.raises(StudyError, match="is a symbolic link"):
        merge(study, done, out)
    with pytest.raises(StudyError, match="is a symbolic link"):
        run(study, done)
    (done / "30%" / "link").unlink()
    os.mkfifo(done / "30%" / "pipe")
    with pytest.raises(StudyError, match="no file and no folder"):
        merge(study, done, out)
    (done / "30%" / "pipe").unlink()
    (done / "30%" / "trained" / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(StudyError, match="is damaged"):
        merge(study, done, out)
    assert not out.exists() or not any(out.iterdir())


def test_settings_of_an_earlier_version_are_those_of_today(study, tmp_path):
    """patience is new; what was finished before it is not repeated."""
    run(study, tmp_path / "out")
    for path in ((tmp_path / "out" / "30%" / "request.json"), (tmp_path / "out" / "cases.json")):
        path.write_text(path.read_text().replace('"patience": 0,', ""))
        assert "patience" not in path.read_text()
    assert run(study, tmp_path / "out") == []


def test_on_the_command_line(study, tmp_path):
    out = tmp_path / "out"
    stdout, _ = command("run", study.path, "--out", out, "--case", "macs", "--budget-minutes", 0, code=3)
    assert "0 of 2 cases are done" in stdout
    stdout, _ = command("run", study.path, "--out", out, "--case", "macs")
    assert "macs (about 0.5 minutes):" in stdout
    stdout, _ = command("run", study.path, "--out", tmp_path / "b", "--merge", out, "--budget-minutes", 0, code=3)
    assert "merged from" in stdout and "1 of 2 cases are done" in stdout
    assert [case.minutes for case in study.cases] == [4, 0.5]
