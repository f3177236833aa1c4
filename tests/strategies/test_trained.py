"""Strategies that train: what they deliver is the trained network, in the result, on disk and after an interruption."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import rankopt
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.progress import silent
from rankopt.core.records import Candidate, Cost
from rankopt.core.run_folder import WEIGHTS
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.layer_kinds import as_matrix, in_own_shape
from rankopt.report.html import write_report
from rankopt.search import compress
from rankopt.search.benchmark import benchmark
from rankopt.search.compress import NETWORK, run_search
from rankopt.search.job import Job, run_job
from rankopt.search.loop import Study
from rankopt.search.ray.rank_search import RankSearch
from rankopt.search.settings import SearchSettings
from rankopt.strategies import trained
from rankopt.strategies.differentiable import SoftBond
from rankopt.strategies.gates import FAMILIES, Gated, GatedBond, Pressure, take_while_they_fit
from rankopt.strategies.learning_compression import Compression, Unfolding, Whitening
from rankopt.strategies.registry import STRATEGIES, make_strategy, strategy_class
from tests.helpers.layers import PAIRS, build, make, sampled

TRAINERS = [name for name in STRATEGIES if strategy_class(name).trains]
BUDGET = {"params": 0.3}
FEW = {"steps": 12}


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model, other):
    ours, theirs = weights(model), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def delivered(prepared, name, budget=BUDGET, **options):
    strategy = make_strategy(name, prepared.problem(budget), 0, {**FEW, **options})
    strategy.measure(prepared, silent)
    return strategy


def test_there_are_three():
    assert TRAINERS == ["lasso-train", "differentiable", "lc"]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_the_weights_are_the_result(digits, name, metric, tmp_path, monkeypatch):
    """Bit for bit those after the last step, in the result and in the run folder; and the plan counts."""
    last = {}
    monkeypatch.setattr(trained, "train", lambda *a, **k: last.update(model=a[0]) or real(*a, **k))
    result = run_search(digits, digits.problem({metric: 0.3}), SearchSettings(name, options=FEW), tmp_path)
    same(result.model, last["model"])
    same(rankopt.load(digits.task.model, tmp_path), last["model"])
    assert not result.model.training
    assert not any("parametrizations" in name for name in weights(result.model))
    cost = rankopt.count(result.model, digits.task.example_input)
    assert cost[metric] <= 0.3 * digits.dense[metric]
    assert (cost.params, cost.macs) == (result.plan.cost.params, result.plan.cost.macs)
    assert result.info["objective"]["best"] == pytest.approx(digits.objective(result.model))
    assert {c.reason for c in result.plan.choices if c.method != "dense"} == {"rank learnt in training"}
    assert result.info["optimality_gap"] is None and "ranks learnt in training" in result.summary()
    assert "The ranks were learnt together with the weights" in write_report(tmp_path).read_text()


real = trained.train


@pytest.mark.parametrize("name", TRAINERS)
def test_training_changes_all_weights_and_lowers_the_objective(digits, name):
    """Also of layers that stay dense, biases and norms; and forty steps are better than two."""
    short, long = (delivered(digits, name, steps=n).network.model for n in (2, 40))
    assert digits.objective(long) < digits.objective(short)
    before = digits.task.model.state_dict()
    assert not torch.equal(long.bn3.weight, before["bn3.weight"])
    assert not torch.equal(long.bn3.running_mean, before["bn3.running_mean"])
    assert all(torch.equal(t, before[n]) for n, t in digits.task.model.state_dict().items())


@pytest.mark.parametrize("name", TRAINERS)
def test_what_was_trained_is_not_trained_again(digits, name, tmp_path, monkeypatch):
    """A search that fails after the training, and is resumed, delivers the weights of its last checkpoint."""
    problem, settings = digits.problem(BUDGET), SearchSettings(name, options=FEW)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "build_result", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_search(digits, problem, settings, tmp_path)
    checkpoint = (tmp_path / NETWORK / WEIGHTS).read_bytes()
    monkeypatch.setattr(trained, "train", None)
    result = run_search(digits, problem, dataclasses.replace(settings, resume=True), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == checkpoint
    assert result.info["trials"]["finished"] == 1
    assert not (tmp_path / NETWORK).exists()


@pytest.mark.parametrize("name", ["random", TRAINERS[0]])
def test_what_rankopt_train_wrote_in_a_run_folder_stays(digits, name, tmp_path):
    """Its folder is no network of a strategy's, and no search removes it."""
    problem, options = digits.problem(BUDGET), FEW if name in TRAINERS else {}
    run_search(digits, problem, SearchSettings(name, 1, options=options), tmp_path)
    later = tmp_path / "trained"
    later.mkdir()
    for file in ("plan.json", "model.safetensors", "result.json"):
        (later / file).write_text("another training's")
    run_search(digits, problem, SearchSettings(name, 2, options=options, resume=True), tmp_path)
    assert (later / "plan.json").read_text() == (later / "model.safetensors").read_text() == "another training's"


