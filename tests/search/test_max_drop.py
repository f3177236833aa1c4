"""The smallest model within an allowed drop of the score: the answer holds, and one step smaller does not."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankopt.core.errors import RankoptError, TaskError
from rankopt.model.objective import call
from rankopt.search.max_drop import STEP, deepest, grid, smallest_model
from rankopt.strategies.allocation import allocate
from tests.helpers.command import run


@given(st.integers(1, 300), st.data())
def test_a_monotone_answer_is_found_in_few_steps(count, data):
    truth, asked = data.draw(st.integers(0, count)), []
    assert deepest(lambda k: asked.append(k) or k <= truth, count) == truth
    assert len(set(asked)) <= count.bit_length() + 1 + 4
    assert all(1 <= k <= count for k in asked)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_noise_never_leaves_a_smaller_one_that_was_seen_to_hold(noise):
    seen = {}

    def holds(k):
        seen[k] = noise[k - 1]
        return seen[k]

    found = deepest(holds, len(noise))
    assert found == max((k for k, v in seen.items() if v), default=0)
    assert found == len(noise) or seen[found + 1] is False


def test_the_grid_goes_down_to_the_least_achievable(digits):
    targets = grid(digits, "macs")
    assert targets == sorted(set(targets), reverse=True)
    assert all(b >= a * (1 - STEP) - 1 for a, b in pairwise(targets))
    digits.problem({"macs": targets[-1]})
    with pytest.raises(RankoptError, match="least achievable"):
        digits.problem({"macs": targets[-1] - 1})


@pytest.mark.parametrize("max_drop", [0.01, 0.1])
def test_the_answer_holds_and_the_next_smaller_does_not(digits, max_drop):
    """Both models built and scored again, here."""

    def drop(target):
        problem = digits.problem({"params": target})
        model = digits.apply(problem, allocate(problem).proposal)
        return digits.task.score(digits.task.model) - call("the score", digits.task.score, model)

    q = smallest_model(digits, max_drop).report
    smaller = [row for row in q["tried"] if row["target"] < q["target"]]
    assert drop(q["target"]) == pytest.approx(q["drop"]) and q["drop"] <= max_drop
    assert smaller and all(row["drop"] > max_drop for row in smaller)
    assert drop(smaller[-1]["target"]) == pytest.approx(smaller[-1]["drop"])
    assert max(row["params"] for row in smaller) < next(r for r in q["tried"] if r["target"] == q["target"])["params"]
    assert q["evaluations"] == len(q["tried"]) <= 14
    assert q["interval"][0] < q["drop"] < q["interval"][1]


def test_a_larger_drop_gives_a_smaller_model(digits):
    sizes = [smallest_model(digits, drop, "macs").budget["macs"] for drop in (0.0, 0.05, 0.5)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_questions_that_make_no_sense(digits):
    for drop in (-0.01, 1.0, float("nan")):
        with pytest.raises(RankoptError, match="give a fraction from 0"):
            smallest_model(digits, drop)
    with pytest.raises(RankoptError, match="choose from params, macs, bytes"):
        smallest_model(digits, 0.01, "speed")
    without = dataclasses.replace(digits, task=dataclasses.replace(digits.task, score=None))
    with pytest.raises(TaskError, match="needs a score"):
        smallest_model(without, 0.01)
    dense = digits.task.model
    picky = dataclasses.replace(digits.task, score=lambda model: float(model is dense))
    with pytest.raises(RankoptError, match=r"no model smaller than dense .* loses 100.00%"):
        smallest_model(dataclasses.replace(digits, task=picky), 0.5)


def test_the_command_writes_an_ordinary_run(tmp_path, quick_space):
    out = tmp_path / "run"
    common = ("search", "digits", "--space", quick_space, "--out", out)
    stdout, _ = run(*common, "--max-drop", "0.02", "--minimize", "macs")
    info = json.loads((out / "result.json").read_text())
    q = info["question"]
    assert info["options"] == {"contenders": "1"}, "the plan that was evaluated, not a near-tie of it"
    assert (q["minimize"], q["max_drop"]) == ("macs", 0.02) and q["evaluations"] == len(q["tried"])
    assert info["budget"]["macs"]["target"] == q["target"] >= info["cost"]["compressed"]["macs"]
    before, after = (info["score"][k]["validation"] for k in ("dense", "compressed"))
    assert before - after == pytest.approx(q["drop"]) and q["drop"] <= 0.02
    assert f"answer  macs={q['target']:,}" in stdout and f"{q['evaluations']} plans were evaluated" in stdout
    assert "--max-drop" not in (out / "report.html").read_text() and "answer  macs" in (out / "report.html").read_text()
    assert "as planned" in run("apply", out, "--task", "digits", "--check")[0]
    assert "answer  macs" in run("report", out)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-drop", "0.01", "--budget", "params=0.5"], "and not both"),
        ([], "give --budget (how small) or --max-drop (how good)"),
        (["--budget", "params=0.5", "--minimize", "macs"], "--minimize goes with --max-drop"),
        (["--max-drop", "-0.5"], "give a fraction from 0"),
        (["--max-drop", "0.01", "--minimize", "speed"], "choose from params"),
        (["--max-drop", "0.01", "--strategy", "random"], "takes no --strategy"),
        (["--max-drop", "0.01", "--option", "contenders=8"], "takes no --strategy"),
        (["--max-drop", "0.01", "--resume"], "takes no --strategy"),
    ],
)
def test_clear_errors(tmp_path, quick_space, arguments, message):
    _, stderr = run("search", "digits", "--space", quick_space, "--out", tmp_path / "run", *arguments, code=2)
    (line,) = [x for x in stderr.splitlines() if x.startswith("error:")]
    assert message in line and not (tmp_path / "run").exists()
