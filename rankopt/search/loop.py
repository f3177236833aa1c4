"""The loop: ask, project, evaluate, tell, store. Trials run in this process."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Rank, Trial
from rankopt.strategies.allocation import project
from rankopt.strategies.base import Strategy

ALL_FAILED = 5  # so many failures and no success: the search stops


ETA = 3  # one in so many goes on from a low fidelity to the next


WAIT = 1.0  # seconds between looks at what other processes do


REPEATS = 100  # so many proposals in a row that were evaluated already: the strategy has run dry


class Outcome(NamedTuple):
    """What an evaluation gives. Of an unfinished one there are only `rungs`, the objective at lower fidelities.

    error: why it failed. transient: the machine's fault perhaps, and worth a second attempt.
    """

    objective: float | None = None
    score: float | None = None
    seconds: float = 0.0
    error: str | None = None
    rungs: tuple[float, ...] = ()
    transient: bool = False

    @property
    def finished(self) -> bool:
        return self.objective is not None or self.error is not None


Evaluate = Callable[[Proposal], tuple[float, float | None]]
"""A proposal within the budget -> (objective, score). One with a method `stages` is evaluated at several fidelities:
it yields the objective at each lower one, then (objective, score)."""


def stages(evaluate: Evaluate, proposal: Proposal) -> Iterator[Outcome]:
    """Evaluate, one fidelity after the other; an exception or a number that is not finite is a failure."""
    start = time.perf_counter()
    rungs: tuple[float, ...] = ()
    try:
        for measured in evaluate.stages(proposal) if hasattr(evaluate, "stages") else (evaluate(proposal),):
            objective, score = measured if isinstance(measured, tuple) else (measured, None)
            seconds = time.perf_counter() - start
            if not math.isfinite(objective):
                yield Outcome(seconds=seconds, error=f"the objective is {objective}", rungs=rungs)
                return
            if isinstance(measured, tuple):
                yield Outcome(objective, score, seconds, rungs=rungs)
                return
            rungs = (*rungs, objective)
            yield Outcome(seconds=seconds, rungs=rungs)
    except Exception as error:  # whatever a user's model or score raises must not end the search
        text = f"{type(error).__name__}: {error}"
        yield Outcome(seconds=time.perf_counter() - start, error=text, rungs=rungs, transient=_is_transient(error))


def _is_transient(error: BaseException | None) -> bool:
    """Whether an error may pass: a disk or network that was away, a GPU that others had filled."""
    return error is not None and (isinstance(error, OSError | torch.OutOfMemoryError) or _is_transient(error.__cause__))


def attempt(evaluate: Evaluate, proposal: Proposal) -> Outcome:
    """Evaluate to full fidelity."""
    *_, outcome = stages(evaluate, proposal)
    return outcome


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
    reached: dict[Proposal, tuple[float, ...]] = field(default_factory=dict)  # -> its objective at each rung so far
    retried: set[Proposal] = field(default_factory=set)
    stopping: bool = False  # set it, and nothing more is started
    outside: int = 0  # trials that the store holds, but that a limit on latency, moved since, leaves out
    awaited: set[Proposal] = field(default_factory=set)  # what other processes evaluated at the last look

    def resume(self) -> None:
        """Take up what the store holds. Where every trial failed, they are made again: what was wrong may be mended."""
        if not self.store:
            return
        found, asked = self.store.trials()
        self.trials = [t for t in found if self.problem.fits(t.proposal)]
        self.outside = len(found) - len(self.trials)
        if self.trials and all(t.state == "failed" for t in self.trials):
            self.store.restart()
            self.trials, asked = [], 0
        self.reached = {t.proposal: t.rungs for t in self.trials}
        self.strategy.restore(self.trials, asked)

    def next(self) -> Proposal | None:
        """The next distinct plan to evaluate; None if there is none (now: `pending` tells)."""
        others = self.others()  # before the news: what they tell in between is in both
        self._catch_up()
        seen = {t.proposal for t in self.trials} | self.pending.keys() | others
        self.awaited = others - {t.proposal for t in self.trials}
        if self.stopping or len(seen) >= self.limit:
            return None
        for _ in range(REPEATS):
            number = self.strategy.asked
            wanted = self.strategy.ask()
            if wanted is None:
                return None
            proposal = project(self.problem, wanted)
            if proposal in seen:
                continue
            if self.store and not self.store.claim(proposal, self.limit):
                return self.next()  # another process was faster: there is something new to learn
            self.pending[proposal] = number
            return proposal
        return None

    def others(self) -> set[Proposal]:
        """What other processes evaluate now, on a study that they share."""
        return self.store.claimed() if self.store else set()

    def _catch_up(self) -> None:
        for trial in self.store.news() if self.store else ():
            self.reached[trial.proposal] = trial.rungs
            self.trials.append(dataclasses.replace(trial, number=self.outside + len(self.trials)))
            self.strategy.tell(self.trials[-1])

    def promote(self, proposal: Proposal, rungs: tuple[float, ...]) -> bool:
        """Whether an evaluation goes on from the rung that it has just reached: asynchronous successive halving.

        It does if it is among the best 1/ETA, rounded up, of those that reached this rung so far (Li et al. 2020,
        in the variant that never takes up again what it stopped), or one of the first ETA, which have little beside.
        """
        self.reached[proposal] = rungs
        level = len(rungs) - 1
        values = [r[level] for r in self.reached.values() if len(r) > level]
        return len(values) <= ETA or sum(value < rungs[-1] for value in values) < math.ceil(len(values) / ETA)

    def again(self, proposal: Proposal, outcome: Outcome) -> bool:
        """Whether to evaluate once more what failed: once, where the reason may pass."""
        if not outcome.transient or proposal in self.retried:
            return False
        self.retried.add(proposal)
        return True

    def finish(self, proposal: Proposal, outcome: Outcome) -> Trial:
        """Record an evaluation, given up where it is unfinished: store first, then tell."""
        trial = Trial(
            number=self.outside + len(self.trials),
            proposal=proposal,
            state="failed" if outcome.error else "finished" if outcome.finished else "stopped",
            cost=self.problem.cost(proposal),
            objective=outcome.objective,
            score=outcome.score,
            predicted=self.problem.loss(proposal),
            seconds=outcome.seconds,
            error=outcome.error and outcome.error + " (tried twice)" * (proposal in self.retried),
            note=self.strategy.note(proposal),
            rungs=outcome.rungs,
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
        outcome = evaluate_until_stopped(study, evaluate, proposal)
        study.finish(
            proposal, evaluate_until_stopped(study, evaluate, proposal) if study.again(proposal, outcome) else outcome
        )
    return study.trials


def evaluate_until_stopped(study: Study, evaluate: Evaluate, proposal: Proposal) -> Outcome:
    """Evaluate, from fidelity to fidelity, as far as the study lets it."""
    for outcome in stages(evaluate, proposal):
        if not outcome.finished and not study.promote(proposal, outcome.rungs):
            break
    return outcome


def proposals(study: Study) -> Iterator[Proposal]:
    """What to evaluate, until there is nothing more; waits for other processes, whose trials may change that."""
    while True:
        if (proposal := study.next()) is not None:
            yield proposal
        elif study.stopping or not study.awaited:
            return
        else:
            time.sleep(WAIT)


def best(trials: list[Trial]) -> Trial:
    """The finished trial with the least objective, the first of equals. Raises StudyError if none finished."""
    finished = [t for t in trials if t.objective is not None]
    if not finished:
        first = next((t.error for t in trials if t.error), None)
        said = f"; the first said: {first}. Mend it, then" if first else ":"
        raise StudyError(f"no evaluation finished{said} go on with --resume (rankopt run: the same command)")
    return min(finished, key=lambda t: (t.objective, t.number))


def front(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The finished trials that no other beats in both objective and cost, by rising cost."""
    finished = [t for t in trials if t.objective is not None]
    kept: list[Trial] = []
    for trial in sorted(finished, key=lambda t: (t.cost[metric], t.objective, t.number)):
        if not kept or trial.objective < kept[-1].objective:  # type: ignore[operator]
            kept.append(trial)
    return kept