@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_seed_gives_the_same_network(digits, name):
    same(delivered(digits, name).network.model, delivered(digits, name).network.model)


@pytest.mark.parametrize("penalty", ["l1", "group", "hoyer", "nuclear"])
@pytest.mark.parametrize("start", ["allocation", "dense"])
def test_penalties_change_ranks_and_not_families(digits, penalty, start, monkeypatch):
    begun = {}
    build = Gated.__init__

    def noted(self, layer, candidate, *others):
        begun[layer.name] = candidate
        build(self, layer, candidate, *others)

    monkeypatch.setattr(Gated, "__init__", noted)
    strategy = delivered(digits, "lasso-train", {"params": 0.15}, penalty=penalty, start=start, steps=30)
    assert begun
    for layer, candidate in zip(strategy.problem.layers, strategy.network.candidates, strict=True):
        if layer.name in begun:
            first = begun[layer.name]
            assert candidate.method == first.method
            assert all(0 < r <= f for r, f in zip(candidate.rank, first.rank, strict=True))
            assert DECOMPOSITIONS[candidate.method].valid(layer, candidate.rank) == candidate.rank
        else:
            assert candidate.unchanged
    if start == "dense":
        assert set(begun) == {layer.name for layer in strategy.problem.layers}


@pytest.mark.parametrize(("family", "name"), sampled([(f, n) for f, n in PAIRS if f in FAMILIES]))
@pytest.mark.parametrize("bond", [GatedBond, SoftBond])
def test_pruned_layers_compute_what_the_gates_left(family, name, bond):
    """Components with gates of zero are taken out, and the gates of the others go into the weights."""
    case, decomposition = make(name), DECOMPOSITIONS[family]
    rank = decomposition.valid(case.layer, tuple(4 for _ in decomposition.full_rank(case.layer)))
    module, _ = build(family, case, rank, calibrated=False, steps=2)
    gated = Gated(case.layer, Candidate(family, rank, Cost(0, 0, 0), 0.0), module, bond)
    scores = []
    with torch.no_grad():
        for b in gated.bonds:
            if bond is GatedBond:
                b.gates.mul_(torch.linspace(-1, 1, len(b), dtype=b.gates.dtype)).add_(0.1)
                b.gates[1:2] = 0
                scores.append((b.gates != 0).double())
            else:
                b.mask.width, b.mask.cut = 1e-3, torch.nn.Parameter(b.mask.cut * 0 + max(len(b) - 1, 1) / len(b))
                scores.append(b.mask.logits())
        left = tuple(max(len(b) - 1, 1) for b in gated.bonds)
        small = decomposition.valid(case.layer, left)
        before = module(case.x)
        pruned = gated.pruned(case.module, scores, left) if small == left else None
    if pruned is not None:
        assert pruned.rank == left
        if min(rank) > 1:
            torch.testing.assert_close(pruned(case.x), before)


