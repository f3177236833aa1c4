"""Comparing strategies: the same number of evaluations, on the same problems, with the same seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
from torch import nn
from typing_extensions import TypedDict

from rankopt.candidates.effort import NORMAL, THOROUGH
from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import without_folder, write_beside
from rankopt.core.options import parse_pairs
from rankopt.core.problem import Problem
from rankopt.core.progress import Clock, Progress, silent
from rankopt.core.records import METRICS, Proposal, Trial
from rankopt.core.result_record import Bounds, Part
from rankopt.core.run_folder import check_same, open_folder
from rankopt.core.schema import read_json
from rankopt.core.statistics import wilson
from rankopt.core.text import in_one_line, reason
from rankopt.model.objective import call
from rankopt.search.compress import fingerprint
from rankopt.search.evaluator import Evaluator
from rankopt.search.identity import HASHES, TOLERANCES, identity
from rankopt.search.loop import Outcome, PlanKey, Runner, Study, plan_key, search, trial_limit
from rankopt.strategies.base import Strategy
from rankopt.strategies.registry import STRATEGIES, make_strategy, read_options, strategy_class

FILE = "benchmark.json"


OPPONENT = "optuna:parametrisation=joint"
"""The script that an Optuna user would write, at its best: type and rank of each layer by multivariate TPE in groups,
plans projected onto the budget, and a warm start."""


LARGEST_BENCHMARK = 2**28  # bytes; it holds all trials of all strategies


MOST_RUNS = 10**5  # trials of a run, and seeds, in a file that is read


# --- benchmark.json ------------------------------------------------------------------------------------


class BenchmarkTrial(TypedDict):
    """A trial of a run.

    Attributes:
        objective: Measured objective; None if the evaluation failed.
        predicted: Predicted rise of the objective.
        seconds: Duration of the evaluation; of a plan that was known, of its first one.
        error: Why the evaluation failed.
        proposal: One frontier index per free layer.
        cost: Cost of the plan, in the order of METRICS.
        repeated: Whether the plan was measured before, in this run or another.
    """

    objective: float | None
    predicted: float | None
    seconds: float
    error: str | None
    proposal: list[int]
    cost: list[int]
    repeated: bool


class CellSeconds(TypedDict):
    """Where the time of a run went.

    Attributes:
        measure: Before the first proposal.
        strategy: Proposing and learning.
        evaluation: Evaluating.
    """

    measure: float
    strategy: float
    evaluation: float


class Cell(TypedDict):
    """One run: a strategy on a budget with a seed.

    Attributes:
        budget: The budget, as text.
        strategy: The strategy with its options, as text.
        seed: The seed.
        copied_from: The seed whose run this one repeats, for one-shot strategies that do not use their seed.
        error: Why the run failed.
        seconds: Where the time went.
        trials: The trials, in their order.
    """

    budget: str
    strategy: str
    seed: int
    copied_from: int | None
    error: str | None
    seconds: CellSeconds
    trials: list[BenchmarkTrial]


class BenchmarkSettings(TypedDict):
    """What a benchmark compares.

    Attributes:
        task: Name of the task.
        space: Name of the search space.
        trials: Evaluations for each run.
        budgets: The budgets, as text.
        strategies: The strategies with their options, as text.
        seeds: Number of seeds: 0, 1, ...
        candidates: Fingerprint of the candidates of each budget.
        identity: What the measured numbers depend on, as `identity` describes it.
    """

    task: str
    space: str
    trials: int
    budgets: list[str]
    strategies: list[str]
    seeds: int
    candidates: dict[str, str]
    identity: NotRequired[dict[str, Any]]


class Winner(TypedDict):
    """The best trial of a strategy on a budget, over its seeds.

    Attributes:
        budget: The budget.
        strategy: The strategy.
        seed: Seed of the run.
        trial: Number of the trial in its run.
        objective: Its objective.
        cost: Cost of its plan, in the order of METRICS.
        proposal: One frontier index per free layer.
    """

    budget: str
    strategy: str
    seed: int
    trial: int
    objective: float
    cost: list[int]
    proposal: list[int]


class ScoreRow(Winner):
    """The score of a winner.

    Attributes:
        part: The data it was measured on: "test" if the task has a test score.
        examples: Examples that it averages over; None if the task does not say.
        score: The score.
        interval: Its 95 % interval.
    """

    part: Part
    examples: NotRequired[int | None]
    score: float | None
    interval: Bounds | None


class DenseScore(TypedDict):
    """The score of the dense model.

    Attributes:
        part: The data it was measured on.
        score: The score.
        interval: Its 95 % interval.
    """

    part: Part
    score: float | None
    interval: Bounds | None


class Benchmark(TypedDict):
    """The content of benchmark.json.

    Attributes:
        settings: What is compared.
        cells: The finished runs.
        scores: Scores of the winners.
        dense: Score of the dense model; absent until the winners are scored.
    """

    settings: BenchmarkSettings
    cells: list[Cell]
    scores: list[ScoreRow]
    dense: NotRequired[DenseScore]


# --- running -------------------------------------------------------------------------------------------


def read_strategy(text: str) -> tuple[str, dict[str, Any]]:
    """Read a strategy with its options.

    Args:
        text: For example "optuna:sampler=gp:width=0.7", "module:Class" or "module:Class:option=1".

    Returns:
        The name and the options.

    Raises:
        RankoptError: For an unknown strategy or option.
    """
    name, *pairs = re.split(r":(?=[^:]*=)", text.strip())  # a colon that begins no KEY=VALUE belongs to what is before
    return name, read_options(name, parse_pairs(pairs))


def read_strategies(text: str) -> list[str]:
    """Read a list of strategies.

    Args:
        text: "all" for all and the usual script of an Optuna user, or for example "knapsack,random,optuna:sampler=gp".

    Returns:
        Each strategy with its options, as text.

    Raises:
        RankoptError: For an unknown strategy or option, or an empty list.
    """
    labels = (
        [*STRATEGIES, OPPONENT]
        if text == "all"
        else list(dict.fromkeys(x.strip() for x in text.split(",") if x.strip()))
    )
    if not labels:
        raise RankoptError(f"no strategies: give all, or some of {', '.join(STRATEGIES)}")
    for label in labels:
        read_strategy(label)
    return labels


def usual_effort(strategies: Sequence[str]) -> str:
    """The effort that all of some strategies are served by, in a search space that says none.

    Args:
        strategies: Each strategy with its options, as text.
    """
    own = {strategy_class(read_strategy(x)[0]).effort for x in strategies}
    return NORMAL if own == {NORMAL} else THOROUGH


def benchmark(  # noqa: PLR0913  # all but three are optional
    prepared: Prepared,
    budgets: Sequence[str],
    strategies: Sequence[str],
    trials: int = 30,
    seeds: int = 3,
    out: Path | None = None,
    resume: bool = False,
    report: Callable[[Cell], None] = lambda cell: None,
    progress: Progress = silent,
    runner: Runner = search,
) -> Benchmark:
    """Run every strategy on every budget with seeds 0, 1, ...

    Only the objective is measured. A plan is measured once, whichever strategy proposes it, and counts for each with
    its seconds. At the end the best plan of each strategy and budget is scored, on test data if the task has some.

    Args:
        prepared: The task with its candidates.
        budgets: Problems as text: "params=0.3", or with several limits "params=0.3,macs=0.5".
        strategies: Strategies as text, as "optuna:sampler=gp".
        trials: Distinct plans per run; one for strategies that propose a single plan.
        seeds: Number of seeds.
        out: Folder for benchmark.json, which is written after every run.
        resume: Whether to keep the finished runs in `out`. Failed ones are run again, and new budgets, strategies and
            seeds are added.
        report: Called with every run that ends.
        progress: Shows long work.
        runner: Evaluates the plans of a run: `search` in this process, or a `RaySearch`.

    Returns:
        The content of benchmark.json.

    Raises:
        RankoptError: For arguments that make no sense, or a benchmark in `out` that cannot be continued.
    """
    if trials < 1 or seeds < 1:
        raise RankoptError(f"trials is {trials}, seeds is {seeds}: give 1 or more of each")
    if out:
        open_folder(out, resume, FILE)
    asked: BenchmarkSettings = {
        "task": without_folder(prepared.task.name),
        "space": prepared.space.name,
        "trials": trials,
        "budgets": list(dict.fromkeys(budgets)),
        "strategies": list(dict.fromkeys(strategies)),
        "seeds": seeds,
        "candidates": {},
        "identity": identity(prepared),
    }
    data: Benchmark = {"settings": asked, "cells": [], "scores": []}
    book = _Book(out, _joined(read(out / FILE), data) if resume and out and (out / FILE).is_file() else data)
    settings = book.data["settings"]
    remedy = "Choose another --out"
    kept, path = settings.get("identity", {}), f"{out}/{FILE}"
    check_same(kept, asked["identity"], path, "benchmark", remedy, TOLERANCES, HASHES)
    problems = {b: prepared.problem(b.split(",")) for b in settings["budgets"]}
    for budget, problem in problems.items():
        offered = fingerprint(problem)
        if settings["candidates"].setdefault(budget, offered) != offered:
            raise StudyError(
                f"the candidates of {budget} are not those of the benchmark in {out}: choose another --out"
            )
    for label in settings["strategies"]:
        read_strategy(label)
    runs = _Runs(prepared, problems, trials, progress, runner)
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
    """The file benchmark.json, with its cells by budget, strategy and seed."""

    def __init__(self, out: Path | None, data: Benchmark) -> None:
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


def read(path: Path) -> Benchmark:
    """Read benchmark.json.

    Args:
        path: The file.

    Raises:
        StudyError: If it is missing or damaged.
    """
    try:
        data: Benchmark = in_one_line(read_json(path, Benchmark, LARGEST_BENCHMARK))
        if data["settings"]["trials"] > MOST_RUNS or data["settings"]["seeds"] > MOST_RUNS:
            raise ValueError(f"it has more than {MOST_RUNS:,} trials or seeds")  # noqa: TRY301
        if any((n := row.get("examples")) is not None and n < 1 for row in data["scores"]):
            raise ValueError("it has a score of no examples")  # noqa: TRY301
        return data
    except FileNotFoundError:
        raise StudyError(f"there is no {path}: there is nothing to resume") from None
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({reason(error)}): choose another --out") from error


def _joined(before: Benchmark, data: Benchmark) -> Benchmark:
    """Add new budgets, strategies and seeds to a benchmark. Raises StudyError if the two cannot be compared."""
    old, new = before["settings"], data["settings"]
    fixed: tuple[Literal["task", "space", "trials"], ...] = ("task", "space", "trials")
    for key in fixed:
        if old[key] != new[key]:
            raise StudyError(
                f"the benchmark has {key} {old[key]!r}, asked is {new[key]!r}: "
                "resume with the same, or choose another --out"
            )
    old["budgets"] = list(dict.fromkeys(old["budgets"] + new["budgets"]))
    old["strategies"] = list(dict.fromkeys(old["strategies"] + new["strategies"]))
    old["seeds"] = max(old["seeds"], new["seeds"])
    return before


def _class_of(label: str) -> type[Strategy]:
    return strategy_class(read_strategy(label)[0])


def _copied(book: _Book, budget: str, label: str, seed: int) -> Cell | None:
    """The run of seed 0, if the strategy does not use its seed: it is one-shot and seeds 0 and 1 gave one plan."""
    strategy = _class_of(label)
    if seed < 2 or not strategy.one_shot or strategy.trains:  # of what is trained, plans do not tell seeds apart
        return None
    first, second = (book.cell(budget, label, s) for s in (0, 1))
    if not first or not second or first["error"] or second["error"]:
        return None
    same = [t["proposal"] for t in first["trials"]] == [t["proposal"] for t in second["trials"]]
    return {**first, "seed": seed, "copied_from": 0} if same else None


@dataclass(kw_only=True)
class _RememberingStudy(Study):
    """A study of one run, which ends the trials of plans that were measured in another without evaluating them.

    Attributes:
        known: Plan -> outcome, of all runs.
        clock: Takes the time of the strategy, and of the evaluations.
        repeated: The plans that were known.
    """

    known: dict[PlanKey, Outcome]
    clock: Clock
    repeated: set[Proposal] = field(default_factory=set)

    def next(self) -> Proposal | None:
        with self.clock.stage("strategy"):
            while (proposal := super().next()) is not None:
                outcome = self.known.get(plan_key(self.problem, proposal))
                if outcome is None:
                    return proposal
                self.repeated.add(proposal)
                self._finish(proposal, outcome)
        return None

    def finish(self, proposal: Proposal, outcome: Outcome) -> Trial:
        self.known[plan_key(self.problem, proposal)] = outcome
        with self.clock.stage("strategy"):
            return self._finish(proposal, outcome)

    def _finish(self, proposal: Proposal, outcome: Outcome) -> Trial:
        self.clock["evaluation"] += outcome.seconds
        return super().finish(proposal, outcome)


@dataclass
class _Runs:
    """Runs strategies; measures each distinct plan once."""

    prepared: Prepared
    problems: dict[str, Problem]
    trials: int
    progress: Progress
    runner: Runner
    known: dict[PlanKey, Outcome] = field(default_factory=dict)
    networks: dict[tuple[str, str, int], nn.Module] = field(default_factory=dict)  # by budget, strategy and seed

    def remember(self, cell: Cell) -> None:
        """Reuse a cell's measurements, except failed ones, which may have been transient."""
        problem = self.problems.get(cell["budget"])
        if problem and not _class_of(cell["strategy"]).trains:  # theirs are of another problem
            for t in cell["trials"]:
                key = plan_key(problem, tuple(t["proposal"]))
                if t["error"] is None:
                    self.known.setdefault(key, Outcome(t["objective"], None, t["seconds"]))

    def run(self, budget: str, label: str, seed: int) -> Cell:
        """Run one strategy on one problem. Whatever it raises is the cell's error, and the benchmark goes on."""
        clock, problem, error = Clock(measure=0.0, strategy=0.0, evaluation=0.0), self.problems[budget], None
        study = None
        try:
            with clock.stage("strategy"):
                name, options = read_strategy(label)
                strategy = make_strategy(name, problem, seed, options)
            with clock.stage("measure"):
                strategy.measure(self.prepared, self.progress)
            p, network = self.prepared, strategy.network
            if network is not None:
                problem, self.networks[budget, label, seed] = strategy.problem, network.model
            limit = trial_limit(strategy, self.trials)
            study = _RememberingStudy(problem, strategy, limit, known=self.known, clock=clock)
            trained = network and network.model
            self.runner(study, Evaluator(problem, p.task.model, p.factors, p.objective, None, network=trained))
        except Exception as caught:  # noqa: BLE001  # whatever a strategy raises is its cell's error
            error = f"{type(caught).__name__}: {caught}"
        rows = [_row(t, t.proposal in study.repeated) for t in study.trials] if study else []
        return {
            "budget": budget,
            "strategy": label,
            "seed": seed,
            "copied_from": None,
            "error": error,
            "seconds": {
                "measure": round(clock["measure"], 4),
                "strategy": round(clock["strategy"], 4),
                "evaluation": round(clock["evaluation"], 4),
            },
            "trials": rows,
        }

    def score(self, book: _Book) -> tuple[DenseScore, list[ScoreRow]]:
        """Score the dense model and the best plan of each strategy and budget, each distinct plan once."""
        task = self.prepared.task
        part: Part = "test"
        function, examples = task.test, task.test_examples
        if function is None:
            part, function, examples = ("validation", task.score, task.examples)
        known = book.data.get("dense")
        value = known["score"] if known else None
        value = call(f"the {part} score", function, task.model) if value is None else value
        dense: DenseScore = {"part": part, "score": value, "interval": wilson(value, examples)}
        kept = {_scored(s): s["score"] for s in book.data["scores"]}
        rows: list[ScoreRow] = []
        best = winners(book.cells())
        row: Winner
        for row in self.progress(best, "scoring", len(best)):
            key = _scored(row)
            if key not in kept:
                kept[key] = call(f"the {part} score", function, self._model(row))
            rows.append(
                {**row, "part": part, "examples": examples, "score": kept[key], "interval": wilson(kept[key], examples)}
            )
        return dense, rows

    def _model(self, row: Winner) -> nn.Module:
        """A winner's model; a network that an earlier process trained is trained again."""
        budget, label, seed = row["budget"], row["strategy"], row["seed"]
        name, options = read_strategy(label)
        if not strategy_class(name).trains:
            return self.prepared.apply(self.problems[budget], tuple(row["proposal"]))
        if (budget, label, seed) not in self.networks:
            strategy = make_strategy(name, self.problems[budget], seed, options)
            strategy.measure(self.prepared, self.progress)
            self.networks[budget, label, seed] = strategy.network.model
        return self.networks[budget, label, seed]


