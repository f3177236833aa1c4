"""The whole job: search for a plan within a budget, check its latency, and return the compressed model.

`rankopt.search.job.run_job` prepares a task and calls `run_search`, for `rankopt.compress` and the command line;
experiments prepare a task themselves.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.prepare import Prepared
from rankopt.core.allocator import keep_freed_memory
from rankopt.core.errors import RankoptError
from rankopt.core.files import digest
from rankopt.core.options import text_of
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Proposal, Task, Trial
from rankopt.core.result_record import QuestionEntry, SearchMetadata
from rankopt.core.run_folder import PLAN, open_folder
from rankopt.core.statistics import is_far
from rankopt.search.evaluator import Evaluator
from rankopt.search.identity import identity
from rankopt.search.latency_check import Checks, FinishedSearch, check, checkable_limits, search_until_met
from rankopt.search.loop import RunFor, Runner, Study, best, search, trial_limit
from rankopt.search.result import Result, SearchOutcome, build_result
from rankopt.search.settings import SearchSettings
from rankopt.search.trained_plans import TrainedPlans
from rankopt.strategies.registry import make_strategy, strategy_class
from rankopt.strategies.trained import Network, TrainingStrategy, check_trainable

if TYPE_CHECKING:
    from rankopt.search.storage.local import Store

NETWORK = "network"
"""Folder of a run folder with the network of a strategy that trains, until the result is written."""

TRIALS = "trials"
"""Folder of a run folder with the weights of the best trained trials, until the result is written."""


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
        BudgetError: If no plan keeps a latency or energy budget.
        StudyError: If the run folder holds another search, or no evaluation finished.
        RankoptError: For settings that contradict each other.
    """
    if settings.refine and settings.fidelities.steps:
        raise RankoptError("refining would undo the training of the plans: search without --refine or without train=")
    check_training(settings, prepared.task)
    metadata: SearchMetadata = {
        "task": prepared.task.name,
        "strategy": settings.strategy,
        "seed": settings.seed,
        "options": {k: text_of(v) for k, v in sorted(settings.options.items())},
    }
    store = None if out is None else _open_store(out, prepared, problem, metadata, settings)
    if settings.timeout is not None:
        runner = RunFor(runner, settings.timeout)

    limits = checkable_limits(prepared, problem)

    def check_plan(problem: Problem, proposal: Proposal) -> Checks:
        return tuple(check(prepared, limit, problem, proposal) for limit in limits)

    files = ExitStack()
    kept = _trained_plans(settings, out, files)

    def search_within(problem: Problem, limits_changed: bool = True) -> FinishedSearch:
        return _search_once(prepared, problem, settings, out, store, kept, runner, progress, limits_changed)

    try:
        files.enter_context(keep_freed_memory())
        finished = search_within(problem, limits_changed=False)
        checks: Checks = ()
        if limits:
            with prepared.clock.stage("checking"):
                finished, checks = search_until_met(finished, check_plan, search_within, progress)
        strategy = finished.study.strategy
        prepared = dataclasses.replace(prepared, network=finished.network)
        if max_drop:
            metadata["question"] = max_drop
        metadata["notes"] = strategy.notes
        metadata["warnings"] = [
            *prepared.warnings,
            *_unfinished_fits(prepared, problem, settings),
            *_failed_prediction(prepared, finished.chosen),
        ]
        outcome = SearchOutcome(
            problem=finished.problem,
            trials=finished.trials,
            chosen=finished.chosen,
            asked=strategy.n_asked,
            limit=finished.study.limit,
            checks=checks,
            outside=finished.study.outside,
            interrupted=finished.study.stopping,
            kept=kept,
        )
        result = build_result(prepared, outcome, metadata=metadata, settings=settings, progress=progress)
        if out is not None and store is not None:
            store.export()
            result.save(out)
            if not outcome.interrupted:
                for folder in (NETWORK, TRIALS):
                    shutil.rmtree(out / folder, ignore_errors=True)
    finally:
        files.close()
        if store is not None:
            store.close()
    return result


def _unfinished_fits(prepared: Prepared, problem: Problem, settings: SearchSettings) -> list[str]:
    """A warning, if the strategy may choose candidates that the effort has not fitted to the end."""
    if problem.fitting is None or settings.effort != THOROUGH:
        return []
    return [
        f"with effort {prepared.space.effort} only candidates near the exact allocation are fitted to the end: "
        f"strategy {settings.strategy} may choose others, whose fits are short; give it effort {THOROUGH}"
    ]


def _failed_prediction(prepared: Prepared, chosen: Trial) -> list[str]:
    """A warning, if the chosen plan lost far more than its layers were predicted to."""
    if chosen.objective is None or chosen.predicted is None:
        return []
    zero = prepared.dense_objective
    if not is_far(chosen.objective - zero, chosen.predicted):
        return []
    return [
        f"the plan's measured objective rises by {chosen.objective - zero:.3g}, far above the predicted "
        f"{chosen.predicted:.3g}: the calibration data show too little of what some layers do, give more of them"
    ]


