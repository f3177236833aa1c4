"""Latency budgets against the real clock: `pytest -m timing`, on a calm machine."""

from __future__ import annotations

import statistics

import pytest

import rankopt
from rankopt.candidates.latency_table import Conditions, interleaved, passes
from rankopt.candidates.prepare import prepare
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from tests.helpers.latency import SPACE, make_task

pytestmark = pytest.mark.timing


def test_the_budget_is_kept_by_the_clock(_cache):
    prepared = prepare(make_task(), SPACE, workers=1, budget={"latency": 0.9})
    result = run_search(prepared, prepared.problem({"latency": 0.7}), SearchSettings())
    assert result.info["latency"]["met"]
    both = passes([prepared.task.model, result.model], prepared.task.example_input, Conditions())
    dense, small = interleaved(both, Conditions(), 31)
    assert statistics.median(b / a for a, b in zip(dense, small, strict=True)) < 0.7 * 1.15, "with room for noise"


def test_compiled_models_keep_their_latency(_cache):
    task = make_task()
    result = rankopt.compress(
        task.model, task.calibration, {"latency": 0.8}, space=SPACE, latency_on="cpu,batch=1,runtime=compile"
    )
    assert result.info["latency"]["met"] and result.info["latency"]["interpolation"] is not None
