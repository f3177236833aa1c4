"""Study: the usual script (Optuna's TPE over raw ranks) against rankopt's strategies, on ResNet-20 at params=0.3.

    .venv/bin/python studies/raw_tpe.py                     # 200 trials of the script, 40 of every strategy
    .venv/bin/python studies/raw_tpe.py --raw 10 --trials 3 --only optuna random

Writes studies/results/raw_tpe.{json,md}, the JSON after every evaluation: run again, it goes on where it stopped.
The script is what one writes without rankopt, but on rankopt's fitted candidates: `suggest_int` per layer over the
ranks of one family (cp_merged, in order, then dense), TPE with Optuna's defaults. A plan above the budget is told a
penalty that grows with its excess; it counts as a trial, but no model is evaluated for it. All minimise the same
objective, the KL divergence from the dense model on 2,000 augmented training images. What is compared: after how
many evaluations each strategy passes the best of all of the script's trials.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from rich.console import Console

from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.files import write_beside
from rankopt.core.problem import Problem
from rankopt.core.progress import silent
from rankopt.core.records import Cost, Proposal, Trial
from rankopt.experiments.tasks import load_task
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Study, attempt, search
from rankopt.strategies.registry import STRATEGIES, make_strategy, strategy_class

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "raw_tpe.json"
BUDGET, FAMILY, SEED = {"params": 0.3}, "cp_merged", 0
PENALTY = 100.0  # far above any KL divergence of a plan within the budget
console = Console(stderr=True)


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"script": [], "strategies": {}}


def write(result: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    write_beside(RESULTS, lambda p: p.write_text(json.dumps(result, indent=1)))


# --- the usual script ------------------------------------------------------------------------------


def raw_menu(prepared: Prepared, problem: Problem) -> Problem:
    """Per layer the ranks of one family, rising, then dense: what suggest_int counts through."""
    menus = tuple(
        (
            *sorted((c for c in prepared.candidates[x.name] if c.method == FAMILY), key=lambda c: c.rank),
            dense_candidate(x),
        )
        for x in problem.layers
    )
    return dataclasses.replace(problem, frontiers=menus)


def run_script(prepared: Prepared, problem: Problem, trials: int, result: dict[str, Any]) -> None:
    """The missing trials of the baseline. Every ask is seeded by its number, so a stop changes nothing."""
    menu, limit = raw_menu(prepared, problem), problem.limits[0]
    evaluate = Evaluator.of(prepared, menu)
    evaluate.score = None
    names, done = [x.name for x in menu.layers], result["script"]
    space: dict[str, BaseDistribution] = {
        n: IntDistribution(0, len(f) - 1) for n, f in zip(names, menu.frontiers, strict=True)
    }
    study = optuna.create_study(direction="minimize")
    for row in done:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(zip(names, row["plan"], strict=True)), distributions=space, value=row["told"]
            )
        )
    for number in range(len(done), trials):
        study.sampler = optuna.samplers.TPESampler(seed=1000 * SEED + number)
        asked = study.ask()
        plan: Proposal = tuple(asked.suggest_int(n, 0, len(f) - 1) for n, f in zip(names, menu.frontiers, strict=True))
        excess = menu.cost(plan)[limit.metric] / limit.target - 1
        row = {"plan": plan, "share": menu.cost(plan)[limit.metric] / menu.dense[limit.metric], "objective": None}
        if excess <= 0:
            outcome = attempt(evaluate, plan)
            row |= {"objective": outcome.objective, "seconds": round(outcome.seconds, 2), "error": outcome.error}
        row["told"] = PENALTY * (1 + max(excess, 0)) if row["objective"] is None else row["objective"]
        study.tell(asked, row["told"])
        done.append(row)
        write(result)
        console.print(f"script {number}: {row['share']:.1%} of the parameters, told {row['told']:.4f}")


# --- rankopt's strategies ----------------------------------------------------------------------------


class Kept:
    """A search's trials in the results file; what rankopt.search.Study takes as a store."""

    def __init__(self, name: str, result: dict[str, Any]) -> None:
        self.result = result
        self.rows: list[dict[str, Any]] = result["strategies"].setdefault(name, [])

    def trials(self) -> tuple[list[Trial], int]:
        found = []
        for row in self.rows:
            values = {k: v for k, v in row.items() if k != "asked"}
            values |= {"proposal": tuple(row["proposal"]), "cost": Cost(**row["cost"]), "note": tuple(row["note"])}
            found.append(Trial(**values))
        return found, self.rows[-1]["asked"] if self.rows else 0

    def add(self, trial: Trial, asked: int) -> None:
        self.rows.append({**dataclasses.asdict(trial), "asked": asked})
        write(self.result)


