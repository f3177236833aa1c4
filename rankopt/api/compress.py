"""The entry point for Python: compress a model in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.api.errors import in_python_words
from rankopt.api.result import Result
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import TaskError
from rankopt.core.progress import Progress
from rankopt.core.records import Task, Trial, unwrapped
from rankopt.decompositions.registry import FamilyLike
from rankopt.model.checks import check_model
from rankopt.model.inputs import first_example, peek
from rankopt.search.job import Job, run_job
from rankopt.search.loop import Study
from rankopt.search.runners import RunnerSettings
from rankopt.strategies.registry import StrategyLike


@in_python_words
def compress(  # noqa: PLR0913  (the public entry point: everything after `score` is optional and by keyword)
    model: nn.Module | Task,
    calibration: Iterable[Any] | None = None,
    budget: Mapping[str, Any] | Sequence[str] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    *,
    example_input: Any = None,
    objective: Callable[[nn.Module], float] | None = None,
    test: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    minimize: str | None = None,
    strategy: StrategyLike = "knapsack",
    trials: int | None = None,
    timeout: float | None = None,
    callbacks: Sequence[Callable[[Study, Trial], None]] = (),
    seed: int = 0,
    space: SearchSpace | str | Path = "default",
    families: Sequence[FamilyLike] | Mapping[str, Sequence[FamilyLike]] | None = None,
    ranks: Mapping[str, Sequence[Any]] | None = None,
    keep_dense: Sequence[str] | None = None,
    effort: str | None = None,
    minutes: float | None = None,
    refine: bool = False,
    fidelities: str | None = None,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    storage: str | None = None,
    cache: str | Path | None = None,
    progress: bool | Progress | None = None,
    examples: int | None = None,
    test_examples: int | None = None,
    latency_on: str | None = None,
    workers: int = 0,
    gpus_per_trial: float = 0.0,
    cpus_per_trial: float = 1.0,
    ray_address: str | None = None,
    as_fast: bool = False,
) -> Result:
    """Compress a model to a budget by low-rank decompositions of its layers.

    Every layer gets a tensor decomposition and a rank, or stays dense, such that the whole model meets the budget and
    its predictions change as little as possible. The model that is passed in is not changed.

    Args:
        model: The dense model, any `nn.Module`; or a whole `Task`, which holds calibration data and functions, too.
        calibration: Batches of real inputs: tensors, tuples whose first item is the input (as a DataLoader gives
            them), or mappings of the forward's keyword arguments. The first 2,048 examples are used; labels are not.
        budget: Limits by metric, such as `{"params": 0.5}` or `{"macs": "30%", "bytes": "500KB"}`, or as text,
            `["params=0.5"]`. Fractions and per cents are of the dense model. Metrics are params, macs, bytes, latency,
            memory, disk and energy.
        score: Model -> score on validation data, a fraction, higher is better. It is reported, and not optimised.
            `max_drop` needs it.
        example_input: One input to count costs with; a tensor, or a tuple or dict of the forward's arguments.
            Default: the first example of the first calibration batch.
        objective: Model -> number to minimise. Default: the KL divergence to the dense model's predictions on the
            calibration batches.
        test: Like `score`, on test data; evaluated once, at the end.
        max_drop: Instead of a budget: the smallest model is searched that loses at most this much score; 0.01 is one
            percentage point.
        minimize: With `max_drop`: what is to be small: "params", "macs" or "bytes". Default: "params".
        strategy: Name of the search strategy, one of `rankopt.STRATEGIES`, "module:Class" or "FILE.py:Class"; or a
            subclass of `Strategy`, also with its options, as `Mine(depth=3)`.
        trials: Distinct plans to evaluate. Default: 30, or 1 for strategies that propose a single plan.
        timeout: Seconds after the start of the first trial from which no further one starts.
        callbacks: Called as callback(study, trial) after every trial, as Optuna's are. `study.stop()` ends the search,
            `study.trials` and `study.best_trial` are the trials so far. Errors of a callback end the search, too.
        seed: The same seed gives the same plan.
        space: A search space, its name, or the path of its TOML file. If it asks for several `rounds`, the model is
            compressed part of the way, trained briefly, and compressed again.
        families: Decompositions instead of the space's, by name or as objects or classes of `Decomposition`; or for
            some layers: `{"layer3.*": ["tucker2"]}`.
        ranks: Ranks to try for some layers: `{"layer3.*": [8, (8, 16)]}`. A number stands for every bond. The first
            pattern that fits a layer counts.
        keep_dense: Names or patterns of layers to leave dense, in addition to the space's.
        effort: How much to fit: "thorough" for all candidates of the search space, "normal" for those that can be part
            of a good plan within the budget, "quick" for less. Default: the space's; if it says none, "normal" for the
            strategy `knapsack`, and "thorough" for others.
        minutes: Instead: how long preparing may take; fits that were not started by then are left out.
        refine: Whether to refit the chosen plan's layers one after the other, against the dense model's outputs;
            takes minutes.
        fidelities: Stop bad trials early: shares of the examples and a short training, such as "0.1,0.5".
        options: The strategy's own options, such as `{"sampler": "gp"}` for "optuna".
        out: Run folder. Every trial, and finally model and result are written there, as `rankopt search` does.
        resume: Whether to go on with the run folder `out`.
        storage: SQLAlchemy URL of a study that several processes share. Default: study.db in `out`.
        cache: Folder for fitted candidates. Default: the environment variable RANKOPT_CACHE, or the user's cache.
        progress: By default bars on a terminal and in a notebook; elsewhere lines go to the logger "rankopt", at level
            INFO. True prints lines to standard error there, False shows nothing. A function is called as
            `progress(items, what, total)` and yields the items.
        examples: Number of examples that `score` averages over, for confidence intervals.
        test_examples: Number of examples that `test` averages over.
        latency_on: Conditions of a latency or energy budget (`{"latency": 0.6}` or `"5ms"`), such as
            "cpu,batch=1,threads=1,runtime=eager".
        workers: Ray Tune workers that evaluate trials at once; 0: this process does.
        gpus_per_trial: GPUs of one worker, may be a fraction.
        cpus_per_trial: CPUs of one worker; its torch uses as many threads.
        ray_address: Address of a running Ray cluster, or "auto".
        as_fast: Whether to search a second time, within the same budget and for a model that is not slower than dense
            where both are fused. That is `result.as_fast`; the report shows it beside the first, or why there is none.

    Returns:
        The result: the compressed model, an ordinary `nn.Module`, as `result.model`; its plan as `result.plan`; a
        readable report from `result.summary()`. `result.save(folder)` writes it to disk for `rankopt.load`. Once trials
        have begun, Ctrl-C ends the search in good order: the result is that of the trials so far.

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
    task = as_task(
        model, calibration, score, example_input=example_input, objective=objective, test=test, examples=examples,
        test_examples=test_examples,
    )  # fmt: skip
    job = Job.parse(
        budget,
        max_drop=max_drop,
        minimize=minimize,
        latency_on=latency_on,
        strategy=strategy,
        options=options,
        trials=trials,
        seed=seed,
        space=space,
        families=families,
        ranks=ranks,
        keep_dense=keep_dense,
        effort=effort,
        minutes=minutes,
        fidelities=fidelities,
        refine=refine,
        timeout=timeout,
        callbacks=callbacks,
        out=out,
        resume=resume,
        storage=storage,
        cache=cache,
        runner=RunnerSettings(workers, ray_address, gpus_per_trial, cpus_per_trial=cpus_per_trial),
        as_fast=as_fast,
    )
    return Result.of(run_job(task, job, progress))


def as_task(
    model: nn.Module | Task,
    calibration: Iterable[Any] | None,
    score: Callable[[nn.Module], float] | None,
    **others: Any,
) -> Task:
    """The task that a public function's arguments describe.

    Args:
        model: The model, or the task itself, which goes with none of the others.
        calibration: Batches of inputs.
        score: Model -> score.
        others: Further fields of the task.

    Raises:
        TaskError: If the model or the data cannot be used.
    """
    if isinstance(model, Task):
        if given := [k for k, v in {"calibration": calibration, "score": score, **others}.items() if v is not None]:
            raise TaskError(f"{given[0]} is given beside a Task: give it to the Task")
        return model
    if not isinstance(model, nn.Module):
        raise TaskError(f"model is a {type(model).__name__}: give an nn.Module")
    check_model(unwrapped(model))
    if others.get("example_input") is None:
        batch, calibration = peek(calibration)
        others["example_input"] = first_example(unwrapped(model), batch)
    return Task(model, calibration=calibration or (), score=score, **others)
