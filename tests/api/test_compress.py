"""rankopt.compress as people call it: what it shows, what survives, and what the command line can."""

from __future__ import annotations

import io
import logging
import time

import pytest
import torch
from rich.console import Console
from torch import nn

import rankopt
from rankopt.search import progress
from tests.helpers.spaces import QUICK

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
RANDOM = {"strategy": "random", "trials": 4, "space": QUICK}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


def score(model):
    return (model(X).argmax(1) == X[:, :8].argmax(1)).float().mean().item()


def compress(model, **more):
    return rankopt.compress(model, [X], **{"budget": {"params": 0.5}, **RANDOM, **more})


def test_bars_are_shown_on_a_terminal(model, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKOPT_CACHE", str(tmp_path))  # what another test left in the cache is not measured again
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=100))
    compress(model)
    assert "measuring sensitivities" in out.getvalue() and "of 4 trials" in out.getvalue()


def test_elsewhere_lines_go_to_the_logger(model, capsys, caplog):
    caplog.set_level(logging.INFO, "rankopt")
    compress(model)
    assert "trial 3: " in caplog.text and {r.name for r in caplog.records if "trial" in r.message} == {"rankopt"}
    assert capsys.readouterr() == ("", "")


def test_progress_can_be_silenced_or_be_a_function_of_the_user(model, caplog):
    caplog.set_level(logging.INFO, "rankopt")
    compress(model, progress=False)
    assert not caplog.records
    seen = []

    def shown(items, what, total):
        for number, item in enumerate(items):
            yield item
            seen.append((what, number + 1, total))

    compress(model, progress=shown)
    assert ("evaluating plans", 4, 4) in seen
    with pytest.raises(rankopt.RankoptError, match="progress is 'yes'"):
        compress(model, progress="yes")


def test_trials_survive_in_a_run_folder(model, tmp_path):
    first = compress(model, out=tmp_path / "run", trials=2)
    with pytest.raises(rankopt.StudyError, match="pass resume=True to go on with it, or choose another out"):
        compress(model, out=tmp_path / "run", trials=4)
    again = compress(model, out=tmp_path / "run", trials=4, resume=True)
    assert [t.proposal for t in again.trials[:2]] == [t.proposal for t in first.trials] and len(again.trials) == 4
    read = rankopt.load_run(model, tmp_path / "run")
    assert [(t.objective, t.cost) for t in read.trials] == [(t.objective, t.cost) for t in again.trials]
    assert read.plan == again.plan and torch.equal(read.model(X), again.model(X))
    with pytest.raises(rankopt.RankoptError, match="resume=True and storage go with out"):
        compress(model, resume=True)


def test_callbacks_are_optunas_and_may_stop_the_search(model):
    seen = []

    def callback(study, trial):
        seen.append((trial.number, study.best_trial.objective))
        if trial.number == 1:
            study.stop()

    result = compress(model, callbacks=[callback])
    assert [number for number, _ in seen] == [0, 1] and len(result.trials) == 2
    assert result.info["trials"]["interrupted"] and seen[-1][1] == result.info["objective"]["best"]


def test_no_trial_starts_after_the_timeout(model):
    def slow(small):
        time.sleep(0.3)
        return 0.5

    result = compress(model, score=slow, trials=1000, timeout=0.5)
    assert 1 <= len(result.trials) <= 2
    with pytest.raises(rankopt.RankoptError, match="timeout is 0: give seconds above 0"):
        compress(model, timeout=0)


def test_the_smallest_model_that_keeps_the_score(model):
    result = rankopt.compress(model, [X], score=score, max_drop=0.1, minimize="macs", space=QUICK)
    assert result.info["question"]["minimize"] == "macs" and result.info["question"]["drop"] <= 0.1
    with pytest.raises(rankopt.RankoptError, match=r"give budget \(how small\) or max_drop \(how good\), and not both"):
        rankopt.compress(model, [X], space=QUICK)


def test_layers_have_families_and_ranks_of_their_own(model):
    own = {"families": {"0": ["svd_out"]}, "ranks": {"2": [4, (6,)], "0": 5}, "keep_dense": "4"}
    result = compress(model, **own, strategy="knapsack")
    assert {(c.method, c.rank) for c in result.frontier("0")} == {("svd_out", (5,)), ("dense", ())}
    assert {c.rank for c in result.frontier("2")} == {(4,), (6,), ()}
    assert next(c for c in result.plan.choices if c.name == "4").method == "dense"
    with pytest.raises(rankopt.RankoptError, match="no layer is called 'head'; the layers are '0', '2', '4'"):
        compress(model, ranks={"head": [4]})
    with pytest.raises(rankopt.RankoptError, match="'8' is no rank"):
        compress(model, ranks={"0": ["8"]})
    warned = compress(model, keep_dense=["head"]).info["warnings"]
    assert any("keep_dense: no layer is called 'head'" in text for text in warned)


def test_a_task_is_a_model_too(model):
    task = rankopt.Task(model, X[:1], [X], score=score)
    assert rankopt.compress(task, budget={"params": 0.5}, **RANDOM).info["score"]["dense"]["validation"] is not None
    with pytest.raises(rankopt.TaskError, match="score is given beside a Task"):
        rankopt.compress(task, score=score, budget={"params": 0.5})


def test_one_preparation_answers_many_budgets(model):
    prepared = rankopt.prepare(model, [X], score, space=QUICK)
    half, small = prepared.compress(params=0.5), prepared.compress({"macs": "40%"}, strategy="uniform")
    assert half.info["budget"]["params"]["achieved"] <= 0.5 * prepared.dense.params
    assert small.info["budget"]["macs"]["achieved"] <= 0.4 * prepared.dense.macs and small.info["strategy"] == "uniform"
    assert prepared.smallest(max_drop=0.1).info["question"]["drop"] <= 0.1
    assert prepared.frontier("2")[-1].method == "dense" and set(prepared.sensitivities) == {"0", "2", "4"}
    found = prepared.sweep("params=0.8,0.5", evaluate="none")
    assert len(found.points) == 2 and "the exact allocation for each budget" in str(found)
    with pytest.raises(rankopt.BudgetError, match="unknown budget metric 'stratgy'"):
        prepared.compress(params=0.5, stratgy="uniform")
    with pytest.raises(rankopt.RankoptError, match=r"effort is an argument of rankopt\.prepare"):
        prepared.compress(params=0.5, effort="quick")
    with pytest.raises(rankopt.BudgetError, match="latency was not measured here"):
        prepared.compress(latency=0.5)
