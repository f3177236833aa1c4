"""On a GPU: pytest -m gpu. Deselected by default, because elsewhere it could only skip."""

from __future__ import annotations

import dataclasses
import json
from statistics import median

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates import fit, instruments
from rankopt.candidates.input_moments import moments
from rankopt.candidates.latency_table import Conditions, interleaved, passes
from rankopt.candidates.output_metrics import output_metrics
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Original
from rankopt.experiments.tasks import load_task
from rankopt.model.energy import NotHereError, open_meter
from rankopt.model.inventory import inventory
from rankopt.model.memory import peak_memory
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Evaluator
from rankopt.search.settings import SearchSettings
from rankopt.strategies.registry import make_strategy
from tests.helpers.command import run
from tests.helpers.latency import SPACE, make_task
from tests.helpers.layers import ONE_EACH
from tests.helpers.spaces import QUICK

pytestmark = pytest.mark.gpu

SERVED = "cuda,batch=256,dtype=bfloat16,runtime=graph"
"""Work enough that ranks count, and no launches."""


FEW_FITS = SearchSpace(name="few fits", families=("svd_out",), points=2, steps=2)
FEW = SearchSpace(name="few", families=("svd_out",), points=2, steps=0, keep_dense=("first", "head"))


def on_gpu():
    task = load_task("digits")
    task.model.cuda()
    return task


def test_statistics_agree_with_the_cpu():
    for statistics in (moments, output_metrics):
        sides = []
        for device in ("cpu", "cuda"):
            task = load_task("digits")
            model = task.model.to(device)
            layers = [x for x in inventory(model, task.example_input) if x.reason is None]
            sides.append({k: v.cpu() for k, v in statistics(model, layers, list(task.calibration)).items()})
        for name, value in sides[0].items():
            assert ((value - sides[1][name]).norm() / value.norm()).item() < 1e-3, name


@pytest.mark.parametrize(("family", "kind"), ONE_EACH)
def test_fits_on_the_gpu_agree_with_the_cpu(family, kind):
    torch.manual_seed(0)
    module, shape = (nn.Linear(32, 24), (64, 32)) if kind == "linear" else (nn.Conv2d(16, 24, 3), (32, 16, 9, 9))
    x = torch.randn(shape)
    (layer,) = inventory(module, x)
    moment = moments(module, [layer], [x])[""]
    rank = DECOMPOSITIONS[family].ranks(layer, [0.5])[0]
    errors = []
    for device in ("cpu", "cuda"):
        weight = module.weight.to(device)
        (fit,) = DECOMPOSITIONS[family].fit(layer, weight, [rank], moment.to(device), None, 100)
        errors.append(fit.error)
        assert all(f.device.type == device for f in fit.factors)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_the_whole_job_stays_on_the_device(tmp_path):
    task = on_gpu()
    prepared = prepare(task, QUICK, tmp_path / "cache")
    result = run_search(prepared, prepared.problem({"params": 0.3}), SearchSettings("optuna", 5), None)
    assert all(p.is_cuda for p in result.model.parameters())
    assert result.info["score"]["compressed"]["test"] > 0.95
    result.save(tmp_path / "run")
    loaded = rankopt.load(on_gpu().model, tmp_path / "run")
    x = task.example_input.cuda()
    torch.testing.assert_close(loaded(x), result.model(x))


def test_wide_layers_are_fitted_on_the_gpu(tmp_path, monkeypatch):
    seen = set()
    whole = fit._fits

    def watch(jobs, weights, *others):
        seen.update((job.layer.name, w.device.type) for job, w in zip(jobs, weights, strict=True))
        return whole(jobs, weights, *others)

    monkeypatch.setattr(fit, "_fits", watch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64)).cuda()
    task = rankopt.Task(model, torch.zeros(1, 64), calibration=[torch.randn(32, 64)])
    prepare(task, FEW_FITS, tmp_path, workers=1)
    assert ("2", "cuda") in seen


def test_convolutions_are_measured_as_they_are_built(tmp_path):
    """Plans are measured with reconstructed weights there."""
    prepared = prepare(on_gpu(), QUICK, tmp_path)
    problem = prepared.problem({"params": 0.3})
    proposal = make_strategy("knapsack", problem).ask()
    built, measured = prepared.apply(problem, proposal), prepared.to_measure(problem, proposal)
    assert prepared.objective(measured) == pytest.approx(prepared.objective(built), rel=1e-3)


def test_a_search_on_the_command_line_moves_the_model(tmp_path, quick_space):
    out = tmp_path / "run"
    run("search", "digits", "--budget", "params=0.3", "--device", "cuda", "--space", quick_space, "--out", out)
    assert "cuda" in json.loads((out / "result.json").read_text())["environment"]["device"]
    run("train", out, "--task", "digits", "--device", "cuda", "--epochs", 1)


def test_half_precision_models(tmp_path):
    task = load_task("digits")
    x = [b.cuda().bfloat16() for b in task.calibration]
    result = rankopt.compress(task.model.cuda().bfloat16(), x, {"params": 0.4}, space=QUICK, cache=tmp_path)
    assert all(p.dtype == torch.bfloat16 and p.is_cuda for p in result.model.parameters())


def test_a_ray_workers_move_to_the_gpu(tmp_path):
    """What a worker with a GPU does with the evaluator it was sent."""
    prepared = prepare(load_task("digits"), QUICK, tmp_path)
    problem = prepared.problem({"params": 0.3})
    evaluate = Evaluator.of(prepared, problem)
    proposal = make_strategy("knapsack", problem).ask()
    before = evaluate(proposal)
    evaluate.model.to("cuda")
    assert evaluate(proposal) == pytest.approx(before, rel=1e-2)


