"""What running trials costs beside the trials: in this process, on Ray with 1 and 2 workers, on paper with 100.

    python studies/runner_overhead.py            # about half an hour on two cores
    python studies/runner_overhead.py --quick    # 1 s trials only, nothing is written
    python studies/runner_overhead.py --only start    # that table again, the others stay

A trial is a real evaluation of the digits network, which then waits until its length is reached: so that what is
measured is the runner, on whatever machine. Written: studies/results/runner_overhead.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.budget import Limit
from rankopt.core.problem import Problem
from rankopt.core.records import Call, Candidate, Cost, Layer
from rankopt.experiments.tasks import load_task
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Outcome, Study, search
from rankopt.search.ray.runner import RaySearch
from rankopt.search.storage.local import Store
from rankopt.strategies.registry import make_strategy

RESULTS = Path(__file__).parent / "results"
LENGTHS = {0.1: 30, 1.0: 12, 5.0: 6}  # seconds of a trial -> how many
SPACE = SearchSpace(families=("svd_out", "cp_merged"), points=6, steps=20)
SHORT, MANY = 0.3, 16  # seconds of a trial, and trials, of a search that ends almost before Ray has started
ALLOWED = 12.0  # seconds that it may take longer on Ray than in this process
SEED = 0


class Padded:
    """An evaluation of a given length; its score is the clock's time at its start."""

    def __init__(self, evaluate: Any, seconds: float) -> None:
        self.evaluate, self.seconds = evaluate, seconds

    def __call__(self, proposal: Any) -> tuple[float, float]:
        start = time.time()
        objective, _ = self.evaluate(proposal)
        time.sleep(max(0.0, self.seconds - (time.time() - start)))
        return objective, start


def measure(prepared: Prepared, runner: Any, workers: int, seconds: float, trials: int) -> dict[str, float]:
    """Seconds until the first trial starts, and beside the evaluation for each trial after the first round."""
    problem = prepared.problem({"params": 0.3})
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), problem, {}, resume=False)
        told: list[float] = []
        study = Study(
            problem, make_strategy("random", problem, SEED), trials, store, lambda _: told.append(time.time())
        )
        start = time.time()
        runner(study, Padded(Evaluator.of(prepared, problem), seconds))
        total = time.time() - start
        store.close()
    starts = sorted(t.score or 0.0 for t in study.trials)
    rest = (told[-1] - told[workers - 1]) / (trials - workers) * workers
    return {
        "first": starts[0] - start,
        "total": total,
        "per_trial": rest - seconds,
        "share": (rest - seconds) / seconds,
        "end": total - (told[-1] - start),
    }


def synthetic(layers: int, options: int = 20) -> Problem:
    """Layers with frontiers of decaying losses, as in studies/synthetic.py."""
    rng = np.random.default_rng(SEED)
    found, frontiers = [], []
    for i in range(layers):
        size, scale = int(rng.integers(1_000, 100_000)), float(np.exp(rng.normal()))
        shares = np.geomspace(0.05, 1, options)
        costs = [Cost(max(1, int(size * s)), max(1, int(size * s)), 4 * max(1, int(size * s))) for s in shares]
        losses = [scale * (1 - s) ** 2 for s in shares]
        frontiers.append(
            tuple(Candidate("svd_out", (k + 1,), c, x, x) for k, (c, x) in enumerate(zip(costs, losses, strict=True)))
        )
        found.append(Layer(f"l{i}", "Linear", (size, 1), calls=(Call(1, (1, 1), (1, 1)),), cost=costs[-1]))
    whole = sum((f[-1].cost for f in frontiers), Cost(0, 0, 0))
    return Problem(tuple(found), tuple(frontiers), whole, (Limit("params", 0.3, int(0.3 * whole.params)),))