def run_strategy(name: str, prepared: Prepared, problem: Problem, trials: int, result: dict[str, Any]) -> None:
    strategy = make_strategy(name, problem, SEED)
    limit = 1 if strategy.one_shot else trials
    study = Study(problem, strategy, limit, Kept(name, result))
    study.report = lambda t: console.print(f"{name} {t.number}: {t.objective}")
    study.resume()
    if len(study.trials) < limit:
        strategy.measure(prepared, silent)
    evaluate = Evaluator.of(prepared, problem)
    evaluate.score = None  # only the objective is compared
    search(study, evaluate)


# --- what comes out ----------------------------------------------------------------------------------


def passes(objectives: list[float | None], bar: float) -> int | None:
    """The number of the first evaluation below the bar, from 1; None: none is."""
    return next((i for i, x in enumerate(objectives, 1) if x is not None and x < bar), None)


def table(result: dict[str, Any]) -> str:
    """The comparison as markdown."""
    script = [row["objective"] for row in result["script"]]
    feasible = [x for x in script if x is not None]
    bar = min(feasible, default=float("inf"))
    limits = ", ".join(f"{m}={v}" for m, v in BUDGET.items())
    reached = f"its best, {bar:.4f}, came at trial {script.index(bar) + 1}" if feasible else "so nothing to pass"
    lines = [
        "# Plain Optuna over raw ranks, and after how many evaluations it is passed",
        "",
        f"Made by `python studies/raw_tpe.py`, seed {SEED}, {date.today().isoformat()}. ResNet-20, {limits};",
        f"objective: KL divergence from the dense model. The script: {len(script)} trials of TPE over raw",
        f"{FAMILY} ranks, {len(feasible)} of them within the budget (the others were penalised",
        f"without an evaluation); {reached}.",
        "",
        "`passes at`: evaluations until the script's best is passed. `without the first`: the same, when a strategy's",
        "first evaluation (for some the exact allocation) is taken away and not counted.",
        "",
        "| strategy | evaluations | first | best | passes at | without the first |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in result["strategies"].items():
        values = [row["objective"] for row in rows]
        best = min((x for x in values if x is not None), default=None)
        shown = [values[0] if values else None, best]
        cells = [f"{x:.4f}" if x is not None else "–" for x in shown]
        cells += [str(passes(x, bar) or "–") for x in (values, values[1:])]
        lines.append(f"| {name} | {len(values)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, default=200, help="trials of the script")
    parser.add_argument("--trials", type=int, default=40, help="evaluations of every strategy")
    all_of_them = [name for name in STRATEGIES if not strategy_class(name).trains]
    parser.add_argument("--only", nargs="*", default=all_of_them, help="strategies; by default all that do not train")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    prepared = prepare(
        load_task(f"{HERE}/tasks/cifar10.py:resnet20"), load_space("default").adjusted(effort="thorough")
    )
    problem, result = prepared.problem(BUDGET), read()
    run_script(prepared, problem, given.raw, result)
    for name in given.only:
        run_strategy(name, prepared, problem, given.trials, result)
    RESULTS.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
