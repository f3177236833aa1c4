"""The whole registry of strategies on real and synthetic problems; EVBMF against its definition."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from rankopt.budget import Limit, Problem, Spectra, allocate, project
from rankopt.core import Candidate, Cost, Layer, RankoptError, Trial
from rankopt.frontier import frontier
from rankopt.job import Settings, run_search
from rankopt.search import Study, best, search
from rankopt.strategies import STRATEGIES, make_strategy, strategy_class
from rankopt.strategies.evbmf import evbmf_rank


def synthetic(share=0.3, n=12, seed=0):
    """Layers with decaying error curves; the true loss weighs them unlike the predicted one."""
    rng = np.random.default_rng(seed)
    layers, frontiers, spectra = [], [], []
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
        values = tuple(float(np.exp(-decay * k / size)) for k in range(size))
        spectra.append(Spectra(values, values))
    dense = Cost(*(sum(x.cost[m] for x in layers) for m in ("params", "macs", "bytes")))
    limits = (Limit("params", share, int(share * dense.params)),)
    weights = np.exp(rng.normal(0, 1, n))
    problem = Problem(tuple(layers), tuple(frontiers), dense, limits, tuple(spectra))

    def truth(proposal):
        return float(sum(w * c.loss for w, c in zip(weights, problem.candidates(proposal), strict=True))), None

    return problem, truth


@pytest.mark.parametrize("name", list(STRATEGIES))
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


@pytest.mark.parametrize("name", [n for n in STRATEGIES if strategy_class(n).one_shot])
def test_one_shot_strategies_meet_the_budget_themselves_and_stop(name):
    problem, _ = synthetic(0.3)
    strategy = make_strategy(name, problem)
    proposal = strategy.ask()
    assert problem.fits(proposal) and strategy.ask() is None
    assert project(problem, proposal) == proposal


def test_knapsack_has_the_least_predicted_loss():
    problem, _ = synthetic(0.3)
    exact = problem.loss(make_strategy("knapsack", problem).ask())
    for name in ("uniform", "energy", "greedy", "evbmf", "random"):
        assert exact <= problem.loss(project(problem, make_strategy(name, problem).ask()))


def test_optuna_starts_at_knapsack_and_learns():
    problem, truth = synthetic(0.3)
    trials = search(Study(problem, make_strategy("optuna", problem), 60), truth)
    random = search(Study(problem, make_strategy("random", problem), 60), truth)
    assert trials[0].proposal == allocate(problem).proposal
    assert best(trials).objective < trials[0].objective
    assert best(trials).objective < best(random).objective
    assert np.mean([t.objective for t in trials[40:]]) < np.mean([t.objective for t in random])


SPAWNED = """
import json, sys
from tests.test_strategies import plans
json.dump(plans(sys.argv[1]), sys.stdout)
"""


def plans(name):
    problem, truth = synthetic(0.3)
    strategy = make_strategy(name, problem, seed=5)
    return [list(t.proposal) for t in search(Study(problem, strategy, 1 if strategy.one_shot else 14), truth)]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_same_seed_same_plans_in_another_process(name):
    out = subprocess.run([sys.executable, "-c", SPAWNED, name], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == plans(name)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if not strategy_class(n).one_shot])
def test_telling_out_of_order_and_failures(name):
    problem, truth = synthetic(0.3)
    strategy = make_strategy(name, problem)
    proposals = [project(problem, strategy.ask()) for _ in range(12)]
    for i in reversed(range(12)):
        failed = i % 3 == 0
        objective = None if failed else truth(proposals[i])[0]
        strategy.tell(Trial(i, proposals[i], "failed" if failed else "finished", problem.cost(proposals[i]), objective))
    assert problem.fits(project(problem, strategy.ask()))


@pytest.mark.parametrize("name", [n for n in STRATEGIES if not strategy_class(n).one_shot])
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

    def measure(self, prepared, track):
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
        make_strategy("knapsack", problem, 0, {"x": 1})


@pytest.mark.usefixtures("inquisitive")
def test_a_strategy_may_look_at_the_model_and_its_data(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(Inquisitive, "measure", lambda self, prepared, track: seen.append(prepared))
    problem = digits.problem({"params": 0.5})
    result = run_search(digits, problem, Settings("inquisitive", trials=2, options={"rounds": "2"}))
    assert seen == [digits] and result.info["options"] == {"rounds": "2"}


# --- EVBMF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 120), (60, 60), (30, 400)])
@pytest.mark.parametrize("rank", [0, 3, 10])
@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_evbmf_finds_planted_ranks(shape, rank, noise):
    rng = np.random.default_rng(rank)
    rows, columns = shape
    signal = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns)) * 3
    s = np.linalg.svd(signal + noise * rng.standard_normal(shape), compute_uv=False)
    assert evbmf_rank(s, rows, columns) == rank
    assert evbmf_rank(s, columns, rows) == rank, "the transpose has the same rank"


def brute_force_rank(s, rows, columns):
    """Minimise the free energy over a dense grid of noise variances, as published (Nakajima 2013, theorem 4)."""
    low, high = min(rows, columns), max(rows, columns)
    alpha = low / high
    tau_bar = 2.5129 * np.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)

    def energy(variance):
        total = 0.0
        for value in s**2 / (high * variance):
            total += value - np.log(value)
            if value > x_bar:
                tau = 0.5 * (value - (1 + alpha) + np.sqrt((value - (1 + alpha)) ** 2 - 4 * alpha))
                total += np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
        return total

    grid = np.geomspace((s**2).sum() / (low * high) * 1e-6, (s**2).sum() / (low * high), 4000)
    start = grid[int(np.argmin([energy(v) for v in grid]))]
    found = minimize_scalar(energy, bounds=(start / 1.01, start * 1.01), method="bounded").x
    return int((s > np.sqrt(high * found * x_bar)).sum())


@pytest.mark.parametrize("seed", range(6))
def test_evbmf_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    rows, columns, rank = 24, 50, 4
    decay = np.diag(2.0 ** -np.arange(rank))
    matrix = rng.standard_normal((rows, rank)) @ decay @ rng.standard_normal((rank, columns))
    s = np.linalg.svd(matrix + 0.2 * rng.standard_normal((rows, columns)), compute_uv=False)
    assert evbmf_rank(s, rows, columns) == brute_force_rank(s, rows, columns)


def test_evbmf_of_degenerate_matrices():
    assert evbmf_rank([0.0, 0.0], 2, 5) == 0
    assert 0 <= evbmf_rank([1.0], 1, 9) <= 1