def _search_once(  # noqa: PLR0913  # where things are kept, and what runs and shows the search
    prepared: Prepared,
    problem: Problem,
    settings: SearchSettings,
    out: Path | None,
    store: Store | None,
    kept: TrainedPlans | None,
    runner: Runner,
    progress: Progress,
    limits_changed: bool,
) -> FinishedSearch:
    """Run the strategy to its end, or to the limit on trials.

    limits_changed: True when a check moved a limit. Earlier trials count towards `trials`, and a one-shot
    strategy proposes once more.
    """
    strategy = make_strategy(settings.strategy, problem, settings.seed, settings.options)
    if strategy.prunes and not settings.fidelities.names[1:]:
        raise RankoptError("a pruner stops trials at low fidelities: give some, as --fidelities 0.1,0.5")
    if isinstance(strategy, TrainingStrategy):
        with prepared.clock.stage("strategy"):
            _train(strategy, prepared, out, progress)
        prepared, problem = dataclasses.replace(prepared, network=strategy.network.model), strategy.problem
    study = Study(problem, strategy, trial_limit(strategy, settings.trials), store, callbacks=settings.callbacks)
    study.resume()
    if limits_changed:
        strategy.n_asked = 0
        study.limit = max(study.limit, len(study.trials) + strategy.one_shot)
    if len(study.trials) < study.limit and not strategy.trains:
        with prepared.clock.stage("strategy"):
            strategy.measure(prepared, progress)
    with prepared.clock.stage("search"):
        if kept is not None:
            kept.only(problem, [t.proposal for t in study.trials])
        trials = runner(study, Evaluator.of(prepared, problem, settings.fidelities, kept))
    return FinishedSearch(problem, study, trials, best(trials), prepared.network)


def _trained_plans(settings: SearchSettings, out: Path | None, files: ExitStack) -> TrainedPlans | None:
    """Where the weights of trained trials are kept: in the run folder, or in a temporary one; None if none are trained.

    files: Removes the temporary folder when it is closed.
    """
    if not settings.fidelities.steps:
        return None
    folder = Path(files.enter_context(TemporaryDirectory(prefix="rankopt-"))) if out is None else out / TRIALS
    folder.mkdir(parents=True, exist_ok=True)
    return TrainedPlans(folder.resolve())  # workers have working directories of their own


def _train(strategy: TrainingStrategy, prepared: Prepared, out: Path | None, progress: Progress) -> None:
    """Train a strategy's network, or read the one that an earlier run of this search trained and left in its folder."""
    folder = None if out is None else out / NETWORK
    if folder is not None and (folder / PLAN).is_file():
        strategy.deliver(Network.read(folder, prepared, strategy.problem.layers))
        return
    strategy.measure(prepared, progress)
    if folder is not None:
        strategy.network.save(folder)


def check_training(settings: SearchSettings, task: Task) -> None:
    """Check that a strategy that trains can do so, before any work.

    Args:
        settings: How to search.
        task: The task.

    Raises:
        TaskError: The task lacks what the training needs.
        RankoptError: The network would not be what was trained.
    """
    if not strategy_class(settings.strategy).trains:
        return
    check_trainable(settings.strategy, task)
    if settings.refine:
        raise RankoptError(
            f"refining would undo the training of strategy {settings.strategy!r}: search without --refine"
        )


def open_run_folder(out: Path, settings: SearchSettings) -> None:
    """Make a run folder, or check one that is to be resumed, and check that trials can be kept, before any work.

    Args:
        out: The run folder.
        settings: The settings of the search.

    Raises:
        StudyError: If the folder or the storage cannot be used.
    """
    from rankopt.search.storage.local import FILE, check_folder
    from rankopt.search.storage.shared import check_storage

    open_folder(out, settings.resume, "*" if settings.storage else FILE)
    check_folder(out)
    if settings.storage:
        check_storage(settings.storage)


def _open_store(
    out: Path, prepared: Prepared, problem: Problem, metadata: Mapping[str, Any], settings: SearchSettings
) -> Store:
    """The study in the run folder or at the storage's URL, with all that a resumed search must agree on."""
    from rankopt.search.storage.local import Store
    from rankopt.search.storage.shared import SharedStore

    required = {
        **{k: v for k, v in metadata.items() if k != "task"},
        **identity(prepared),
        "limits": [list(dataclasses.astuple(limit)) for limit in problem.limits],
        "candidates": fingerprint(problem),
        "fidelities": str(settings.fidelities),
    }
    if settings.storage:
        return SharedStore(settings.storage, out, problem, required, settings.resume)
    return Store(out, problem, required, settings.resume)


def fingerprint(problem: Problem) -> str:
    """Hash what a search chooses from, so that only equal searches share trials.

    Args:
        problem: The candidates within a budget.

    Returns:
        A digest of the candidates' families and ranks. The fitted numbers are left out: they differ between machines.
    """
    return digest([[(c.method, c.rank, c.form, c.precision) for c in f] for f in problem.frontiers])
