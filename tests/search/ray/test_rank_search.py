"""RankSearch: the searcher for people who have a Ray Tune trainable of their own. Ray itself is not started here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ray")

from ray import cloudpickle

from rankopt.candidates.prepare import prepare
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.ray import RankSearch
from rankopt.search.ray.rank_search import plan_of, proposal_of
from tests.helpers.spaces import QUICK

BUDGET = {"params": 0.3}


@pytest.fixture(scope="module")
def prepared(_cache):
    return prepare(load_task("digits"), QUICK)


def searcher(prepared, strategy="random", trials=6, **given):
    return RankSearch(prepared, BUDGET, strategy, trials, metric="loss", mode="min", **given)


def test_each_trial_is_a_readable_plan_within_the_budget(prepared):
    search = searcher(prepared)
    dense = prepared.dense.params
    seen = set()
    for number in range(6):
        config = search.suggest(f"t{number}")
        assert config["plan"].keys() == {x.name for x in prepared.free}
        model = search.builder(config["plan"])
        cost = count(model, prepared.task.example_input)
        proposal = proposal_of(search.problem, config["plan"])
        assert plan_of(search.problem, proposal) == config["plan"]
        assert cost == search.problem.cost(proposal) and cost.params <= 0.3 * dense
        seen.add(proposal)
        search.on_trial_complete(f"t{number}", {"loss": float(number)})
    assert len(seen) == 6 and search.suggest("t6") == "FINISHED"
    assert [t.objective for t in search.study.trials] == [0, 1, 2, 3, 4, 5]


def test_it_waits_for_what_runs_and_learns_from_failures(prepared):
    search = searcher(prepared, trials=2)
    assert search.suggest("a") and search.suggest("b")
    assert search.suggest("c") is None, "not now: a and b still run"
    search.on_trial_complete("a", error=True)
    search.on_trial_complete("b", {"loss": 0.5})
    search.on_trial_complete("unknown", {"loss": 0.0})
    assert search.suggest("c") == "FINISHED"
    assert [t.state for t in search.study.trials] == ["failed", "finished"]


@pytest.mark.parametrize("result", [{}, {"loss": float("nan")}, {"loss": float("inf")}])
def test_a_result_without_a_number_is_a_failed_trial(prepared, result):
    search = searcher(prepared)
    search.suggest("a")
    search.suggest("b")
    search.on_trial_complete("b", {"loss": 1.0})
    search.on_trial_complete("a", result)
    assert search.study.trials[-1].state == "failed"


def test_with_mode_max_larger_is_better(prepared):
    search = RankSearch(prepared, BUDGET, "random", 3, metric="accuracy", mode="max")
    for name, accuracy in (("a", 0.5), ("b", 0.9)):
        search.suggest(name)
        search.on_trial_complete(name, {"accuracy": accuracy})
    assert search.study.best_trial.objective == -0.9


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "optuna", "rl"])
def test_a_restored_search_proposes_what_the_first_would_have(prepared, tmp_path, strategy):
    """Saved after three trials with one more running, as Tune does; also pickled, as Tune does, too."""
    first = searcher(prepared, strategy)
    for name in "abc":
        first.suggest(name)
        first.on_trial_complete(name, {"loss": float(ord(name))})
    running = first.suggest("d")["plan"]
    first.save(str(tmp_path / "state.pkl"))
    copies = [cloudpickle.loads(cloudpickle.dumps(first)), searcher(prepared, strategy)]
    copies[1].restore(str(tmp_path / "state.pkl"))
    following = first.suggest("e")
    for copy in copies:
        assert [t.objective for t in copy.study.trials] == [97, 98, 99]
        proposed = copy.suggest("e")
        assert proposed == following and proposed["plan"] != running
        copy.on_trial_complete("d", {"loss": 1.0})
        assert copy.study.best_trial.proposal == proposal_of(copy.problem, running)


def test_a_builder_travels_with_its_factors(prepared):
    search = searcher(prepared)
    config, x = search.suggest("a"), prepared.task.example_input
    sent = cloudpickle.loads(cloudpickle.dumps(search.builder))
    sent.factors.cache.folder = sent.factors.cache.folder / "of another machine"
    with torch.no_grad():
        torch.testing.assert_close(sent(config["plan"])(x), search.builder(config["plan"])(x))
    with pytest.raises(RankoptError, match="is no candidate of this search"):
        search.builder({**config["plan"], prepared.free[0].name: "svd_out 1000"})


def test_a_budget_out_of_reach_is_refused_at_once(prepared):
    with pytest.raises(BudgetError, match="cannot be met"):
        RankSearch(prepared, {"params": 0.001}, metric="accuracy", mode="max")
    with pytest.raises(RankoptError, match="mode is 'best': choose min or max"):
        RankSearch(prepared, BUDGET, metric="accuracy", mode="best")
