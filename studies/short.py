"""Study: what one epoch over the 50,000 training images buys: ResNet-20 at 40, 25 and 15 % of its parameters.

    .venv/bin/python studies/short.py                # about half an hour on one core
    .venv/bin/python studies/short.py 0.25           # one cell
    .venv/bin/python studies/short.py --minutes 10   # stops after ten, at whatever step; the same command goes on

Each cell is the `knapsack` plan of the default search space, refined, then trained for one epoch with distillation
from the dense model. The recipe was chosen on augmented training images from 45,000 on, after training on the first
45,000 (results/README.md); the test score of a cell is read once. Writes studies/results/short.{json,md}; run folders
are in runs/short. Cells in the JSON are kept: delete the file to measure anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from rankopt.core import Task
from rankopt.job import run_search
from rankopt.plan import RESULT
from rankopt.prepare import Prepared, prepare
from rankopt.progress import Bar, console, track
from rankopt.recipe import Recipe
from rankopt.retrain import retrain
from rankopt.settings import Settings
from rankopt.tasks import load_task

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "short.json"
RUNS = HERE.parent / "runs" / "short"
TARGETS = {0.25: 0.900, 0.15: 0.875, 0.4: 0.914}  # fraction of the parameters -> test score; the most telling first
RATES = {0.25: 2e-4, 0.15: 3e-4, 0.4: 1e-4}  # the gentler, the less there is to win back
RECIPE = Recipe(epochs=1, optimizer="adamw", weight_decay=0.0, distill=1.0, eval_mode=True, channels_last=True)
BATCH = 64


def resnet20() -> Task:
    """The task, to be trained on all training images."""
    task = load_task(f"{HERE}/tasks/cifar10.py:resnet20")
    return dataclasses.replace(task, train=type(task.train)(0, 50_000, BATCH))


def known() -> dict[str, Any]:
    """The cells that were measured."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def measure(fractions: Sequence[float], minutes: float) -> None:
    """Fill in the missing cells; KeyboardInterrupt when the time is over."""
    end, task = time.monotonic() + 60 * minutes, resnet20()
    prepared: Prepared | None = None
    for fraction in fractions:
        if str(fraction) in known():
            continue
        folder, bar = RUNS / str(fraction), Bar()
        if not (folder / RESULT).is_file():
            prepared = prepared or prepare(task, track=track)
            result = run_search(prepared, prepared.problem({"params": fraction}), Settings(refine=True), track=track)
            result.save(folder)
        out, recipe = folder / "trained", dataclasses.replace(RECIPE, rate=RATES[fraction])
        stop = lambda: time.monotonic() >= end  # noqa: E731
        trained = retrain(folder, task, recipe, out, resume=True, stop=stop, track=bar, note=bar.note)
        cells = known() | {str(fraction): cell(trained.info, fraction)}  # another process may have added one
        RESULTS.write_text(json.dumps(cells, indent=1))
        console.print(f"{fraction}: {cells[str(fraction)]['top1']:.2%}")


def cell(info: dict[str, Any], fraction: float) -> dict[str, Any]:
    training, cost = info["training"], info["cost"]
    return {
        "fraction": fraction,
        "params": cost["compressed"]["params"] / cost["dense"]["params"],
        "macs": cost["compressed"]["macs"] / cost["dense"]["macs"],
        "dense_top1": info["score"]["dense"]["test"],
        "top1_before": training["test_before"],
        "top1": info["score"]["compressed"]["test"],
        "interval": info["intervals"]["compressed"]["test"],
        "target": TARGETS[fraction],
        "images": 50_000,
        "recipe": training["recipe"],
        "batch": BATCH,
        "seconds": training["seconds"],
        "seed": RECIPE.seed,
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}",
        "command": f"python studies/{Path(sys.argv[0]).name}",
    }


def table(cells: dict[str, Any]) -> str:
    """The results as markdown."""
    lines = [
        "# One epoch: ResNet-20 on CIFAR-10, 50,000 images seen once",
        "",
        "Made by `python studies/short.py`. Plans: `knapsack`, search space `default`, refined, seed 0. Top-1 on the",
        "10,000 test images, read once a cell, with its 95 % interval; dense 91.73. Seconds: of the training, on",
        "a core that others used too.",
        "",
        "| parameters | MACs | top-1, no training | top-1 after the epoch | target | rate | seconds | date, machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in sorted(cells.values(), key=lambda c: -c["fraction"]):
        low, high = c["interval"]
        lines.append(
            f"| {c['params']:.2%} | {c['macs']:.2%} | {100 * c['top1_before']:.2f} "
            f"| **{100 * c['top1']:.2f}** ({100 * low:.1f}–{100 * high:.1f}) | {100 * c['target']:.1f} "
            f"| {c['recipe']['rate']:g} | {c['seconds']:.0f} | {c['date']}, {c['machine']} |"
        )
    settings = ", ".join(f"{k} {v}" for k, v in RECIPE.changed().items())
    return "\n".join([*lines, "", f"Recipe: {settings}; batches of {BATCH}; otherwise as `rankopt.Recipe()`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, and go on later")
    parser.add_argument("fractions", nargs="*", type=float, help="of the parameters [0.25 0.15 0.4]")
    given = parser.parse_args()
    try:
        measure(given.fractions or [*TARGETS], given.minutes)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
    if cells := known():
        RESULTS.with_suffix(".md").write_text(table(cells))
        print(table(cells))


if __name__ == "__main__":
    main()