def _scored(row: Winner) -> tuple[object, ...]:
    """What tells the models of winners apart: a plan; of a strategy that trains, the run."""
    run = (row["strategy"], row["seed"]) if _class_of(row["strategy"]).trains else ()
    return (row["budget"], *run, *row["proposal"])


def _row(trial: Trial, repeated: bool) -> BenchmarkTrial:
    return {
        "objective": trial.objective,
        "predicted": trial.predicted,
        "seconds": trial.seconds,
        "error": trial.error,
        "proposal": [int(i) for i in trial.proposal],
        "cost": [trial.cost[metric] for metric in METRICS],
        "repeated": repeated,
    }


# --- what the runs say ---------------------------------------------------------------------------------


def winners(cells: Sequence[Cell]) -> list[Winner]:
    """Find the best trial of each budget and strategy over its seeds.

    Args:
        cells: The runs.
    """
    found: dict[tuple[str, str], Winner] = {}
    for cell in cells:
        for number, t in enumerate(cell["trials"]):
            key = (cell["budget"], cell["strategy"])
            objective = t["objective"]
            if objective is not None and (key not in found or objective < found[key]["objective"]):
                found[key] = {
                    "budget": cell["budget"],
                    "strategy": cell["strategy"],
                    "seed": cell["seed"],
                    "trial": number,
                    "objective": objective,
                    "cost": t["cost"],
                    "proposal": t["proposal"],
                }
    return list(found.values())


