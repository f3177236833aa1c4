"""Shared by all tests: one thread, a cache of its own, and the digits task prepared once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.experiments.tasks import load_task
from tests.helpers.spaces import QUICK

# The same examples every time; HYPOTHESIS_PROFILE=drawn draws others (make slow does).
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("drawn", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Hundreds of tests compress something; what its forward takes matters to few of them.
        patch.setattr("rankopt.model.speed.SECONDS", 0.02)
        patch.setattr("rankopt.model.speed.LONGEST_PASS", 0.005)
        yield


@pytest.fixture(autouse=True)
def _no_signal_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is tested in this process must not take an earlier test's signal for its own."""
    monkeypatch.setattr("rankopt.core.signals._received", [])


@pytest.fixture(scope="session", autouse=True)
def _signals() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and nohup ignores SIGHUP; child processes inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def digits(_cache: None) -> Prepared:
    """The digits task with two families, few ranks and short fits."""
    return prepare(load_task("digits"), QUICK, workers=1)


@pytest.fixture
def quick_space(tmp_path: Path) -> Path:
    """The same search space as a file, for the command line."""
    path = tmp_path / "quick.toml"
    path.write_text('families = ["svd_out", "cp_merged"]\npoints = 6\nsteps = 20\n')
    return path
