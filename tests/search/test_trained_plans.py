"""What the last fidelity trained is what is delivered: nothing is trained twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cloudpickle
import pytest
import torch

import rankopt
from rankopt.search import evaluator, result
from rankopt.search.compress import TRIALS, run_search
from rankopt.search.evaluator import Evaluator
from rankopt.search.fidelity import FidelitySchedule
from rankopt.search.loop import search
from rankopt.search.settings import SearchSettings
from rankopt.search.trained_plans import KEPT, TrainedPlans
from rankopt.training.loop import train_briefly

BUDGET = {"params": 0.3}
FIDELITIES = FidelitySchedule.parse("0.25,train=5")
SETTINGS = SearchSettings("random", 6, fidelities=FIDELITIES)


@pytest.fixture
def trained(monkeypatch):
    """The models that were trained within a search, and how many were trained once more for the result."""
    models, again = [], []

    def in_trial(*args, **options):
        models.append(train_briefly(*args, **options))
        return models[-1]

    def for_result(*args, **options):
        again.append(train_briefly(*args, **options))
        return again[-1]

    monkeypatch.setattr(evaluator, "train_briefly", in_trial)
    monkeypatch.setattr(result, "train_briefly", for_result)
    return models, again


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_delivered_weights_are_those_that_were_trained(digits, tmp_path, trained, on_disk):
    models, again = trained
    out = tmp_path if on_disk else None
    found = run_search(digits, digits.problem(BUDGET), SETTINGS, out)
    assert not again and len(models) > 2
    assert sum(_fits(model, found.model) and same(model, found.model) for model in models) == 1
    if out is not None:
        assert not (out / TRIALS).exists()
        assert same(rankopt.load(digits.task.model, out), found.model)


def _fits(a, b):
    return [x.shape for x in a.state_dict().values()] == [x.shape for x in b.state_dict().values()]


def test_a_search_that_stopped_goes_on_with_what_it_trained(digits, tmp_path, trained):
    models, again = trained
    best = run_search(digits, digits.problem(BUDGET), SETTINGS)
    first = len(models)

    def stops(study, trial):
        if len(study.trials) == 5:
            raise KeyboardInterrupt

    killed = dataclasses.replace(SETTINGS, callbacks=(stops,))
    with pytest.raises(KeyboardInterrupt):
        run_search(digits, digits.problem(BUDGET), killed, tmp_path)
    assert 0 < len(list((tmp_path / TRIALS).iterdir())) <= KEPT
    resumed = run_search(digits, digits.problem(BUDGET), dataclasses.replace(SETTINGS, resume=True), tmp_path)
    assert not again and len(models) == 2 * first
    assert same(resumed.model, best.model)


def test_a_worker_keeps_weights_from_another_working_directory(digits, tmp_path, monkeypatch):
    """As Ray sends an evaluator: without its problem, as bytes. Relative run folders are those of the first process."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sent = []

    def runner(study, evaluate):
        monkeypatch.chdir(tmp_path / "there")
        sent.append(cloudpickle.dumps(dataclasses.replace(evaluate, problem=None)))
        there = cloudpickle.loads(sent[0])
        there.problem = study.problem
        search(study, there)
        monkeypatch.chdir(tmp_path / "here")
        assert list((tmp_path / "here" / "run" / TRIALS).glob("*.safetensors"))
        return study.trials

    Path("run").mkdir()
    found = run_search(digits, digits.problem(BUDGET), SETTINGS, Path("run"), runner)
    assert sent and not list((tmp_path / "there").iterdir())
    assert digits.objective(found.model) == found.info["objective"]["best"]


@pytest.mark.parametrize("damage", ["missing", "empty", "another"])
def test_weights_that_are_lost_are_trained_again(digits, tmp_path, damage):
    problem, proposal = digits.problem(BUDGET), None
    plans = TrainedPlans(tmp_path)
    evaluate = Evaluator.of(digits, problem, FIDELITIES, plans)
    proposal = tuple(0 for _ in problem.layers)
    objective, _ = evaluate(proposal)
    (path,) = tmp_path.iterdir()
    untrained = digits.apply(problem, proposal)
    restored = plans.restored(problem, proposal, untrained)
    assert digits.objective(restored) == objective and digits.objective(untrained) != objective
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        plans.keep(problem, proposal, torch.nn.Linear(2, 2), objective)
    assert plans.restored(problem, proposal, untrained) is None
    assert digits.objective(untrained) != objective  # the model that was given is not changed


def test_only_the_best_are_kept_and_only_those_that_can_be_chosen(digits, tmp_path):
    problem, plans = digits.problem(BUDGET), TrainedPlans(tmp_path)
    proposals = [tuple(int(i == k) for i in range(len(problem.layers))) for k in range(5)]
    model = torch.nn.Linear(2, 2)
    for objective, proposal in zip([5.0, 1.0, 4.0, float("nan"), 2.0], proposals, strict=True):
        plans.keep(problem, proposal, model, objective)
    kept = [p for p in proposals if plans.restored(problem, p, model) is not None]
    assert kept == [proposals[1], proposals[2], proposals[4]] and len(kept) == KEPT
    plans.only(problem, proposals[:2])
    assert [p for p in proposals if plans.restored(problem, p, model) is not None] == [proposals[1]]
    TrainedPlans(tmp_path / "not there").keep(problem, proposals[0], model, 1.0)
    assert not (tmp_path / "not there").exists()
