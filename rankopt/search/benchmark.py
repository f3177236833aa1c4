"""Which strategy: all with as many evaluations, on the same problems, with the same seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.options import parse_pairs
from rankopt.core.problem import Problem
from rankopt.core.progress import Clock, Progress, silent
from rankopt.core.records import Proposal, Trial
from rankopt.core.run_folder import open_folder
from rankopt.core.statistics import wilson
from rankopt.model.objective import call
from rankopt.search.compress import fingerprint
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Outcome, PlanKey, Study, attempt, plan_key, proposals, trial_limit
from rankopt.strategies.registry import STRATEGIES, make_strategy, read_options, strategy_class

FILE = "benchmark.json"


Cell = dict[str, Any]
"""One run: budget, strategy, seed, trials (objective, predicted, cost, proposal, seconds, repeated, error), seconds
(measure: what the strategy did before its first proposal; strategy: proposing and learning; evaluation), error, and
copied_from: the seed whose run this repeats, for one-shot strategies that do not look at theirs."""


def read_strategy(text: str) -> tuple[str, dict[str, Any]]:
    """ "optuna:sampler=gp:..." -> the name and its options. Raises RankoptError."""
    name, *pairs = text.strip().split(":")
    return name, read_options(name, parse_pairs(pairs))


def read_strategies(text: str) -> list[str]:
    """ "all", or "knapsack,random,optuna:sampler=gp". Raises RankoptError for what is not known."""
    labels = list(STRATEGIES) if text == "all" else list(dict.fromkeys(x.strip() for x in text.split(",") if x.strip()))
    if not labels:
        raise RankoptError(f"no strategies: give all, or some of {', '.join(STRATEGIES)}")
    for label in labels:
        read_strategy(label)
    return labels


def benchmark(
    prepared: Prepared,
    budgets: Sequence[str],
    strategies: Sequence[str],
    trials: int = 30,
    seeds: int = 3,
    out: Path | None = None,
    resume: bool = False,
    report: Callable[[Cell], None] = lambda cell: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run every strategy on every budget with seeds 0, 1, ...; returns the content of benchmark.json.

    budgets: "params=0.3", or several limits of one problem as "params=0.3,macs=0.5". strategies: names, with options
    as "optuna:sampler=gp". trials: distinct plans for each; one-shot strategies have one. Only the objective is
    measured. A plan is measured once, whoever proposes it, and counts for each, with its seconds. At the end the best
    plan of each strategy and budget is scored, on test data where the task has some.
    out: benchmark.json is written there after every run; resume: finished runs are taken from it, failed ones are
    run again, and budgets, strategies and seeds that are new are added to those it has. Raises RankoptError.
    """
    if trials < 1 or seeds < 1:
        raise RankoptError(f"trials is {trials}, seeds is {seeds}: give 1 or more of each")
    if out:
        open_folder(out, resume, FILE)
    same = {"task": prepared.task.name, "space": prepared.space.name, "trials": trials}
    asked = {"budgets": list(dict.fromkeys(budgets)), "strategies": list(dict.fromkeys(strategies)), "seeds": seeds}
    data = {"settings": {**same, **asked, "candidates": {}}, "cells": [], "scores": []}
    book = _Book(out, _joined(read(out / FILE), data) if resume and out and (out / FILE).is_file() else data)
    settings = book.data["settings"]
    problems = {b: prepared.problem(b.split(",")) for b in settings["budgets"]}
    for budget, problem in problems.items():
        offered = fingerprint(prepared, problem)
        if settings["candidates"].setdefault(budget, offered) != offered:
            raise StudyError(
                f"the candidates of {budget} are not those of the benchmark in {out}: choose another --out"
            )
    for label in settings["strategies"]:
        read_strategy(label)
    runs = _Runs(prepared, problems, trials, progress)
    for cell in book.cells():
        runs.remember(cell)
    for seed, budget, label in product(range(settings["seeds"]), problems, settings["strategies"]):
        if (found := book.cell(budget, label, seed)) and not found["error"]:
            continue
        cell = _copied(book, budget, label, seed) or runs.run(budget, label, seed)
        book.add(cell)
        report(cell)
    book.data["dense"], book.data["scores"] = runs.score(book)
    book.save()
    return book.data


