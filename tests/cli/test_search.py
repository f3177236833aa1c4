"""Options of `rankopt search` that Python has, too."""

from __future__ import annotations

import json

import rankopt
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


def test_version_and_short_help():
    assert run("--version")[0] == f"rankopt {rankopt.__version__}\n"
    assert run("search", "-h")[0] == run("search", "--help")[0]