def test_a_step_of_pressure_is_the_least_that_meets_the_target(digits):
    """Worked on one layer whose components cost the same: λ is where as many are left as the budget allows."""
    problem = digits.problem(BUDGET)
    layer = next(x for x in problem.layers if x.name == "fc1")
    candidate = next(c for c in digits.candidates["fc1"] if c.method == "svd_out" and c.rank[0] > 10)
    module = digits.apply(problem, make_strategy("uniform", problem).ask()).fc1
    gated = Gated(layer, dataclasses.replace(candidate, rank=module.rank), module)
    size = module.rank[0]
    limit = dataclasses.replace(problem.limits[0], target=gated.cost((size - 3,)).params)
    pressure = Pressure([limit], Cost(0, 0, 0), [gated], 1)
    values = torch.arange(1.0, size + 1)
    price = pressure.step(0, lambda p: [gated.valid([int((values > p).sum())])])
    assert 3 <= price < 4 and pressure.ranks == [(size - 3,)]
    assert pressure.step(0, lambda p: [gated.valid([1])]) == 0.0
    chosen = take_while_they_fit([gated], [[values]], pressure.fits)
    assert chosen == ((size - 3,),)


@pytest.mark.parametrize(
    ("family", "name"), sampled([(f, n) for f, n in PAIRS if f in ("svd_out", "svd_in", "svd_spatial")])
)
def test_the_c_step_is_the_nearest_weight_of_a_rank(family, name):
    """In the whitened norm: the SVD's error is the predicted distance, and the family can have its weight."""
    case, decomposition = make(name), DECOMPOSITIONS[family]
    weight = as_matrix(case.layer, case.module.weight.detach()).reshape(case.layer.shape)
    white = Whitening(case.layer, weight, case.moment, case.metric)
    torch.testing.assert_close(white.undone(white(weight)), weight)
    assert float(white(weight).square().sum()) == pytest.approx(1.0)
    unfolding = Unfolding.of(decomposition, case.layer, weight)
    distances = unfolding.distances(white(weight))
    (full,) = decomposition.full_rank(case.layer)
    assert len(distances) == full + 1 and distances[0] == pytest.approx(1.0)
    rank = max(1, full // 2)
    low = white.undone(unfolding.truncated(white(weight), rank))
    assert float((white(weight) - white(low)).square().sum()) == pytest.approx(float(distances[rank]), abs=1e-9)
    shaped = low.reshape(case.layer.shape)
    (fit,) = decomposition.fit(case.layer, in_own_shape(case.layer, shaped), [(rank,)], steps=1)
    assert fit.error < 1e-9


def test_the_exact_output_metric_is_met_where_the_moment_is_a_product():
    """Of a 1 x 1 layer there is one input mode, so the whitened norm is the output metric's own."""
    case = make("linear")
    svd = DECOMPOSITIONS["svd_out"]
    weight = case.module.weight.detach()
    white = Whitening(case.layer, weight, case.moment, case.metric)
    errors = [f.error for f in svd.fit(case.layer, weight, [(3,), (7,)], case.moment, case.metric)]
    distances = Unfolding.of(svd, case.layer, weight).distances(white(weight))
    assert [float(distances[3]), float(distances[7])] == pytest.approx(errors, rel=1e-6)


def test_the_c_step_keeps_the_budget_and_l_steps_draw_the_weights_to_it(digits):
    problem = digits.problem(BUDGET)
    dense = copy.deepcopy(digits.task.model)
    compression = Compression(digits, problem, dense)
    compression.step()
    total = sum((c.cost for c in compression.chosen), problem.fixed)
    assert 0.95 * problem.limits[0].target < total.params <= problem.limits[0].target
    before = compression.distance()
    before.backward()
    for p in dense.parameters():
        if p.grad is not None:
            p.data -= 0.1 * p.grad
    assert compression.distance() < before
    network = compression.network()
    for name, low in compression.low.items():
        torch.testing.assert_close(network.get_submodule(name).weight, low, rtol=1e-3, atol=1e-4)


# --- what is refused ---


@pytest.mark.parametrize("name", TRAINERS)
def test_a_task_without_train_is_refused_in_one_sentence_before_any_work(digits, name, monkeypatch):
    task = dataclasses.replace(digits.task, train=None)
    monkeypatch.setattr("rankopt.search.job.prepare", None)
    with pytest.raises(TaskError, match=f"strategy '{name}' trains the network, and the task has no train: give it"):
        run_job(task, Job.parse(BUDGET, strategy=name))
    without = dataclasses.replace(digits, task=task)
    with pytest.raises(TaskError, match="the task has no train"):
        run_search(without, digits.problem(BUDGET), SearchSettings(name))
    with pytest.raises(TaskError, match="the task has no train"):
        delivered(without, name)


@pytest.mark.parametrize("name", TRAINERS)
def test_wrong_options_and_budgets_are_refused(digits, name):
    problem = digits.problem(BUDGET)
    with pytest.raises(RankoptError, match=f"strategy '{name}': steps is 1, give 2 or more"):
        make_strategy(name, problem, 0, {"steps": 1})
    limit = dataclasses.replace(problem.limits[0], metric="latency")
    with pytest.raises(
        RankoptError, match="whose latency is not known beforehand: give a budget of params, macs, bytes"
    ):
        make_strategy(name, dataclasses.replace(problem, limits=(limit,)))
    with pytest.raises(RankoptError, match="refining would undo the training"):
        run_search(digits, problem, SearchSettings(name, refine=True))
    with pytest.raises(RankoptError, match="trains first: call measure"):
        make_strategy(name, problem).ask()
    with pytest.raises(RankoptError, match="delivers one trained network"):
        RankSearch(digits, BUDGET, name, metric="x", mode="min")


def test_a_study_of_another_problem_does_not_take_the_networks_plan(digits):
    """Its indices, all 0, would elsewhere stand for the cheapest plan."""
    problem = digits.problem(BUDGET)
    strategy = make_strategy("lc", problem, 0, {"steps": 2})
    study = Study(problem, strategy, 1)
    strategy.measure(digits, silent)
    with pytest.raises(RankoptError, match="strategy 'lc' has trained a network, which no plan of this problem stands"):
        study.next()
    assert Study(strategy.problem, strategy, 1).next() == (0,) * len(problem.layers)


def test_words_that_are_no_options_are_refused(digits):
    problem = digits.problem(BUDGET)
    for name, option in (("lasso-train", "start"), ("differentiable", "start")):
        with pytest.raises(RankoptError, match="unknown start 'full'; choose from allocation, dense"):
            make_strategy(name, problem, 0, {option: "full"})
    with pytest.raises(RankoptError, match="alternations is 0, give 1 or more"):
        make_strategy("lc", problem, 0, {"alternations": 0})


# --- beside others ---


def test_a_benchmark_measures_the_networks(digits):
    """Each seed's own, though their plans have the same indices, which elsewhere stand for the cheapest plan."""
    data = benchmark(digits, ["params=0.3"], ["uniform", "lc:steps=4"], trials=1, seeds=2)
    cells = {(c["strategy"], c["seed"]): c for c in data["cells"]}
    assert all(c["error"] is None and c["copied_from"] is None for c in cells.values())
    for seed in (0, 1):
        strategy = make_strategy("lc", digits.problem(BUDGET), seed, {"steps": 4})
        strategy.measure(digits, silent)
        (trial,) = cells["lc:steps=4", seed]["trials"]
        assert trial["objective"] == pytest.approx(digits.objective(strategy.network.model))
    best = next(s for s in data["scores"] if s["strategy"] == "lc:steps=4")
    strategy = make_strategy("lc", digits.problem(BUDGET), best["seed"], {"steps": 4})
    strategy.measure(digits, silent)
    assert best["score"] == digits.task.test(strategy.network.model)


def test_layers_whose_candidates_others_have_beaten_are_not_left_dense_silently(digits):
    """As at an effort below thorough, which gives up candidates."""
    name = digits.free[-1].name
    left = {**digits.candidates, name: [c for c in digits.candidates[name] if c.method not in FAMILIES]}
    beaten = dataclasses.replace(digits, candidates=left, offers=digits.candidates)
    assert len(left[name]) < len(digits.candidates[name])
    for strategy in ("lasso-train", "differentiable"):
        with pytest.raises(RankoptError, match=f"layer '{name}' has no candidate left.*--effort thorough"):
            make_strategy(strategy, digits.problem(BUDGET), 0, FEW).measure(beaten, silent)
    compression = Compression(beaten, digits.problem(BUDGET), copy.deepcopy(digits.task.model))
    assert (
        compression.unfoldings[name].keys()
        == Compression(digits, digits.problem(BUDGET), digits.task.model).unfoldings[name].keys()
    )
