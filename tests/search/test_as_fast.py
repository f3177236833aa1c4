"""A second search, within the same budget, for a model that is not slower than dense."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

import rankopt
from rankopt.core.run_folder import read_result
from rankopt.model.inputs import CALIBRATION_EXAMPLES
from rankopt.report.html import verdict, write_report
from rankopt.search import compress as job
from rankopt.search import job as jobs
from rankopt.search.latency_check import Measured
from tests.helpers.browser import Page
from tests.helpers.latency import SPACE, make_task, use_modelled_times


@pytest.fixture(scope="module", autouse=True)
def _modelled_times(_cache):
    with pytest.MonkeyPatch.context() as patch:
        use_modelled_times(patch)
        yield


def compress(**options):
    return rankopt.compress(make_task(), budget={"params": 0.4}, space=SPACE, as_fast=True, progress=False, **options)


def test_the_second_model_is_within_the_budget_and_not_slower(tmp_path):
    result = compress(out=tmp_path / "run")
    fast, entry = result.as_fast, result.info["as_fast"]
    assert isinstance(fast, rankopt.Result)
    for found in (result, fast):
        assert found.plan.cost.params <= 0.4 * found.plan.dense.params
    assert fast.info["latency"]["met"] and fast.info["latency"]["conditions"].endswith("fused=yes")
    assert entry["ratio"] <= entry["interval"][1] <= 1.05
    assert entry["cost"]["params"] == fast.plan.cost.params
    assert re.search(
        r"budget met; one pass, fused is (as fast|[\d.]+\u00a0×\u00a0faster \(.*\)) here\.$", verdict(fast.info)
    )
    del fast.info["latency"]["latency"]  # as with a table of another machine
    assert "; one forward pass is " in verdict(fast.info)
    assert entry["reconstructed"] == sum(c.form == "reconstructed" for c in fast.plan.choices)
    assert read_result(tmp_path / "run")["as_fast"] == entry
    again = rankopt.load(lambda: make_task().model, tmp_path / "run" / "as-fast")
    assert rankopt.count(again, make_task().example_input).params == fast.plan.cost.params
    for text in (Page(write_report(tmp_path / "run").read_text()).text, " ".join(result.summary().split())):
        assert "maller and as fast: a second plan (as-fast/ in the run folder) has" in text


def test_where_there_is_none_the_report_says_so(tmp_path, monkeypatch):
    real = job.check

    def slow(prepared, limit, problem, proposal):
        value = 2 * limit.target
        return dataclasses.replace(
            real(prepared, limit, problem, proposal), measured=Measured(1, value, value, value, 40), layers={}
        )

    monkeypatch.setattr(job, "check", slow)
    result = compress(out=tmp_path / "run")
    assert result.as_fast is None and "was not kept" in result.info["as_fast"]["refused"]
    assert result.plan.cost.params <= 0.4 * result.plan.dense.params
    for text in (Page(write_report(tmp_path / "run").read_text()).text, " ".join(result.summary().split())):
        assert "o model of this search space is within the budget and not slower than the dense one" in text


@pytest.mark.parametrize("error", [rankopt.StudyError("no evaluation finished"), KeyboardInterrupt()])
def test_the_first_result_stays_whatever_becomes_of_the_second(error, tmp_path, monkeypatch):
    real, calls = jobs.run_search, itertools.count()

    def second_fails(*given):
        if next(calls):
            raise error
        return real(*given)

    monkeypatch.setattr(jobs, "run_search", second_fails)
    result = compress(out=tmp_path / "run")
    assert result.as_fast is None and result.plan.cost.params <= 0.4 * result.plan.dense.params
    said = str(error) or "it was stopped"
    assert f"did not end: {said}" in " ".join(result.summary().split())
    assert read_result(tmp_path / "run")["as_fast"]["failed"] == said


def test_batches_of_an_endless_generator_are_read_once_and_no_more_than_count():
    task, read = make_task(), itertools.count()
    batch = next(iter(task.calibration))
    endless = (batch for _ in read)
    result = rankopt.compress(task.model, endless, {"params": 0.4}, space=SPACE, as_fast=True, progress=False)
    assert result.as_fast is not None and next(read) <= 2 + CALIBRATION_EXAMPLES // len(batch)


@pytest.mark.parametrize("other", [{"budget": {"latency": 0.5}}, {"budget": None, "max_drop": 0.1}])
def test_what_does_not_go_with_it_is_refused(other):
    options = {"budget": {"params": 0.4}, "space": SPACE, "as_fast": True} | other
    with pytest.raises(rankopt.RankoptError, match="as_fast"):
        rankopt.compress(make_task(), **options)