def driver(layers: int, strategy: str, options: dict[str, Any], trials: int) -> dict[str, float]:
    """Seconds of the one process that asks, tells and stores: per trial, over the last third."""
    problem = synthetic(layers)
    spent: dict[str, list[float]] = {"ask": [], "tell and store": []}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), problem, {}, resume=False)
        study = Study(problem, make_strategy(strategy, problem, SEED, options), trials, store)
        rng = np.random.default_rng(SEED)
        for _ in range(trials):
            start = time.perf_counter()
            proposal = study.next()
            if proposal is None:
                break
            asked = time.perf_counter()
            study.finish(proposal, Outcome(problem.loss(proposal) * float(np.exp(0.1 * rng.normal())), None, 1.0))
            spent["ask"].append(asked - start)
            spent["tell and store"].append(time.perf_counter() - asked)
        store.close()
    return {k: float(np.mean(v[-max(1, len(v) // 3) :])) for k, v in spent.items()} | {"trials": len(spent["ask"])}


def start_text(data: dict[str, Any]) -> list[str]:
    """The table of a short search."""
    rows = data["start"]
    lines = [
        "",
        f"## A short search: {MANY} trials of {SHORT:g} s",
        "",
        f"Measured {rows[0]['date']}, {rows[0]['machine']}. The aim: at most {ALLOWED:g} s more on Ray.",
        "",
        "| runner | first trial starts after | all | more than in process |",
        "|---|---|---|---|",
    ]
    for r in rows:
        more = r["total"] - rows[0]["total"]
        lines.append(f"| {r['runner']} | {r['first']:.1f} s | {r['total']:.1f} s | {more:.1f} s |")
    return lines


def text(data: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# What the runners cost",
        "",
        f"`python studies/runner_overhead.py`, {data['date']}, seed {SEED}, {data['machine']}. A trial is an",
        "evaluation of the digits network, stretched to its length; SQLite store; strategy `random`.",
        "*Beside*: seconds that a worker spends between two evaluations, for each trial after the first round.",
        "",
        "| runner | trial | trials | first trial starts after | beside each trial | of its length | after the last |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in data["runners"]:
        lines.append(
            f"| {r['runner']} | {r['seconds']:g} s | {r['trials']} | {r['first']:.2f} s | "
            f"{1000 * r['per_trial']:.0f} ms | {r['share']:.1%} | {r['end']:.2f} s |"
        )
    lines += start_text(data) if "start" in data else []
    lines += [
        "",
        "## On paper: 100 workers",
        "",
        "One process asks, tells and stores, one trial after the other: it keeps N workers busy while a trial lasts at",
        "least N times as long as its share of this process. Measured on synthetic problems of 20 candidates a layer,",
        "over the last third of the trials. Ray's own share (the rows of 1 worker above) comes on top and was not",
        "split into what the driver and what the worker spends: take these lengths as the least.",
        "",
        "| layers | strategy | trials | ask | tell and store | trials a second | 100 workers are busy from trials of |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in data["driver"]:
        each = d["ask"] + d["tell and store"]
        lines.append(
            f"| {d['layers']} | {d['strategy']} | {d['trials']} | {1000 * d['ask']:.0f} ms | "
            f"{1000 * d['tell and store']:.0f} ms | {1 / each:.1f} | {100 * each:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="two shared cores")
    parser.add_argument("--only", choices=("runners", "start", "driver"), help="measure one table, keep the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = _kept() if arguments.only else {}
    prepared = prepare(load_task("digits"), SPACE)
    origin = {"date": str(datetime.date.today()), "machine": arguments.machine}
    if arguments.only in (None, "runners"):
        data |= origin | {"runners": _measured(prepared, (0, 1, 2), {1.0: 6} if arguments.quick else LENGTHS)}
    if arguments.only in (None, "start"):
        data["start"] = [row | origin for row in _measured(prepared, (0, 1, 2, 4), {SHORT: MANY})]
    if arguments.only in (None, "driver"):
        data["driver"] = _driven((20,) if arguments.quick else (20, 60, 200))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "runner_overhead.json").write_text(json.dumps(data, indent=1))
        (RESULTS / "runner_overhead.md").write_text(text(data))


def _kept() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((RESULTS / "runner_overhead.json").read_text())
    return kept


def _measured(prepared: Prepared, numbers: Sequence[int], lengths: Mapping[float, int]) -> list[dict[str, Any]]:
    """A row for each number of workers, 0 for this process, and each length of a trial."""
    rows = []
    for workers in numbers:
        runner = RaySearch(workers) if workers else search
        name = f"Ray, {workers} worker{'s' * (workers > 1)}" if workers else "in-process"
        for seconds, trials in lengths.items():
            found = measure(prepared, runner, max(workers, 1), seconds, trials)
            rows.append({"runner": name, "seconds": seconds, "trials": trials} | found)
            print(rows[-1], flush=True)
    return rows


def _driven(sizes: Sequence[int]) -> list[dict[str, Any]]:
    strategies = {"random": {}, "optuna (gp)": {}, "optuna (tpe)": {"sampler": "tpe"}, "thompson": {}}
    rows = []
    for layers in sizes:
        for label, options in strategies.items():
            rows.append({"layers": layers, "strategy": label} | driver(layers, label.split()[0], options, 45))
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
