"""Optuna's samplers over corrections and positions: names, the budget surface, learning, a strategy's contract."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import warnings
from itertools import product

import numpy as np
import optuna
import pytest

from rankopt.api.result import Result
from rankopt.candidates.pareto import frontier
from rankopt.core.budget import Limit
from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Trial
from rankopt.search.compress import run_search
from rankopt.search.front import Front
from rankopt.search.loop import Study, search
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import Store
from rankopt.strategies.allocation import allocate, fill
from rankopt.strategies.optuna_plugins import sampler_class
from rankopt.strategies.registry import make_strategy
from tests.helpers.problems import synthetic

SAMPLERS = ["tpe", "gp", "cmaes", "random", "qmc", "nsgaii", "nsgaiii"]
VARIANTS = [
    *[{"sampler": s} for s in SAMPLERS],
    {"parametrisation": "positions", "sampler": "tpe"},
    {"parametrisation": "joint"},
    {"parametrisation": "joint", "infeasible": "penalise", "warm": "0", "n_startup_trials": "3"},
]


def names(options):
    return ",".join(options.values())


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("tpe", "TPESampler"),
        ("GP", "GPSampler"),
        ("GPSampler", "GPSampler"),
        ("cma-es", "CmaEsSampler"),
        ("cmaes", "CmaEsSampler"),
        ("qmc", "QMCSampler"),
        ("nsga_iii", "NSGAIIISampler"),
        ("random", "RandomSampler"),
    ],
)
def test_samplers_by_name(name, full):
    assert sampler_class(name) is getattr(optuna.samplers, full)


def test_every_sampler_of_optuna_is_offered_or_cannot_be_asked():
    """Grid, brute force and partly fixed samplers need a finite space or values given beforehand."""
    offered = {sampler_class(s).__name__ for s in SAMPLERS}
    rest = {"BaseSampler", "BaseGASampler", "BruteForceSampler", "GridSampler", "PartialFixedSampler"}
    assert offered | rest == {x for x in optuna.samplers.__all__ if x != "nsgaii"}


def test_wrong_options_say_what_is_valid(monkeypatch):
    problem, _ = synthetic()
    for options, message in (
        ({"sampler": "grid"}, "unknown sampler 'grid': choose from cmaes, gp, nsgaii, nsgaiii, qmc, random, tpe"),
        ({"parametrisation": "ranks"}, "unknown parametrisation 'ranks': choose from corrections, positions, joint"),
        ({"parametrisation": "joint", "sampler": "gp"}, "takes no parameters that depend on others"),
        ({"infeasible": "drop"}, "unknown infeasible=drop: choose from project, penalise"),
        ({"warm": "-1"}, "warm is -1"),
        ({"sampler": "nowhere:Sampler"}, r"sampler 'nowhere:Sampler' cannot be imported \(ModuleNotFoundError"),
        ({"sampler": "optuna:Study"}, "give a subclass of optuna.samplers.BaseSampler"),
        ({"blocks": "0"}, "blocks is 0: give 1 or more"),
        ({"width": "-1"}, r"width is -1\.0: give more than 0"),
    ):
        with pytest.raises(RankoptError, match=message):
            make_strategy("optuna", problem, 0, options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RankoptError, match="sampler 'cmaes' needs cmaes: pip install cmaes"):
        make_strategy("optuna", problem, 0, {"sampler": "cmaes"})


@pytest.mark.parametrize("options", VARIANTS, ids=names)
def test_first_knapsack_then_distinct_plans_on_the_budget_surface(options):
    problem, truth = synthetic(0.3, n=6)
    strategy = make_strategy("optuna", problem, 1, options)
    assert (strategy.ask() == allocate(problem).proposal) == (options.get("warm") != "0")
    strategy = make_strategy("optuna", problem, 1, options)
    trials = search(Study(problem, strategy, 6), truth)
    assert strategy.n_asked == 6, "no ask is wasted on a plan that was evaluated"
    for trial in trials:
        assert problem.fits(trial.proposal) and fill(problem, trial.proposal) == trial.proposal


def test_many_layers_share_corrections_with_their_neighbours():
    problem, _ = synthetic(0.3)
    shared = make_strategy("optuna", problem, 0, {"blocks": 5}).points
    assert shared.size == 5 and [len(b) for b in shared.blocks] == [3, 3, 2, 2, 2]
    assert np.concatenate(shared.blocks).tolist() == list(range(12))
    single = make_strategy("optuna", problem, 0, {"blocks": 12}).points
    x = [0.5, -0.5, 0.2, 0.0, 0.9]
    assert shared.plan(x) == single.plan(np.repeat(x, [3, 3, 2, 2, 2]))


def test_corrections_are_exact_allocations_of_multiplied_losses():
    """Multipliers that turn the predicted losses into the true ones give the true optimum."""
    problem, truth = synthetic(0.3)
    points = make_strategy("optuna", problem, 0, {"width": 3.0}).points
    unit = [problem.frontiers[i][0].loss for i in range(12)]
    cheapest = [0] * 12
    weights = []
    for i in range(12):  # the truth is additive: a layer's weight shows when it alone changes
        step = [*cheapest[:i], 1, *cheapest[i + 1 :]]
        weights.append((truth(cheapest)[0] - truth(step)[0]) / (unit[i] - problem.frontiers[i][1].loss))
    found = truth(points.plan(np.log(weights)))[0]
    true = [[w * c.loss for c in f] for w, f in zip(weights, problem.frontiers, strict=True)]
    assert found == pytest.approx(allocate(problem, true).loss)


def objectives(name, trials, **options):
    problem, truth = synthetic(0.3)
    return [t.objective for t in search(Study(problem, make_strategy(name, problem, 0, options), trials), truth)]


@pytest.fixture(scope="module")
def random_best():
    return min(objectives("random", 24))


@pytest.mark.parametrize(
    ("sampler", "trials"), [("tpe", 24), ("gp", 16), pytest.param("cmaes", 36, marks=pytest.mark.slow)]
)
def test_learns(sampler, trials, random_best):
    """Better than random plans, than its own start, and later better than earlier."""
    found = objectives("optuna", trials, sampler=sampler)
    assert min(found) < random_best and min(found) < found[0]
    assert np.mean(found[-trials // 3 :]) < np.mean(found[1 : trials // 3])


@pytest.mark.slow
def test_the_default_beats_random_corrections():
    assert min(objectives("optuna", 16)) < min(objectives("optuna", 24, sampler="random"))


def plans(options, trials=5):
    problem, truth = synthetic(0.3, n=6)
    strategy = make_strategy("optuna", problem, 5, options)
    return [list(t.proposal) for t in search(Study(problem, strategy, trials), truth)]


@pytest.mark.slow
def test_same_seed_same_plans_in_another_process():
    code = "import json, sys; from tests.strategies.test_optuna import *; "
    code += "json.dump([plans(v) for v in VARIANTS], sys.stdout)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [plans(v) for v in VARIANTS]


@pytest.mark.parametrize(
    "options", [pytest.param(v, marks=() if i < 3 else pytest.mark.slow) for i, v in enumerate(VARIANTS)], ids=names
)
def test_resumed_from_disk_as_if_never_stopped(options, tmp_path):
    """With a failure on the way; the store keeps the points, so the sampler learns the same from it."""
    problem, truth = synthetic(0.3, n=6)
    broken = plans(options)[4]

    def evaluate(plan):
        if list(plan) == broken:
            raise RuntimeError
        return truth(plan)

    def study(limit, store=None):
        return Study(problem, make_strategy("optuna", problem, 5, options), limit, store)

    whole = search(study(8), evaluate)
    assert [t.state for t in whole].count("failed") == 1
    search(study(6, Store(tmp_path, problem, {}, resume=False)), evaluate)
    resumed = study(8, Store(tmp_path, problem, {}, resume=True))
    resumed.resume()
    assert len(resumed.trials) == 6
    assert [t.proposal for t in search(resumed, evaluate)] == [t.proposal for t in whole]


@pytest.mark.parametrize("options", VARIANTS, ids=names)
def test_parallel_asks_are_distinct_and_follow_from_the_events(options):
    problem, truth = synthetic(0.3, n=6)

    def events():
        strategy, asked, number = make_strategy("optuna", problem, 2, options), [], 0
        for told in ((), (2, 0), (1, 3)):  # which asks finish before the next three
            for i in told:
                failed = i == 3
                objective = None if failed else truth(asked[i])[0]
                state = "failed" if failed else "finished"
                strategy.tell(Trial(number, asked[i], state, problem.cost(asked[i]), objective))
                number += 1
            asked += [strategy.ask() for _ in range(3)]
        return asked

    first = events()
    assert len(set(first)) == 9 and all(problem.fits(p) for p in first)
    assert events() == first


def test_a_failure_counts_as_the_worst_so_far(monkeypatch):
    """Seen in the Optuna study that an ask is made from."""
    made = studies(monkeypatch)
    problem, _ = synthetic(0.3)
    strategy = make_strategy("optuna", problem)
    told = [strategy.ask() for _ in range(3)]
    for plan, objective in zip(told, (1.0, None, 3.0), strict=True):
        state = "failed" if objective is None else "finished"
        strategy.tell(Trial(0, plan, state, problem.cost(plan), objective))
    while not made:  # the first asks are contenders, without a sampler
        strategy.ask()
    assert [t.value for t in made[-1].trials[:3]] == [1.0, 3.0, 3.0]


def test_trials_of_another_strategy_are_not_repeated():
    problem, truth = synthetic(0.3)
    others = search(Study(problem, make_strategy("knapsack", problem), 1), truth)
    strategy = make_strategy("optuna", problem)
    strategy.restore(others, 0)
    assert strategy.ask() not in {t.proposal for t in others}


@pytest.mark.parametrize("options", VARIANTS, ids=names)
def test_small_problems_run_dry(options):
    """With three candidates in each of two layers, every sampler stops at the latest when all plans are used up."""
    big, _ = synthetic(0.4, n=2)
    frontiers = tuple(frontier(x, f[2:-1:5][:2], ["params"]) for x, f in zip(big.layers, big.frontiers, strict=True))
    problem = type(big)(big.layers, frontiers, big.dense, big.limits)
    plans = [p for p in product(*(range(len(f)) for f in frontiers)) if problem.fits(p)]
    strategy = make_strategy("optuna", problem, 0, options)
    trials = search(Study(problem, strategy, 30), lambda plan: (sum(plan), None))
    assert 1 <= len(trials) <= len(plans) < 9 and strategy.ask() is None


def two_metrics(seed=0):
    """As `synthetic`, with MACs that follow parameters differently in every layer, and a budget for both."""
    problem, truth = synthetic(0.4, 12, seed)
    rng = np.random.default_rng(seed)
    layers, frontiers = [], []
    for layer, menu, maps in zip(problem.layers, problem.frontiers, rng.integers(1, 200, 12).tolist(), strict=True):
        layers.append(dataclasses.replace(layer, cost=dataclasses.replace(layer.cost, macs=layer.cost.params * maps)))
        costs = [dataclasses.replace(c.cost, macs=c.cost.params * maps) for c in menu]
        frontiers.append(tuple(dataclasses.replace(c, cost=x) for c, x in zip(menu, costs, strict=True)))
    dense = dataclasses.replace(problem.dense, macs=sum(x.cost.macs for x in layers))
    limits = (*problem.limits, Limit("macs", 1.0, dense.macs))
    return Problem(tuple(layers), tuple(frontiers), dense, limits), truth


@pytest.mark.parametrize("sampler", [pytest.param("gp", marks=pytest.mark.slow), "tpe", "nsgaii", "nsgaiii"])
def test_a_second_objective_gives_a_front(sampler):
    problem, truth = two_metrics()
    options = {"sampler": sampler, "objectives": "objective,macs"}
    trials = search(Study(problem, make_strategy("optuna", problem, 0, options), 24), truth)
    found = Front.of(trials, ["macs"])
    assert trials[0].proposal == allocate(problem).proposal and all(problem.fits(t.proposal) for t in trials)
    assert len(found) >= 4 and found[0].cost.macs < 0.8 * trials[0].cost.macs
    assert [t.cost.macs for t in found] == sorted(t.cost.macs for t in found)
    for trial in trials:
        beaten = [o for o in found if o.objective <= trial.objective and o.cost.macs <= trial.cost.macs]
        assert beaten, "every trial is on the front or behind it"


def test_a_second_objective_wants_a_budget_and_a_sampler_for_it():
    problem, _ = two_metrics()
    with pytest.raises(RankoptError, match="--budget macs=100%"):
        make_strategy("optuna", synthetic()[0], 0, {"objectives": "objective,macs"})
    with pytest.raises(RankoptError, match="takes one objective"):
        make_strategy("optuna", problem, 0, {"objectives": ["macs", "objective"], "sampler": "cmaes"})


# --- a method and its rank for each layer ---


def several_methods():
    """As `synthetic`, where every second candidate is of another method, and some of several ranks."""
    problem, truth = synthetic(0.3, 6)
    frontiers = []
    for menu in problem.frontiers:
        kinds = [("svd_out", c.rank) if i % 2 else ("tucker2", (*c.rank, 3)) for i, c in enumerate(menu[:-1])]
        changed = [dataclasses.replace(c, method=m, rank=r) for c, (m, r) in zip(menu, kinds, strict=False)]
        frontiers.append((*changed, menu[-1]))
    return dataclasses.replace(problem, frontiers=tuple(frontiers)), truth


def studies(monkeypatch):
    """The Optuna studies that asks are made from, as they are created."""
    made, create = [], optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **options: made.append(create(**options)) or made[-1])
    return made


def test_joint_parameters_are_methods_and_ranks(monkeypatch):
    """Every trial in Optuna's study names the plan that was evaluated, and nothing of methods it does not use."""
    made = studies(monkeypatch)
    problem, truth = several_methods()
    strategy = make_strategy("optuna", problem, 0, {"parametrisation": "joint"})
    trials = search(Study(problem, strategy, 14), truth)
    asked = make_strategy("optuna", problem, 0, {"parametrisation": "joint"})
    asked.restore(trials, 14)
    assert asked.ask() is not None
    for trial, frozen in zip(trials, made[-1].trials, strict=False):
        expected = {}
        for layer, menu, at in zip(problem.layers, problem.frontiers, trial.proposal, strict=True):
            chosen = menu[at]
            expected[f"{layer.name}.method"] = chosen.method
            if chosen.method == "svd_out":
                expected[f"{layer.name}.svd_out.rank"] = chosen.rank[0]
            elif chosen.method == "tucker2":
                expected[f"{layer.name}.tucker2.ranks"] = 1 + sum(c.method == "tucker2" for c in menu[:at])
        assert frozen.params == expected and frozen.value == trial.objective
    assert {type(made[-1].sampler).__name__, made[-1].sampler._group} == {"TPESampler", True}
    optuna.importance.get_param_importances(made[-1], evaluator=optuna.importance.PedAnovaImportanceEvaluator())


