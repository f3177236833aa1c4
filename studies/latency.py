"""Study: latency budgets on networks of random weights, each promise checked on the rebuilt model.

    .venv/bin/python studies/latency.py                                    # every cell: about an hour on two cores
    .venv/bin/python studies/latency.py --only resnet18 --minutes 20       # these, most telling first

Writes studies/results/latency.{json,md}, the JSON after every cell: run again, it goes on where it stopped. A cell is
a model, a batch, a number of threads and a budget (fraction of the dense model's latency, eager mode); for it the
knapsack plan is made, rebuilt and measured in turns with the dense model, and tightened until it holds. Where plans
hold CP or Tucker layers and tltorch (PyPI: tensorly-torch 0.5.0) is installed, its factorised layers are timed beside
ours at the same ranks, in the same run. Weights and images are random, so the plans' accuracy means nothing and fits
take no steps; what is measured is whether the latency is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Iterator
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from rankopt.candidates.latency import expanded, layer_inputs, random_factors, sample_modules
from rankopt.candidates.latency_table import Conditions, machine
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.errors import BudgetError
from rankopt.core.files import write_beside
from rankopt.core.records import Choice, Layer
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import run_search
from rankopt.search.progress import show_progress
from rankopt.search.result import Result
from rankopt.search.settings import SearchSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "latency.json"
MODELS = {"resnet18": "resnet18", "vgg16_32": "vgg16_32", "vgg16_224": "vgg16_224"}
BUDGETS = (0.7, 0.6, 0.4, 0.8)
PEERS = {"tucker2": "tucker", "cp_merged": "cp"}
console = Console(stderr=True)


class Cell(NamedTuple):
    """model: of MODELS; budget: fraction of the dense model's latency."""

    model: str
    batch: int
    threads: int
    budget: float


def cells() -> Iterator[Cell]:
    """Most telling first: small batches on one thread, small models."""
    for (batch, threads), model in product(((1, 1), (8, 2), (1, 2), (8, 1)), MODELS):
        yield from (Cell(model, batch, threads, b) for b in BUDGETS)


def prepared_for(cell: Cell) -> Prepared:
    """Fits without steps, the Linear layers of the large VGG left alone: their moments would take 5 GB."""
    space = dataclasses.replace(
        load_space("latency"), name="latency-random", steps=0, points=6, keep_dense=("classifier.*",)
    )
    conditions = Conditions(batch=cell.batch, threads=cell.threads)
    task = load_task(f"{HERE}/tasks/random_networks.py:{MODELS[cell.model]}")
    return prepare(task, space, progress=show_progress, budget={"latency": 0.99}, latency_on=conditions)


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
        return {**about, "refused": str(error)}
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
        "Made by `python studies/latency.py`, seed 0, eager mode, random weights. Latency: median of the ratio",
        "to the dense model, measured in turns, with its 95 % interval; a row is met if the upper end is within the",
        "budget. Speed-up/MACs: (1/latency) / (1/MACs), 1 if time fell as MACs did. Slowest: of the factorised layers,",
        "over the dense layer. tltorch: its layers' time over ours at the same ranks, median (of so many layers).",
        "",
        "| model | batch | threads | budget | latency (95 %) | met | attempts | dense ms | MACs | speed-up/MACs | "
        "layers | slowest | left dense | tltorch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        start = f"| {r['model']} | {r['batch']} | {r['threads']} | {r['budget']:.2f} | "
        if "refused" in r:
            lines.append(f"{start} refused: {r['refused']} ||||||||||")
            continue
        whole = r["target"] / r["budget"]
        share, low, high = (r[k] / whole for k in ("latency", "low", "high"))
        ratios = sorted(p["tltorch"] / p["ours"] for p in r["peers"])
        peer = f"{ratios[len(ratios) // 2]:.2f} ({len(ratios)})" if ratios else "–"
        slowest = "–" if r["slowest_layer"] is None else f"{r['slowest_layer']:.2f}"
        lines.append(
            f"{start}{share:.3f} ({low:.3f} to {high:.3f}) | {'yes' if r['met'] else 'NO'} | {r['attempts']} | "
            f"{r['dense'] / 1e6:.1f} | {r['macs']:.2f} | {r['macs'] / share:.2f} | {r['factorised']} | {slowest} | "
            f"{r['none_faster']} | {peer} |"
        )
    dates = ", ".join(sorted({f"{r['machine']} on {r['date']}" for r in rows}))
    return "\n".join([*lines, "", f"Measured: {dates}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    done = {Cell(*(r[k] for k in Cell._fields)) for r in rows}
    prepared, last = None, None
    for cell in cells():
        if cell in done or cell.model not in given.only or time.monotonic() > end:
            continue
        if prepared is None or last != cell[:3]:
            prepared, last = prepared_for(cell), cell[:3]
        rows.append(measure(cell, prepared))
        write_beside(RESULTS, lambda p: p.write_text(json.dumps(rows, indent=1)))
        console.print(table(rows[-1:]).splitlines()[-3], soft_wrap=True, markup=False)
    RESULTS.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
