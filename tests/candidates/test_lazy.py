"""The lazy frontier: what is fitted for a budget, and that nothing is lost, fitted twice or offered unfitted."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import rankopt
from rankopt.candidates import fit as fits
from rankopt.candidates import lazy
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.core.records import DENSE, Task
from rankopt.core.run_folder import read_result
from rankopt.decompositions import parameter_search
from rankopt.decompositions.plan import apply
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.experiments.experiment import Experiment
from rankopt.experiments.tasks import load_task
from rankopt.search.benchmark import usual_effort
from rankopt.search.compress import run_search
from rankopt.search.job import Job
from rankopt.search.settings import SearchSettings
from rankopt.search.sweep import sweep
from rankopt.strategies.allocation import allocate

SPACE = SearchSpace(families=("svd_out", "tucker2", "cp_merged"), points=10, steps=60)
BUDGETS = ({"params": 0.5}, {"params": 0.25}, {"macs": 0.4}, {"params": 0.5, "macs": 0.4})


@pytest.fixture(autouse=True)
def always_lazy(monkeypatch):
    monkeypatch.setattr(lazy, "SMALL", 0.0)


def make_task() -> Task:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d
    model = torch.nn.Sequential(
        *(conv(3, 12, 3, padding=1), torch.nn.ReLU(), conv(12, 16, 3, padding=1), torch.nn.ReLU()),
        *(conv(16, 16, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 10)),
    ).eval()
    x = torch.randn(64, 3, 8, 8)
    return Task(model, x[:1], [x])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def prepared(cache, effort="normal", space=SPACE, **given):
    return prepare(make_task(), dataclasses.replace(space, effort=effort), cache, workers=1, **given)


def offered(problem):
    return [[(c.method, c.rank, c.form, c.precision, c.error, c.loss) for c in f] for f in problem.frontiers]


def measured(found, budget):
    return run_search(found, found.problem(budget), SearchSettings()).info["objective"]["best"]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_few_fits_predict_as_good_a_plan_as_all_of_them(cache, budget):
    few, whole = prepared(cache).problem(budget), prepared(cache, "thorough").problem(budget)
    assert measured(prepared(cache), budget) <= 1.05 * measured(prepared(cache, "thorough"), budget)
    assert few.fitting["final"] < few.fitting["candidates"] / 2 and few.fitting["settled"]
    assert whole.fitting is None


def test_where_fits_are_dear_few_ranks_are_fitted_and_the_plan_is_as_good(cache, tmp_path, monkeypatch):
    fine, budget = dataclasses.replace(SPACE, points=24), {"params": 0.4}
    usual = prepared(cache, space=fine)
    whole = measured(usual, budget)
    monkeypatch.setattr(lazy, "DEAR", 0.0)
    few = prepared(tmp_path, space=fine)
    assert few.lazy.dear and not usual.lazy.dear
    assert sum(map(len, few.lazy.first.values())) < sum(map(len, usual.lazy.first.values()))
    assert measured(few, budget) <= 1.1 * whole


@pytest.mark.slow
def test_on_a_trained_model_the_plan_of_a_few_fits_is_as_good(cache):
    task = dataclasses.replace(load_task("digits"), score=None, test=None)
    found = {e: prepare(task, dataclasses.replace(SPACE, effort=e), cache, workers=1) for e in ("normal", "thorough")}
    few, whole = (measured(found[e], {"params": 0.3}) for e in ("normal", "thorough"))
    assert few <= 1.05 * whole


@pytest.mark.parametrize("families", [SPACE.families, ("tucker2", "cp_merged")], ids=str)
def test_a_search_that_came_to_its_end_is_not_begun_again_by_a_later_rung(families, tmp_path, monkeypatch):
    """Where no steps are affordable, as of large ranks on wide layers, later rungs have nothing to do."""
    made = []
    run = fits._run

    def noted(statistics, jobs, *others):
        made.extend((job.layer.name, job.family) for job in jobs if job.family != "svd_out")
        return run(statistics, jobs, *others)

    monkeypatch.setattr(fits, "_run", noted)
    monkeypatch.setattr(parameter_search, "MAX_FLOPS", 0.0)
    monkeypatch.setattr(fits, "takes_a_step", lambda request: True)  # else the layer would have closed forms only
    found = prepared(tmp_path, space=dataclasses.replace(SPACE, families=families))
    assert len(made) == len(set(made)) > 4
    assert all(candidates for name, candidates in found.candidates.items() if name != "7" or "svd_out" in families)
    problem = found.problem({"params": 0.5})
    assert all(c.key for f in problem.frontiers for c in f if c.method != DENSE)
    assert run_search(found, problem, SearchSettings()).info["cost"]["compressed"]["params"] <= 0.5 * found.dense.params


def test_all_that_is_offered_is_fitted_and_has_the_error_of_its_factors(cache):
    found = prepared(cache)
    problem = found.problem({"params": 0.3})
    for layer, frontier in zip(problem.layers, problem.frontiers, strict=True):
        weight = found.model.get_submodule(layer.name).weight
        target = full_target(layer, weight, *found.statistics[layer.name])
        for candidate in frontier:
            if candidate.method == DENSE:
                continue
            model = apply(found.task.model, [layer], [candidate], found.factors)
            made = model.get_submodule(layer.name)
            assert sum(p.numel() for p in made.parameters()) == candidate.cost.params
            family = fits.DECOMPOSITIONS[candidate.method]
            own = family.weight(layer, tuple(f.double() for f in found.factors[candidate.key]))
            assert target.error(own.reshape(target.weight.shape)) == pytest.approx(candidate.error, rel=1e-3, abs=1e-7)


def test_what_a_budget_gets_depends_on_no_other_budget_and_not_on_the_cache(cache, tmp_path):
    alone = {str(b): offered(prepared(cache).problem(b)) for b in BUDGETS}
    together = prepared(tmp_path)
    assert {str(b): offered(together.problem(b)) for b in reversed(BUDGETS)} == {
        str(b): alone[str(b)] for b in reversed(BUDGETS)
    }


def test_a_further_budget_fits_only_what_is_new_and_the_same_one_nothing(tmp_path, monkeypatch):
    made = []
    real = fits._fit_here

    def counted(statistics, stack, jobs, *others):
        made.extend((job.layer.name, job.family, rank, job.steps) for job in jobs for rank in job.ranks)
        return real(statistics, stack, jobs, *others)

    monkeypatch.setattr(fits, "_fit_here", counted)
    found = prepared(tmp_path)
    for budget in BUDGETS:
        found.problem(budget)
    assert len(made) == len(set(made)) > 0
    before = len(made)
    found.problem(BUDGETS[0])
    for budget in BUDGETS:
        prepared(tmp_path).problem(budget)
    assert len(made) == before


def test_what_is_given_up_is_on_no_frontier_of_the_whole_grid(cache):
    found, whole = prepared(cache), prepared(cache, "thorough")
    for metric in ("params", "macs"):
        problem = whole.problem({metric: 1.0})
        for layer, frontier in zip(problem.layers, problem.frontiers, strict=True):
            reached = {m: x for (name, m), x in found.lazy.reached.items() if name == layer.name}
            left = [c for c in found.offers[layer.name] if c.rank in reached.get(c.method, {})]
            assert len(left) < len(whole.candidates[layer.name]) - 1 or layer.kind == "Linear"
            for c in frontier:
                # a fit that goes on is within a few per cent of what it reaches, whose place it may take
                as_good = 1.0001 * c.error  # fits in other batches differ by rounding
                assert c.method == DENSE or any(
                    x.cost[metric] <= c.cost[metric] and reached[x.method][x.rank].best <= as_good for x in left
                )


def test_of_ranks_between_those_that_are_fitted_the_errors_are_known_nearly(tmp_path, monkeypatch):
    fine = dataclasses.replace(SPACE, points=24)
    some = prepared(tmp_path, space=fine).lazy
    effort = lazy.EFFORTS["normal"]
    fine_rungs = tuple(rung._replace(stride=1) for rung in effort.rungs)
    monkeypatch.setitem(lazy.EFFORTS, "normal", dataclasses.replace(effort, rungs=fine_rungs))
    every = prepared(tmp_path, space=fine).lazy
    off = []
    for pair, left in some.reached.items():
        assert set(some.first[pair]) <= set(left)
        between = left.keys() - some.first[pair].keys()
        off += [left[r].error / every.reached[pair][r].error for r in between if r in every.reached[pair]]
    assert len(off) > 20 and max(off) < 1.2 and sum(off) / len(off) == pytest.approx(1, abs=0.1)
    asked = {pair: len(found) for pair, found in every.first.items() if pair in every.cells}
    assert sum(len(some.first[pair]) for pair in asked) < 0.7 * sum(asked.values())


def test_the_candidates_left_do_not_depend_on_the_number_of_workers(cache, tmp_path):
    one, two = prepared(cache), prepare(make_task(), dataclasses.replace(SPACE, effort="normal"), tmp_path, workers=2)
    assert one.lazy.first.keys() == two.lazy.first.keys()
    for pair, fits_of_one in one.lazy.first.items():
        assert [(x.rank, x.error) for x in fits_of_one.values()] == [
            (x.rank, x.error) for x in two.lazy.first[pair].values()
        ]


def test_a_family_alone_loses_no_rank_that_a_budget_could_choose(cache):
    space = dataclasses.replace(SPACE, families=("tucker2",))
    few, whole = (prepared(cache, effort, space).problem({"params": 1.0}) for effort in ("normal", "thorough"))
    for layer in few.layers:
        ranks = [{(c.method, c.rank) for c in p.frontier(layer.name)} for p in (few, whole)]
        assert ranks[0] == ranks[1]


def test_the_chosen_plan_is_fitted_with_all_steps(cache):
    found = prepared(cache)
    problem = found.problem({"params": 0.3})
    final = {(pair, rank) for pair, ranks in found.lazy.made.items() for rank in ranks}
    for layer, c in zip(problem.layers, problem.candidates(allocate(problem).proposal), strict=True):
        assert c.method == DENSE or ((layer.name, c.method), c.rank) in final


def test_the_least_budget_is_that_of_the_whole_space(cache):
    whole, few = prepared(cache, "thorough"), prepared(cache)
    for metric in ("params", "macs", "bytes"):
        (least,) = whole.problem({metric: 1.0}).least
        assert few.problem({metric: least}).cost(allocate(few.problem({metric: least})).proposal)[metric] == least
        with pytest.raises(BudgetError, match="the least achievable"):
            few.problem({metric: least - 1})


def test_a_sweep_measures_every_plan_on_the_same_frontiers(cache):
    points = sweep(prepared(cache), "params=0.7:0.3:3", "all").points
    assert all(p.objective is not None for p in points)
    alone = measured(prepared(cache), {"params": 0.3})
    assert points[-1].predicted > 0 and points[-1].objective == pytest.approx(alone, rel=0.3)


def test_a_budget_in_bytes_gets_candidates_in_lower_precisions(cache):
    space = dataclasses.replace(SPACE, precisions=("same", "int8"))
    few, whole = (prepared(cache, effort, space) for effort in ("normal", "thorough"))
    assert measured(few, {"bytes": 0.2}) <= 1.05 * measured(whole, {"bytes": 0.2})


def test_a_layers_whole_frontier_is_fitted_when_it_is_asked_for(cache):
    whole = prepared(cache, "thorough").problem({"params": 1.0}).frontier("2")
    few = prepared(cache).all_of("2").problem({"params": 1.0}).frontier("2")
    errors = [min(c.error for c in f if c.cost.params <= 500) for f in (whole, few)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)  # the ranks of a whole grid are fitted in one batch


def test_small_models_and_fits_without_steps_are_fitted_as_a_whole(cache, monkeypatch):
    assert prepared(cache, space=dataclasses.replace(SPACE, steps=0)).lazy is None
    monkeypatch.setattr(lazy, "SMALL", 1e6)
    assert prepared(cache, "quick").lazy is None


def test_when_the_time_is_out_what_is_there_is_offered_and_again(tmp_path, monkeypatch):
    space = dataclasses.replace(SPACE, effort="normal", minutes=1e-6)
    first = prepared(tmp_path, space=space).problem({"params": 0.3})
    assert not first.fitting["settled"] and first.fitting["final"] == 0
    assert first.fits(allocate(first).proposal)
    families = {c.method for frontier in first.frontiers for c in frontier}
    assert families == {DENSE, *(f for f in SPACE.families if DECOMPOSITIONS[f].closed_form)}
    monkeypatch.setattr("rankopt.candidates.lazy.time.monotonic", lambda: 0.0)  # a faster machine
    assert offered(prepared(tmp_path, space=space).problem({"params": 0.3})) == offered(first)


@pytest.mark.parametrize("calls", [20, 60, 150])
def test_whenever_the_time_is_out_each_layer_is_offered_something_and_the_same_again(calls, tmp_path, monkeypatch):
    """Time that goes on by a second whenever it is asked for, in a family without a closed form."""
    space = dataclasses.replace(SPACE, effort="normal", minutes=calls / 60, families=("tucker2", "svd_in", "tt_matrix"))
    now = itertools.count()
    monkeypatch.setattr("rankopt.candidates.fit.time.monotonic", lambda: float(next(now)))
    first = prepared(tmp_path, space=space).problem({"params": 0.5})
    assert all(len(frontier) > 1 for frontier in first.frontiers) and first.fits(allocate(first).proposal)
    monkeypatch.setattr("rankopt.candidates.fit.time.monotonic", lambda: 0.0)  # a faster machine
    again = prepared(tmp_path, space=space).problem({"params": 0.5})
    assert offered(again) == offered(first) and again.fitting["settled"] == first.fitting["settled"]


def test_the_record_of_what_there_was_time_for_is_found_again(tmp_path, monkeypatch):
    """What each layer needs is fitted first, in the time of the first run; in that of the second all at once."""
    space = dataclasses.replace(SPACE, effort="normal", minutes=1)
    for _ in range(2):
        prepared(tmp_path, space=space).problem({"params": 0.3})
    assert len([*tmp_path.rglob("lazy-*.json")]) == 1


def test_what_was_chosen_by_other_costs_is_not_taken_for_this_searchs(tmp_path):
    """Records of what there was time for, of searches with the same candidates under other metrics and precisions."""
    space = dataclasses.replace(SPACE, effort="normal", minutes=60)
    for given in ({}, {"budget": {"memory": 0.9}}, {"space": dataclasses.replace(space, precisions=("same", "int8"))}):
        prepared(tmp_path, **({"space": space} | given)).problem(given.get("budget", {"bytes": 0.9}))
    assert len([*tmp_path.rglob("first-*.json")]) == 3 and len([*tmp_path.rglob("lazy-*.json")]) == 3


def test_the_result_says_what_was_fitted_and_why_not_more(cache, tmp_path):
    task, space = make_task(), dataclasses.replace(SPACE, steps=200)  # a fifth of which is more than the last rung
    result = rankopt.compress(
        task, budget={"params": 0.4}, space=space, effort="quick", cache=cache, out=tmp_path / "run"
    )
    entry = result.info["fitting"]
    assert result.info["effort"] == "quick" and 0 < entry["final"] < entry["candidates"]
    assert {(x["layer"], x["family"]) for x in entry["dropped"]} < {
        (x.name, f) for x in result.plan.choices for f in SPACE.families
    }
    said = " ".join(result.summary().split())
    assert f"{entry['first']} of {entry['candidates']} candidates in few steps" in said
    assert f"{entry['final']} to the end for this budget" in said
    page = result.report(tmp_path / "page.html").read_text()
    assert "Families that were dropped" in page and f"<td>{entry['dropped'][0]['family']}</td>" in page
    assert read_result(tmp_path / "run")["fitting"] == entry


def test_limits_that_exclude_each_other_are_refused_as_ever(cache):
    budgets = {e: prepared(cache, e) for e in ("normal", "thorough")}
    least = budgets["thorough"].problem({"params": 1.0, "macs": 1.0}).least
    for found in budgets.values():
        with pytest.raises(BudgetError, match="cannot be met together"):
            allocate(found.problem({"params": least[0], "macs": least[1]}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"effort": "huge"}, "unknown effort 'huge'; choose from quick, normal, thorough"),
        ({"effort": "quick", "minutes": 0}, "above 0"),
        ({"effort": "quick", "minutes": "x"}, "above 0"),
        ({"effort": "thorough", "minutes": 5}, "minutes go with effort 'quick' or 'normal'"),
    ],
)
def test_what_no_effort_is(given, said):
    with pytest.raises(RankoptError, match=said):
        SearchSpace(**given)


def test_effort_and_minutes_exclude_each_other_and_come_from_files(tmp_path):
    with pytest.raises(RankoptError, match="exclude each other"):
        SPACE.adjusted(effort="quick", minutes=5)
    assert dataclasses.replace(SPACE, effort="thorough").adjusted(minutes=5).effort == "normal"
    (tmp_path / "mine.toml").write_text('effort = "quick"\n')
    assert load_space(tmp_path / "mine.toml").effort == "quick"
    assert load_space(tmp_path / "mine.toml").adjusted(effort="thorough").effort == "thorough"


@pytest.mark.parametrize(("strategy", "usual"), [("knapsack", "normal"), ("uniform", "thorough"), ("rl", "thorough")])
def test_a_space_without_an_effort_has_its_strategys(strategy, usual, tmp_path):
    budget, settings = {"params": 0.5}, SearchSettings(strategy)
    assert Job.parse(budget, strategy=strategy).space.effort == usual
    assert Experiment(budget, settings, SearchSpace()).space.effort == usual
    assert usual_effort([strategy]) == usual
    (tmp_path / "mine.toml").write_text('effort = "quick"\n')
    own = load_space(tmp_path / "mine.toml")
    assert Job.parse(budget, strategy=strategy, space=own).space.effort == "quick"
    assert Experiment(budget, settings, own).with_values({"space.steps": 10}).space.effort == "quick"
    assert Job.parse(budget, strategy=strategy, effort="quick").space.effort == "quick"
    assert Job.parse(budget, strategy=strategy, minutes=5).space.effort == "normal"
    (tmp_path / "timed.toml").write_text("minutes = 5\n")
    assert Job.parse(budget, strategy=strategy, space=tmp_path / "timed.toml").space.effort == "normal"


def test_strategies_that_are_compared_see_the_candidates_that_all_of_them_need():
    assert usual_effort(["knapsack", "knapsack:contenders=1"]) == "normal"
    assert usual_effort(["knapsack", "uniform"]) == "thorough"


def test_a_strategy_that_may_choose_short_fits_is_warned_of(cache):
    def warnings(strategy, effort):
        found = prepared(cache, effort)
        return " ".join(run_search(found, found.problem({"params": 0.5}), SearchSettings(strategy)).info["warnings"])

    assert "strategy uniform may choose others, whose fits are short" in warnings("uniform", "normal")
    assert "fits are short" not in warnings("uniform", "thorough") + warnings("knapsack", "normal")


def test_a_prepared_task_has_the_effort_of_knapsack(tmp_path):
    assert prepare(make_task(), SPACE, tmp_path, workers=1).space.effort == "normal"
