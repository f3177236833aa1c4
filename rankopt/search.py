"""The loop: ask, project, evaluate, tell, store. Trials run in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rankopt.allocation import project
from rankopt.budget import Problem
from rankopt.core import Proposal, StudyError, Trial
from rankopt.strategies.base import Strategy

ALL_FAILED = 5  # so many failures and no success: the search stops
REPEATS = 100  # so many proposals in a row that were evaluated already: the strategy has run dry


class Outcome(NamedTuple):
    """What an evaluation gives; error: why it failed."""

    objective: float | None = None
    score: float | None = None
    seconds: float = 0.0
    error: str | None = None


Evaluate = Callable[[Proposal], tuple[float, float | None]]
"""A proposal within the budget -> (objective, score)."""


def attempt(evaluate: Evaluate, proposal: Proposal) -> Outcome:
    """Evaluate; an exception or a number that is not finite becomes a failure with its reason."""
    start = time.perf_counter()
    try:
        objective, score = evaluate(proposal)
    except Exception as error:  # whatever a user's model or score raises must not end the search
        return Outcome(seconds=time.perf_counter() - start, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    if not math.isfinite(objective):
        return Outcome(seconds=seconds, error=f"the objective is {objective}")
    return Outcome(objective, score, seconds)


@dataclass
class Study:
    """What the loop keeps: the trials of distinct plans. Shared by the runners in this process and on Ray.

    limit: distinct plans to evaluate in total, failures and resumed ones included.
    """

    problem: Problem
    strategy: Strategy
    limit: int
    store: Any = None
    report: Callable[[Trial], None] = lambda trial: None
    trials: list[Trial] = field(default_factory=list)
    pending: dict[Proposal, int] = field(default_factory=dict)  # -> the number of its ask

    def resume(self) -> None:
        """Take up what the store holds."""
        if self.store:
            self.trials, asked = self.store.trials()
            self.strategy.restore(self.trials, asked)

    def next(self) -> Proposal | None:
        """The next distinct plan to evaluate; None if there is none (now: `pending` tells)."""
        seen = {t.proposal for t in self.trials}
        if len(seen) + len(self.pending) >= self.limit:
            return None
        for _ in range(REPEATS):
            number = self.strategy.asked
            wanted = self.strategy.ask()
            if wanted is None:
                return None
            proposal = project(self.problem, wanted)
            if proposal not in seen and proposal not in self.pending:
                self.pending[proposal] = number
                return proposal
        return None

    def finish(self, proposal: Proposal, outcome: Outcome) -> Trial:
        """Record an evaluation: store first, then tell."""
        trial = Trial(
            number=len(self.trials),
            proposal=proposal,
            state="failed" if outcome.error else "finished",
            cost=self.problem.cost(proposal),
            objective=outcome.objective,
            score=outcome.score,
            predicted=self.problem.loss(proposal),
            seconds=outcome.seconds,
            error=outcome.error,
            note=self.strategy.note(proposal),
        )
        self.pending.pop(proposal, None)
        if self.store:  # after a stop, what was running is asked for again
            self.store.add(trial, min(self.pending.values(), default=self.strategy.asked))
        self.trials.append(trial)
        self.strategy.tell(trial)
        self.report(trial)
        self._stop_if_hopeless()
        return trial

    def _stop_if_hopeless(self) -> None:
        failed = [t for t in self.trials if t.state == "failed"]
        if len(failed) == len(self.trials) and len(failed) >= min(ALL_FAILED, self.limit):
            raise StudyError(f"every evaluation failed; the first said: {failed[0].error}")


def search(study: Study, evaluate: Evaluate) -> list[Trial]:
    """Evaluate until the limit or the strategy's end, one trial at a time. Returns all trials."""
    for proposal in proposals(study):
        study.finish(proposal, attempt(evaluate, proposal))
    return study.trials


def proposals(study: Study) -> Iterator[Proposal]:
    while (proposal := study.next()) is not None:
        yield proposal


def best(trials: list[Trial]) -> Trial:
    """The finished trial with the least objective, the first of equals. Raises StudyError if none finished."""
    finished = [t for t in trials if t.objective is not None]
    if not finished:
        first = next((t.error for t in trials if t.error), "nothing was proposed")
        raise StudyError(f"no evaluation finished; the first said: {first}. Mend it, then search into another folder")
    return min(finished, key=lambda t: (t.objective, t.number))


def front(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The finished trials that no other beats in both objective and cost, by rising cost."""
    finished = [t for t in trials if t.objective is not None]
    kept: list[Trial] = []
    for trial in sorted(finished, key=lambda t: (t.cost[metric], t.objective, t.number)):
        if not kept or trial.objective < kept[-1].objective:  # type: ignore[operator]
            kept.append(trial)
    return kept
