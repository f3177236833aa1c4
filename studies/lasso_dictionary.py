"""What the calibration Lasso's dictionary should hold: the SVD's components alone, or other families' with them.

    python studies/lasso_dictionary.py [--images 500] [--out studies/results]

ResNet-20, KL divergence from the dense model on the calibration images, without training. Writes lasso_dictionary.md.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from training_strategies import HERE, SPACE, load

from rankopt.candidates.prepare import prepare
from rankopt.core.environment import processor
from rankopt.core.progress import silent
from rankopt.strategies.registry import make_strategy

BUDGETS = ("params=0.25", "params=0.3", "params=0.5", "macs=0.3", "macs=0.5")


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("lasso", {"dictionary": "svd"}),
    ("lasso", {"dictionary": "families"}),
    ("uniform", {}),
    ("knapsack", {"contenders": 1}),
]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(load("resnet20", args.images), SPACE, workers=1)
    names = [":".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in RUNS]
    machine = f"{processor()}, one thread, torch {torch.__version__}; {datetime.now(UTC).date().isoformat()}"
    lines = [
        f"KL divergence of ResNet-20's plans without training; `python studies/lasso_dictionary.py --images "
        f"{args.images}`; {machine}.",
        "",
        f"| budget | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for budget in BUDGETS:
        problem, cells = prepared.problem([budget]), []
        for name, options in RUNS:
            strategy, before = make_strategy(name, problem, 0, options), time.process_time()
            strategy.measure(prepared, silent)
            model = prepared.apply(problem, strategy.ask() or ())
            cells.append(f"{prepared.objective(model):.4f} ({time.process_time() - before:.1f} s)")
        lines.append(f"| {budget} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lasso_dictionary.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
