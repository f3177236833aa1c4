"""Study: rank x precision under one budget in bytes, on pretrained ResNet-20, without any training.

    .venv/bin/python studies/bits.py            # all cells, about 10 minutes on one core once the fits are cached

Three searches share their candidates: `rank` (the default families, weights in float32), `bits` (dense layers in
float16 or int8) and `rank x bits` (search space `bits`: both). Each cell is one `knapsack` plan; its test accuracy is
read once. Writes studies/results/bits.{json,md,png}, the JSON after every cell: run again, it goes on where it
stopped; delete it to measure anew. A budget that a search cannot meet is a cell too: it names the least that it can.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as bar

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.errors import BudgetError
from rankopt.core.files import write_beside
from rankopt.core.records import DENSE, SAME, Candidate
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.model.objective import call
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "bits.json"
MODES: dict[str, Callable[[Candidate], bool]] = {
    "rank x bits": lambda c: True,
    "rank": lambda c: c.precision == SAME,
    "bits": lambda c: c.method == DENSE,
}
FRACTIONS = (0.25, 0.15, 0.10, 0.06, 0.5, 0.35, 0.26)
SEED = 0
console = Console(stderr=True)


def measure(prepared: Prepared, mode: str, fraction: float, test: Any) -> dict[str, Any]:
    """One cell: the plan of a search at a share of the dense model's bytes, and its test accuracy."""
    allowed = {n: [c for c in found if MODES[mode](c)] for n, found in prepared.candidates.items()}
    mine = dataclasses.replace(prepared, candidates=allowed)
    about = {
        "mode": mode,
        "fraction": fraction,
        "seed": SEED,
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} thread, {platform.machine()}, torch {torch.__version__}",
    }
    try:
        problem = mine.problem({"bytes": fraction})
    except BudgetError as error:
        return {**about, "infeasible": str(error)}
    start = time.process_time()
    result = run_search(mine, problem, SearchSettings("knapsack", seed=SEED))
    seconds, cost = time.process_time() - start, count(result.model, mine.task.example_input)
    return {
        **about,
        "bytes": cost.bytes,
        "bytes_of_dense": cost.bytes / prepared.dense.bytes,
        "params": cost.params / prepared.dense.params,
        "macs": cost.macs / prepared.dense.macs,
        "kl": result.info["objective"]["best"],
        "top1": call("the test score", test, result.model),
        "cpu_seconds": round(seconds, 1),
        "precisions": Counter(c.precision for c in result.plan.choices),
        "methods": Counter(c.method for c in result.plan.choices),
    }


def row(cell: dict[str, Any]) -> str:
    if "infeasible" in cell:
        return f"| {cell['mode']} | {cell['fraction']:.0%} | not possible: {cell['infeasible']} | | | | | | |"
    counts = [", ".join(f"{n} {k}" for k, n in sorted(cell[x].items(), key=lambda i: -i[1])) for x in SHOWN]
    return (
        f"| {cell['mode']} | {cell['fraction']:.0%} | {cell['bytes_of_dense']:.2%} | {cell['params']:.1%} "
        f"| {cell['macs']:.1%} | **{100 * cell['top1']:.2f}** | {cell['kl']:.4f} | {' | '.join(counts)} |"
    )


SHOWN = ("precisions", "methods")


def table(found: dict[str, Any]) -> str:
    """The results as markdown."""
    cells = sorted(found["cells"], key=lambda c: (-c["fraction"], list(MODES).index(c["mode"])))
    lines = [
        "# Rank x precision under one budget in bytes: ResNet-20, without any training",
        "",
        f"Made by `python studies/bits.py`; strategy `knapsack`, seed {SEED}, no training. Top-1 on the 10,000 test "
        f"images, read once a cell; dense: {100 * found['dense_top1']:.2f} % at {found['dense_bytes']:,} bytes.",
        "Bytes are of all parameters and buffers as stored, counted on the rebuilt model: scales and the float32 batch "
        "norms (1.0 % of dense) included. `same`: float32. KL: divergence from the dense model on 2,000 augmented "
        "training images, what the search minimises.",
        "",
        "| search | budget | bytes | parameters | MACs | top-1 | KL | layers by precision | layers by method |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(row, cells),
        "",
        f"{cells[0]['machine']}, {min(c['date'] for c in cells)} to {max(c['date'] for c in cells)}.",
    ]
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Any]) -> None:
    """Top-1 against bytes kept, a line for each search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    styles = {"rank x bits": ("ko-", 2.5), "rank": ("C0s-", 1.2), "bits": ("C1^", 1.2)}
    for mode, (style, width) in styles.items():
        done = sorted((c["bytes_of_dense"], c["top1"]) for c in found["cells"] if c["mode"] == mode and "top1" in c)
        axes.plot([100 * b for b, _ in done], [100 * t for _, t in done], style, lw=width, ms=5, label=mode)
    axes.axhline(100 * found["dense_top1"], color="gray", ls=":", lw=1)
    axes.annotate(f"dense {100 * found['dense_top1']:.2f} %", (40, 100 * found["dense_top1"] + 1), color="gray")
    axes.set(xlabel="bytes kept, % of the whole model", ylabel="top-1 on CIFAR-10 test, %", ylim=(5, 97), xlim=(0, 55))
    axes.set_title("ResNet-20 under a budget in bytes, without training")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main() -> None:
    torch.set_num_threads(1)
    task = load_task(f"{HERE}/tasks/cifar10.py:resnet20")
    silent = dataclasses.replace(task, score=None, test=None)  # here test data are read once a cell, and no other
    prepared = prepare(
        silent,
        load_space("bits").adjusted(effort="thorough"),
        progress=lambda x, what, n: bar(x, what, n, console=console),
        workers=1,
    )
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": []}
    found |= {"command": "python studies/bits.py", "dense_bytes": prepared.dense.bytes}
    if "dense_top1" not in found:
        found["dense_top1"] = call("the test score", task.test, task.model)
    done = {(c["mode"], c["fraction"]) for c in found["cells"]}
    for fraction, mode in [(f, m) for f in FRACTIONS for m in MODES if (m, f) not in done]:
        found["cells"].append(measure(prepared, mode, fraction, task.test))
        write_beside(RESULTS, lambda p: p.write_text(json.dumps(found, indent=1)))
        console.print(row(found["cells"][-1]))
    RESULTS.with_suffix(".md").write_text(table(found))
    picture(found)
    print(table(found))


if __name__ == "__main__":
    main()