def curve(cell: Cell, trials: int) -> list[float]:
    """Compute the least objective after 1, 2, ... evaluations.

    Args:
        cell: The run.
        trials: Length of the curve.

    Returns:
        The curve: infinite before the first evaluation that finished, constant after the last.
    """
    values = [math.inf if (objective := t["objective"]) is None else objective for t in cell["trials"]]
    values += [math.inf] * (trials - len(values))
    return [float(v) for v in np.minimum.accumulate(values)]


def results(data: Benchmark) -> dict[str, list[float]]:
    """Collect the best objectives in every budget and seed that all strategies have run.

    Args:
        data: The content of benchmark.json.

    Returns:
        Strategy -> its objectives, infinite where no evaluation finished; in the same order for all.
    """
    settings = data["settings"]
    names: list[str] = settings["strategies"]
    last = {(c["budget"], c["seed"], c["strategy"]): curve(c, settings["trials"])[-1] for c in data["cells"]}
    problems = [
        (budget, seed)
        for budget, seed in product(settings["budgets"], range(settings["seeds"]))
        if all((budget, seed, name) in last for name in names)
    ]
    return {name: [last[budget, seed, name] for budget, seed in problems] for name in names}


def ranks(data: Benchmark) -> dict[str, list[float]]:
    """Rank the strategies in every budget and seed that all of them have run.

    Args:
        data: The content of benchmark.json.

    Returns:
        Strategy -> its ranks; 1 is best, and equals share the mean rank.
    """
    from scipy.stats import rankdata

    found = results(data)
    ranked = rankdata(list(found.values()), axis=0)
    return {name: [float(x) for x in row] for name, row in zip(found, ranked, strict=True)}
