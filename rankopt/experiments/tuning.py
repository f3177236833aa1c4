"""Studies of one search, and studies that search for hyperparameters, such as

```toml
task = "digits"
budget = { params = 0.3 }
training = { epochs = 5 }
searches = 40

[hyperparameters]
training.rate = { low = 0.0001, high = 0.01, log = true }
space.points = [6, 12]
```

A TPE sampler (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011) chooses each search's
settings. A search is a trial of the Optuna study in OUT/hyperparameters.db, on disk as soon as it has ended. For every
trial there is a new sampler, seeded by the study's seed and the trial's place in the order of asking. It sees the
trials before this one, without those that may still run: a study that was killed continues as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import rankdata
from typing_extensions import TypedDict

from rankopt.candidates.cache import Cache
from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.progress import Display, StopCondition
from rankopt.core.records import METRICS, Task
from rankopt.core.run_folder import RESULT, check_same, folder_lock, open_folder
from rankopt.core.schema import checked
from rankopt.experiments.config import OBJECTIVES, StudyFile
from rankopt.experiments.elsewhere import Shared, WorkerSearch, run_in_folder_away, status, to_device
from rankopt.experiments.experiment import Experiment, load_teacher, prepare_experiment, run_experiment, run_in_folder
from rankopt.search.loop import ALL_FAILED, Runner, RunUntil
from rankopt.search.ray.away import Desk, Job, Update
from rankopt.search.result import Result
from rankopt.search.runners import Crew, crew_of
from rankopt.search.storage.local import STUDY, create_study, load_study, storage_errors
from rankopt.strategies.optuna import derived
from rankopt.strategies.optuna_plugins import SamplerFactory

FILE = "hyperparameters.db"


MIN_FOR_IMPORTANCE = 3  # searches


MIN_RANDOM = 10  # searches with random settings, before the sampler learns; at least two for each hyperparameter


LOST = "lost"  # attribute of the Optuna study: trials whose process was killed; they do not count


POSITION = "position"
"""Attribute of a trial: its place in the order of asking. A search that was lost is made again in its place."""


class Measured(TypedDict, total=False):
    """What a study keeps of a search; see `measurements`."""

    position: int
    error: str
    score: float
    objective: float
    params: float
    macs: float
    bytes: float
    latency: float
    memory: float
    disk: float
    energy: float
    milliseconds: float
    seconds: float


Report = Callable[[str], None]
"""Shows a line on a search that has ended."""


class TuningStudy:
    """The searches of a study with hyperparameters, kept in its folder's hyperparameters.db.

    Args:
        study: The study's file.
        task: The task.
        out: Folder of the study; one process at a time may use it.

    Raises:
        RankoptError: If an objective is the score and the task gives none.
    """

    def __init__(self, study: StudyFile, task: Task, out: Path) -> None:
        self.study_file, self.out = study, out
        self.objectives = study.objectives or ("score" if task.score else "objective",)
        if "score" in self.objectives and not task.score:
            raise RankoptError(f"study {study.path}: the task gives no score, choose other objectives")
        self.task = task
        self.distributions = {h.name: h.distribution for h in study.hyperparameters}
        self.path = out / FILE
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    @contextmanager
    def open(self) -> Iterator[TuningStudy]:
        """Context: the folder is locked and its database created or loaded.

        Raises:
            StudyError: If the folder belongs to another study or is in use.
        """
        if (self.out / RESULT).is_file():
            raise StudyError(f"{self.out} holds another study's run: give another --out")
        open_folder(self.out, self.path.exists(), FILE)
        with folder_lock(self.out):
            with storage_errors(self.path):
                self._create_or_load()
            yield self

    def _create_or_load(self) -> None:
        """Open the database; trials that still run or wait in it were killed, and are marked as lost."""
        if not self.path.exists():
            directions = [OBJECTIVES[name] for name in self.objectives]
            write_beside(self.path, lambda p: create_study(p, STUDY, self.metadata(), directions))
        self.study = load_study(self.path)
        remedy = "Go on with the same file, or give another --out"
        check_same(self.study.user_attrs, self.metadata(), self.path, "study", remedy)
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.ask()  # it runs, and can be ended
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.set_user_attr(LOST, [*self.study.user_attrs.get(LOST, ()), trial.number])
            self.study.tell(trial.number, state=TrialState.FAIL)
        for trial in self.done():
            self._check(trial)

    def _check(self, trial: FrozenTrial) -> None:
        """Raise ValueError for a search that is not what `run` writes: the file may be damaged, or from elsewhere."""
        found = trial.distributions, len(trial.values or ()), all(map(math.isfinite, trial.values or ()))
        if found != (self.distributions, len(self.objectives) * (trial.state == TrialState.COMPLETE), True):
            raise ValueError(f"search {trial.number} has other hyperparameters or objectives")
        for h in self.study_file.hyperparameters:
            if h.to_optuna(h.from_optuna(trial.params[h.name])) != trial.params[h.name]:
                raise ValueError(f"search {trial.number} has {h.name} = {trial.params[h.name]!r}")
        checked(trial.user_attrs, Measured)

    def metadata(self) -> dict[str, Any]:
        """Describe the study, as its database keeps it: a study can be resumed if all of this is the same."""
        ranges = {
            name: json.loads(optuna.distributions.distribution_to_json(d)) for name, d in self.distributions.items()
        }
        asked = self.study_file.experiment.as_json(self.task.name)
        return {**asked, "objectives": list(self.objectives), "hyperparameters": ranges}

    def done(self) -> list[FrozenTrial]:
        """List the searches that have ended, failed ones included."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        lost = set(self.study.user_attrs.get(LOST, ()))
        return [t for t in trials if t.number not in lost]

    def finished(self) -> list[FrozenTrial]:
        """List the searches that have a result."""
        return [t for t in self.done() if t.state == TrialState.COMPLETE]

    def best(self) -> FrozenTrial:
        """Return the finished search with the best first objective; ties are broken by the others."""
        signs = [-1 if OBJECTIVES[name] == "maximize" else 1 for name in self.objectives]
        return min(self.finished(), key=lambda t: [s * v for s, v in zip(signs, t.values, strict=True)])

    def importance(self, objective: int) -> dict[str, float]:
        """Estimate each hyperparameter's share in the variance of an objective's ranks.

        By fANOVA (Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014). Ranks
        are used because a few searches that went wrong would otherwise make up all of the variance.

        Args:
            objective: Index of the objective.

        Returns:
            Hyperparameter -> share; empty if there are too few searches, or all have one value.
        """
        values = {t.number: t.values[objective] for t in self.finished()}
        if len(values) < MIN_FOR_IMPORTANCE or len(set(values.values())) == 1:
            return {}
        ranks = dict(zip(values, rankdata(list(values.values())), strict=True))
        found = optuna.importance.get_param_importances(
            self.study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            target=lambda trial: float(ranks[trial.number]),
        )
        return {name: float(v) for name, v in found.items() if math.isfinite(v)}

    def experiment(self, params: Mapping[str, Any]) -> Experiment:
        """Return the experiment with a trial's values of the hyperparameters.

        Args:
            params: Hyperparameter -> value, as Optuna stores it.
        """
        values = {h.name: h.from_optuna(params[h.name]) for h in self.study_file.hyperparameters}
        return self.study_file.experiment.with_values(values)

    def _positions(self) -> dict[int, FrozenTrial]:
        """The searches that have ended, by their place in the order of asking."""
        return {t.user_attrs.get(POSITION, i): t for i, t in enumerate(self.done())}

    def next_position(self, running: Collection[int], at_once: int) -> int | None:
        """Find the place of the next search.

        Args:
            running: Places of searches that run.
            at_once: How many may run.

        Returns:
            The place; None if there is none, or it has to wait for the result of an earlier one.
        """
        done = self._positions()
        for position in range(self.study_file.searches):
            if position not in done and position not in running:
                return position if all(p in done for p in range(position - at_once + 1)) else None
        return None

    def ask(self, position: int, at_once: int = 1) -> optuna.Trial:
        """Start the search of a place; the first has the settings of the file, if they lie within the ranges.

        The sampler sees the results of all places up to `at_once` before this one, and of no others, whether they have
        ended or not: so the settings do not depend on how long searches take.

        Args:
            position: The place.
            at_once: How many searches run at a time.
        """
        usual = self.study_file.experiment.tunable()
        params = {h.name: h.to_optuna(usual[h.name]) for h in self.study_file.hyperparameters}
        if position > 0 or None in params.values():
            params = self._draw(position, [t for p, t in sorted(self._positions().items()) if p <= position - at_once])
        self.study.sampler = RandomSampler()  # which has nothing to decide
        self.study.enqueue_trial(params, user_attrs={POSITION: position})
        return self.study.ask(self.distributions)

    def _draw(self, position: int, known: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Choose settings, given some results."""
        n_random = max(MIN_RANDOM, 2 * len(self.distributions))
        seed = derived(self.study_file.experiment.search.seed, position)
        sampler = SamplerFactory("tpe", n_startup_trials=n_random).make(seed)
        seen = optuna.create_study(directions=self.study.directions, sampler=sampler)
        seen.add_trials(known)
        return seen.ask(self.distributions).params

    def run(self, deadline: float, runner: Runner, cache: Path | None, report: Report, display: Display) -> bool:
        """Search until the study is complete. With Ray workers several searches run beside each other, one in each.

        Args:
            deadline: When to stop, on the clock of `time.monotonic`. No search begins that would probably not end by
                then, judged by the median of those before.
            runner: Runs the searches.
            cache: Folder of fitted candidates; None for the default.
            report: Shows a line on every search that ends.
            display: Shows the progress of preparations, or what runs.

        Returns:
            Whether the study is complete.

        Raises:
            StudyError: If all of the first searches failed.
        """
        untested = dataclasses.replace(self.task, test=None)  # only the best search may see test data
        if (crew := crew_of(runner)) is not None:
            _BesideEachOther(self, crew, untested, deadline, cache, report).run(display)
        else:
            self._run_here(untested, deadline, runner, cache, report, display)
        return len(self.done()) >= self.study_file.searches

    def _run_here(
        self, task: Task, deadline: float, runner: Runner, cache: Path | None, report: Report, display: Display
    ) -> None:
        spent: list[float] = []
        prepared: Prepared | None = None
        while (position := self.next_position((), 1)) is not None:
            if time.monotonic() + (median(spent) if spent else 0) > deadline:
                return
            start = time.monotonic()
            trial = self.ask(position)
            try:
                experiment = self.experiment(trial.params)
                if prepared is None or prepared.space != experiment.space:
                    prepared = prepare_experiment(experiment, task, cache, display, runner, StopCondition())
                result = run_experiment(experiment, prepared, runner)
                self.record(trial, {**measurements(result), "seconds": round(time.monotonic() - start, 3)}, report)
            except Exception as error:  # noqa: BLE001  # otherwise each resumption would repeat it, and fail again
                self.record_failure(trial, error, report)
            spent.append(time.monotonic() - start)

    def record_failure(self, trial: optuna.Trial, error: Exception, report: Report) -> None:
        """Store that a search failed.

        Args:
            trial: Its trial.
            error: Why.
            report: Shows a line on it.

        Raises:
            StudyError: If all of the first searches failed.
        """
        said = str(error) if isinstance(error, RankoptError) else f"{type(error).__name__}: {error}"
        trial.set_user_attr("error", said)
        self.study.tell(trial, state=TrialState.FAIL)
        report(f"search {len(self.done())} of {self.study_file.searches}: failed, {said}")
        self._stop_if_hopeless(said)

    def record(self, trial: optuna.Trial, found: dict[str, Any], report: Report) -> None:
        """Store a search's measurements.

        Args:
            trial: Its trial.
            found: The measurements.
            report: Shows a line on it.
        """
        for key, value in found.items():
            trial.set_user_attr(key, value)
        self.study.tell(trial, [found[name] for name in self.objectives])
        shown = ", ".join(f"{name} {found[name]:,.5g}" for name in self.objectives)
        settings = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        report(f"search {len(self.done())} of {self.study_file.searches}: {shown}; {settings}")

    def _stop_if_hopeless(self, error: str) -> None:
        if not self.finished() and len(self.done()) >= min(ALL_FAILED, self.study_file.searches):
            raise StudyError(f"every search failed; the last said: {error}")

    def rerun_best(self, runner: Runner, cache: Path | None, stop: StopCondition, display: Display) -> Path | None:
        """Repeat the best search in a run folder of its own, with the test score; searches keep no models.

        Args:
            runner: Runs the search.
            cache: Folder of fitted candidates; None for the default.
            stop: Whether to stop the training.
            display: Shows progress.

        Returns:
            The folder that holds the result; None if it was stopped before there was one.
        """
        trial = self.best()
        folder, experiment = self.out / f"search-{trial.number}", self.experiment(trial.params)
        if not experiment.training.trains and (folder / RESULT).is_file():
            return folder
        if (crew := crew_of(runner)) is not None:
            return run_in_folder_away(crew, experiment, self.task, folder, cache, stop, display)
        return run_in_folder(experiment, self.task, folder, runner, cache, stop, display)


class _BesideEachOther:
    """The searches of a study in Ray workers, `crew.workers` at a time."""

    def __init__(
        self, study: TuningStudy, crew: Crew, task: Task, deadline: float, cache: Path | None, report: Report
    ) -> None:
        self.study, self.crew, self.deadline, self.report = study, crew, deadline, report
        self.shared: Shared = task, load_teacher(study.study_file.experiment.teacher)
        self.cache = Cache(cache).folder.resolve()
        self.running: dict[Job, _Begun] = {}
        self.spent: list[float] = []

    def run(self, display: Display) -> None:
        """Search until all is done, or time is over and what runs has ended."""
        notes: dict[int, str] = {}
        with closing(self.crew.do(self.next_job)) as news:
            for job, update in news:
                begun = self.running[job]
                notes[begun.position] = status(update)
                if update.ended:
                    del self.running[job], notes[begun.position]
                    self.take(begun, update)
                display.note(" · ".join(f"search {p + 1}: {note}" for p, note in notes.items()) or "searches")

    def next_job(self) -> Job | None:
        """The job of the next search; None if there is none now."""
        study, at_once = self.study, self.crew.workers
        while time.monotonic() + (median(self.spent) if self.spent else 0) <= self.deadline:
            position = study.next_position([x.position for x in self.running.values()], at_once)
            if position is None:
                return None
            begun = _Begun(position, study.ask(position, at_once), time.monotonic())
            try:
                arguments = study.experiment(begun.trial.params), self.cache
            except RankoptError as error:
                study.record_failure(begun.trial, error, self.report)
                continue
            job = Job(f"search {position + 1}", _search, self.shared, arguments)
            self.running[job] = begun
            return job
        return None

    def take(self, begun: _Begun, update: Update) -> None:
        """Record a search that has ended."""
        self.spent.append(time.monotonic() - begun.start)
        if update.error is not None:
            self.study.record_failure(begun.trial, update.error, self.report)
        elif update.result is not None:
            self.study.record(begun.trial, update.result, self.report)


class _Begun(NamedTuple):
    """A search that runs."""

    position: int
    trial: optuna.Trial
    start: float


def _search(shared: Shared, desk: Desk, experiment: Experiment, cache: Path) -> dict[str, Any]:
    """In a worker: make a search. Returns what is kept of it."""
    start = time.monotonic()
    task, teacher = shared
    to_device(desk, shared)
    runner = WorkerSearch(desk)
    prepared = prepare_experiment(experiment, task, cache, desk, runner, desk.stop)
    result = run_experiment(experiment, prepared, runner, teacher)
    return {**measurements(result), "seconds": round(time.monotonic() - start, 3)}


def measurements(result: Result) -> dict[str, Any]:
    """Collect what a study keeps of a search's result: possible objectives, and the dense model's values.

    Args:
        result: The result.

    Returns:
        Name -> value, those left out that the task does not give. "milliseconds" is the duration of one forward pass
        of the compressed model.
    """
    info = result.info
    found: dict[str, Any] = {
        "score": info["score"]["compressed"]["validation"],
        "objective": info["objective"]["best"],
        **{metric: info["cost"]["compressed"][metric] for metric in METRICS},
        "milliseconds": info["milliseconds"]["compressed"],
        "dense": {**info["cost"]["dense"], "score": info["score"]["dense"]["validation"]},
    }
    return {k: v for k, v in found.items() if v is not None}


# --- the whole study -----------------------------------------------------------------------------------------


class RunFinished(NamedTuple):
    """How far a study of one search is.

    Attributes:
        folder: The run folder that holds a result, if there is one.
        complete: Whether all was done: False if the time was over before.
    """

    folder: Path | None
    complete: bool


def run_single(
    file: StudyFile,
    task: Task,
    out: Path,
    runner: Runner,
    cache: Path | None,
    stop: StopCondition,
    display: Display,
) -> RunFinished:
    """Do the one search that a study's file describes, and its training, or resume them.

    Args:
        file: The study's file.
        task: The task.
        out: The run folder.
        runner: Runs the search.
        cache: Folder of fitted candidates; None for the default.
        stop: Whether to stop, and when the time is over.
        display: Shows progress.
    """
    folder = run_in_folder(file.experiment, task, out, RunUntil(runner, stop.end), cache, stop, display)
    return RunFinished(folder or (out if (out / RESULT).is_file() else None), folder is not None)