class _Book:
    """benchmark.json: the cells by budget, strategy and seed."""

    def __init__(self, out: Path | None, data: dict[str, Any]) -> None:
        self.path, self.data = None if out is None else out / FILE, data
        self.index = {(c["budget"], c["strategy"], c["seed"]): c for c in data["cells"]}

    def cells(self) -> list[Cell]:
        return list(self.index.values())

    def cell(self, budget: str, label: str, seed: int) -> Cell | None:
        return self.index.get((budget, label, seed))

    def add(self, cell: Cell) -> None:
        self.index[cell["budget"], cell["strategy"], cell["seed"]] = cell
        self.save()

    def save(self) -> None:
        self.data["cells"] = self.cells()
        if self.path:
            text = json.dumps(self.data)
            write_beside(self.path, lambda p: p.write_text(text))


def read(path: Path) -> dict[str, Any]:
    """benchmark.json. Raises StudyError if it is missing or damaged."""
    try:
        data = json.loads(path.read_text())
        if data.keys() >= {"settings", "cells", "scores"}:
            return dict(data)
    except FileNotFoundError:
        raise StudyError(f"there is no {path}: there is nothing to resume") from None
    except (OSError, ValueError, AttributeError) as error:
        raise StudyError(f"{path} is damaged ({error}): choose another --out") from error
    raise StudyError(f"{path} is no benchmark of rankopt: choose another --out")


