"""A model prepared once, for many budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.api.compress import as_task, compress
from rankopt.api.errors import in_python_words
from rankopt.api.result import Result
from rankopt.candidates import prepare as preparation
from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.errors import RankoptError
from rankopt.core.progress import Progress
from rankopt.core.records import METRICS, Candidate, Cost, Layer, Task
from rankopt.decompositions.registry import FamilyLike
from rankopt.search import sweep as sweeps
from rankopt.search.job import Job, run_prepared


class Sweep(sweeps.Sweep):
    """A finished sweep, which prints as its table."""

    def __repr__(self) -> str:
        from rankopt.report.sweep import table

        return table(self)


class PreparedModel:
    """A model whose layers have been calibrated and fitted: it answers many budgets, each in a short time.

    `rankopt.prepare` makes it.

    Attributes:
        layers: All layers; `reason` says why some stay dense.
        dense: The cost of the dense model.
        sensitivities: Layer name -> measured (relative error, rise of the objective), one layer at a time.
        warnings: What to know of the model and the data before trusting a result.
    """

    def __init__(self, prepared: preparation.Prepared, progress: bool | Progress | None = None) -> None:
        """Wrap what was prepared.

        Args:
            prepared: The task with its candidates.
            progress: As of `rankopt.compress`, for all that is done with it.
        """
        self._prepared, self._progress = prepared, progress
        self.layers: tuple[Layer, ...] = prepared.layers
        self.dense: Cost = prepared.dense
        self.sensitivities = prepared.curves
        self.warnings = tuple(prepared.warnings)

    def __repr__(self) -> str:
        free, cost = len(self._prepared.free), self.dense
        return f"<PreparedModel: {cost.params:,} parameters, {free} of {len(self.layers)} layers may be factorised>"

    @in_python_words
    def compress(
        self, budget: preparation.Budget | None = None, *, progress: bool | Progress | None = None, **given: Any
    ) -> Result:
        """Compress the model to a budget.

        Args:
            budget: As of `rankopt.compress`. Or give the limits by name: `compress(params=0.5, macs="30%")`.
            progress: As of `rankopt.compress`. Default: that of `rankopt.prepare`.
            given: Limits by name, and arguments of `rankopt.compress` that say how to search: strategy, trials,
                timeout, callbacks, seed, options, fidelities, refine, out, resume, storage.

        Returns:
            The result.

        Raises:
            RankoptError: As `rankopt.compress`; also if a budget limits latency, energy, memory or disk, and the model
                was prepared without.
        """
        search = {k: given.pop(k) for k in SEARCH if k in given}
        if before := sorted(given.keys() & signature(compress).parameters.keys()):
            raise RankoptError(f"{before[0]} is an argument of rankopt.prepare or rankopt.compress, not of this method")
        if budget is not None and given:
            raise RankoptError(f"give the budget either as a whole or by name, not both: {', '.join(given)}")
        return self._run(Job.parse(budget if budget is not None else given, **search), progress)

    @in_python_words
    def smallest(
        self,
        max_drop: float,
        minimize: str = "params",
        *,
        out: str | Path | None = None,
        progress: bool | Progress | None = None,
    ) -> Result:
        """Find the smallest model whose score drops by no more than `max_drop`.

        Args:
            max_drop: Largest drop of the score, a fraction; 0.01 is one percentage point.
            minimize: What is to be small: "params", "macs" or "bytes".
            out: Run folder; None keeps nothing on disk.
            progress: As of `rankopt.compress`. Default: that of `rankopt.prepare`.

        Returns:
            The result.

        Raises:
            RankoptError: If no plan smaller than the dense model holds, or an argument makes no sense.
        """
        return self._run(Job.parse(max_drop=max_drop, minimize=minimize, out=out), progress)

    @in_python_words
    def sweep(self, budgets: str, evaluate: str = "knees", *, progress: bool | Progress | None = None) -> Sweep:
        """Allocate for a range of budgets, as `rankopt.sweep`.

        Args:
            budgets: As of `rankopt.sweep`.
            evaluate: As of `rankopt.sweep`.
            progress: As of `rankopt.compress`. Default: that of `rankopt.prepare`.

        Raises:
            RankoptError: As `rankopt.sweep`.
        """
        shown = _shown(self._progress if progress is None else progress)
        return Sweep(**vars(sweeps.sweep(self._prepared, budgets, evaluate, shown)))

    def frontier(self, layer: str, metric: str = "params") -> tuple[Candidate, ...]:
        """The candidates of a layer that no other beats in both loss and cost, cheapest first.

        Candidates of the layer that no budget has asked for so far are fitted first.

        Args:
            layer: The layer's name.
            metric: The metric of the cost.

        Raises:
            RankoptError: There is no such layer, or it has to stay dense.
        """
        found = next((x for x in self.layers if x.name == layer), None)
        if found is None:
            names = ", ".join(repr(x.name) for x in self.layers)
            raise RankoptError(f"there is no layer {layer!r}: choose from {names}")
        if found.reason is not None:
            raise RankoptError(f"layer {layer!r} has no frontier, it stays dense: {found.reason}")
        frontier = self._prepared.all_of(layer).problem({metric: "100%"}).frontier(layer)
        assert frontier is not None
        return frontier

    def _run(self, job: Job, progress: bool | Progress | None) -> Result:
        return Result.of(run_prepared(self._prepared, job, self._progress if progress is None else progress))


SEARCH = (
    *("strategy", "trials", "timeout", "callbacks", "seed", "options", "fidelities", "refine", "out", "resume"),
    "storage",
)
"""Arguments of `rankopt.compress` that say how to search, whatever the model and its candidates."""


@in_python_words
def prepare(  # noqa: PLR0913  (the model's arguments and the search space's)
    model: nn.Module | Task,
    calibration: Iterable[Any] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    *,
    example_input: Any = None,
    objective: Callable[[nn.Module], float] | None = None,
    test: Callable[[nn.Module], float] | None = None,
    examples: int | None = None,
    test_examples: int | None = None,
    budget: Mapping[str, Any] | Sequence[str] | None = None,
    latency_on: str | None = None,
    space: SearchSpace | str | Path = "default",
    families: Sequence[FamilyLike] | Mapping[str, Sequence[FamilyLike]] | None = None,
    ranks: Mapping[str, Sequence[Any]] | None = None,
    keep_dense: Sequence[str] | None = None,
    effort: str | None = None,
    minutes: float | None = None,
    cache: str | Path | None = None,
    progress: bool | Progress | None = None,
) -> PreparedModel:
    """Calibrate a model and fit the candidates of its layers once, for many budgets.

    Args:
        model: As of `rankopt.compress`.
        calibration: As of `rankopt.compress`.
        score: As of `rankopt.compress`.
        example_input: As of `rankopt.compress`.
        objective: As of `rankopt.compress`.
        test: As of `rankopt.compress`.
        examples: As of `rankopt.compress`.
        test_examples: As of `rankopt.compress`.
        budget: A loose budget with every metric that will be limited, such as `{"latency": 0.9}`. Needed for latency,
            energy, memory and disk only: these are measured if a budget limits them.
        latency_on: As of `rankopt.compress`.
        space: As of `rankopt.compress`.
        families: As of `rankopt.compress`.
        ranks: As of `rankopt.compress`.
        keep_dense: As of `rankopt.compress`.
        effort: As of `rankopt.compress`, "normal" if the space says none: further budgets fit what they need beyond the
            first. Strategies other than `knapsack` want "thorough".
        minutes: As of `rankopt.compress`, for each budget.
        cache: As of `rankopt.compress`.
        progress: As of `rankopt.compress`; also of all that is done with the prepared model.

    Returns:
        The prepared model: `prepared.compress(params=0.5)`, `prepared.smallest(max_drop=0.01)`.

    Raises:
        RankoptError: As `rankopt.compress`.
    """
    task = as_task(
        model, calibration, score, example_input=example_input, objective=objective, test=test, examples=examples,
        test_examples=test_examples,
    )  # fmt: skip
    found = space if isinstance(space, SearchSpace) else load_space(space)
    conditions = Conditions.parse(latency_on) if latency_on else None
    prepared = preparation.prepare(
        task,
        found.adjusted(families, ranks, keep_dense, effort, minutes),
        cache,
        _shown(progress),
        budget=budget if budget is not None else dict.fromkeys(METRICS[:1], "100%"),
        latency_on=conditions,
    )
    return PreparedModel(prepared, progress)


@in_python_words
def sweep(
    model: nn.Module | Task,
    calibration: Iterable[Any] | None = None,
    budgets: str = "params=0.9:0.1:9",
    score: Callable[[nn.Module], float] | None = None,
    *,
    evaluate: str = "knees",
    **prepared: Any,
) -> Sweep:
    """Trace quality against size: one calibration, then the exact allocation for every budget.

    Args:
        model: As of `rankopt.compress`.
        calibration: As of `rankopt.compress`.
        budgets: "params=0.8:0.1:8" for eight budgets at equal ratios, or "params=0.8,0.5,30K".
        score: As of `rankopt.compress`.
        evaluate: Which plans to measure: "knees" (and the ends), "all" or "none".
        prepared: Further arguments of `rankopt.prepare`.

    Returns:
        The sweep, with a point for every budget.

    Raises:
        RankoptError: As `rankopt.prepare`; `BudgetError` if none of the budgets can be met.
    """
    return prepare(model, calibration, score, **prepared).sweep(budgets, evaluate)


def _shown(progress: bool | Progress | None) -> Progress:
    from rankopt.search.progress import displays

    return displays(progress)[0]
