"""The search loop: ask the strategy, project onto the budget, evaluate, store, tell the strategy.

`Study` holds the state, for runners in this process (`search`) and on Ray (`rankopt.search.ray.runner`).
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Rank, Trial
from rankopt.strategies.allocation import project
from rankopt.strategies.base import Strategy

if TYPE_CHECKING:
    from rankopt.search.storage.local import Store

ALL_FAILED = 5  # failures without a success after which the search stops


ETA = 3  # the best 1 / ETA of trials go on from a low fidelity to the next


WAIT = 1.0  # seconds between looks at the results of other processes


REPEATS = 100  # known proposals in a row after which the strategy counts as exhausted


TRANSIENT = (OSError, torch.OutOfMemoryError, torch.AcceleratorError)


class Outcome(NamedTuple):
    """The result of evaluating a plan, or of as many fidelities as were measured so far.

    Attributes:
        objective: The objective at full fidelity; None while it is unfinished, or if it failed.
        score: The validation score, if the task has one.
        seconds: Duration so far.
        error: Why the evaluation failed.
        rungs: The objective at each lower fidelity that was measured.
        transient: True for errors that may not recur (I/O, out of memory, a GPU's); the trial is retried once.
        device: The device that it ran on; empty if that is not known.
    """

    objective: float | None = None
    score: float | None = None
    seconds: float = 0.0
    error: str | None = None
    rungs: tuple[float, ...] = ()
    transient: bool = False
    device: str = ""

    @property
    def finished(self) -> bool:
        """Whether the evaluation came to its end, by success or failure."""
        return self.objective is not None or self.error is not None


Evaluate = Callable[[Proposal], tuple[float, float | None]]
"""Evaluates a plan: a proposal within the budget -> (objective, score or None).

If it also has a method `stages(proposal)`, that is used instead: it yields the objective at each lower fidelity, then
(objective, score).
"""


def stages(evaluate: Evaluate, proposal: Proposal) -> Iterator[Outcome]:
    """Evaluate a plan, one fidelity after the other.

    Args:
        evaluate: Evaluates plans.
        proposal: The plan.

    Yields:
        The outcome after every fidelity; the last one is finished. Exceptions, and objectives that are not finite, are
        failed outcomes.
    """
    start = time.perf_counter()
    found = Outcome(device=getattr(evaluate, "device", ""))
    try:
        for measured in evaluate.stages(proposal) if hasattr(evaluate, "stages") else (evaluate(proposal),):
            objective, score = measured if isinstance(measured, tuple) else (measured, None)
            found = found._replace(seconds=time.perf_counter() - start)
            if not math.isfinite(objective):
                yield found._replace(error=f"the objective is {objective}")
                return
            if isinstance(measured, tuple):
                yield found._replace(objective=objective, score=score)
                return
            found = found._replace(rungs=(*found.rungs, objective))
            yield found
    except Exception as error:  # noqa: BLE001  # whatever a user's model or score raises must not end the search
        text, seconds = f"{type(error).__name__}: {error}", time.perf_counter() - start
        yield found._replace(seconds=seconds, error=text, transient=_is_transient(error))


def _is_transient(error: BaseException | None) -> bool:
    """Whether an error may not recur: a disk or network that was away, a GPU that others had filled."""
    return error is not None and (isinstance(error, TRANSIENT) or _is_transient(error.__cause__))


def attempt(evaluate: Evaluate, proposal: Proposal) -> Outcome:
    """Evaluate a plan at full fidelity.

    Args:
        evaluate: Evaluates plans.
        proposal: The plan.

    Returns:
        The finished outcome; a failure is an outcome, too.
    """
    *_, outcome = stages(evaluate, proposal)
    return outcome


@dataclass
class Study:
    """The state of a search: the trials of distinct plans.

    Attributes:
        problem: The candidates of every layer, and the limits.
        strategy: Proposes plans.
        limit: Distinct plans to evaluate in total; failed ones and those of a resumed study count.
        store: Where trials are kept; None for nowhere.
        report: Called with every trial that ends.
        callbacks: Called with the study and every trial that ends here, as Optuna's; one may call `stop()`.
        trials: The trials that ended.
        pending: Plan being evaluated -> number of its ask.
        reached: Plan -> its objective at each lower fidelity so far.
        retried: Plans that were evaluated again after a transient error.
        stopping: Set it to True to start no more trials.
        outside: Stored trials whose plans lie outside a latency limit that was tightened since.
        awaited: Plans that other processes were evaluating at the last look.
    """

    problem: Problem
    strategy: Strategy
    limit: int
    store: Store | None = None
    report: Callable[[Trial], None] = lambda trial: None
    callbacks: Sequence[Callback] = ()
    trials: list[Trial] = field(default_factory=list)
    pending: dict[Proposal, int] = field(default_factory=dict)
    reached: dict[Proposal, tuple[float, ...]] = field(default_factory=dict)
    retried: set[Proposal] = field(default_factory=set)
    stopping: bool = False
    outside: int = 0
    awaited: set[Proposal] = field(default_factory=set)

    def resume(self) -> None:
        """Load the store's trials. If all of them failed they are made again: the cause may be mended by now."""
        if not self.store:
            return
        stored, n_asked = self.store.trials()
        self.trials = [t for t in stored if self.problem.fits(t.proposal)]
        self.outside = len(stored) - len(self.trials)
        if self.trials and all(t.state == "failed" for t in self.trials):
            self.store.restart()
            self.trials, n_asked = [], 0
        self.reached = {t.proposal: t.rungs for t in self.trials}
        self.strategy.restore(self.trials, n_asked)

    def next(self) -> Proposal | None:
        """Choose the next plan to evaluate.

        Returns:
            A plan that nobody has evaluated or is evaluating; None if there is none. If plans are `pending` or
            `awaited`, their results may change that.

        Raises:
            RankoptError: The strategy has trained a network, and this is a study of other plans.
        """
        if self.strategy.network is not None and self.problem is not self.strategy.problem:
            raise RankoptError(
                f"strategy {self.strategy.name!r} has trained a network, which no plan of this problem stands for: "
                "make the study of the strategy's own `problem`, after `measure`"
            )
        others = self.others()  # read before the results: a plan that finishes in between is then in both
        self._read_results()
        seen = {t.proposal for t in self.trials} | self.pending.keys() | others
        self.awaited = others - {t.proposal for t in self.trials}
        if self.stopping or len(seen) >= self.limit:
            return None
        for _ in range(REPEATS):
            number = self.strategy.n_asked
            asked = self.strategy.ask()
            if asked is None:
                return None
            proposal = project(self.problem, asked)
            if proposal in seen:
                continue
            if self.store and not self.store.claim(proposal, self.limit):
                return self.next()  # another process was faster: look at its results first
            self.pending[proposal] = number
            return proposal
        return None

    def others(self) -> set[Proposal]:
        """The plans that other processes sharing the study are evaluating."""
        return self.store.claimed() if self.store else set()

    def _read_results(self) -> None:
        """Tell the strategy the trials of other processes."""
        for trial in self.store.new_trials() if self.store else ():
            self.reached[trial.proposal] = trial.rungs
            self.trials.append(dataclasses.replace(trial, number=self.outside + len(self.trials)))
            self.strategy.tell(self.trials[-1])

    def promote(self, proposal: Proposal, rungs: tuple[float, ...]) -> bool:
        """Decide whether a trial goes on to the next fidelity: the strategy does, or asynchronous successive halving.

        It goes on if it is among the best 1/ETA (rounded up) of the trials that reached this rung so far, or among the
        first ETA. This is ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning") in the variant
        where a stopped trial is never resumed.

        Args:
            proposal: The plan.
            rungs: Its objective at each fidelity so far; the last one is new.
        """
        self.reached[proposal] = rungs
        if (decided := self.strategy.promote(proposal, rungs)) is not None:
            return decided
        level = len(rungs) - 1
        values = [r[level] for r in self.reached.values() if len(r) > level]
        return len(values) <= ETA or sum(value < rungs[-1] for value in values) < math.ceil(len(values) / ETA)

    def should_retry(self, proposal: Proposal, outcome: Outcome) -> bool:
        """Decide whether to evaluate a plan again: once, after a transient error.

        Args:
            proposal: The plan.
            outcome: The outcome of its evaluation.
        """
        if not outcome.transient or proposal in self.retried:
            return False
        self.retried.add(proposal)
        return True

    def finish(self, proposal: Proposal, outcome: Outcome) -> Trial:
        """Record the end of a trial: in the store first, then with the strategy.

        Args:
            proposal: The plan.
            outcome: The outcome; an unfinished one was stopped at a low fidelity.

        Raises:
            StudyError: If the trial cannot be stored, or if all trials so far failed.
        """
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
            device=outcome.device,
        )
        self.pending.pop(proposal, None)
        if self.store:  # a resumed study asks again for the plans that were running
            self.store.add(trial, min(self.pending.values(), default=self.strategy.n_asked))
        self.trials.append(trial)
        self.strategy.tell(trial)
        self.report(trial)
        for callback in self.callbacks:
            callback(self, trial)
        self._stop_if_hopeless()
        return trial

    def stop(self) -> None:
        """Start no more trials; those that run come to their end."""
        self.stopping = True

    @property
    def best_trial(self) -> Trial:
        """The finished trial with the least objective; StudyError if none finished."""
        return best(self.trials)

    def _stop_if_hopeless(self) -> None:
        failed = [t for t in self.trials if t.state == "failed"]
        if len(failed) == len(self.trials) and len(failed) >= min(ALL_FAILED, self.limit):
            raise StudyError(f"every evaluation failed; the first said: {failed[0].error}")