def test_joint_search_learns_without_any_plan_of_knapsack(random_best):
    found = objectives("optuna", 30, parametrisation="joint", warm="0")
    assert np.mean(found[-10:]) < np.mean(found[:10]) and min(found) < random_best * 1.1


def test_points_beyond_the_budget_are_told_as_worse_than_all_results(monkeypatch):
    made = studies(monkeypatch)
    problem, truth = several_methods()
    options = {"parametrisation": "joint", "infeasible": "penalise", "warm": 0}
    strategy = make_strategy("optuna", problem, 1, options)
    trials = search(Study(problem, strategy, 8), truth)
    assert strategy.beyond and all(strategy.points.excess(p) > 0 for p in strategy.beyond)
    assert strategy.ask() is not None
    worst = max(t.objective for t in trials)
    penalised = made[-1].trials[: len(strategy.beyond)]
    assert all(t.value > worst for t in penalised)
    again = make_strategy("optuna", problem, 1, options)
    again.restore(trials, 8)
    assert again.beyond == strategy.beyond, "a resumed search knows them, too"


def test_three_objectives(monkeypatch):
    made = studies(monkeypatch)
    problem, truth = two_metrics()
    strategy = make_strategy("optuna", problem, 0, {"sampler": "tpe", "objectives": ["objective", "macs", "params"]})
    trials = search(Study(problem, strategy, 16), truth)
    assert strategy.ask() is not None
    assert strategy.points.names[-2:] == ["macs.price", "params.price"]
    for trial, frozen in zip(trials, made[-1].trials, strict=False):
        shares = [trial.cost[m] / problem.dense[m] for m in ("macs", "params")]
        assert frozen.values == [trial.objective, *shares]
    found = Front.of(trials, ["macs", "params"])
    assert found.metrics == ("macs", "params") and {t.number for t in found} <= {t.number for t in trials}
    assert len(found) >= len(Front.of(trials, ["macs"])) and found[0].cost.macs < 0.9 * trials[0].cost.macs


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ("macs", "objectives=macs: give objective and other metrics, each once"),
        ("objective,macs,macs", "each once"),
        (["objective", "speed"], "unknown objective 'speed': choose from objective, params, macs"),
        ("objective,latency", "objective 'latency' needs a budget: --budget latency=100%"),
    ],
)
def test_objectives_that_are_refused(objectives, message):
    with pytest.raises(RankoptError, match=message):
        make_strategy("optuna", two_metrics()[0], 0, {"objectives": objectives})


