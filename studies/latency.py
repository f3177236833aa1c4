"""Study: latency budgets on networks of random weights, each promise checked on the rebuilt model.

    .venv/bin/python studies/latency.py                                    # every cell: about an hour on two cores
    .venv/bin/python studies/latency.py --only resnet18 --minutes 20       # these, most telling first
    .venv/bin/python studies/latency.py --on cuda                          # on a GPU, in three minutes
    .venv/bin/python studies/latency.py --on cpu --tiny                    # the same code, to try it

Writes studies/results/latency.{json,md}, the JSON after every cell: run again, it goes on where it stopped. A cell is
a model, a batch, a number of threads and a budget (fraction of the dense model's latency, eager mode); for it the
knapsack plan is made, rebuilt and measured in turns with the dense model, and tightened until it holds. Where plans
hold CP or Tucker layers and tltorch (PyPI: tensorly-torch 0.5.0) is installed, its factorised layers are timed beside
ours at the same ranks, in the same run.

With --on it is ResNet-18 alone, in batches of 1 and 64, float32 and bfloat16, eager and as a CUDA graph, at budgets of
0.8 and 0.6, without any fits; written to studies/results/latency_DEVICE.{json,md}, or to --out. Weights and images are
random, so the plans' accuracy means nothing and fits take no steps; what is measured is whether the latency is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from rankopt.candidates.cache import Cache
from rankopt.candidates.instruments import LATENCY
from rankopt.candidates.latency import (
    MeasuredCosts,
    expanded,
    layer_inputs,
    measure_costs,
    random_factors,
    sample_modules,
    timed_candidates,
)
from rankopt.candidates.latency_table import Conditions, machine
from rankopt.candidates.model_layers import ModelLayers
from rankopt.candidates.pareto import frontier
from rankopt.candidates.prepare import Prepared, mark_dense, prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.budget import parse_budget
from rankopt.core.errors import BudgetError
from rankopt.core.files import write_beside
from rankopt.core.problem import Problem, check_feasible
from rankopt.core.records import Candidate, Choice, Cost, Layer, Proposal, Task, Trial
from rankopt.core.result_record import Metric
from rankopt.decompositions.plan import assemble
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.model.inventory import inventory, unfolded
from rankopt.search.compress import run_search
from rankopt.search.latency_check import Checks, FinishedSearch, check, search_until_met
from rankopt.search.loop import Study
from rankopt.search.progress import show_progress
from rankopt.search.result import Result
from rankopt.search.settings import SearchSettings
from rankopt.strategies.allocation import allocate
from rankopt.strategies.registry import make_strategy

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "latency.json"
MODELS = ("resnet18", "vgg16_32", "vgg16_224")
BUDGETS = (0.7, 0.6, 0.4, 0.8)
FAMILIES_ON = ("svd_out", "svd_spatial", "tucker2")  # with --on
MINUTES_ON = 2.5
SECONDS_ON = 5.0  # after which an interval is taken as it is
PEERS = {"tucker2": "tucker", "cp_merged": "cp"}
console = Console(stderr=True)


class Cell(NamedTuple):
    """model: of MODELS; budget: fraction of the dense model's latency."""

    model: str
    batch: int
    threads: int
    budget: float
    device: str = "cpu"
    dtype: str = "float32"
    runtime: str = "eager"

    @property
    def conditions(self) -> Conditions:
        """Where and how it is measured."""
        return Conditions(self.device, self.batch, self.threads, self.runtime, self.dtype)


def cells() -> Iterator[Cell]:
    """Most telling first: small batches on one thread, small models."""
    for (batch, threads), model in product(((1, 1), (8, 2), (1, 2), (8, 1)), MODELS):
        yield from (Cell(model, batch, threads, b) for b in BUDGETS)


def cells_on(device: str, tiny: bool) -> Iterator[Cell]:
    """Most telling first: a captured graph serves one image in float32, then half precision serves many."""
    model, many = ("resnet18_32", 4) if tiny else ("resnet18", 64)
    runtimes = ("graph", "eager") if device.startswith("cuda") else ("eager",)
    for runtime, (batch, dtype) in product(
        runtimes, ((1, "float32"), (many, "bfloat16"), (many, "float32"), (1, "bfloat16"))
    ):
        yield from (Cell(model, batch, 1, budget, device, dtype, runtime) for budget in (0.8, 0.6))


