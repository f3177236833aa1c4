"""A whole job, from a task to the compressed model: what `rankopt.compress` and `rankopt search` both run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.prepare import Budget, Prepared, prepare
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.budget import limited_metrics
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.core.progress import Progress
from rankopt.core.records import MEASURED, Task
from rankopt.core.result_record import AsFastEntry
from rankopt.core.run_folder import AS_FAST, write_result
from rankopt.decompositions.registry import FamilyLike
from rankopt.model.forward import device_of
from rankopt.search.compress import check_training, open_run_folder, run_search
from rankopt.search.loop import Runner
from rankopt.search.max_drop import OPTIONS, check_max_drop, smallest_model
from rankopt.search.multi_stage import run_multi_stage
from rankopt.search.result import Result, as_fast_entry
from rankopt.search.runners import RunnerSettings, make_runner, pool_of, session
from rankopt.search.settings import SearchSettings
from rankopt.strategies.registry import StrategyLike

ShowTrials = Callable[[Runner, Path | None], Runner]
"""Wraps the runner of a search in a run folder, so that its trials are shown."""


@dataclass(frozen=True)
class Job:
    """What to do with a task. `parse` reads it as users write it.

    Attributes:
        budget: The limits; None with `max_drop`.
        max_drop: Instead of a budget: the largest drop of the score that is allowed, a fraction.
        minimize: With `max_drop`: what is to be as small as possible; None for "params".
        latency_on: Conditions of a latency or energy budget, as `Conditions.parse` reads them.
        space: The search space.
        settings: How to search.
        runner: Where trials are evaluated.
        out: The run folder; None keeps nothing on disk.
        cache: Folder for fitted candidates; None for the default one.
        as_fast: Whether to search a second time, within the same budget, for a model that is not slower than dense.
    """

    budget: Budget | None = None
    _: KW_ONLY
    max_drop: float | None = None
    minimize: str | None = None
    latency_on: str | None = None
    space: SearchSpace = field(default_factory=SearchSpace)
    settings: SearchSettings = field(default_factory=SearchSettings)
    runner: RunnerSettings = field(default_factory=RunnerSettings)
    out: Path | None = None
    cache: str | Path | None = None
    as_fast: bool = False

    @classmethod
    def parse(  # noqa: PLR0913  (a parameter for every option)
        cls,
        budget: Budget | None = None,
        *,
        max_drop: float | None = None,
        minimize: str | None = None,
        latency_on: str | None = None,
        strategy: StrategyLike = "knapsack",
        options: Mapping[str, Any] | None = None,
        trials: int | None = None,
        seed: int = 0,
        space: SearchSpace | str | Path = "default",
        families: Sequence[FamilyLike] | Mapping[str, Sequence[FamilyLike]] | None = None,
        ranks: Mapping[str, Sequence[Any]] | None = None,
        keep_dense: Sequence[str] | None = None,
        effort: str | None = None,
        minutes: float | None = None,
        fidelities: str | None = None,
        refine: bool = False,
        timeout: float | None = None,
        callbacks: Sequence[Any] = (),
        out: str | Path | None = None,
        resume: bool = False,
        storage: str | None = None,
        cache: str | Path | None = None,
        runner: RunnerSettings | None = None,
        as_fast: bool = False,
    ) -> Job:
        """Read a job as users write it; the parameters are those of `rankopt.compress`.

        Raises:
            RankoptError: Something is not understood, or does not go together.
        """
        settings = SearchSettings.parse(
            strategy,
            options,
            fidelities or None,
            trials=trials,
            seed=seed,
            refine=refine,
            timeout=timeout,
            callbacks=tuple(callbacks),
            storage=storage,
            resume=resume,
        )
        found = space if isinstance(space, SearchSpace) else load_space(space)
        job = cls(
            budget or None,
            max_drop=max_drop,
            minimize=minimize,
            latency_on=latency_on or None,
            space=found.adjusted(families, ranks, keep_dense, effort, minutes).with_effort(settings.effort),
            settings=settings,
            runner=runner or RunnerSettings(),
            out=None if out is None else Path(out),
            cache=cache,
            as_fast=as_fast,
        )
        job.check()
        return job

    @property
    def conditions(self) -> Conditions | None:
        """The conditions of a latency or energy budget, if they were given."""
        return Conditions.parse(self.latency_on) if self.latency_on else None

    def check(self) -> None:
        """Check that the parts go together.

        Raises:
            RankoptError: They do not.
        """
        if self.max_drop is None and self.minimize is not None:
            raise RankoptError("--minimize goes with --max-drop")
        if (self.max_drop is None) == (self.budget is None):
            raise RankoptError("give --budget (how small) or --max-drop (how good), and not both")
        if self.as_fast and (self.max_drop is not None or self.space.rounds > 1 or self.settings.storage):
            raise RankoptError("--as-fast searches a second time: not with --max-drop, --storage, or rounds of a space")
        if self.as_fast and "latency" in limited_metrics(self.budget):
            raise RankoptError("--as-fast adds latency=100%: give a budget without latency")
        if self.latency_on and not limited_metrics(self.budget) & set(MEASURED):
            raise RankoptError("--latency-on goes with --budget latency=... or energy=...")
        if self.runner.scheduler and len(self.settings.fidelities.names) == 1:
            raise RankoptError("--scheduler stops trials at low fidelities: give --fidelities, such as 0.1,0.5")
        _ = self.conditions
        if self.out is None and (self.settings.resume or self.settings.storage):
            raise RankoptError("--resume and --storage go with --out, the run folder")
        self._check_max_drop()
        self._check_rounds()

    def _check_max_drop(self) -> None:
        default = SearchSettings(seed=self.settings.seed, refine=self.settings.refine)
        if self.max_drop is not None and (self.settings != default or self.runner.any_given):
            raise RankoptError(
                "--max-drop evaluates knapsack plans of several budgets, here and now: it takes no --strategy, "
                "--option, --trials, --resume, --fidelities, --storage, timeout, callbacks, --workers, or what goes "
                "with workers"
            )

    def _check_rounds(self) -> None:
        settings = self.settings
        special = settings.refine or settings.fidelities != SearchSettings().fidelities or settings.storage
        ended = settings.timeout is not None or settings.callbacks
        timed = "latency" in limited_metrics(self.budget)
        if self.space.rounds > 1 and (self.max_drop is not None or special or ended or timed):
            raise RankoptError(
                f"search space {self.space.name!r} asks for {self.space.rounds} rounds: not with --max-drop, --refine, "
                "--fidelities, --storage, a budget of latency, timeout or callbacks"
            )


def run_job(task: Task, job: Job, progress: bool | Progress | None = None) -> Result:
    """Compress a task's model, and once more to be as fast as dense if the job asks for it.

    Args:
        task: The task.
        job: What to do.
        progress: As of `rankopt.search.progress.displays`.

    Raises:
        RankoptError: If an argument is wrong or the search cannot be done; see `rankopt.compress`.
    """
    result = _run(task, job, progress)
    if job.as_fast and isinstance(task.calibration, Iterator):  # it has been read
        task = dataclasses.replace(task, calibration=result.inputs or ())
    return _with_as_fast(result, task, job, progress) if job.as_fast and not result.interrupted else result


def _with_as_fast(result: Result, task: Task, job: Job, progress: bool | Progress | None) -> Result:
    """The result with what a search for a model that is not slower found, kept in the run folder, too."""
    limits = job.budget or {}
    budget: Budget = {**limits, "latency": "100%"} if isinstance(limits, Mapping) else [*limits, "latency=100%"]
    out = None if job.out is None else job.out / AS_FAST
    settings = dataclasses.replace(job.settings, resume=job.settings.resume and out is not None and out.is_dir())
    conditions = Conditions(device_of(task.model).type, fused="yes")
    again = dataclasses.replace(
        job, budget=budget, settings=settings, out=out, latency_on=str(conditions), as_fast=False
    )
    entry: AsFastEntry = {"conditions": str(conditions)}
    try:
        result.as_fast = _run(task, again, progress)
        entry = {**entry, **as_fast_entry(result.as_fast)}
    except BudgetError as error:
        entry["refused"] = str(error)
    except RankoptError as error:  # the first result stays, whatever becomes of the second
        entry["failed"] = str(error)
    except KeyboardInterrupt:
        entry["failed"] = "it was stopped"
    result.info["as_fast"] = entry
    if job.out is not None:
        write_result(job.out, result.info)
    return result


def _run(task: Task, job: Job, progress: bool | Progress | None) -> Result:
    if job.max_drop is not None:
        check_max_drop(task, job.max_drop, job.minimize or "params")
    check_training(job.settings, task)
    runner, show, shown = _opened(job, progress)
    if job.space.rounds > 1:
        with session(runner):
            return run_multi_stage(
                task, job.space, job.budget or {}, job.settings, job.out, job.cache, shown(runner, job.out), show
            )
    with session(runner):
        prepared = prepare(task, job.space, job.cache, show, pool_of(runner), job.budget, job.conditions)
        return _search(prepared, job, runner, show, shown)


def run_prepared(prepared: Prepared, job: Job, progress: bool | Progress | None = None) -> Result:
    """Compress the model of a task that was prepared before.

    Args:
        prepared: The task with its candidates; the job's search space is not used.
        job: What to do.
        progress: As in `run_job`.

    Raises:
        RankoptError: As `run_job`.
    """
    return _search(prepared, job, *_opened(job, progress))


def _opened(job: Job, progress: bool | Progress | None) -> tuple[Runner, Progress, ShowTrials]:
    """The runner of a job, whose run folder is opened, and the displays of its stages and of its trials."""
    from rankopt.search.progress import displays

    runner = make_runner(job.runner, job.out)
    if job.out is not None:
        open_run_folder(job.out, job.settings)
    return runner, *displays(progress)


def _search(prepared: Prepared, job: Job, runner: Runner, show: Progress, shown: ShowTrials) -> Result:
    """Search within the budget, or within the smallest one that keeps the score."""
    if job.max_drop is None:
        problem = prepared.problem(job.budget or {})
        return run_search(prepared, problem, job.settings, job.out, shown(runner, job.out), show)
    answer = smallest_model(prepared, job.max_drop, job.minimize or "params", show)
    settings = dataclasses.replace(job.settings, options=OPTIONS)
    problem = prepared.problem(answer.budget)
    return run_search(prepared, problem, settings, job.out, shown(answer.run, job.out), show, answer.report)