Callback = Callable[[Study, Trial], None]
"""Called with the study and a trial that ended; its errors end the search. `study.stop()` ends it in good order."""


def search(study: Study, evaluate: Evaluate) -> list[Trial]:
    """Run a study in this process, one trial at a time, until its limit or the strategy's end.

    Args:
        study: The study.
        evaluate: Evaluates plans.

    Returns:
        All trials of the study.
    """
    for proposal in proposals(study):
        outcome = evaluate_until_stopped(study, evaluate, proposal)
        if study.should_retry(proposal, outcome):
            outcome = evaluate_until_stopped(study, evaluate, proposal)
        study.finish(proposal, outcome)
    return study.trials


def evaluate_until_stopped(study: Study, evaluate: Evaluate, proposal: Proposal) -> Outcome:
    """Evaluate a plan from fidelity to fidelity, until the study stops it.

    Args:
        study: Decides at every fidelity whether the trial goes on.
        evaluate: Evaluates plans.
        proposal: The plan.

    Returns:
        The last outcome.
    """
    for outcome in stages(evaluate, proposal):
        if not outcome.finished and not study.promote(proposal, outcome.rungs):
            break
    return outcome


def proposals(study: Study) -> Iterator[Proposal]:
    """Iterate over the plans to evaluate; waits for other processes, whose results may lead to more.

    Args:
        study: The study.

    Yields:
        Plans, each to be passed to `study.finish`.
    """
    while True:
        if (proposal := study.next()) is not None:
            yield proposal
        elif study.stopping or not study.awaited:
            return
        else:
            time.sleep(WAIT)


