"""Options of `rankopt search` that Python has, too."""

from __future__ import annotations

import json

import pytest
import torch

import rankopt
from rankopt.experiments.tasks import load_task
from tests.helpers.command import run


def test_families_and_layers_that_stay_dense(tmp_path, quick_space):
    options = (
        "--families",
        "svd_out",
        "--keep-dense",
        "fc*",
        "--keep-dense",
        "conv1",
        "--quiet",
        "--space",
        quick_space,
    )
    _, stderr = run(
        "search", "digits", "--budget", "params=0.6", *options, "--space", quick_space, "--out", tmp_path / "run"
    )
    assert stderr == ""
    methods = {x["name"]: x["method"] for x in json.loads((tmp_path / "run" / "result.json").read_text())["layers"]}
    assert [methods[name] for name in ("conv1", "fc1", "fc2")] == ["dense"] * 3
    assert set(methods.values()) <= {"dense", "svd_out"}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu': cpu, cuda, or cuda:1 of several GPUs"),
        ("cuda:99", "device cuda:99: torch finds"),
    ],
)
@pytest.mark.parametrize("command", [("search", "--budget", "params=0.6"), ("sweep", "--budgets", "params=0.6,0.7")])
def test_devices_that_are_not_there(tmp_path, command, device, message):
    _, stderr = run(command[0], "digits", *command[1:], "--device", device, "--out", tmp_path / "run", code=2)
    assert message in stderr


def test_the_model_is_moved(tmp_path):
    """To a device that every machine has: one without data."""
    made = "rankopt.Task(torch.nn.Linear(8, 8), torch.zeros(1, 8), calibration=[])"
    (tmp_path / "mine.py").write_text(f"import rankopt, torch\ndef task(): return {made}")
    assert load_task(f"{tmp_path / 'mine.py'}:task", "meta").model.weight.is_meta


def test_a_gpu_that_is_not_used_is_pointed_out(tmp_path, quick_space, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    search = ("search", "digits", "--budget", "params=0.6", "--space", quick_space, "--families", "svd_out", "--quiet")
    hint = "the model is on the CPU, and there is a GPU: --device cuda uses it"
    assert hint in run(*search, "--out", tmp_path / "run")[1]
    assert hint not in run(*search, "--device", "cpu", "--out", tmp_path / "other")[1]


def test_version_and_short_help():
    assert run("--version")[0] == f"rankopt {rankopt.__version__}\n"
    assert run("search", "-h")[0] == run("search", "--help")[0]