# --- searching ---------------------------------------------------------------------------------------


PlanKey = tuple[tuple[str, Rank, str, str], ...]


def plan_key(problem: Problem, proposal: Proposal) -> PlanKey:
    """What a proposal builds, whatever the frontiers it is given in: equal plans have equal keys."""
    return tuple((c.method, c.rank, c.form, c.precision) for c in problem.candidates(proposal))


def trial_limit(strategy: Any, trials: int | None) -> int:
    """How many distinct plans to evaluate: one for strategies with a single proposal, else as asked (30)."""
    if trials is not None and trials < 1:
        raise RankoptError(f"trials is {trials}: give 1 or more")
    if strategy.one_shot:
        return 1
    return 30 if trials is None else trials


# --- the whole job -----------------------------------------------------------------------------------

Runner = Callable[[Study, Evaluate], list[Trial]]


class RunUntil:
    """A runner that starts no trial after a moment of time.monotonic()."""

    def __init__(self, runner: Runner, deadline: float) -> None:
        self.runner, self.deadline = runner, deadline

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        def stop() -> None:
            study.stopping = True

        wait = self.deadline - time.monotonic()
        if wait <= 0:
            stop()
        timer = threading.Timer(min(max(wait, 0), threading.TIMEOUT_MAX), stop)
        timer.daemon = True
        timer.start()
        try:
            return self.runner(study, evaluate)
        finally:
            timer.cancel()
