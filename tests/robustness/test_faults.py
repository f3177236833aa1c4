"""Faults of the machine: a full disk, a folder that may not be written."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from rankopt.search.storage.local import read_trials
from tests.helpers.command import run

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)  # any file beyond this: EFBIG, as a full disk
from rankopt.cli.main import main
main()
"""


def limited(size, *arguments):
    """The command in a process whose files may not grow beyond a size in bytes."""
    command = [sys.executable, "-c", LIMITED, str(size), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [120_000, 0, 20_000])
def test_a_full_disk_is_one_clear_line_and_resumable(size, tmp_path, quick_space):
    """Full from the start, when the cache or the study is written, and when the weights are."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    common = ("search", "digits", "--budget", "params=0.9", "--strategy", "random", "--trials", "3", "--no-html")
    common = (*common, "--space", quick_space, "--out", out, "--cache", cache)
    outcome = limited(size, *common)
    assert outcome.returncode == 2, outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in outcome.stderr, outcome.stderr
    kept = read_trials(out) if (out / "study.db").is_file() and size > 20_000 else []
    resumed = limited(10**9, *common, *(["--resume"] if (out / "study.db").is_file() else []))
    if resumed.returncode:  # a study cut off while it was made says so: another folder
        assert "study.db" in resumed.stderr
        resumed = limited(10**9, *common[:-4], "--out", tmp_path / "run2", "--cache", cache)
    assert resumed.returncode == 0, resumed.stderr
    assert len(kept) in (0, 1, 2, 3)
    if kept:
        assert [t["objective"] for t in read_trials(out)][: len(kept)] == [t["objective"] for t in kept]


def test_a_folder_that_cannot_be_made(tmp_path, quick_space):
    (tmp_path / "file").write_text("in the way")
    common = ("search", "digits", "--budget", "params=0.5", "--space", quick_space)
    for place in (("--out", tmp_path / "file" / "run"), ("--out", tmp_path / "file")):
        assert run(*common, *place, code=2)[1].startswith("error:")
    assert "RANKOPT_CACHE" in run(*common, "--out", tmp_path / "run", "--cache", tmp_path / "file" / "cache", code=2)[1]
    assert os.environ["RANKOPT_CACHE"]


def obey_permissions():
    """In a child before it starts: root loses its right to write everywhere (CAP_DAC_OVERRIDE)."""
    if os.getuid() == 0:
        assert ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) == 0


@pytest.mark.slow
def test_a_folder_that_may_not_be_written(tmp_path, quick_space):
    """A finished run whose folder is read-only: going on is refused in one line, and nothing is changed."""
    run = tmp_path / "run"
    common = ["search", "digits", "--budget", "params=0.5", "--strategy", "random", "--space", quick_space, "--no-html"]
    common += ["--cache", tmp_path / "cache", "--out", run]
    assert limited(10**9, *common, "--trials", "2").returncode == 0
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    for path in [*run.iterdir(), run]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-m", "rankopt.cli", *map(str, common), "--trials", "4", "--resume"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=obey_permissions)
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr, outcome.stderr
    assert len([line for line in outcome.stderr.splitlines() if line.startswith("error:")]) == 1, outcome.stderr
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert len(read_trials(run)) == 2