def best(trials: list[Trial]) -> Trial:
    """Find the finished trial with the least objective, the first of equals.

    Args:
        trials: The trials of a study.

    Raises:
        StudyError: If none finished.
    """
    finished = [t for t in trials if t.objective is not None]
    if not finished:
        first = next((t.error for t in trials if t.error), None)
        said = f"; the first said: {first}. Mend it, then" if first else ":"
        raise StudyError(f"no evaluation finished{said} go on with --resume (rankopt run: the same command)")
    return min(finished, key=lambda t: (t.objective, t.number))


PlanKey = tuple[tuple[str, Rank, str, str, str | None], ...]
"""Every layer's family, rank, form and precision, and which fit of these it is."""


def plan_key(problem: Problem, proposal: Proposal) -> PlanKey:
    """Identify a plan independently of the frontiers that its proposal indexes.

    Args:
        problem: The problem with its frontiers.
        proposal: One frontier index per layer.

    Returns:
        A key; equal plans of problems with different budgets have equal keys.
    """
    return tuple((c.method, c.rank, c.form, c.precision, c.key) for c in problem.candidates(proposal))


def trial_limit(strategy: Strategy, trials: int | None) -> int:
    """Decide how many distinct plans to evaluate.

    Args:
        strategy: The strategy; one that proposes a single plan has one trial.
        trials: The number asked for; None for the default of 30.

    Raises:
        RankoptError: If trials is less than 1.
    """
    if trials is not None and trials < 1:
        raise RankoptError(f"trials is {trials}: give 1 or more")
    if strategy.one_shot:
        return 1
    return 30 if trials is None else trials


Runner = Callable[[Study, Evaluate], list[Trial]]
"""Evaluates a study's plans until its limit or the strategy's end, and returns all its trials."""


class RunUntil:
    """A runner that starts no trial after a deadline."""

    def __init__(self, runner: Runner, deadline: float) -> None:
        """Wrap a runner.

        Args:
            runner: The runner that does the work.
            deadline: A value of `time.monotonic()`.
        """
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


class RunFor:
    """A runner that starts no trial after some seconds, counted from its first call."""

    def __init__(self, runner: Runner, seconds: float) -> None:
        """Wrap a runner.

        Args:
            runner: The runner that does the work.
            seconds: How long trials may start.
        """
        self.runner, self.seconds = runner, seconds
        self.deadline: float | None = None

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        self.deadline = self.deadline or time.monotonic() + self.seconds
        return RunUntil(self.runner, self.deadline)(study, evaluate)
