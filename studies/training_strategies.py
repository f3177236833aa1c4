"""Strategies that train, beside knapsack's plan trained for the same steps: ResNet-20 at a quarter of its parameters.

    python studies/training_strategies.py [--steps 352] [--budget params=0.25] [--seed 0] [--out studies/results]

All train with one recipe (AdamW, nine parts of distillation from the dense model to one of labels) on the same batches
of 128 augmented images in the same order; 352 steps are one epoch. Trainings of this length choose between strategies,
and say little of what long ones end with. Writes training_strategies.json and .md, after every row. Test images are
read once a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.problem import Problem
from rankopt.core.progress import silent
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.strategies.registry import make_strategy
from rankopt.strategies.trained import RECIPE, Trainer

TASK = f"{Path(__file__).parent}/tasks/cifar10.py:resnet20"


SPACE = SearchSpace(
    name="training", families=("svd_out", "svd_in", "svd_spatial", "tucker2", "cp_merged"), points=12, steps=100
)
"""Short fits: the weights are trained anyway."""


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("knapsack", {}),
    ("lasso-train", {}),
    ("differentiable", {}),
    ("lc", {}),
]


def trained(prepared: Prepared, problem: Problem, name: str, options: dict[str, Any], steps: int, seed: int) -> Any:
    """A strategy's network after some steps of training."""
    if name != "knapsack":
        strategy = make_strategy(name, problem, seed, {**options, "steps": steps})
        strategy.measure(prepared, silent)
        return strategy.network.model
    strategy = make_strategy(name, problem, seed, options)
    strategy.measure(prepared, silent)
    model = prepared.apply(problem, strategy.ask())
    if steps:
        Trainer(prepared, dataclasses.replace(RECIPE, seed=seed), steps, 0, silent)(model, steps)
    return model


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=352)
    parser.add_argument("--budget", default="params=0.25")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(load_task(TASK), SPACE, workers=1)
    task, problem = prepared.task, prepared.problem([args.budget])
    device = next(task.model.parameters()).device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    about = {
        "command": f"python studies/training_strategies.py --steps {args.steps} --budget {args.budget}",
        "seed": args.seed,
        "machine": f"{where}, one thread, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    rows: list[dict[str, Any]] = []
    for name, options, steps in [("knapsack", {}, 0), *((n, o, args.steps) for n, o in RUNS)]:
        before = time.process_time()
        model = trained(prepared, problem, name, options, steps, args.seed)
        seconds = time.process_time() - before
        label = name if name != "knapsack" else f"knapsack{' + train' * bool(steps)}"
        row = {
            "strategy": ":".join([label, *(f"{k}={v}" for k, v in options.items())]),
            "steps": steps,
            "params": count(model, task.example_input).params / prepared.dense.params,
            "objective": prepared.objective(model),
            "test": task.test(model) if task.test else None,
            "seconds": round(seconds),
        }
        rows.append(row)
        print(row, flush=True)
        write(args.out, about, rows)


def write(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the table so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "training_strategies.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
    lines = [
        f"ResNet-20, `{about['command']}`, seed {about['seed']}; {about['machine']}; {about['date']}.",
        "",
        "| strategy | steps | parameters | KL from the dense model | test accuracy | CPU seconds |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['strategy']} | {r['steps']} | {r['params']:.2%} | {r['objective']:.4f} | {r['test']:.2%} "
            f"| {r['seconds']} |"
            for r in rows
        ),
    ]
    (out / "training_strategies.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
