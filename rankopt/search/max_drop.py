"""The smallest model whose validation score drops by no more than a given amount.

This is the inverse of `run_search`: the quality is given and the budget is found, by bisection over a grid of budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.progress import Progress, silent
from rankopt.core.records import METRICS, Task, Trial
from rankopt.core.result_record import Metric, QuestionEntry, TriedRow
from rankopt.core.statistics import difference, misread_score
from rankopt.model.objective import call
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Evaluate, PlanKey, Study, plan_key, search
from rankopt.strategies.allocation import allocate

STEP = 0.02  # relative difference of neighbouring budgets of the grid


OPTIONS = {"contenders": 1}
"""Options of the strategy `knapsack` with which it proposes the exact allocation, the plan evaluated here."""


PROBES = (1, 2, 3, 5)  # steps beyond the answer that are tried as well, since scores are noisy and not monotonic


@dataclass
class Answer:
    """The budget that was found.

    Attributes:
        report: What was asked and found: the entry `question` of result.json.
        known: Plan -> its (objective, score), of all plans evaluated.
    """

    report: QuestionEntry
    known: dict[PlanKey, tuple[float, float | None]] = field(repr=False)

    @property
    def budget(self) -> dict[str, int]:
        """The smallest budget that holds, as `Prepared.problem` takes it."""
        return {self.report["minimize"]: self.report["target"]}

    def run(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        """Run a search in this process without evaluating known plans again; a runner for `run_search`.

        Args:
            study: The study.
            evaluate: Evaluates the other plans.
        """
        return search(study, lambda p: self.known.get(plan_key(study.problem, p)) or evaluate(p))


def check_max_drop(task: Task, max_drop: float, minimize: str) -> None:
    """Check the arguments of `smallest_model` before anything is measured.

    Args:
        task: The task, which needs a score.
        max_drop: Allowed drop of the score, a fraction.
        minimize: The metric of the budget.

    Raises:
        RankoptError: If the drop or the metric makes no sense.
        TaskError: If the task has no score.
    """
    if not 0 <= max_drop < 1:
        raise RankoptError(f"--max-drop {max_drop}: give a fraction from 0 to below 1; 0.01 is one point of the score")
    if minimize not in METRICS:
        raise RankoptError(f"--minimize {minimize!r}: choose from {', '.join(METRICS)}")
    if task.score is None:
        raise TaskError("--max-drop needs a score, and the task has none: give Task(score=...)")


def smallest_model(
    prepared: Prepared, max_drop: float, minimize: str = "params", progress: Progress = silent
) -> Answer:
    """Find the smallest budget whose exact allocation keeps the score.

    Budgets are bisected. Scores are noisy and need not fall with every step: a few budgets below the answer are tried
    as well, and if one of them holds, bisection goes on from there.

    Args:
        prepared: The task with its candidates.
        max_drop: Allowed drop of the validation score, a fraction; 0.01 is one percentage point.
        minimize: The metric of the budget: params, macs or bytes.
        progress: Shows each evaluation.

    Returns:
        The smallest plan evaluated that holds; all smaller ones that were evaluated do not.

    Raises:
        RankoptError: If no plan smaller than the dense model holds, or an argument makes no sense.
        TaskError: If the score is not a fraction where higher is better.
    """
    task = prepared.task
    check_max_drop(task, max_drop, minimize)
    metric = cast(Metric, minimize)
    dense = call("the score", task.score, task.model)
    assert dense is not None
    targets = grid(prepared, minimize)
    rows: dict[PlanKey, TriedRow] = {}

    def holds(step: int) -> bool:
        target = targets[step - 1]
        problem = prepared.problem({metric: target})
        proposal = allocate(problem).proposal
        key = plan_key(problem, proposal)
        if key not in rows:
            for _ in progress([step], f"evaluating {metric}={target:,}", 1):
                objective, score = Evaluator.of(prepared, problem)(proposal)
            assert score is not None
            if odd := misread_score(dense, score, task.examples):
                raise TaskError(f"--max-drop: {odd}")
            row = {"objective": objective, "score": score, "drop": dense - score, "target": target}
            rows[key] = cast(TriedRow, row | {metric: problem.cost(proposal)[metric]})
        rows[key]["target"] = min(target, rows[key]["target"])
        return _within(rows[key], max_drop)

    if deepest(holds, len(targets)) == 0:
        mildest = min(rows.values(), key=lambda row: row["drop"])
        raise RankoptError(
            f"no model smaller than dense was found that loses at most {max_drop:.2%} of score; the mildest of the "
            f"{len(rows)} plans tried ({metric}={mildest['target']:,}) loses {mildest['drop']:.2%}: allow more"
        )
    tried = sorted(rows.values(), key=lambda row: row["target"])
    smallest = next(row for row in tried if _within(row, max_drop))
    report: QuestionEntry = {
        "minimize": metric,
        "max_drop": max_drop,
        "step": STEP,
        "evaluations": len(rows),
        "dense_score": dense,
        "target": smallest["target"],
        "drop": smallest["drop"],
        "score": smallest["score"],
        "interval": difference(dense, smallest["score"], task.examples),
        "tried": tried,
    }
    return Answer(report, {key: (row["objective"], row["score"]) for key, row in rows.items()})


def _within(row: TriedRow, max_drop: float) -> bool:
    """Whether a plan's score drops by no more than allowed, up to rounding."""
    return row["drop"] <= max_drop + 1e-9


def grid(prepared: Prepared, metric: str) -> list[int]:
    """List the budgets to bisect.

    Args:
        prepared: The task with its candidates.
        metric: The metric of the budgets.

    Returns:
        Absolute budgets from just below dense to the least achievable, each `STEP` smaller than the one before.
    """
    dense = prepared.dense[metric]
    problem = prepared.problem({metric: dense})
    (least,) = problem.least
    targets: list[int] = []
    while (target := int(dense * (1 - STEP) ** (len(targets) + 1))) > least:
        targets.append(target)
    return [*targets, least]


def deepest(holds: Callable[[int], bool], count: int) -> int:
    """Search for the largest number that holds, by bisection and a few probes beyond its answer.

    Args:
        holds: Tells whether a number holds.
        count: The numbers are 1, ..., count.

    Returns:
        The largest number that was seen to hold; 0 if none was.
    """
    failed = {count + 1}

    def bisect(low: int, high: int) -> int:
        while high - low > 1:
            middle = (low + high) // 2
            if holds(middle):
                low = middle
            else:
                high = middle
                failed.add(middle)
        return low

    best = bisect(0, count + 1)
    while True:
        beyond = [best + ahead for ahead in PROBES if best + ahead <= count and best + ahead not in failed]
        better = next((k for k in beyond if holds(k)), None)
        failed.update(k for k in beyond if better is None or k < better)
        if better is None:
            return best
        best = bisect(better, min(k for k in failed if k > better))