def prepared_for(cell: Cell) -> Prepared:
    """Fits without steps, the Linear layers of the large VGG left alone: their moments would take 5 GB."""
    space = dataclasses.replace(
        load_space("latency"), name="latency-random", steps=0, points=6, keep_dense=("classifier.*",)
    )
    task = load_task(f"{HERE}/tasks/random_networks.py:{cell.model}")
    return prepare(task, space, progress=show_progress, budget={"latency": 0.99}, latency_on=cell.conditions)


def measure(cell: Cell, prepared: Prepared) -> dict[str, Any]:
    """One row of the table."""
    assert prepared.latencies is not None
    about = {**cell._asdict(), "date": date.today().isoformat(), "machine": machine(prepared.latencies.conditions)}
    start = time.perf_counter()
    try:
        result = run_search(
            prepared, prepared.problem({"latency": cell.budget}), SearchSettings(), progress=show_progress
        )
    except BudgetError as error:
        return {**about, "refused": " ".join(str(error).split())}
    found = result.info["latency"]
    keys = ("target", "predicted", "latency", "low", "high", "dense", "attempts", "rounds", "met", "slope", "residual")
    ratios = [x["latency"] / x["dense"] for x in found["layers"].values()]
    return {
        **about,
        **{k: found[k] for k in keys},
        "seconds": time.perf_counter() - start,
        "macs": result.plan.cost.macs / result.plan.dense.macs,
        "params": result.plan.cost.params / result.plan.dense.params,
        "factorised": len(ratios),
        "none_faster": len(found["none_faster"]),
        "slowest_layer": max(ratios, default=None),
        "methods": {
            m: sum(c.method == m for c in result.plan.choices) for m in {c.method for c in result.plan.choices}
        },
        "peers": peers(prepared, result),
    }


@dataclasses.dataclass
class Timed:
    """What a check needs of a `Prepared`, without calibration and fits: factors are random."""

    task: Task
    model: nn.Module
    layers: list[Layer]
    candidates: dict[str, list[Candidate]]
    measured: dict[Metric, MeasuredCosts]
    dense: Cost

    @classmethod
    def of(cls, cell: Cell, points: int, cache: Path) -> Timed:
        """Time the layers and their candidates, or read them from the cache."""
        space = dataclasses.replace(load_space("latency"), families=FAMILIES_ON, points=points)
        task = load_task(f"{HERE}/tasks/random_networks.py:{cell.model}")
        task.model.to(cell.device)
        model = unfolded(task.model, task.example_input, space.split_qkv)
        layers = [x for x in mark_dense(inventory(model, task.example_input), space) if x.reason is None]
        model_layers = ModelLayers(task.model, model, layers, task.example_input)
        quick = dataclasses.replace(LATENCY, seconds=SECONDS_ON)
        costs = measure_costs(model_layers, space, cell.conditions, Cache(cache), show_progress, instrument=quick)
        offers = {x.name: [c for c in timed_candidates(x, space, 400) if not c.unchanged] for x in layers}
        layers = [costs.with_layer(x) for x in layers]
        dense = count(task.model, task.example_input).with_metric("latency", costs.dense)
        candidates = {x.name: costs.with_candidates(x, map(partial(guessed, x), offers[x.name])) for x in layers}
        return cls(task, model, layers, candidates, {"latency": costs}, dense)

    def problem(self, budget: float) -> Problem:
        """Candidates that are no slower than their layers, as `Prepared.problem` has it."""
        offers = [[c for c in self.candidates[x.name] if c.cost.latency <= x.cost.latency] for x in self.layers]
        frontiers = tuple(frontier(x, some, ["latency"]) for x, some in zip(self.layers, offers, strict=True))
        problem = Problem(tuple(self.layers), frontiers, self.dense, parse_budget({"latency": budget}, self.dense))
        check_feasible(problem)
        return problem

    def apply(self, problem: Problem, proposal: Proposal) -> nn.Module:
        """The model of a plan."""
        chosen = problem.candidates(proposal)
        return assemble(self.task.model, problem.layers, chosen, lambda new, _: random_factors(new))