def _joined(before: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """A benchmark that goes on, with what is asked for now. Raises StudyError if the two cannot be compared."""
    old, new = before["settings"], data["settings"]
    for key in ("task", "space", "trials"):
        if old[key] != new[key]:
            raise StudyError(
                f"the benchmark has {key} {old[key]!r}, asked is {new[key]!r}: "
                "resume with the same, or choose another --out"
            )
    for key in ("budgets", "strategies"):
        old[key] = list(dict.fromkeys(old[key] + new[key]))
    old["seeds"] = max(old["seeds"], new["seeds"])
    return before


def _copied(book: _Book, budget: str, label: str, seed: int) -> Cell | None:
    """A one-shot strategy that gave the same plan for seeds 0 and 1 does not look at its seed."""
    if seed < 2 or not strategy_class(read_strategy(label)[0]).one_shot:
        return None
    first, second = (book.cell(budget, label, s) for s in (0, 1))
    if not first or not second or first["error"] or second["error"]:
        return None
    same = [t["proposal"] for t in first["trials"]] == [t["proposal"] for t in second["trials"]]
    return {**first, "seed": seed, "copied_from": 0} if same else None


@dataclass
class _Runs:
    """Runs strategies; measures each distinct plan once."""

    prepared: Prepared
    problems: dict[str, Problem]
    trials: int
    progress: Progress
    known: dict[PlanKey, Outcome] = field(default_factory=dict)

    def remember(self, cell: Cell) -> None:
        """Take up what a cell measured; what failed may have been the machine's fault, and is tried again."""
        if problem := self.problems.get(cell["budget"]):
            for t in cell["trials"]:
                key = plan_key(problem, tuple(t["proposal"]))
                if t["error"] is None:
                    self.known.setdefault(key, Outcome(t["objective"], None, t["seconds"]))

    def run(self, budget: str, label: str, seed: int) -> Cell:
        """One strategy on one problem; whatever it raises is the cell's error, and the benchmark goes on."""
        clock, problem, error = Clock(measure=0.0, strategy=0.0, evaluation=0.0), self.problems[budget], None
        study, repeated = None, []
        try:
            with clock.stage("strategy"):
                name, options = read_strategy(label)
                strategy = make_strategy(name, problem, seed, options)
                study = Study(problem, strategy, trial_limit(strategy, self.trials))
            with clock.stage("measure"):
                strategy.measure(self.prepared, self.progress)
            asked = proposals(study)
            while True:
                with clock.stage("strategy"):
                    proposal = next(asked, None)
                if proposal is None:
                    break
                repeated.append(plan_key(problem, proposal) in self.known)
                outcome = self._evaluate(problem, proposal)
                clock["evaluation"] += outcome.seconds
                with clock.stage("strategy"):
                    study.finish(proposal, outcome)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        told = study.trials if study else []
        rows = [_row(t, r) for t, r in zip(told, repeated, strict=False)]
        about = {"budget": budget, "strategy": label, "seed": seed, "copied_from": None, "error": error}
        return {**about, "seconds": {k: round(v, 4) for k, v in clock.items()}, "trials": rows}

    def _evaluate(self, problem: Problem, proposal: Proposal) -> Outcome:
        key = plan_key(problem, proposal)
        if key not in self.known:
            p = self.prepared
            self.known[key] = attempt(Evaluator(problem, p.task.model, p.factors, p.objective, None), proposal)
        return self.known[key]

    def score(self, book: _Book) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The dense model's score, and that of the best plan of each strategy and budget; each plan once."""
        task = self.prepared.task
        part, function, examples = ("test", task.test, task.test_examples)
        if function is None:
            part, function, examples = ("validation", task.score, task.examples)
        value = (book.data.get("dense") or {}).get("score")
        value = call(f"the {part} score", function, task.model) if value is None else value
        dense = {"part": part, "score": value, "interval": wilson(value, examples)}
        kept = {(s["budget"], *s["proposal"]): s["score"] for s in book.data["scores"]}
        rows, best = [], winners(book.cells())
        for row in self.progress(best, "scoring", len(best)):
            key = (row["budget"], *row["proposal"])
            if key not in kept:
                model = self.prepared.apply(self.problems[row["budget"]], tuple(row["proposal"]))
                kept[key] = call(f"the {part} score", function, model)
            rows.append(
                {**row, "part": part, "examples": examples, "score": kept[key], "interval": wilson(kept[key], examples)}
            )
        return dense, rows


def _row(trial: Trial, repeated: bool) -> dict[str, Any]:
    keys = ("objective", "predicted", "seconds", "error")
    cost = [trial.cost.params, trial.cost.macs, trial.cost.bytes]
    about = {"proposal": [int(i) for i in trial.proposal], "cost": cost, "repeated": repeated}
    return {**{k: getattr(trial, k) for k in keys}, **about}


# --- what the runs say ---------------------------------------------------------------------------------


def winners(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The best trial of each budget and strategy over its seeds."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        for number, t in enumerate(cell["trials"]):
            key = (cell["budget"], cell["strategy"])
            if t["objective"] is not None and (key not in found or t["objective"] < found[key]["objective"]):
                place = {k: cell[k] for k in ("budget", "strategy", "seed")}
                found[key] = {**place, "trial": number, **{k: t[k] for k in ("objective", "cost", "proposal")}}
    return list(found.values())


def curve(cell: Cell, trials: int) -> list[float]:
    """The least objective after 1, 2, ... evaluations; infinite before the first that finished, flat after the last."""
    values = [math.inf if t["objective"] is None else t["objective"] for t in cell["trials"]]
    values += [math.inf] * (trials - len(values))
    return [float(v) for v in np.minimum.accumulate(values)]


def ranks(data: dict[str, Any]) -> dict[str, list[float]]:
    """Per strategy its rank (1 is best, equals share) in every budget and seed that all strategies have run."""
    from scipy.stats import rankdata

    settings = data["settings"]
    names: list[str] = settings["strategies"]
    found: dict[str, list[float]] = {name: [] for name in names}
    last = {(c["budget"], c["seed"], c["strategy"]): curve(c, settings["trials"])[-1] for c in data["cells"]}
    for budget, seed in product(settings["budgets"], range(settings["seeds"])):
        values = [last.get((budget, seed, name)) for name in names]
        if None not in values:
            for name, rank in zip(names, rankdata(values), strict=True):
                found[name].append(float(rank))
    return found
