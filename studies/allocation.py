"""Study: how allocation scales with layers, ours against `scipy.optimize.milp` on the whole problem.

    python studies/allocation.py    # about a minute of one core

Writes studies/results/allocation.{json,md,png}. Problems are drawn with seed 0: 64 candidates a layer, errors that
decay with cost at the layer's own rate, log-normal sensitivities, one limit at 40 % of dense parameters. One thread;
seconds are CPU time of the process, so that a busy machine does not lengthen them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is loaded

import numpy as np
import scipy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

from rankopt.core.budget import Limit
from rankopt.core.environment import processor
from rankopt.core.problem import Problem
from rankopt.core.records import METRICS, Candidate, Cost, Layer
from rankopt.strategies.allocation import allocate, relative_gap

RESULTS = Path(__file__).parent / "results" / "allocation.json"
SIZES = (10, 30, 100, 300, 1_000, 3_000, 10_000)
LARGEST_MILP = 1_000
SEED = 0


def random_problem(layers: int, candidates: int = 64, limits: int = 1, share: float = 0.4, seed: int = SEED) -> Problem:
    """Layers of 10,000 to 2 million weights with noisy error curves; dense comes last."""
    rng = np.random.default_rng(seed)
    found, frontiers = [], []
    for i in range(layers):
        size, maps = int(rng.integers(10_000, 2_000_000)), int(rng.choice([1, 16, 49, 196]))
        decay, weight = rng.uniform(2, 10), math.exp(rng.normal(0, 1.5))
        params = (np.sort(rng.uniform(0.02, 1, candidates - 1)) * size).astype(int)
        macs = (params * maps * rng.uniform(0.8, 1.2, len(params))).astype(int)
        errors = np.sort(np.exp(-decay * params / size) * rng.uniform(0.7, 1, len(params)))[::-1]
        costs = [Cost(int(p), int(m), 4 * int(p)) for p, m in zip(params, macs, strict=True)]
        menu = [Candidate("svd_out", (1,), c, float(e), float(e * weight)) for c, e in zip(costs, errors, strict=True)]
        cost = Cost(size, size * maps, 4 * size)
        found.append(Layer(f"layer{i}", "Linear", (1, size), cost=cost))
        frontiers.append((*menu, Candidate("dense", (), cost, 0.0)))
    dense = Cost(*(sum(x.cost[m] for x in found) for m in METRICS))
    targets = tuple(Limit(m, share, int(share * dense[m])) for m in METRICS[:limits])
    return Problem(tuple(found), tuple(frontiers), dense, targets)


def plain_milp(problem: Problem, gap: float) -> tuple[float, float]:
    """(loss, bound) of the whole problem given to HiGHS. gap: relative, at which it may stop."""
    losses = np.array([c.loss for f in problem.frontiers for c in f])
    scale = 1e4 / losses.max()
    constraints = [LinearConstraint(block_diag([np.ones((1, len(f))) for f in problem.frontiers], "csr"), 1, 1)]
    for limit in problem.limits:
        costs = np.array([c.cost[limit.metric] for f in problem.frontiers for c in f], float)
        room = limit.target - problem.fixed[limit.metric]
        constraints.append(LinearConstraint(costs / costs.max(), -np.inf, room / costs.max()))
    found = milp(
        losses * scale,
        constraints=constraints,
        integrality=np.ones(len(losses)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap, "time_limit": 60.0, "presolve": False},
    )
    return float(found.fun / scale), float(found.mip_dual_bound / scale)


def measure(layers: int) -> dict[str, Any]:
    """Seconds (the median of three; milp once) and certified gaps; each call gets a problem without cached arrays."""
    problem = random_problem(layers)
    seconds = []
    for _ in range(3):
        fresh = Problem(problem.layers, problem.frontiers, problem.dense, problem.limits)
        start = time.process_time()
        found = allocate(fresh)
        seconds.append(time.process_time() - start)
    row: dict[str, Any] = {"layers": layers, "ours_seconds": sorted(seconds)[1], "ours_gap": found.gap}
    if layers <= LARGEST_MILP:
        start = time.process_time()
        loss, bound = plain_milp(problem, gap=1e-3)
        row |= {"milp_seconds": time.process_time() - start, "milp_gap": relative_gap(loss, bound)}
        row["ours_over_milp_loss"] = float(found.loss / loss)
    return row


def table(record: dict[str, Any]) -> str:
    lines = [
        "# Allocation: seconds against layers",
        "",
        f"`python studies/allocation.py` on {record['date']}, seed {SEED}, {record['machine']}, one thread.",
        "CPU seconds. 64 candidates a layer, one limit at 40 % of dense. Ours: median of three, arrays built",
        "each time. milp: the whole problem given to HiGHS, allowed to stop at a gap of 0.1 %, once.",
        "",
        "| layers | ours, s | certified gap | milp, s | certified gap | loss, ours / milp |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        other = "– | – | –"
        if "milp_seconds" in row:
            other = f"{row['milp_seconds']:.3f} | {row['milp_gap']:.4%} | {row['ours_over_milp_loss']:.6f}"
        lines.append(f"| {row['layers']:,} | {row['ours_seconds']:.3f} | {row['ours_gap']:.4%} | {other} |")
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, label, marker in (("milp_seconds", "milp on the whole problem", "s"), ("ours_seconds", "rankopt", "o")):
        points = [(row["layers"], row[key]) for row in record["rows"] if key in row]
        axes.loglog(*zip(*points, strict=True), marker=marker, label=label)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="layers (64 candidates each)", ylabel="CPU seconds, one thread")
    axes.set_title("Allocation with a certified gap of at most 0.1 %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main() -> None:
    machine = f"{processor()}, Python {platform.python_version()}, scipy {scipy.__version__}"
    record: dict[str, Any] = {"date": str(date.today()), "machine": machine, "seed": SEED, "rows": []}
    for layers in SIZES:
        record["rows"].append(measure(layers))
        print(record["rows"][-1], flush=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(record))
    draw(record)


if __name__ == "__main__":
    main()
