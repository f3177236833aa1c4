"""Fidelities: slices add up to the whole, a promoted trial repeats nothing, and only full results can win."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankopt.core.errors import RankoptError, StudyError, TaskError
from rankopt.model.objective import Divergence
from rankopt.report.html import write_report
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Evaluator
from rankopt.search.fidelity import FULL_FIDELITY, FidelitySchedule
from rankopt.search.loop import ETA, Study, best, search
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import Store, read_trials
from rankopt.strategies.registry import make_strategy
from tests.helpers.command import run as command

BUDGET = {"params": 0.3}


def explore(digits, fidelities, trials=12, strategy="random", store=None, runner=search, around=lambda e: e):
    problem = digits.problem(BUDGET)
    study = Study(problem, make_strategy(strategy, problem, seed=0), trials, store)
    study.resume()
    runner(study, around(Evaluator.of(digits, problem, fidelities)))
    return study.trials


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    cuts=st.sets(st.floats(0.05, 0.95), max_size=3),
    classes=st.sampled_from([1, 4]),
)
def test_slices_add_up_to_the_whole(sizes, cuts, classes):
    torch.manual_seed(0)
    dense, other = nn.Linear(3, classes), nn.Linear(3, classes)
    whole = Divergence(dense, [torch.randn(n, 3) for n in sizes])
    try:
        parts = whole.slices([*sorted(cuts), 1.0])
    except TaskError as error:
        assert "holds no example more" in str(error)
        return
    assert sum(len(x) for part in parts for x in part.batches) == sum(sizes)
    sums = [part.sums(other) for part in parts]
    assert sum(a for a, _ in sums) / sum(b for _, b in sums) == pytest.approx(whole(other), rel=1e-6)
    for share, part in zip(itertools.accumulate(b for _, b in sums), itertools.accumulate(cuts or [1]), strict=False):
        assert share <= whole.sums(other)[1] * 1.000001 and part > 0


def test_promotion_goes_by_the_best_third(digits):
    problem = digits.problem(BUDGET)
    study = Study(problem, make_strategy("random", problem, 0), 99)
    values = [5.0, 4.0, 6.0, 3.0, 4.5, 3.5, 9.0]
    went = [study.promote((i,), (value,)) for i, value in enumerate(values)]
    for i, value in enumerate(values):
        rank = sorted(values[: i + 1]).index(value)
        assert went[i] == (i < ETA or rank < -(-(i + 1) // ETA))
    assert went == [True, True, True, True, False, True, False]


@pytest.fixture(scope="module")
def whole(digits):
    return explore(digits, FULL_FIDELITY)


def test_trials_that_go_on_end_with_the_objective_of_a_search_without_fidelities(digits, whole):
    trials = explore(digits, FidelitySchedule.parse("0.1,0.4"))
    assert [t.proposal for t in trials] == [t.proposal for t in whole]
    assert {t.state for t in trials} == {"finished", "stopped"}
    for t, full in zip(trials, whole, strict=True):
        assert len(t.rungs) in (1, 2) and all(x > 0 for x in t.rungs)
        assert (t.objective is None) == (t.state == "stopped")
        if t.objective is not None:
            assert t.objective == pytest.approx(full.objective, rel=1e-6) and t.score == full.score
    assert best(trials).state == "finished"


def test_a_stopped_trial_cannot_win_even_if_its_rung_is_the_least_number(digits):
    class Odd:
        """The slice says the opposite of the whole."""

        def __init__(self, evaluate):
            self.evaluate, self.asked = evaluate, 0

        def stages(self, proposal):
            self.asked += 1
            yield 1.0 if self.asked == 1 else 1e-9 + self.asked
            yield self.evaluate(proposal)

    trials = explore(digits, FULL_FIDELITY, around=Odd)
    assert [t.state for t in trials] == ["finished"] * ETA + ["stopped"] * (len(trials) - ETA)
    assert best(trials).objective == min(t.objective for t in trials if t.objective is not None)


def test_no_example_is_measured_twice(digits):
    seen = []
    model = digits.task.model
    problem = digits.problem(BUDGET)
    evaluator = Evaluator.of(digits, problem, FidelitySchedule.parse("0.1,0.4"))
    evaluator.score = None
    hook = model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    try:
        found = [x if isinstance(x, float) else x[0] for x in evaluator.stages((0,) * len(problem.layers))]
    finally:
        hook.remove()
    assert len(found) == 3 and sum(seen) == sum(len(b) for b in digits.statistics.batches)


def test_training_is_the_last_fidelity_and_the_result_has_it(digits, tmp_path):
    fidelities = FidelitySchedule.parse("0.25,train=20")
    assert fidelities.names == ["0.25 of the examples", "all examples", "20 steps of training"]
    problem = digits.problem(BUDGET)
    result = run_search(digits, problem, SearchSettings("random", 6, fidelities=fidelities), tmp_path)
    objective = result.info["objective"]["best"]
    assert digits.objective(result.model) == pytest.approx(objective, rel=1e-3)
    chosen = next(t for t in read_trials(tmp_path) if t["objective"] == objective)
    assert objective < chosen["rungs"][1], "20 steps of training help at 30 % of the parameters"
    with pytest.raises(RankoptError, match="refining would undo"):
        run_search(digits, problem, SearchSettings("random", 6, fidelities=fidelities, refine=True))


@pytest.mark.parametrize("strategy", ["random", "thompson"])
def test_a_resumed_search_stops_the_same_trials(digits, tmp_path, strategy):
    fidelities = FidelitySchedule.parse("0.1")
    calm = explore(digits, fidelities, strategy=strategy)
    for trials in (5, 12):
        store = Store(tmp_path, digits.problem(BUDGET), {"seed": 0}, resume=trials > 5)
        resumed = explore(digits, fidelities, trials, strategy, store)
        del store
    assert [(t.proposal, t.state, t.rungs) for t in resumed] == [(t.proposal, t.state, t.rungs) for t in calm]


@pytest.mark.parametrize("text", ["", "1", "0.5,0.2", "0", "2", "nan", "x", "train=x", "train=-1", "0.5,train=5,1"])
def test_fidelities_without_sense_are_refused(text):
    with pytest.raises(RankoptError, match="fidelities"):
        FidelitySchedule.parse(text)


def test_objectives_that_cannot_be_sliced_are_refused(digits):
    import dataclasses

    own = dataclasses.replace(digits, objective=lambda model: 1.0)
    with pytest.raises(TaskError, match=r"slices\(shares\)"):
        Evaluator.of(own, digits.problem(BUDGET), FidelitySchedule.parse("0.5"))
    Evaluator.of(own, digits.problem(BUDGET), FidelitySchedule.parse("train=5"))
    with pytest.raises(TaskError, match="holds no example more"):
        Evaluator.of(digits, digits.problem(BUDGET), FidelitySchedule.parse("0.5,0.5001"))


def test_the_command_reports_what_was_stopped_and_how_the_slice_ranked(digits, tmp_path, quick_space):
    out = tmp_path / "run"
    common = (*f"search digits --budget params=0.3 --strategy random --space {quick_space}".split(), "--out", out)
    stdout, stderr = command(*common, "--trials", 14, "--fidelities", "0.1")
    info = json.loads((out / "result.json").read_text())
    (row,) = info["fidelities"]
    assert row["measured"] == 14 and len(row["stopped"]) == info["trials"]["stopped"] > 3
    assert 0 <= row["agreement"] <= 1
    assert "stopped at a low fidelity" in stdout and "of the pairs that went on as the objective did" in " ".join(
        stdout.split()
    )
    assert "0.1 of the examples" in write_report(out).read_text()
    assert "stopped at" in stderr and "stopped at" in (out / "search.log").read_text()
    _, stderr = command(*common, "--trials", 16, "--resume", code=2)
    assert "its fidelities is '0.1,1'" in stderr


def test_everything_failing_at_the_low_fidelity_ends_the_search(digits):
    class Fails:
        def __init__(self, evaluate):
            pass

        def stages(self, proposal):
            yield float("nan")

    with pytest.raises(StudyError, match="the first said: the objective is nan"):
        explore(digits, FULL_FIDELITY, around=Fails)
