"""A package with a strategy and a decomposition of its own is found by its entry points and passes the same suites."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest

from tests.helpers import ROOT, TESTS


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_separate_package_is_found_and_passes_the_suites(tmp_path):
    source, target, results = tmp_path / "source", tmp_path / "installed", tmp_path / "results.xml"
    shutil.copytree(TESTS / "toy_package", source)
    run("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "--target", target, source)
    path = os.pathsep.join([str(target), str(ROOT), os.environ.get("PYTHONPATH", "")])

    listed = "from rankopt import DECOMPOSITIONS as d, STRATEGIES as s; "
    found = run("-c", listed + "print(list(s)[-1], list(d)[-1], d['toy_svd_spatial'].__module__)", PYTHONPATH=path)
    assert found.split() == ["toy_shaken", "toy_svd_spatial", "toy_rankopt"]

    suites = [
        TESTS / path
        for path in ("strategies/test_contract.py", "decompositions/test_fits.py", "decompositions/test_contract.py")
    ]
    options = ["-k", "toy_", "-m", "not timing and not gpu", "-p", "no:cacheprovider", f"--junitxml={results}"]
    run("-m", "pytest", *suites, *options, PYTHONPATH=path)
    cases = list(ElementTree.parse(results).iter("testcase"))
    assert not [case.get("name") for case in cases if len(case)], "some failed or were skipped"
    ran = Counter(case.get("classname") for case in cases)
    assert (
        ran["tests.strategies.test_contract"] >= 6
        and ran["tests.decompositions.test_fits"] >= 10
        and ran["tests.decompositions.test_contract"] >= 10
    )
    assert all("toy_" in case.get("name") for case in cases)
