"""What every strategy of the registry must do, on synthetic problems and on the digits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rankopt.core.errors import RankoptError
from rankopt.core.records import Trial
from rankopt.search.benchmark import read_strategy
from rankopt.search.compress import run_search
from rankopt.search.loop import Study, search
from rankopt.search.settings import SearchSettings
from rankopt.strategies.allocation import project
from rankopt.strategies.registry import STRATEGIES, make_strategy, strategy_class, strategy_name
from tests.helpers.problems import synthetic

QUICK = {"rl": {"walks": 256}}  # options with which a strategy is made in a moment


def made(name, problem, seed=0):
    return make_strategy(name, problem, seed, QUICK.get(name, {}))


SEARCHERS = [name for name in STRATEGIES if not strategy_class(name).one_shot]


NUMBERS_ONLY = [n for n in STRATEGIES if not strategy_class(n).needs_model]  # others: test_lasso.py


@pytest.mark.parametrize("name", NUMBERS_ONLY)
@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_proposals_are_on_the_menu_and_fit_after_projection(name, share):
    problem, truth = synthetic(share)
    strategy = made(name, problem, seed=3)
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
from tests.strategies.test_contract import plans
json.dump({name: plans(name) for name in sys.argv[1:]}, sys.stdout)
"""


def plans(name):
    problem, truth = synthetic(0.3)
    strategy = made(name, problem, seed=5)
    return [list(t.proposal) for t in search(Study(problem, strategy, 1 if strategy.one_shot else 14), truth)]


@pytest.fixture(scope="module")
def plans_of_another_process():
    command = [sys.executable, "-c", SPAWNED, *NUMBERS_ONLY]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("name", NUMBERS_ONLY)
def test_same_seed_same_plans_in_another_process(name, plans_of_another_process):
    assert plans_of_another_process[name] == plans(name)


@pytest.mark.parametrize("name", SEARCHERS)
def test_telling_out_of_order_and_failures(name):
    problem, truth = synthetic(0.3)
    strategy = made(name, problem)
    proposals = [project(problem, strategy.ask()) for _ in range(12)]
    for i in reversed(range(12)):
        failed = i % 3 == 0
        objective = None if failed else truth(proposals[i])[0]
        strategy.tell(Trial(i, proposals[i], "failed" if failed else "finished", problem.cost(proposals[i]), objective))
    assert problem.fits(project(problem, strategy.ask()))


@pytest.mark.parametrize("name", SEARCHERS)
def test_restored_strategies_go_on_as_if_never_stopped(name):
    problem, truth = synthetic(0.3)
    whole = search(Study(problem, made(name, problem), 12), truth)
    first = Study(problem, made(name, problem), 8)
    search(first, truth)
    second = Study(problem, made(name, problem), 12, trials=list(first.trials))
    second.strategy.restore(first.trials, first.strategy.n_asked)
    assert [t.proposal for t in search(second, truth)] == [t.proposal for t in whole]


def test_a_class_of_any_module_is_a_strategy():
    """By "module:Class", by the class itself, and in a benchmark with options."""
    here = f"{__name__}:Inquisitive"
    assert strategy_class(here) is strategy_class(strategy_name(Inquisitive)) is Inquisitive
    assert strategy_name(strategy_class("random")) == "random"
    assert SearchSettings.parse(Inquisitive, {"rounds": "2"}).strategy == here
    assert read_strategy(f"{here}:rounds=2:sampler=a:b") == (here, {"rounds": 2, "sampler": "a:b"})
    assert read_strategy(here) == (here, {})
    for wrong, message in (
        ("no_module:Class", r"'no_module:Class' cannot be imported \(ModuleNotFoundError"),
        (f"{__name__}:Nothing", "cannot be imported"),
        (f"{__name__}:plans", "give a subclass of rankopt.strategies.base.Strategy"),
    ):
        with pytest.raises(RankoptError, match=message):
            strategy_class(wrong)

    class Local(Inquisitive):
        """Of a function."""

    with pytest.raises(RankoptError, match="cannot be imported"):
        strategy_name(Local)


def test_a_strategy_may_lie_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "of_mine_20.py").write_text(
        "from rankopt.strategies.baselines import Random\nclass Mine(Random): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert make_strategy("of_mine_20:Mine", synthetic(0.3)[0]).ask()


def test_a_strategy_may_lie_in_a_file(tmp_path, monkeypatch):
    """It is run once, with what lies beside it, and again when it has changed."""
    (tmp_path / "beside_20.py").write_text("from rankopt.strategies.baselines import Random\n")
    file = tmp_path / "my agents.py"
    file.write_text("from beside_20 import Random\nclass Mine(Random): ...\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    problem = synthetic(0.3)[0]
    name = f"{file}:Mine"
    assert make_strategy(name, problem).ask() and strategy_class(name) is strategy_class(name)
    assert strategy_class(strategy_name(strategy_class(name))) is strategy_class(name)
    assert read_strategy(name) == (name, {}), "in a benchmark"
    file.write_text("from beside_20 import Random\nclass Mine(Random): depth = 2\n")
    assert strategy_class(name).depth == 2
    for text, message in (
        ("class Other: ...\n", "has no attribute 'Mine'"),
        ("class Mine: ...\n", "give a subclass of rankopt.strategies.base.Strategy"),
        ("1 / 0\n", r"cannot be imported \(.*my agents.py does not run: ZeroDivisionError"),
    ):
        file.write_text(text)
        with pytest.raises(RankoptError, match=message):
            strategy_class(name)
    with pytest.raises(RankoptError, match=r"cannot be imported \(FileNotFoundError.*or FILE.py:CLASS"):
        strategy_class(f"{tmp_path}/nowhere.py:Mine")


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
    result = run_search(digits, problem, SearchSettings("inquisitive", trials=2, options={"rounds": "2"}))
    assert seen == [digits] and result.info["options"] == {"rounds": "2"}
