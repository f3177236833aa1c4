"""The whole registry of strategies on real and synthetic problems; EVBMF against its definition."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from rankopt.candidates.pareto import frontier
from rankopt.core.budget import Limit
from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Candidate, Cost, Layer, Trial
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Settings
from rankopt.search.loop import Study, search
from rankopt.strategies.allocation import project
from rankopt.strategies.registry import STRATEGIES, make_strategy, strategy_class

SEARCHERS = [name for name in STRATEGIES if not strategy_class(name).one_shot]


def synthetic(share=0.3, n=12, seed=0):
    """Layers with decaying error curves; the true loss weighs them unlike the predicted one."""
    rng = np.random.default_rng(seed)
    layers, frontiers = [], []
    for i in range(n):
        size = int(rng.integers(16, 64))
        cost = Cost(size * size, size * size * 64, 4 * size * size)
        layer = Layer(f"l{i}", "Linear", (size, size), cost=cost)
        decay = rng.uniform(2, 8)
        options = []
        for rank in range(1, size // 2, 2):
            error = float(np.exp(-decay * rank / size))
            params = 2 * size * rank
            options.append(Candidate("svd_out", (rank,), Cost(params, params * 64, 4 * params), error, error))
        layers.append(layer)
        frontiers.append(frontier(layer, options, ["params"]))
    dense = Cost(*(sum(x.cost[m] for x in layers) for m in ("params", "macs", "bytes")))
    limits = (Limit("params", share, int(share * dense.params)),)
    weights = np.exp(rng.normal(0, 1, n))
    problem = Problem(tuple(layers), tuple(frontiers), dense, limits)

    def truth(proposal):
        return float(sum(w * c.loss for w, c in zip(weights, problem.candidates(proposal), strict=True))), None

    return problem, truth


NUMBERS_ONLY = [n for n in STRATEGIES if not strategy_class(n).needs_model]  # others: test_lasso.py


@pytest.mark.parametrize("name", NUMBERS_ONLY)
@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_proposals_are_on_the_menu_and_fit_after_projection(name, share):
    problem, truth = synthetic(share)
    strategy = make_strategy(name, problem, seed=3)
    trials = search(Study(problem, strategy, 1 if strategy.one_shot else 6), truth)
    assert len(trials) == (1 if strategy.one_shot else 6) or share == 1.0
    for trial in trials:
        assert problem.fits(trial.proposal) and trial.cost == problem.cost(trial.proposal)
        assert all(0 <= i < len(f) for i, f in zip(trial.proposal, problem.frontiers, strict=True))
    assert len({t.proposal for t in trials}) == len(trials)


@pytest.mark.parametrize("name", [n for n in NUMBERS_ONLY if strategy_class(n).one_shot])
def test_one_shot_strategies_meet_the_budget_themselves_and_stop(name):
    problem, _ = synthetic(0.3)
    strategy = make_strategy(name, problem)
    proposal = strategy.ask()
    assert problem.fits(proposal) and strategy.ask() is None
    assert project(problem, proposal) == proposal


def test_knapsack_has_the_least_predicted_loss():
    problem, _ = synthetic(0.3)
    exact = problem.loss(make_strategy("knapsack", problem).ask())
    for name in ("uniform", "energy", "greedy", "random"):
        assert exact <= problem.loss(project(problem, make_strategy(name, problem).ask()))


SPAWNED = """
import json, sys
from tests.test_strategies import plans
json.dump(plans(sys.argv[1]), sys.stdout)
"""


def plans(name):
    problem, truth = synthetic(0.3)
    strategy = make_strategy(name, problem, seed=5)
    return [list(t.proposal) for t in search(Study(problem, strategy, 1 if strategy.one_shot else 14), truth)]


@pytest.mark.parametrize("name", NUMBERS_ONLY)
def test_same_seed_same_plans_in_another_process(name):
    out = subprocess.run([sys.executable, "-c", SPAWNED, name], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == plans(name)


@pytest.mark.parametrize("name", SEARCHERS)
def test_telling_out_of_order_and_failures(name):
    problem, truth = synthetic(0.3)
    strategy = make_strategy(name, problem)
    proposals = [project(problem, strategy.ask()) for _ in range(12)]
    for i in reversed(range(12)):
        failed = i % 3 == 0
        objective = None if failed else truth(proposals[i])[0]
        strategy.tell(Trial(i, proposals[i], "failed" if failed else "finished", problem.cost(proposals[i]), objective))
    assert problem.fits(project(problem, strategy.ask()))


@pytest.mark.parametrize("name", SEARCHERS)
def test_restored_strategies_go_on_as_if_never_stopped(name):
    problem, truth = synthetic(0.3)
    whole = search(Study(problem, make_strategy(name, problem), 16), truth)
    first = Study(problem, make_strategy(name, problem), 9)
    search(first, truth)
    second = Study(problem, make_strategy(name, problem), 16, trials=list(first.trials))
    second.strategy.restore(first.trials, first.strategy.asked)
    assert [t.proposal for t in search(second, truth)] == [t.proposal for t in whole]


def test_unknown_strategy_lists_the_valid_ones():
    with pytest.raises(RankoptError, match=r"unknown strategy 'magic': choose from knapsack, uniform"):
        strategy_class("magic")


class Inquisitive(strategy_class("random")):
    """Random, with options and a look at the data."""

    def __init__(self, problem, seed=0, *, temperature=1.0, rounds=3, warm=True, sampler="tpe"):
        super().__init__(problem, seed)
        self.options = (temperature, rounds, warm, sampler)

    def measure(self, prepared, progress):
        self.seen = prepared


@pytest.fixture
def inquisitive(monkeypatch):
    monkeypatch.setitem(STRATEGIES.built_in, "inquisitive", Inquisitive)


@pytest.mark.usefixtures("inquisitive")
def test_options_are_read_in_the_type_of_their_default():
    problem, _ = synthetic(0.3)
    text = {"temperature": "0.5", "rounds": "2", "warm": "False", "sampler": "gp"}
    assert make_strategy("inquisitive", problem, 0, text).options == (0.5, 2, False, "gp")
    assert make_strategy("inquisitive", problem).options == (1.0, 3, True, "tpe")
    for wrong, message in (({"x": "1"}, "no option 'x'; its options: temperature=1.0"), ({"rounds": "2.5"}, "no int")):
        with pytest.raises(RankoptError, match=message):
            make_strategy("inquisitive", problem, 0, wrong)
    with pytest.raises(RankoptError, match="its options: none"):
        make_strategy("uniform", problem, 0, {"x": 1})


@pytest.mark.usefixtures("inquisitive")
def test_a_strategy_may_look_at_the_model_and_its_data(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(Inquisitive, "measure", lambda self, prepared, progress: seen.append(prepared))
    problem = digits.problem({"params": 0.5})
    result = run_search(digits, problem, Settings("inquisitive", trials=2, options={"rounds": "2"}))
    assert seen == [digits] and result.info["options"] == {"rounds": "2"}
