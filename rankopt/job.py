"""The main job: search under a budget, keep what it promises, and finish with the best plan."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.budget import Problem
from rankopt.candidates import digest
from rankopt.core import (
    Proposal,
    Rank,
    RankoptError,
    StudyError,
    Task,
    TaskError,
    Trial,
)
from rankopt.fidelity import Evaluator
from rankopt.hardware import Conditions
from rankopt.inventory import model_input, one_example
from rankopt.prepare import Prepared, Track, check_batches, prepare, silent
from rankopt.promise import (
    Searched,
    check,
    checkable_limit,
    keep_promise,
)
from rankopt.result import Result, finish
from rankopt.search import Evaluate, Study, best, search
from rankopt.settings import Settings
from rankopt.space import SearchSpace
from rankopt.strategies import make_strategy, read_options

log = logging.getLogger(__name__)

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


def run_search(
    prepared: Prepared,
    problem: Problem,
    settings: Settings,
    out: Path | None = None,
    runner: Runner = search,
    track: Track = silent,
    question: Mapping[str, Any] | None = None,
) -> Result:
    """Search with a strategy and a runner; with a run folder, every trial and then the result is kept there.

    question: what the budget came from, for result.json.
    """
    if settings.refine and settings.ladder.steps:
        raise RankoptError("refining would undo the training of the plans: search without --refine or without train=")
    about: dict[str, Any] = {"task": prepared.task.name, "strategy": settings.strategy, "seed": settings.seed}
    about["options"] = {k: str(v) for k, v in sorted(settings.options.items())}
    store = None if out is None else _open_store(out, prepared, problem, about, settings)

    def look(problem: Problem, anew: bool = True) -> Searched:
        return _searched(prepared, problem, settings, store, runner, track, anew)

    try:
        found = look(problem, anew=False)
        kept = None
        if limit := checkable_limit(prepared, problem):
            with prepared.clock.stage("checking"):
                found, kept = keep_promise(found, partial(check, prepared, limit), look, track)
        about |= {"question": dict(question)} if question else {}
        strategy = found.study.strategy
        about |= {"notes": strategy.notes}
        where = (prepared, found.problem, found.trials, found.chosen)
        result = finish(*where, about, strategy.asked, settings, kept, track)
        result.info["trials"] |= {"outside": found.study.outside, "interrupted": found.study.stopping}
        if out is not None and store is not None:
            store.export()
            result.save(out)
    finally:
        if store is not None:
            store.close()
    return result


def _searched(
    prepared: Prepared, problem: Problem, settings: Settings, store: Any, runner: Runner, track: Track, anew: bool
) -> Searched:
    """anew: with limits that were moved; what was evaluated before counts, and one-shot strategies propose again."""
    strategy = make_strategy(settings.strategy, problem, settings.seed, settings.options)
    study = Study(problem, strategy, trial_limit(strategy, settings.trials), store)
    study.resume()
    if anew:
        strategy.asked = 0
        study.limit = max(study.limit, len(study.trials) + strategy.one_shot)
    if len(study.trials) < study.limit:
        with prepared.clock.stage("strategy"):
            strategy.measure(prepared, track)
    with prepared.clock.stage("search"):
        trials = runner(study, Evaluator.of(prepared, problem, settings.ladder))
    return Searched(problem, study, trials, best(trials))


def _open_store(out: Path, prepared: Prepared, problem: Problem, about: Mapping[str, Any], settings: Settings) -> Any:
    from rankopt.store import Store
    from rankopt.store_shared import SharedStore

    limits = [list(limit) for limit in map(dataclasses.astuple, problem.limits)]
    same = {**about, "limits": limits, "candidates": fingerprint(prepared, problem), "fidelities": str(settings.ladder)}
    where = (out, problem, same, settings.resume)
    return SharedStore(settings.storage, *where) if settings.storage else Store(*where)


def fingerprint(prepared: Prepared, problem: Problem) -> str:
    """Of what may be chosen and what it is fitted to and how; the fits' numbers differ from machine to machine."""
    ranks = [[(c.method, c.rank, c.form, c.precision) for c in f] for f in problem.frontiers]
    return digest(ranks, dataclasses.asdict(prepared.space), *prepared.task.model.state_dict().values())


class Until:
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


def open_folder(out: Path, resume: bool, kept: str = "study.db") -> None:
    """Make a run folder. Raises StudyError if it holds something already and is not resumed, or cannot be made."""
    try:
        # Of a process that was killed while it wrote its first file, *.part is all there is.
        full = out.exists() and (not out.is_dir() or any(".part" not in p.name for p in out.iterdir()))
        if full and not resume:
            raise StudyError(f"{out} is not empty: pass --resume to go on with it, or choose another --out")
        if full and not any(out.rglob(kept)):
            raise StudyError(f"there is nothing to resume in {out}: it holds files, but no {kept}")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{out} cannot be used: {error}") from error


def compress(
    model: nn.Module,
    calibration: Iterable[Any],
    budget: Mapping[str, Any] | Sequence[str],
    score: Callable[[nn.Module], float] | None = None,
    *,
    example_input: Any = None,
    objective: Callable[[nn.Module], float] | None = None,
    test: Callable[[nn.Module], float] | None = None,
    strategy: str = "knapsack",
    trials: int | None = None,
    seed: int = 0,
    space: SearchSpace | str = "default",
    refine: bool = False,
    options: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    track: Track = silent,
    examples: int | None = None,
    test_examples: int | None = None,
    latency_on: str | None = None,
) -> Result:
    """A smaller copy of a model that meets a budget; the model itself is unchanged.

    model: any nn.Module. calibration: batches of real inputs (a tensor, (input, ...) or a dict of arguments);
    the first 2,048 examples are used. budget: {"params": 0.5}, {"macs": "30%", "bytes": "500KB"}, ...
    score: model -> fraction, higher is better. example_input: default the first calibration batch's first example.
    refine: refit the chosen plan's layers one after the other, against the dense model's outputs (minutes).
    options: the strategy's own, such as {"sampler": "gp"}. latency_on: of a latency budget ({"latency": 0.6} or
    "5ms"), as "cpu,batch=1,threads=1,runtime=eager".
    See `Task` for the rest. Raises RankoptError (a ValueError) that says what is wrong and what to do.
    """
    read_options(strategy, options or {})
    if not isinstance(model, nn.Module):
        raise TaskError(f"model is a {type(model).__name__}: give an nn.Module")
    if example_input is None:
        check_batches(calibration)
        iterator = iter(calibration)
        first = list(islice(iterator, 1))
        if not first:
            raise TaskError("the calibration set is empty: give at least one batch of inputs")
        example_input = one_example(model_input(first[0]))
        calibration = chain(first, iterator)  # it may be a generator
    task = Task(
        model, example_input, calibration, score, objective, test=test, examples=examples, test_examples=test_examples
    )
    where = Conditions.parse(latency_on) if latency_on else None
    prepared = prepare(task, space, cache, track, budget=budget, latency_on=where)
    settings = Settings(strategy, trials, seed, refine=refine, options=options or {})
    return run_search(prepared, prepared.problem(budget), settings, track=track)
