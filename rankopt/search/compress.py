"""The whole job: search for a plan within a budget, check its latency, and return the compressed model.

`compress` is the entry point for Python; the command line and experiments prepare a task themselves and call
`run_search`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.files import digest
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task
from rankopt.core.result_record import QuestionEntry, SearchMetadata
from rankopt.model.forward import check_batches, model_input, one_example
from rankopt.search.evaluator import Evaluator
from rankopt.search.latency_check import FinishedSearch, check, checkable_limit, search_until_met
from rankopt.search.loop import Runner, Study, best, search, trial_limit
from rankopt.search.result import Result, SearchOutcome, build_result
from rankopt.search.settings import SearchSettings
from rankopt.strategies.registry import make_strategy

if TYPE_CHECKING:
    from rankopt.search.storage.local import Store


def compress(  # noqa: PLR0913  (the public entry point: everything after `score` is optional and by keyword)
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
    """Compress a model to a budget by low-rank decompositions of its layers.

    Every layer gets a tensor decomposition and a rank, or stays dense, such that the whole model meets the budget and
    its predictions change as little as possible. The model that is passed in is not changed.

    Args:
        model: The dense model, any `nn.Module`.
        calibration: Batches of real inputs: tensors, tuples whose first item is the input (as a DataLoader gives
            them), or dicts of the forward's keyword arguments. The first 2,048 examples are used; labels are not.
        budget: Limits by metric, such as `{"params": 0.5}` or `{"macs": "30%", "bytes": "500KB"}`, or as text,
            `["params=0.5"]`. Fractions and per cents are of the dense model. Metrics are params, macs, bytes, latency,
            memory and disk.
        score: Model -> score on validation data, a fraction, higher is better. It is reported, and not optimised.
        example_input: One input to count costs with; a tensor, or a tuple or dict of the forward's arguments.
            Default: the first example of the first calibration batch.
        objective: Model -> number to minimise. Default: the KL divergence to the dense model's predictions on the
            calibration batches.
        test: Like `score`, on test data; evaluated once, at the end.
        strategy: Name of the search strategy, one of `rankopt.STRATEGIES`.
        trials: Distinct plans to evaluate. Default: 30, or 1 for strategies that propose a single plan.
        seed: The same seed gives the same plan.
        space: A search space, its name, or the path of its TOML file.
        refine: Whether to refit the chosen plan's layers one after the other, against the dense model's outputs;
            takes minutes.
        options: The strategy's own options, such as `{"sampler": "gp"}` for "optuna".
        cache: Folder for fitted candidates. Default: the environment variable RANKOPT_CACHE, or the user's cache.
        progress: Called as `progress(items, what, total)` to show long work; must yield the items.
        examples: Number of examples that `score` averages over, for confidence intervals.
        test_examples: Number of examples that `test` averages over.
        latency_on: Conditions of a latency budget (`{"latency": 0.6}` or `"5ms"`), such as
            "cpu,batch=1,threads=1,runtime=eager".

    Returns:
        The result: the compressed model, an ordinary `nn.Module`, as `result.model`; its plan as `result.plan`; a
        readable report from `result.summary()`. `result.save(folder)` writes it to disk for `rankopt.load`.

    Raises:
        RankoptError: If an argument is wrong or the search cannot be done; the message says what to do. Subclasses:
            `BudgetError` for a budget that is not understood or cannot be met, `TaskError` for the model, the data or
            a function that fails, `StudyError` if every evaluation failed.

    Example:
        >>> import rankopt
        >>> result = rankopt.compress(model, train_loader, {"params": 0.5}, score=accuracy)
        >>> print(result.summary())
        >>> small = result.model
        >>> result.save("runs/small")
    """
    settings = SearchSettings.parse(strategy, options, trials=trials, seed=seed, refine=refine)
    if not isinstance(model, nn.Module):
        raise TaskError(f"model is a {type(model).__name__}: give an nn.Module")
    if example_input is None:
        example_input, calibration = _first_example(calibration)
    task = Task(
        model, example_input, calibration, score, objective, test=test, examples=examples, test_examples=test_examples
    )
    conditions = Conditions.parse(latency_on) if latency_on else None
    prepared = prepare(task, space, cache, progress, budget=budget, latency_on=conditions)
    return run_search(prepared, prepared.problem(budget), settings, progress=progress)


def _first_example(calibration: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first input, and the batches with the first one put back: they may come from a generator."""
    check_batches(calibration)
    iterator = iter(calibration)
    first = list(islice(iterator, 1))
    if not first:
        raise TaskError("the calibration set is empty: give at least one batch of inputs")
    return one_example(model_input(first[0])), chain(first, iterator)


