"""The entry point for Python: compress a model in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task, unwrapped
from rankopt.model.checks import check_model
from rankopt.model.inputs import check_batches, first_example, not_empty
from rankopt.search.compress import run_search
from rankopt.search.multi_stage import run_multi_stage
from rankopt.search.result import Result
from rankopt.search.settings import SearchSettings


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
            them), or mappings of the forward's keyword arguments. The first 2,048 examples are used; labels are not.
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
        space: A search space, its name, or the path of its TOML file. If it asks for several `rounds`, the model is
            compressed part of the way, trained briefly, and compressed again.
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
    check_model(unwrapped(model))
    if example_input is None:
        example_input, calibration = _first_example(unwrapped(model), calibration)
    task = Task(
        model, example_input, calibration, score, objective, test=test, examples=examples, test_examples=test_examples
    )
    conditions = Conditions.parse(latency_on) if latency_on else None
    space = load_space(space) if isinstance(space, str) else space
    if space.rounds > 1:
        if refine or latency_on:
            asks = f"search space {space.name!r} asks for {space.rounds} rounds"
            raise RankoptError(f"{asks}: not with refine or latency_on")
        return run_multi_stage(task, space, budget, settings, cache=cache, progress=progress)
    prepared = prepare(task, space, cache, progress, budget=budget, latency_on=conditions)
    return run_search(prepared, prepared.problem(budget), settings, progress=progress)


def _first_example(model: nn.Module, calibration: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first example, and the batches with the first one put back: they may come from a generator."""
    check_batches(calibration)
    iterator = not_empty(calibration)
    first = list(islice(iterator, 1))
    if not first:
        raise TaskError("the calibration set is empty: give at least one batch of inputs")
    return first_example(model, first[0]), chain(first, iterator)