def guessed(layer: Layer, candidate: Candidate) -> Candidate:
    """With a loss that grows as MACs are saved: what random weights would lose says nothing of trained ones."""
    saved = 1 - candidate.cost.macs / layer.cost.macs
    return dataclasses.replace(candidate, error=saved, loss=saved**2 * layer.cost.macs)


def best_plan(problem: Problem) -> FinishedSearch:
    """The plan of least loss, as a finished search."""
    proposal = allocate(problem).proposal
    trial = Trial(0, proposal, "finished", problem.cost(proposal), objective=problem.loss(proposal))
    return FinishedSearch(problem, Study(problem, make_strategy("knapsack", problem, 0), 1), [trial], trial)


def measure_on(cell: Cell, timed: Timed) -> dict[str, Any]:
    """One row of the table, with --on: the check of `run_search`, without its search."""
    costs = timed.measured["latency"]
    about = {**cell._asdict(), "date": date.today().isoformat(), "machine": costs.machine}
    start = time.perf_counter()
    try:
        problem = timed.problem(cell.budget)
        limits = problem.limits

        def checked(problem: Problem, proposal: Proposal) -> Checks:
            return tuple(check(timed, limit, problem, proposal) for limit in limits)

        finished, (done,) = search_until_met(best_plan(problem), checked, best_plan, show_progress)
    except BudgetError as error:
        return {**about, "refused": " ".join(str(error).split())}
    chosen = finished.problem.candidates(finished.chosen.proposal)
    total = finished.problem.cost(finished.chosen.proposal)
    ratios = [small.ns / dense.ns for dense, small in done.layers.values()]
    about |= {k: v for k, v in done.entry().items() if k != "layers"}
    return {
        **about,
        "slope": costs.slope,
        "residual": costs.residual,
        "seconds": time.perf_counter() - start,
        "macs": total.macs / timed.dense.macs,
        "params": total.params / timed.dense.params,
        "factorised": len(ratios),
        "none_faster": sum(len(f) == 1 for f in problem.frontiers),
        "slowest_layer": max(ratios, default=None),
        "methods": {m: sum(c.method == m for c in chosen) for m in {c.method for c in chosen}},
        "peers": [],
    }


def peers(prepared: Prepared, result: Result) -> list[dict[str, Any]]:
    """Layers of the plan that tltorch has, too: nanoseconds dense, ours and tltorch's, timed in turns."""
    if importlib.util.find_spec("tltorch") is None:
        return []
    assert prepared.latencies is not None
    conditions = prepared.latencies.conditions
    by_name = {x.name: x for x in prepared.free}
    chosen = [c for c in result.plan.choices if c.method in PEERS and by_name[c.name].kind == "Conv2d"]
    layers = [by_name[c.name] for c in chosen]
    inputs = layer_inputs(prepared.model, layers, expanded(prepared.task.example_input, conditions.batch))
    rows = []
    for choice, layer in zip(chosen, layers, strict=True):
        dense = prepared.model.get_submodule(layer.name)
        ours = random_factors(DECOMPOSITIONS[choice.method].build(dense, layer, choice.rank))
        times = sample_modules([dense, ours, theirs(dense, layer, choice)], inputs[layer.name], conditions)
        row = dict(zip(("dense", "ours", "tltorch"), map(median, times), strict=True))
        rows.append({"layer": layer.name, "method": choice.method, "rank": choice.rank, **row})
    return rows


