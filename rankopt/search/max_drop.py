"""The inverse question: the smallest model that loses at most so much of its validation score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.progress import Progress, silent
from rankopt.core.records import METRICS, Task, Trial
from rankopt.core.statistics import Interval, difference
from rankopt.model.objective import call
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Evaluate, PlanKey, Study, plan_key, search
from rankopt.strategies.allocation import allocate

STEP = 0.02  # each budget of the grid is so much smaller than the one before


OPTIONS = {"contenders": 1}  # of the strategy `knapsack`, to get the plan that was evaluated: the exact allocation


PROBES = (1, 2, 3, 5)  # steps beyond the answer that are tried too: scores are noisy, and do not fall step by step


@dataclass
class Answer:
    """The budget found, and how.

    question: what was asked and found, the entry `question` of result.json. Its `tried` holds every distinct plan
    evaluated, smallest first; `interval` is the 95 % interval of the drop, if the task says how many examples its
    score averages over.
    """

    question: dict[str, Any]
    known: dict[PlanKey, tuple[float, float | None]] = field(repr=False)

    @property
    def budget(self) -> dict[str, int]:
        return {self.question["minimize"]: self.question["target"]}

    def run(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        """A runner for `run_search`: plans that were evaluated are not evaluated again."""
        return search(study, lambda p: self.known.get(plan_key(study.problem, p)) or evaluate(p))


def check_question(task: Task, max_drop: float, minimize: str) -> None:
    """Raises RankoptError for a question that makes no sense, before anything is measured."""
    if not 0 <= max_drop < 1:
        raise RankoptError(f"--max-drop {max_drop}: give a fraction from 0 to below 1; 0.01 is one point of the score")
    if minimize not in METRICS:
        raise RankoptError(f"--minimize {minimize!r}: choose from {', '.join(METRICS)}")
    if task.score is None:
        raise TaskError("--max-drop needs a score, and the task has none: give Task(score=...)")


def smallest_model(
    prepared: Prepared, max_drop: float, minimize: str = "params", progress: Progress = silent
) -> Answer:
    """Bisect the budget, over exact allocations, until one step smaller loses more than max_drop of the score.

    Scores are noisy and need not fall with every step: after bisecting, a few smaller budgets are tried as well, and
    if one of them holds, bisection goes on from there. The answer is the smallest plan evaluated that holds; every
    smaller one that was evaluated does not. Raises RankoptError if nothing smaller than dense holds.
    """
    task = prepared.task
    check_question(task, max_drop, minimize)
    dense = call("the score", task.score, task.model)
    assert dense is not None
    targets = grid(prepared, minimize)
    rows: dict[PlanKey, dict[str, Any]] = {}

    def drop(k: int) -> float:
        problem = prepared.problem({minimize: targets[k - 1]})
        proposal = allocate(problem).proposal
        key = plan_key(problem, proposal)
        if key not in rows:
            for _ in progress([k], f"evaluating {minimize}={targets[k - 1]:,}", 1):
                objective, score = Evaluator.of(prepared, problem)(proposal)
            assert score is not None
            rows[key] = {"objective": objective, "score": score, "drop": dense - score}
            rows[key][minimize] = problem.cost(proposal)[minimize]
        rows[key]["target"] = min(targets[k - 1], rows[key].get("target", targets[k - 1]))
        return float(rows[key]["drop"])

    k = deepest(lambda k: drop(k) <= max_drop + 1e-9, len(targets))
    if k == 0:
        mildest = min(rows.values(), key=lambda row: row["drop"])
        raise RankoptError(
            f"no model smaller than dense was found that loses at most {max_drop:.2%} of score; the mildest of the "
            f"{len(rows)} plans tried ({minimize}={mildest['target']:,}) loses {mildest['drop']:.2%}: allow more"
        )
    tried = sorted(rows.values(), key=lambda row: row["target"])
    found = next(row for row in tried if row["drop"] <= max_drop + 1e-9)
    interval: Interval | None = difference(dense, found["score"], task.examples)
    asked = {"minimize": minimize, "max_drop": max_drop, "step": STEP, "evaluations": len(rows), "dense_score": dense}
    answer = {k: found[k] for k in ("target", "drop", "score")} | {"interval": interval, "tried": tried}
    return Answer(asked | answer, {key: (row["objective"], row["score"]) for key, row in rows.items()})


def grid(prepared: Prepared, metric: str) -> list[int]:
    """Budgets from just below dense down to the least achievable, each STEP smaller than the one before."""
    dense = prepared.dense[metric]
    problem = prepared.problem({metric: dense})
    least = problem.fixed[metric] + sum(min(c.cost[metric] for c in f) for f in problem.frontiers)
    targets: list[int] = []
    while (target := int(dense * (1 - STEP) ** (len(targets) + 1))) > least:
        targets.append(target)
    return [*targets, least]


def deepest(holds: Callable[[int], bool], count: int) -> int:
    """The largest of 1..count that was found to hold, 0 if none: bisection, then probes beyond it."""
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
