"""A range of budgets from one preparation.

The exact allocation is solved for every budget; plans are measured at the ends of the predicted front and where it
bends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankopt.candidates.prepare import Prepared
from rankopt.core.budget import Limit, parse_budget
from rankopt.core.errors import BudgetError, RankoptError, TaskError
from rankopt.core.problem import Problem
from rankopt.core.progress import Clock, Progress, silent
from rankopt.core.records import Cost, Plan, Proposal, Task
from rankopt.core.statistics import Interval, wilson
from rankopt.model.counting import count
from rankopt.model.objective import call
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Runner, Study, search
from rankopt.search.result import make_plan
from rankopt.strategies.allocation import allocate
from rankopt.strategies.base import Strategy

DEPTH = 2  # knees are searched on the whole front, then on both sides of its knee


BEND = 0.1  # distance from the straight line, as a share of the front's extent, below which there is no knee


EVALUATE = ("knees", "all", "none")


HELP = "give METRIC=FROM:TO:HOW_MANY (params=0.8:0.1:8) or a list (params=0.8,0.5,0.3)"


@dataclass(frozen=True)
class Point:
    """One budget of a sweep.

    Attributes:
        budget: The budget as `rankopt search --budget` takes it.
        limit: The budget as a limit.
        kind: "end", "knee", "between" or "infeasible".
        reason: Why it is infeasible.
        proposal: The exact allocation.
        plan: The same as a plan.
        predicted: Its predicted loss.
        gap: Relative optimality gap of the predicted loss.
        objective: Measured objective, if it was evaluated.
        score: Validation score, if it was evaluated and the task has one.
        interval: 95 % interval of the score.
    """

    budget: str
    limit: Limit
    kind: str
    reason: str = ""
    proposal: Proposal | None = None
    plan: Plan | None = None
    predicted: float | None = None
    gap: float | None = None
    objective: float | None = None
    score: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        task: Name of the task.
        metric: The metric of the budgets.
        dense: Cost of the dense model.
        dense_score: Its validation score.
        dense_interval: 95 % interval of that score.
        points: The budgets in their order.
        evaluated: Number of plans evaluated.
        seconds: Time of "allocating" and "evaluating".
    """

    task: str
    metric: str
    dense: Cost
    dense_score: float | None
    dense_interval: Interval | None
    points: tuple[Point, ...]
    evaluated: int
    seconds: dict[str, float]


def read_budgets(text: str, dense: Cost) -> list[tuple[str, Limit]]:
    """Read the budgets of a sweep.

    Args:
        text: "params=0.8,0.5,30K" lists budgets. "params=0.8:0.1:8" is eight budgets from 0.8 to 0.1 in equal ratios,
            since losses grow with ratios rather than differences; fractions are rounded to 3 digits, absolute numbers
            to integers.
        dense: Cost of the dense model.

    Returns:
        Each budget as text and as a limit, in the order of the text.

    Raises:
        BudgetError: If the text is not understood.
    """
    metric, equals, values = text.partition("=")
    if not equals or not values:
        raise BudgetError(f"budgets {text!r} are not understood: {HELP}")
    if ":" not in values:
        budgets = [f"{metric}={v.strip()}" for v in values.split(",")]
    else:
        parts = values.split(":")
        if len(parts) != 3 or not parts[2].strip().isdigit() or int(parts[2]) < 2:
            raise BudgetError(f"budgets {text!r} are not understood, or fewer than 2: {HELP}")
        ends = [parse_budget([f"{metric}={v}"], dense)[0].requested for v in parts[:2]]
        if (ends[0] <= 1) != (ends[1] <= 1):
            raise BudgetError(f"budgets {text!r}: give both ends as fractions of dense, or both as numbers")
        between = np.geomspace(ends[0], ends[1], int(parts[2]))
        budgets = [f"{metric}={float(f'{v:.3g}')}" if v <= 1 else f"{metric}={round(v)}" for v in between]
    return [(b, parse_budget([b], dense)[0]) for b in dict.fromkeys(budgets)]


def loosest(task: Task, budgets: str) -> str:
    """Find the budget of a sweep that is easiest to meet; if it cannot be met, none can.

    Args:
        task: The task.
        budgets: The budgets, as `read_budgets` takes them.
    """
    wanted = read_budgets(budgets, count(task.model, task.example_input))
    return max(wanted, key=lambda b: b[1].target)[0]


def knees(x: Sequence[float], y: Sequence[float], depth: int = DEPTH) -> set[int]:
    """Find the knees of a decreasing front (Satopää et al. 2011, "Kneedle").

    With both axes scaled to [0, 1], the knee is the point furthest below the line between the ends. The search is
    repeated on both sides of it.

    Args:
        x: Ascending values.
        y: Descending values.
        depth: How often to search.

    Returns:
        Indices of the knees.
    """
    if depth == 0 or len(x) < 3 or x[-1] <= x[0] or y[0] <= y[-1]:
        return set()
    a, b = np.asarray(x, float), np.asarray(y, float)
    below = 1 - (a - a[0]) / (a[-1] - a[0]) - (b - b[-1]) / (b[0] - b[-1])
    at = int(below.argmax())
    if below[at] < BEND:
        return set()
    left, right = knees(x[: at + 1], y[: at + 1], depth - 1), knees(x[at:], y[at:], depth - 1)
    return {at} | left | {at + i for i in right}


