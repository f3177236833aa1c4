"""Study: regret of every strategy on synthetic problems whose true optimum is known.

    .venv/bin/python studies/synthetic.py              # 3 seeds, 20 trials: about 3 minutes on one core
    .venv/bin/python studies/synthetic.py 100          # other numbers of trials

Writes studies/results/synthetic.{json,md,png}. A problem has 60 layers with decaying error curves e(rank), which are
all that a strategy sees as predicted losses. The true loss has two things more, so that the separable prediction is
wrong: hidden weights w, log-normal, and coupled errors in pairs of neighbours (a, b), whose amplitudes add:

    sum over pairs of  A + B + 2 rho sqrt(A B),  A = w_a e_a, B = w_b e_b, rho uniform in (-0.5, 0.9).

The optimum is exact and independent of rankopt's allocation: every cost is a multiple of UNIT, so dynamic programming
over pairs and whole units of the budget leaves nothing out. Regret is the loss of the best plan so far over the
optimum's, less 1. Problems come in two kinds: `rough` predictions (sigma of log w = 1) and `measured` ones (0.3), as
after a sensitivity analysis.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rankopt.candidates.pareto import frontier
from rankopt.core.budget import Limit
from rankopt.core.problem import Problem
from rankopt.core.records import Candidate, Cost, Layer, Proposal
from rankopt.search.loop import Study, search
from rankopt.strategies.registry import STRATEGIES, make_strategy, strategy_class

RESULTS = Path(__file__).parent / "results" / "synthetic.json"
UNIT, LAYERS, SHARE = 64, 60, 0.3  # parameters, layers, the budget
KINDS = {"rough": 1.0, "measured": 0.3}
SEEDS = (0, 1, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "optuna tpe": {"sampler": "tpe"},
    "optuna cmaes": {"sampler": "cmaes"},
    "optuna random": {"sampler": "random"},
    "optuna tpe, positions": {"sampler": "tpe", "parametrisation": "positions"},
}
console = Console(stderr=True)


class Synthetic:
    """A problem, its true loss and its optimum."""

    def __init__(self, seed: int, sigma: float) -> None:
        rng = np.random.default_rng(seed)
        layers, frontiers = [], []
        for i in range(LAYERS):
            size = 16 * int(rng.integers(2, 9))
            cost = Cost(size**2, size**2, 4 * size**2)
            layers.append(Layer(f"block{i // 2}.layer{i % 2}", "Linear", (size, size), cost=cost))
            decay = rng.uniform(2, 8)
            options = []
            for rank in range(2, size // 2, 4):
                params, error = 2 * size * rank, float(np.exp(-decay * rank / size))
                options.append(Candidate("svd_out", (rank,), Cost(params, params, 4 * params), error, error))
            frontiers.append(frontier(layers[-1], options, ["params"]))
        dense = Cost(*(sum(x.cost[m] for x in layers) for m in ("params", "macs", "bytes")))
        limits = (Limit("params", SHARE, int(SHARE * dense.params)),)
        self.problem = Problem(tuple(layers), tuple(frontiers), dense, limits)
        weights = np.exp(rng.normal(0, sigma, LAYERS))
        self.errors = [w * np.array([c.loss for c in f]) for w, f in zip(weights, frontiers, strict=True)]
        self.rho = rng.uniform(-0.5, 0.9, LAYERS // 2)

    def __call__(self, plan: Proposal) -> tuple[float, None]:
        """The true loss, as an evaluation gives it."""
        x = np.array([e[i] for e, i in zip(self.errors, plan, strict=True)])
        return float(x.sum() + (2 * self.rho * np.sqrt(x[::2] * x[1::2])).sum()), None

    def optimum(self) -> float:
        """The least true loss within the budget: dynamic programming over pairs and units of the budget."""
        room = int(self.problem.table.room[0]) // UNIT
        best = np.zeros(room + 1)
        costs = [np.array([c.cost.params // UNIT for c in f]) for f in self.problem.frontiers]
        for k, rho in enumerate(self.rho):
            a, b = self.errors[2 * k], self.errors[2 * k + 1]
            loss = a[:, None] + b + 2 * rho * np.sqrt(a[:, None] * b)
            cost = costs[2 * k][:, None] + costs[2 * k + 1]
            after = np.full(room + 1, np.inf)
            for x, c in zip(loss.ravel(), cost.ravel(), strict=True):
                if c <= room:
                    np.minimum(after[c:], best[: room + 1 - c] + x, out=after[c:])
            best = after
        return float(best[room])


def measure(trials: int) -> dict[str, Any]:
    """Kind -> strategy or variant -> regret after 1, 2, ... evaluations, per seed; and seconds."""
    runs: dict[str, tuple[str, dict[str, Any]]] = {n: (n, {}) for n in STRATEGIES if not strategy_class(n).needs_model}
    runs |= {label: ("optuna", options) for label, options in VARIANTS.items()}
    cells: dict[str, Any] = {}
    for kind, sigma in KINDS.items():
        problems = [Synthetic(seed, sigma) for seed in SEEDS]
        optima = [p.optimum() for p in problems]
        for label, (name, options) in runs.items():
            start, curves = time.perf_counter(), []
            for seed, truth, optimum in zip(SEEDS, problems, optima, strict=True):
                strategy = make_strategy(name, truth.problem, seed, options)
                done = search(Study(truth.problem, strategy, 1 if strategy.one_shot else trials), truth)
                best = np.minimum.accumulate([t.objective for t in done]) / optimum - 1
                curves.append([round(float(x), 5) for x in np.pad(best, (0, trials - len(best)), mode="edge")])
            seconds = round((time.perf_counter() - start) / len(SEEDS), 1)
            cells.setdefault(kind, {})[label] = {
                "regret": curves,
                "seconds": seconds,
                "evaluations": len(done),
                "options": options,
            }
            console.print(f"{kind}, {label}: {np.mean(curves, 0)[-1]:.3f}, {seconds} s")
    return cells


def table(result: dict[str, Any]) -> str:
    """The results as markdown."""
    trials, skipped = result["trials"], result["skipped"]
    marks = sorted({1, min(20, trials), trials})
    head = [f"{kind}, {n}" for kind in KINDS for n in marks]
    lines = [
        "# Regret against a known optimum",
        "",
        f"Made by `python studies/synthetic.py {trials}`, {result['date']}. {LAYERS} layers at {SHARE:.0%} of the",
        f"parameters, coupled errors, hidden weights (`rough`: sigma 1, `measured`: 0.3); mean of {len(SEEDS)} seeds.",
        "Loss of the best plan over the true optimum's, less 1, by number of evaluations; the optimum is exact",
        "(dynamic programming over pairs of layers). Strategies with one plan are constant. Seconds: all",
        "evaluations of one search, `rough`; the evaluation itself takes none. `optuna` is its default (see the docs).",
        f"Left out, since they need a model and its data: {', '.join(skipped) or 'none'}.",
        "",
        f"| strategy | {' | '.join(head)} | seconds |",
        "|---" * (len(head) + 2) + "|",
    ]
    for label, cell in result["cells"]["rough"].items():
        values = [np.mean(result["cells"][k][label]["regret"], 0)[n - 1] for k in KINDS for n in marks]
        lines.append(f"| {label} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {cell['seconds']} |")
    return "\n".join(lines) + "\n"


def picture(result: dict[str, Any]) -> None:
    """Mean regret against evaluations, with the spread over seeds; strategies above, samplers below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, len(KINDS), sharey="col")
    for column, kind in enumerate(KINDS):
        cells = result["cells"][kind]
        groups = [[x for x in cells if x not in VARIANTS], ["optuna", "knapsack", *VARIANTS]]
        for axes, labels in zip(panels[:, column], groups, strict=True):
            for i, label in enumerate(labels):
                curves = np.array(cells[label]["regret"])
                x = np.arange(1, curves.shape[1] + 1)
                constant = cells[label]["evaluations"] == 1
                style = {"ls": ":" if constant else "-", "lw": 2.5 if label == "optuna" else 1.4}
                colour = "black" if label == "optuna" else f"C{i}"
                axes.plot(x, curves.mean(0), color=colour, label=label, **style)
                if not constant:
                    axes.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.08, lw=0)
            axes.set(yscale="log", xlabel="evaluations", ylabel="regret (loss / optimum − 1)")
            axes.set_title(f"{kind} predictions" if axes is panels[0, column] else "Optuna's samplers")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=7, frameon=False)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=130)


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    cells = measure(trials)
    skipped = [n for n in STRATEGIES if strategy_class(n).needs_model]
    result = {"trials": trials, "seeds": SEEDS, "date": date.today().isoformat(), "skipped": skipped, "cells": cells}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1))
    RESULTS.with_suffix(".md").write_text(table(result))
    picture(result)
    print(table(result))


if __name__ == "__main__":
    main()