# --- budgets that are measured -----------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["eager", "graph", "compile"])
def test_a_pass_on_the_gpu_computes_what_the_module_does(runtime):
    net, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).eval(), torch.randn(4, 64)
    try:
        (one,) = passes([net], x, Conditions("cuda", runtime=runtime))
    except RankoptError as error:  # torch.compile needs a C compiler, which a machine may lack
        assert runtime == "compile" and "runtime=compile does not take this model" in str(error), error
        return
    with torch.inference_mode():
        torch.testing.assert_close(one().cpu(), net(x), atol=1e-2, rtol=1e-2)


def test_a_graph_hides_launches_and_events_tell():
    """Forty small layers: their launches take longer than their work."""
    net, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40))), torch.randn(1, 64)
    times = {}
    for runtime in ("eager", "graph"):
        conditions = Conditions("cuda", runtime=runtime)
        (samples,) = interleaved(passes([net], x, conditions), conditions, 50)
        times[runtime] = median(samples)
    print({k: f"{ns / 1e3:.1f} us" for k, ns in times.items()})
    assert 10_000 < times["graph"] < 0.7 * times["eager"]


def test_latency_budgets_are_kept_or_refused(tmp_path):
    prepared = prepare(make_task(), SPACE, tmp_path, budget={"latency": 0.95}, latency_on=Conditions.parse(SERVED))
    assert torch.cuda.get_device_name() in prepared.latencies.machine
    for fraction in (0.9, 0.7):
        try:
            found = run_search(prepared, prepared.problem({"latency": fraction}), SearchSettings()).info["latency"]
        except BudgetError as error:
            print(f"{fraction}: refused, {str(error).splitlines()[0]}")
            continue
        print({k: found[k] for k in ("dense", "latency", "low", "high", "target", "slope", "residual", "attempts")})
        assert found["met"] and found["high"] <= found["target"]


def test_energy_budgets_are_kept_or_refused(tmp_path, monkeypatch):
    try:
        open_meter(0)
    except NotHereError:
        with pytest.raises(RankoptError, match="energy cannot be measured here"):
            prepare(make_task(), FEW, tmp_path, budget={"energy": 0.9}, latency_on=Conditions.parse(SERVED))
        return
    monkeypatch.setitem(instruments.WINDOWS, "cuda", (0.05, 0.1))
    short = dataclasses.replace(instruments.ENERGY, seconds=10.0)
    monkeypatch.setitem(instruments.INSTRUMENTS, "energy", short)
    prepared = prepare(make_task(), FEW, tmp_path, budget={"energy": 1.0}, latency_on=Conditions.parse(SERVED))
    energies = prepared.measured["energy"]
    print(f"{energies.dense / 1e6:.3g} mJ an example, {energies.about()}")
    assert 1e3 < energies.dense < 1e9, "between a microjoule and a joule"
    try:
        found = run_search(prepared, prepared.problem({"energy": 0.9}), SearchSettings()).info["energy_budget"]
    except BudgetError as error:
        print(f"refused, {str(error).splitlines()[0]}")
        return
    print({k: found[k] for k in ("dense", "energy", "low", "high", "target", "rounds", "attempts")})
    assert found["met"] and found["high"] <= found["target"]


def test_memory_is_measured_and_the_budget_kept(tmp_path):
    task = on_gpu()
    counted = peak_memory(load_task("digits").model, task.example_input)
    there = peak_memory(task.model, task.example_input)
    print(f"counted {counted:,} bytes, measured {there:,}")
    assert there == pytest.approx(peak_memory(task.model, task.example_input), rel=0.01) and there >= counted
    prepared = prepare(task, QUICK, tmp_path, budget={"memory": 0.8})
    assert prepared.dense.memory == pytest.approx(there, rel=0.01)
    result = run_search(prepared, prepared.problem({"memory": 0.8}), SearchSettings())
    again = peak_memory(result.model, task.example_input)
    print(f"budget 0.8: {result.plan.cost.memory:,} bytes, measured again {again:,}")
    assert result.plan.cost.memory <= 0.8 * prepared.dense.memory
    assert again == pytest.approx(result.plan.cost.memory, rel=0.01)


@pytest.mark.parametrize("family", ["svd_in", "svd_grouped", "tucker2", "cp_merged", "tt"])
def test_layers_and_ranks_in_one_batch_agree_with_the_cpu(family):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1))
    x = torch.randn(16, 24, 9, 9)
    layers = inventory(model, x)
    found = moments(model, layers, [x])
    ranks = DECOMPOSITIONS[family].ranks(layers[0], [0.1, 0.3, 0.6])
    weights, given = [layer.weight.detach() for layer in model], [found[layer.name] for layer in layers]
    on_gpu = [Original(x, w.cuda(), s.cuda()) for x, w, s in zip(layers, weights, given, strict=True)]
    stack = DECOMPOSITIONS[family].fit_stack(on_gpu, [ranks] * 2, 100)
    for layer, weight, moment, fits in zip(layers, weights, given, stack, strict=True):
        assert all(f.is_cuda for fit in fits for f in fit.factors)
        alone = [fit.error for fit in DECOMPOSITIONS[family].fit(layer, weight, ranks, moment, None, 100)]
        assert [fit.error for fit in fits] == pytest.approx(alone, rel=0.01)
