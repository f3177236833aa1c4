"""Study: accuracy against latency, ResNet-20 without training; plans for latency beside plans for the same MACs.

    RANKOPT_DATA=... .venv/bin/python studies/latency_front.py                 # eager, then onnxruntime
    RANKOPT_DATA=... .venv/bin/python studies/latency_front.py --runtimes eager

Writes studies/results/latency_front.{json,md,png}, the JSON after every plan: run again, it goes on where it stopped.
Budgets run from just above the least achievable latency to dense. Each latency plan is found with `knapsack` and
checked on the rebuilt model as `rankopt search` does; beside it stands the knapsack plan of as many MACs, measured in
the same way. Top-1 on the 10,000 test images, read once for each plan; nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.latency_table import Conditions, machine
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.budget import Limit
from rankopt.core.errors import BudgetError
from rankopt.core.files import write_beside
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import run_search
from rankopt.search.latency_check import check
from rankopt.search.progress import show_progress
from rankopt.search.settings import SearchSettings
from rankopt.strategies.allocation import allocate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "latency_front.json"
POINTS, EXTRA = 7, (0.85,)  # of the front; a budget that must be met
console = Console(stderr=True)


def budgets(prepared: Prepared) -> list[float]:
    """Fractions of the dense latency, from 2 % above the least achievable to 0.97."""
    problem = prepared.problem({"latency": 1.0 - 1e-9})
    least = problem.fixed.latency + sum(min(c.cost.latency for c in f) for f in problem.frontiers)
    spaced = np.linspace(1.02 * least / problem.dense.latency, 0.97, POINTS)
    return sorted({*(round(float(x), 3) for x in spaced), *EXTRA})


def for_latency(prepared: Prepared, budget: float) -> dict[str, Any]:
    """The plan that keeps a latency, as a search finds it."""
    try:
        result = run_search(prepared, prepared.problem({"latency": budget}), SearchSettings(), progress=show_progress)
    except BudgetError as error:
        return {"refused": str(error)}
    found = result.info["latency"]
    return {
        "latency": [found[k] / found["target"] * budget for k in ("latency", "low", "high")],
        "met": found["met"],
        "attempts": found["attempts"],
        "dense_ms": found["dense"] / 1e6,
        "macs": result.plan.cost.macs,
        "params": result.plan.cost.params,
        "top1": result.info["score"]["compressed"]["test"],
        "objective": result.info["objective"]["best"],
        "none_faster": len(found["none_faster"]),
        "layers": {c.name: f"{c.method} {c.rank}" for c in result.plan.choices if c.method != "dense"},
    }


def for_macs(prepared: Prepared, macs: int) -> dict[str, Any]:
    """The knapsack plan within a number of MACs, measured."""
    problem = prepared.problem({"macs": macs})
    proposal = allocate(problem).proposal
    dense = prepared.dense.latency
    found = check(prepared, Limit("latency", 1.0, dense), problem, proposal).measured
    model = prepared.apply(problem, proposal)
    assert prepared.task.test is not None
    return {
        "latency": [x / dense for x in (found.latency, found.low, found.high)],
        "macs": problem.cost(proposal).macs,
        "params": problem.cost(proposal).params,
        "top1": prepared.task.test(model),
        "objective": prepared.objective(model),
    }


def at_least(rows: list[dict[str, Any]], latency: float) -> float | None:
    """The best top-1 of plans for MACs that are no slower."""
    return max((r["macs_plan"]["top1"] for r in rows if r["macs_plan"]["latency"][0] <= latency), default=None)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "# ResNet-20 without training: accuracy against latency",
        "",
        "Made by `python studies/latency_front.py`, knapsack, default space, seed 0, batch 1, one thread. Latency over",
        "the dense model's, measured in turns (95 % interval). Same MACs: the plan of knapsack for as many MACs.",
        "Best as fast: the best top-1 of any of those plans that is no slower.",
        "",
        "| runtime | budget | latency | met | MACs | top-1 | same MACs: latency | top-1 | best as fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "refused" in r["plan"]:
            lines.append(f"| {r['runtime']} | {r['budget']:.3f} | refused: {r['plan']['refused']} |||||||")
            continue
        a, b = r["plan"], r["macs_plan"]
        shown = [f"{x['latency'][0]:.3f} ({x['latency'][1]:.3f} to {x['latency'][2]:.3f})" for x in (a, b)]
        same = [x for x in rows if x["runtime"] == r["runtime"] and "macs_plan" in x]
        fast = at_least(same, a["latency"][0])
        lines.append(
            f"| {r['runtime']} | {r['budget']:.3f} | {shown[0]} | {'yes' if a['met'] else 'NO'} | "
            f"{a['macs'] / r['dense_macs']:.2f} | **{100 * a['top1']:.2f}** | {shown[1]} | {100 * b['top1']:.2f} | "
            f"{'–' if fast is None else f'{100 * fast:.2f}'} |"
        )
    about = ", ".join(sorted({f"{r['machine']} on {r['date']}" for r in rows}))
    return "\n".join([*lines, "", f"Measured: {about}."]) + "\n"


def picture(rows: list[dict[str, Any]]) -> None:
    """Top-1 against latency, a panel for each runtime."""
    from matplotlib.figure import Figure

    runtimes = list(dict.fromkeys(r["runtime"] for r in rows))
    figure = Figure(figsize=(5 * len(runtimes), 4), layout="constrained")
    for axes, runtime in zip(figure.subplots(1, len(runtimes), squeeze=False, sharey=True)[0], runtimes, strict=True):
        own = [r for r in rows if r["runtime"] == runtime and "macs_plan" in r]
        for key, style, label in (("macs_plan", "s", "plans for MACs"), ("plan", "o-", "plans for latency")):
            points = sorted((r[key]["latency"][0], 100 * r[key]["top1"]) for r in own)
            axes.plot(*zip(*points, strict=True), style, label=label)
        axes.axvline(1, color="gray", ls=":", lw=1)
        axes.axhline(91.73, color="gray", ls=":", lw=1)
        axes.set(xlabel="latency, measured, over the dense model's", title=runtime)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    figure.axes[0].set_ylabel("top-1 on CIFAR-10 test, %")
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="*", default=["eager", "onnxruntime"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for runtime in given.runtimes:
        conditions = Conditions(runtime=runtime)
        task = load_task(f"{HERE}/tasks/cifar10.py:resnet20")
        prepared = prepare(
            task,
            load_space("default").adjusted(effort=THOROUGH),
            progress=show_progress,
            budget={"latency": 0.99},
            latency_on=conditions,
        )
        done = [r["budget"] for r in rows if r["runtime"] == runtime]
        todo = [b for b in budgets(prepared) if b not in done] if len(done) < POINTS else []
        for budget in todo:
            plan = for_latency(prepared, budget)
            row: dict[str, Any] = {
                "runtime": runtime,
                "budget": budget,
                "plan": plan,
                "dense_macs": prepared.dense.macs,
            }
            row |= {} if "refused" in plan else {"macs_plan": for_macs(prepared, plan["macs"])}
            rows.append({**row, "machine": machine(conditions), "date": date.today().isoformat()})
            write_beside(RESULTS, lambda p: p.write_text(json.dumps(rows, indent=1)))
            console.print(table(rows[-1:]).splitlines()[-3], soft_wrap=True, markup=False)
    RESULTS.with_suffix(".md").write_text(table(rows))
    picture(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