def run_search(
    prepared: Prepared,
    problem: Problem,
    settings: SearchSettings,
    out: Path | None = None,
    runner: Runner = search,
    progress: Progress = silent,
    max_drop: QuestionEntry | None = None,
) -> Result:
    """Search for the best plan of a prepared task, and build its model.

    Args:
        prepared: The task with its candidates.
        problem: The candidates within a budget, from `prepared.problem(budget)`.
        settings: How to search.
        out: Run folder. Every trial, and finally the result, is written there; None keeps nothing on disk.
        runner: Evaluates the plans that the strategy proposes: `search` in this process, or a `RaySearch`.
        progress: Shows long work.
        max_drop: Where the budget was found by `smallest_model`: its report, for result.json.

    Returns:
        The result of the finished trial with the least objective, within the budget as asked.

    Raises:
        BudgetError: If no plan keeps a latency budget.
        StudyError: If the run folder holds another search, or no evaluation finished.
        RankoptError: For settings that contradict each other.
    """
    if settings.refine and settings.fidelities.steps:
        raise RankoptError("refining would undo the training of the plans: search without --refine or without train=")
    metadata: SearchMetadata = {
        "task": prepared.task.name,
        "strategy": settings.strategy,
        "seed": settings.seed,
        "options": {k: str(v) for k, v in sorted(settings.options.items())},
    }
    store = None if out is None else _open_store(out, prepared, problem, metadata, settings)

    def search_within(problem: Problem, limits_changed: bool = True) -> FinishedSearch:
        return _search_once(prepared, problem, settings, store, runner, progress, limits_changed)

    try:
        finished = search_within(problem, limits_changed=False)
        latency_check = None
        if limit := checkable_limit(prepared, problem):
            with prepared.clock.stage("checking"):
                finished, latency_check = search_until_met(
                    finished, partial(check, prepared, limit), search_within, progress
                )
        strategy = finished.study.strategy
        if max_drop:
            metadata["question"] = max_drop
        metadata["notes"] = strategy.notes
        outcome = SearchOutcome(
            problem=finished.problem,
            trials=finished.trials,
            chosen=finished.chosen,
            asked=strategy.n_asked,
            check=latency_check,
            outside=finished.study.outside,
            interrupted=finished.study.stopping,
        )
        result = build_result(prepared, outcome, metadata=metadata, settings=settings, progress=progress)
        if out is not None and store is not None:
            store.export()
            result.save(out)
    finally:
        if store is not None:
            store.close()
    return result


def _search_once(
    prepared: Prepared,
    problem: Problem,
    settings: SearchSettings,
    store: Store | None,
    runner: Runner,
    progress: Progress,
    limits_changed: bool,
) -> FinishedSearch:
    """Run the strategy to its end, or to the limit on trials.

    limits_changed: True when a latency check moved the limit. Earlier trials count towards `trials`, and a one-shot
    strategy proposes once more.
    """
    strategy = make_strategy(settings.strategy, problem, settings.seed, settings.options)
    study = Study(problem, strategy, trial_limit(strategy, settings.trials), store)
    study.resume()
    if limits_changed:
        strategy.n_asked = 0
        study.limit = max(study.limit, len(study.trials) + strategy.one_shot)
    if len(study.trials) < study.limit:
        with prepared.clock.stage("strategy"):
            strategy.measure(prepared, progress)
    with prepared.clock.stage("search"):
        trials = runner(study, Evaluator.of(prepared, problem, settings.fidelities))
    return FinishedSearch(problem, study, trials, best(trials))


def _open_store(
    out: Path, prepared: Prepared, problem: Problem, metadata: Mapping[str, Any], settings: SearchSettings
) -> Store:
    """The study in the run folder or at the storage's URL, with all that a resumed search must agree on."""
    from rankopt.search.storage.local import Store
    from rankopt.search.storage.shared import SharedStore

    required = {
        **metadata,
        "limits": [list(dataclasses.astuple(limit)) for limit in problem.limits],
        "candidates": fingerprint(prepared, problem),
        "fidelities": str(settings.fidelities),
    }
    if settings.storage:
        return SharedStore(settings.storage, out, problem, required, settings.resume)
    return Store(out, problem, required, settings.resume)


def fingerprint(prepared: Prepared, problem: Problem) -> str:
    """Hash what a search chooses from, so that only equal searches share trials.

    Args:
        prepared: The task with its candidates.
        problem: The candidates within a budget.

    Returns:
        A digest of the candidates' families and ranks, the search space and the dense weights. The fitted numbers are
        left out: they differ between machines.
    """
    ranks = [[(c.method, c.rank, c.form, c.precision) for c in f] for f in problem.frontiers]
    return digest(ranks, dataclasses.asdict(prepared.space), *prepared.task.model.state_dict().values())
