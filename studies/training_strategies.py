"""Strategies that train, beside knapsack's plan trained for the same steps: ResNet-20 at a quarter of its parameters.

    python studies/training_strategies.py                                      # an epoch of 352 steps; for a GPU
    python studies/training_strategies.py --steps 60 --batch 32 --images 500 --test 2000    # minutes on a CPU
    python studies/training_strategies.py --task digits --steps 400 --seeds 3

All train with one recipe (AdamW, nine parts of distillation from the dense model to one of labels) on the same batches
in the same order. Trainings of this length choose between strategies, and say little of what long ones end with. Writes
studies/results/training_strategies_TASK.json and .md, after every row. Test images are read once a row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.environment import processor
from rankopt.core.problem import Problem
from rankopt.core.progress import silent
from rankopt.core.records import Task
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.strategies.registry import make_strategy
from rankopt.strategies.trained import RECIPE, Trainer

HERE = Path(__file__).parent


SPACE = SearchSpace(
    name="training", families=("svd_out", "svd_spatial", "cp_merged"), points=8, steps=40, effort=THOROUGH
)
"""Short fits: the weights are trained anyway."""


RUNS = ("knapsack", "lasso-train", "differentiable", "lc")


def trained(prepared: Prepared, problem: Problem, name: str, steps: int, seed: int) -> Any:
    """A strategy's network after some steps of training."""
    strategy = make_strategy(name, problem, seed, {} if name == "knapsack" else {"steps": steps})
    strategy.measure(prepared, silent)
    if strategy.trains:
        return strategy.network.model
    model = prepared.apply(problem, strategy.ask())
    if steps:
        Trainer(prepared, dataclasses.replace(RECIPE, seed=seed), steps, 0, silent)(model, steps)
    return model


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=("resnet20", "digits"), default="resnet20")
    parser.add_argument("--budget", default="params=0.25")
    parser.add_argument("--steps", type=int, default=352)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="images of a step, of resnet20")
    parser.add_argument("--images", type=int, default=2000, help="images that candidates are fitted on, of resnet20")
    parser.add_argument("--test", type=int, default=10_000, help="test images, of resnet20")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(load(args.task, args.images, args.batch, args.test), SPACE, workers=1)
    task, problem = prepared.task, prepared.problem([args.budget])
    device = next(task.model.parameters()).device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {os.cpu_count()} cores"
    about = {
        "command": f"python {' '.join(['studies/training_strategies.py', *without_out(sys.argv[1:])])}",
        "machine": f"{where}, one thread, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    rows: list[dict[str, Any]] = []
    runs = [("knapsack", 0, 0), *((name, args.steps, seed) for seed in range(args.seeds) for name in RUNS)]
    for name, steps, seed in runs:
        before = time.process_time()
        model = trained(prepared, problem, name, steps, seed)
        seconds = time.process_time() - before
        row = {
            "strategy": name if name != "knapsack" else f"knapsack{' + train' * bool(steps)}",
            "steps": steps,
            "seed": seed,
            "params": count(model, task.example_input).params / prepared.dense.params,
            "objective": prepared.objective(model),
            "test": task.test(model) if task.test else None,
            "seconds": round(seconds),
        }
        rows.append(row)
        print(row, flush=True)
        write(args.out / f"training_strategies_{args.task}", about, rows)


def load(name: str, images: int, batch: int = 128, tested: int = 10_000) -> Task:
    """The task, of the size that is asked for."""
    if name == "digits":
        return load_task("digits")
    task = load_task(f"{HERE}/tasks/cifar10.py:resnet20")
    calibration = torch.cat(list(task.calibration))[:images].split(500)
    train: Any = copy.copy(task.train)
    train.size = batch
    test = copy.copy(task.test)
    test.where = ("test", 0, tested)  # type: ignore[union-attr]
    return dataclasses.replace(task, calibration=calibration, train=train, test=test, test_examples=tested)


def without_out(words: list[str]) -> list[str]:
    """A command's words without --out, which does not change the figures."""
    at = words.index("--out") if "--out" in words else len(words)
    return words[:at] + words[at + 2 :]


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the table so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1))
    lines = [
        f"`{about['command']}`; {about['machine']}; {about['date']}.",
        "",
        "| strategy | steps | seed | parameters | KL from the dense model | test accuracy | CPU seconds |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['strategy']} | {r['steps']} | {r['seed']} | {r['params']:.2%} | {r['objective']:.4f} "
            f"| {r['test']:.2%} | {r['seconds']} |"
            for r in rows
        ),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
