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
0.8 and 0.6; written to studies/results/latency_DEVICE.{json,md}, or to --out. Weights and images are random, so the
plans' accuracy means nothing and fits take no steps; what is measured is whether the latency is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
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
MODELS = ("resnet18", "vgg16_32", "vgg16_224")
BUDGETS = (0.7, 0.6, 0.4, 0.8)
FAMILIES_ON = ("svd_out", "svd_spatial", "tucker2")  # with --on
MINUTES_ON = 2.5
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


def prepared_for(cell: Cell, **smaller: Any) -> Prepared:
    """Fits without steps, the Linear layers of the large VGG left alone: their moments would take 5 GB."""
    space = dataclasses.replace(
        load_space("latency"),
        **{"name": "latency-random", "steps": 0, "points": 6, "keep_dense": ("classifier.*",)} | smaller,
    )
    task = load_task(f"{HERE}/tasks/random_networks.py:{cell.model}")
    task.model.to(cell.device)
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
        "over the dense layer. tltorch: its layers' time over ours at the same ranks, median (of so many layers).",
        "",
        "| model | batch | threads | runtime | budget | latency (95 %) | met | attempts | dense ms | MACs | "
        "speed-up/MACs | layers | slowest | left dense | tltorch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        runtime = " ".join(r.get(k, default) for k, default in Cell._field_defaults.items())
        start = f"| {r['model']} | {r['batch']} | {r['threads']} | {runtime} | {r['budget']:.2f} | "
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
            f"{r['dense'] / 1e6:.3g} | {r['macs']:.2f} | {r['macs'] / share:.2f} | {r['factorised']} | {slowest} | "
            f"{r['none_faster']} | {peer} |"
        )
    dates = ", ".join(sorted({f"{r['machine']} on {r['date']}" for r in rows}))
    return "\n".join([*lines, "", f"Measured: {dates}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--minutes", type=float, help="start no cell after so many")
    parser.add_argument("--on", help="a device: ResNet-18 there, in three minutes")
    parser.add_argument("--tiny", action="store_true", help="with --on: images of 32 x 32, batches of 1 and 4")
    parser.add_argument("--out", type=Path, help="the JSON file; the table goes beside it")
    given = parser.parse_args()
    end = time.monotonic() + 60 * (given.minutes or (MINUTES_ON if given.on else math.inf))
    out = given.out or (RESULTS.with_stem(f"latency_{given.on}") if given.on else RESULTS)
    smaller: dict[str, Any] = {"families": FAMILIES_ON, "points": 2 if given.tiny else 4} if given.on else {}
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.is_file() else []
    done = {Cell(**{k: r[k] for k in Cell._fields if k in r}) for r in rows}
    prepared, last = None, None
    for cell in cells_on(given.on, given.tiny) if given.on else cells():
        if cell in done or (not given.on and cell.model not in given.only) or time.monotonic() > end:
            continue
        if prepared is None or last != cell._replace(budget=0):
            start = time.monotonic()
            prepared, last = prepared_for(cell, **smaller), cell._replace(budget=0)
            console.print(f"prepared for {cell.conditions} in {time.monotonic() - start:.1f} s")
        rows.append(measure(cell, prepared))
        write_beside(out, lambda p: p.write_text(json.dumps(rows, indent=1)))
        console.print(table(rows[-1:]).splitlines()[-3], soft_wrap=True, markup=False)
    write_beside(out.with_suffix(".md"), lambda p: p.write_text(table(rows)))
    print(table(rows))


if __name__ == "__main__":
    main()