class Backwards(optuna.samplers.RandomSampler):
    """A sampler of somebody else."""


def test_samplers_of_any_module_by_name_or_class():
    problem, _ = synthetic(0.3)
    for sampler in (Backwards, f"{__name__}:Backwards"):
        assert make_strategy("optuna", problem, 0, {"sampler": sampler}).sampler is Backwards


def test_parameters_are_named_after_layers():
    problem, _ = two_metrics()
    for options, names_of_first in (
        ({"objectives": ("objective", "macs")}, {"l0.correction", "macs.price"}),
        ({"parametrisation": "positions"}, {"l0.position"}),
    ):
        points = make_strategy("optuna", problem, 0, options).points
        assert names_of_first <= points.axes([0.0] * points.size).keys()


# --- samplers and pruners as objects ---


def fixed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler({"l0.position": 1.0}, optuna.samplers.RandomSampler())


@pytest.mark.parametrize(
    ("sampler", "parametrisation"),
    [
        (optuna.samplers.TPESampler(n_startup_trials=3), "joint"),
        (optuna.samplers.RandomSampler(), "positions"),
        (optuna.samplers.GPSampler(seed=1), "corrections"),
        (optuna.samplers.NSGAIISampler(population_size=4), "corrections"),
        (fixed(), "positions"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_sampler_object_is_copied_and_seeded_for_each_ask(sampler, parametrisation):
    """So plans follow from the search's seed, and a stopped search goes on, as with samplers by name."""
    problem, truth = synthetic(0.3, n=6)
    options = {"sampler": sampler, "parametrisation": parametrisation, "warm": 2}

    def study(seed, limit, trials=()):
        return Study(problem, make_strategy("optuna", problem, seed, options), limit, trials=list(trials))

    def plans(found):
        return [t.proposal for t in search(found, truth)]

    whole = plans(study(5, 7))
    first = study(5, 4)
    search(first, truth)
    second = study(5, 7, first.trials)
    second.strategy.restore(first.trials, first.strategy.n_asked)
    assert whole == plans(study(5, 7)) == plans(second) and len(set(whole)) == 7
    assert plans(study(6, 7)) != whole


class Staged:
    """Evaluates at two low fidelities first, which are near the truth."""

    def __init__(self, truth):
        self.truth = truth

    def stages(self, plan):
        value = self.truth(plan)[0]
        yield value + 0.1
        yield value * (1.2 if sum(plan) % 2 else 1.0)
        yield value, None


class Merciless(optuna.pruners.BasePruner):
    """Stops all trials but the first three."""

    def prune(self, study, trial):
        return trial.number >= 3


def pruning(pruner, limit, trials=()):
    problem, _ = synthetic(0.3, n=6)
    strategy = make_strategy("optuna", problem, 3, {"pruner": pruner, "parametrisation": "joint"})
    return Study(problem, strategy, limit, trials=list(trials))


def ends(pruner, limit=12):
    return [(t.state, len(t.rungs)) for t in search(pruning(pruner, limit), Staged(synthetic(0.3, n=6)[1]))]


def test_pruners_stop_trials_at_low_fidelities():
    for name in ("nop", "NopPruner", optuna.pruners.NopPruner()):
        assert ends(name) == [("finished", 2)] * 12
    for name in (Merciless, f"{__name__}:Merciless", Merciless()):
        assert ends(name) == [("finished", 2)] * 3 + [("stopped", 1)] * 9
    assert set(ends(optuna.pruners.ThresholdPruner(upper=1e-9), 5)) == {("stopped", 1)}
    for name in ("median", "successive-halving", "hyperband", optuna.pruners.PercentilePruner(30.0)):
        found = ends(name)
        assert {state for state, _ in found} == {"finished", "stopped"} and found == ends(name)


def test_successive_halving_has_a_rung_for_each_fidelity():
    assert {("stopped", 1), ("stopped", 2), ("finished", 2)} == set(ends("successivehalving", 30))


@pytest.mark.parametrize("pruner", ["median", "successivehalving", "hyperband"])
def test_a_resumed_search_prunes_alike(pruner):
    evaluate = Staged(synthetic(0.3, n=6)[1])
    whole, first = search(pruning(pruner, 16), evaluate), pruning(pruner, 9)
    search(first, evaluate)
    second = pruning(pruner, 16, first.trials)
    second.strategy.restore(first.trials, first.strategy.n_asked)
    second.reached = {t.proposal: t.rungs for t in first.trials}
    resumed = search(second, evaluate)
    assert [(t.proposal, t.state, t.rungs) for t in resumed] == [(t.proposal, t.state, t.rungs) for t in whole]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruner": "best"}, "unknown pruner 'best': choose from hyperband, median, nop, successivehalving, wilcoxon"),
        (
            {"pruner": "optuna.pruners:PatientPruner"},
            "pruner PatientPruner cannot be made .*give an object in Python",
        ),
        ({"pruner": "optuna.pruners:ThresholdPruner"}, "pruner ThresholdPruner cannot be made .*: give an object"),
        ({"pruner": "nowhere:P"}, "pruner 'nowhere:P' cannot be imported"),
        ({"pruner": "optuna:Study"}, r"give a subclass of optuna.pruners.BasePruner"),
        ({"pruner": [3]}, "no pruner of Optuna: give a name, MODULE:CLASS or an object"),
        ({"sampler": [3]}, "no sampler of Optuna: give a name, MODULE:CLASS or an object"),
        ({"sampler": optuna.samplers.GridSampler({"x": [1]})}, "GridSampler needs a finite space"),
        ({"sampler": optuna.samplers.TPESampler(), "n_startup_trials": 3}, "give it to the object"),
        ({"sampler": optuna.samplers.GPSampler(), "parametrisation": "joint"}, "takes no parameters that depend"),
    ],
)
def test_samplers_and_pruners_that_are_refused(options, message):
    with pytest.raises(RankoptError, match=message):
        make_strategy("optuna", synthetic(0.3, n=4)[0], 0, options)


def test_a_pruner_wants_fidelities(digits):
    settings = SearchSettings.parse("optuna", {"pruner": "median"}, trials=2)
    with pytest.raises(RankoptError, match=r"a pruner stops trials at low fidelities: .*--fidelities 0.1,0.5"):
        run_search(digits, digits.problem({"params": 0.5}), settings)


def test_the_front_of_a_search_in_python(digits):
    options = {"objectives": ["objective", "macs"], "sampler": optuna.samplers.TPESampler()}
    settings = SearchSettings.parse("optuna", options, trials=9)
    result = Result.of(run_search(digits, digits.problem({"params": 0.5, "macs": 1.0}), settings))
    found = result.front()
    assert found.metrics == ("macs",) and found.rows == result.info["front"] and "front: for one" in result.summary()
    assert result.info["options"]["sampler"].endswith(":TPESampler")
    assert result.front("params", "macs").metrics == ("params", "macs")
    with pytest.raises(RankoptError, match="unknown metric 'speed'"):
        result.front("speed")