def theirs(conv: nn.Module, layer: Layer, choice: Choice) -> nn.Module:
    """tltorch's factorised convolution at the same rank; of Tucker the kernel's modes in full, as ours has them."""
    import tltorch

    rank: Any = choice.rank[0] if choice.method == "cp_merged" else (*choice.rank[::-1], *layer.kernel)
    module = tltorch.FactorizedConv(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], order=2, stride=conv.stride[0],
        padding=conv.padding[0], bias=conv.bias is not None, factorization=PEERS[choice.method], rank=rank,
        implementation="factorized",
    )  # fmt: skip
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.02)
    return module.eval()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "# Latency budgets, checked on the rebuilt models",
        "",
        "Made by `python studies/latency.py`, seed 0, random weights. Latency: median of the ratio",
        "to the dense model, measured in turns, with its 95 % interval; a row is met if the upper end is within the",
        "budget. Speed-up/MACs: (1/latency) / (1/MACs), 1 if time fell as MACs did. Slowest: of the factorised layers,",
        "over the dense layer. tltorch: its layers' time over ours at the same ranks, median (number of layers).",
        "",
        "| model | batch | threads | runtime | budget | latency (95 %) | met | attempts | dense ms | MACs | "
        "speed-up/MACs | layers | slowest | left dense | tltorch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        runtime = " ".join(r.get(k, default) for k, default in Cell._field_defaults.items())
        start = f"| {r['model']} | {r['batch']} | {r['threads']} | {runtime} | {r['budget']:.2f} | "
        if "refused" in r:
            least = re.search(r"[\d.]+ % of dense", r["refused"])
            lines.append(f"{start}refused: {f'the least is {least[0]}' if least else r['refused']} ||||||||||")
            continue
        whole = r["target"] / r["budget"]
        share, low, high = (r[k] / whole for k in ("latency", "low", "high"))
        ratios = sorted(p["tltorch"] / p["ours"] for p in r["peers"])
        peer = f"{ratios[len(ratios) // 2]:.2f} ({len(ratios)})" if ratios else "–"
        slowest = "–" if r["slowest_layer"] is None else f"{r['slowest_layer']:.2f}"
        lines.append(
            f"{start}{share:.3f} ({low:.3f} to {high:.3f}) | {'yes' if r['met'] else 'NO'} | {r['attempts']} | "
            f"{r['dense'] / 1e6:.3g} | {r['macs']:.2f} | {r['macs'] / share:.2f} | {r['factorised']} | {slowest} | "
            f"{r['none_faster']} | {peer} |"
        )
    dates = ", ".join(sorted({f"{r['machine']} on {r['date']}" for r in rows}))
    return "\n".join([*lines, "", f"Measured: {dates}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--minutes", type=float, help="minutes after which no further cell starts")
    parser.add_argument("--on", help="a device: ResNet-18 there, in three minutes")
    parser.add_argument("--tiny", action="store_true", help="with --on: images of 32 x 32, batches of 1 and 4")
    parser.add_argument("--out", type=Path, help="the JSON file; the table goes beside it")
    given = parser.parse_args()
    end = time.monotonic() + 60 * (given.minutes or (MINUTES_ON if given.on else math.inf))
    out = given.out or (RESULTS.with_stem(f"latency_{given.on}") if given.on else RESULTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    points = 2 if given.tiny else 4
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.is_file() else []
    done = {Cell(**{k: r[k] for k in Cell._fields if k in r}) for r in rows}
    prepared: Any = None
    last = None
    for cell in cells_on(given.on, given.tiny) if given.on else cells():
        if cell in done or (not given.on and cell.model not in given.only) or time.monotonic() > end:
            continue
        if prepared is None or last != cell._replace(budget=0):
            start = time.monotonic()
            prepared = Timed.of(cell, points, out.parent / "cache") if given.on else prepared_for(cell)
            last = cell._replace(budget=0)
            console.print(f"{cell.conditions}: prepared in {time.monotonic() - start:.1f} s")
        rows.append(measure_on(cell, prepared) if given.on else measure(cell, prepared))
        write_beside(out, lambda p: p.write_text(json.dumps(rows, indent=1)))
        console.print(table(rows[-1:]).splitlines()[-3], soft_wrap=True, markup=False)
    write_beside(out.with_suffix(".md"), lambda p: p.write_text(table(rows)))
    print(table(rows))


if __name__ == "__main__":
    main()
