"""The main job: search under a budget, keep what it promises, and finish with the best plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.files import digest
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task
from rankopt.model.forward import check_batches, model_input, one_example
from rankopt.search.evaluator import Evaluator, Settings
from rankopt.search.latency_check import Searched, check, checkable_limit, search_until_met
from rankopt.search.loop import Runner, Study, best, search, trial_limit
from rankopt.search.result import Result, build_result
from rankopt.strategies.registry import make_strategy, read_options


def run_search(
    prepared: Prepared,
    problem: Problem,
    settings: Settings,
    out: Path | None = None,
    runner: Runner = search,
    progress: Progress = silent,
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
        return _searched(prepared, problem, settings, store, runner, progress, anew)

    try:
        found = look(problem, anew=False)
        kept = None
        if limit := checkable_limit(prepared, problem):
            with prepared.clock.stage("checking"):
                found, kept = search_until_met(found, partial(check, prepared, limit), look, progress)
        about |= {"question": dict(question)} if question else {}
        strategy = found.study.strategy
        about |= {"notes": strategy.notes}
        where = (prepared, found.problem, found.trials, found.chosen)
        result = build_result(*where, about, strategy.asked, settings, kept, progress)
        result.info["trials"] |= {"outside": found.study.outside, "interrupted": found.study.stopping}
        if out is not None and store is not None:
            store.export()
            result.save(out)
    finally:
        if store is not None:
            store.close()
    return result


def _searched(
    prepared: Prepared, problem: Problem, settings: Settings, store: Any, runner: Runner, progress: Progress, anew: bool
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
            strategy.measure(prepared, progress)
    with prepared.clock.stage("search"):
        trials = runner(study, Evaluator.of(prepared, problem, settings.ladder))
    return Searched(problem, study, trials, best(trials))


def _open_store(out: Path, prepared: Prepared, problem: Problem, about: Mapping[str, Any], settings: Settings) -> Any:
    from rankopt.search.storage.local import Store
    from rankopt.search.storage.shared import SharedStore

    limits = [list(limit) for limit in map(dataclasses.astuple, problem.limits)]
    same = {**about, "limits": limits, "candidates": fingerprint(prepared, problem), "fidelities": str(settings.ladder)}
    where = (out, problem, same, settings.resume)
    return SharedStore(settings.storage, *where) if settings.storage else Store(*where)


def fingerprint(prepared: Prepared, problem: Problem) -> str:
    """Of what may be chosen and what it is fitted to and how; the fits' numbers differ from machine to machine."""
    ranks = [[(c.method, c.rank, c.form, c.precision) for c in f] for f in problem.frontiers]
    return digest(ranks, dataclasses.asdict(prepared.space), *prepared.task.model.state_dict().values())


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
    progress: Progress = silent,
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
    prepared = prepare(task, space, cache, progress, budget=budget, latency_on=where)
    settings = Settings(strategy, trials, seed, refine=refine, options=options or {})
    return run_search(prepared, prepared.problem(budget), settings, progress=progress)
