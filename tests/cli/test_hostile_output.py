"""What comes from a stranger's folder is printed as text: on the screen, in search.log, in CSV files."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from rankopt.candidates.latency_table import Conditions
from rankopt.cli.main import _Formatter
from rankopt.cli.runs import _measure_again
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.records import Cost, Plan, Trial
from rankopt.model.inputs import expanded
from rankopt.report.tables import write_csv
from rankopt.search.progress import LiveRunner, ProgressBar, _StandardError
from rankopt.search.storage.local import create_study
from tests.helpers.command import run

RESULT = Path(__file__).parents[2] / "studies/results/digits_hyperparameters/search-9/result.json"
EVIL = "x\x1b]0;owned\x07\x1b[2J\n2026-01-01 00:00:00 trial 7: forged"


def clean(text):
    return all(c.isprintable() or c == "\n" for c in text) and "\n2026-01-01" not in text


def test_a_result_with_control_characters(tmp_path):
    info = json.loads(RESULT.read_text())
    info["task"] = info["strategy"] = info["layers"][0]["name"] = info["layers"][0]["reason"] = EVIL
    info["warnings"] = [EVIL]
    (tmp_path / "result.json").write_text(json.dumps(info))
    create_study(tmp_path / "study.db", "rankopt", {})
    out, err = run("report", tmp_path)
    assert "owned" in out and clean(out) and clean(err)


def test_an_error_with_control_characters(tmp_path):
    out, err = run("report", tmp_path / EVIL.replace("/", ""), code=2)
    assert "owned" in err and "\x1b" not in out + err


def test_the_log_and_the_progress_of_a_search(tmp_path):
    file = io.StringIO()
    screen = _StandardError(file=file)
    runner = LiveRunner(lambda study, evaluate: [], tmp_path, screen)
    runner.on_trial(Trial(0, (0,), "failed", Cost(1, 1, 1), error=EVIL))
    bar = ProgressBar(screen)
    bar.say(EVIL)
    list(bar([1], EVIL, 1))
    log = (tmp_path / "search.log").read_text()
    assert log.count("\n") == 1 and clean(log) and clean(file.getvalue()) and file.getvalue().count("owned") == 3
    assert isinstance(screen, Console)


def test_a_warning_of_a_library():
    assert clean(_Formatter("%(message)s").format(logging.makeLogRecord({"msg": EVIL.replace("\n", " ")})))


def test_csv_cells_are_no_formulas(tmp_path):
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "  =1", "\t=1", "plain", "a=b", EVIL]
    write_csv(tmp_path / "a.csv", [["name", "value"], *([text, -1.5] for text in texts)])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0][:1] == "'" for row in rows[1:]] == [True] * 6 + [False] * 3
    assert all(row[1] == "-1.5" for row in rows[1:]) and all(clean(row[0]) for row in rows)
    assert rows[7][0] == "plain" and rows[8][0] == "a=b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu,batch=99999999999", "at most 65,536"),
        ("cpu,threads=100000", "at most 65,536 and 1,024"),
        ("meta", "no device 'meta'"),
        ("cuda:9,table=x.json", "cuda:9"),
        ("cpu,threads=1024", "more threads than this machine has cores"),
        ("x" * 10, "no device"),
    ],
)
def test_a_plan_cannot_ask_for_any_latency(digits, text, said):
    plan = Plan((), Cost(1, 1, 1), Cost(1, 1, 1), latency_on=text)
    with pytest.raises(RankoptError, match=said):
        _measure_again("latency", digits.task, digits.task.model, plan)


def test_a_batch_that_does_not_fit_is_refused(digits, monkeypatch):
    monkeypatch.setattr("rankopt.model.inputs.available_memory", lambda: 10**6)
    with pytest.raises(TaskError, match="lower the batch"):
        expanded(digits.task.example_input, Conditions(batch=65_536).batch)