def sweep(
    prepared: Prepared,
    budgets: str,
    evaluate: str = "knees",
    progress: Progress = silent,
    runner: Runner = search,
) -> Sweep:
    """Allocate for every budget, and measure objective and validation score of some plans. Test data is not used.

    Args:
        prepared: The task with its candidates.
        budgets: The budgets, as `read_budgets` takes them.
        evaluate: Which plans to measure: "knees" (the ends and knees of the predicted front), "all" or "none".
        progress: Shows long work.
        runner: Evaluates the plans: `search` in this process, or a `RaySearch`.

    Raises:
        BudgetError: If no budget can be met.
        TaskError: If an evaluation fails.
    """
    check_evaluate(evaluate)
    task, clock = prepared.task, Clock()
    wanted = read_budgets(budgets, prepared.dense)
    prepared = prepared.fitted_for([[budget] for budget, _ in wanted])
    with clock.stage("allocating"):
        points = [_allocate(prepared, *b) for b in progress(wanted, "allocating", len(wanted))]
    if all(p.plan is None for p in points):
        raise BudgetError(f"none of these budgets can be met: {points[0].reason}")
    points = _mark(points)
    kinds = {"knees": ("end", "knee"), "all": ("end", "knee", "between"), "none": ()}[evaluate]
    with clock.stage("evaluating"):
        chosen = [p for p in points if p.kind in kinds]
        measured = _measure(prepared, chosen, runner, progress)
        dense = call("the score", task.score, task.model)
    points = [measured.get(p.budget, p) for p in points]
    seconds = {k: round(v, 3) for k, v in clock.items()}
    metric, interval = wanted[0][1].metric, wilson(dense, task.examples)
    return Sweep(task.name, metric, prepared.dense, dense, interval, tuple(points), len(chosen), seconds)


def check_evaluate(evaluate: str) -> None:
    """Check which plans of a sweep are to be measured.

    Args:
        evaluate: The option's value.

    Raises:
        RankoptError: If it is not one of `EVALUATE`.
    """
    if evaluate not in EVALUATE:
        raise RankoptError(f"--evaluate {evaluate!r}: choose from {', '.join(EVALUATE)}")


def _allocate(prepared: Prepared, budget: str, limit: Limit) -> Point:
    try:
        problem = prepared.problem([budget])
        found = allocate(problem)
    except BudgetError as error:
        return Point(budget, limit, "infeasible", str(error))
    plan = make_plan(prepared, problem, found.proposal)
    return Point(budget, limit, "between", "", found.proposal, plan, found.loss, found.gap)


def _mark(points: Sequence[Point]) -> list[Point]:
    """Mark the ends and knees of the predicted front."""
    metric = points[0].limit.metric
    front = sorted((i for i, p in enumerate(points) if p.plan), key=lambda i: points[i].limit.target)
    sizes = [p.plan.cost[metric] for i in front if (p := points[i]).plan]
    bends = {front[i] for i in knees(sizes, [points[i].predicted or 0.0 for i in front])}
    kinds = dict.fromkeys(bends, "knee") | dict.fromkeys((front[0], front[-1]), "end")
    return [replace(p, kind=kinds.get(i, p.kind)) for i, p in enumerate(points)]


class _Given(Strategy):
    """Proposes given plans."""

    def __init__(self, problem: Problem, plans: Sequence[Proposal]) -> None:
        super().__init__(problem)
        self.plans = plans

    def propose(self, number: int) -> Proposal | None:
        return self.plans[number] if number < len(self.plans) else None


def _measure(prepared: Prepared, points: Sequence[Point], runner: Runner, progress: Progress) -> dict[str, Point]:
    """Measure the plans of some points. All are one study, within the loosest budget: the frontiers are the same."""
    if not points:
        return {}
    plans = list(dict.fromkeys(p.proposal for p in points if p.proposal is not None))
    problem = prepared.problem([max(points, key=lambda p: p.limit.target).budget])
    done = iter(progress(range(len(plans)), "evaluating", len(plans)))
    study = Study(problem, _Given(problem, plans), len(plans), report=lambda trial: next(done, None) and None)
    next(done)
    trials = {t.proposal: t for t in runner(study, Evaluator.of(prepared, problem))}
    next(done, None)
    if failed := next((t for t in trials.values() if t.error), None):
        raise TaskError(f"the evaluation of a plan failed: {failed.error}")
    examples = prepared.task.examples
    found = {p: trials[p.proposal] for p in points if p.proposal is not None}
    return {
        p.budget: replace(p, objective=t.objective, score=t.score, interval=wilson(t.score, examples))
        for p, t in found.items()
    }
