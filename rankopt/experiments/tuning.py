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
settings. A search is a trial of the Optuna study in OUT/hyperparameters.db, on disk before the next begins. For every
trial there is a new sampler, seeded by the study's seed and the number of finished trials, and it sees only these: a
study that was killed therefore continues as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import rankdata
from typing_extensions import TypedDict

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.progress import Display, Progress, StopCondition
from rankopt.core.records import METRICS, Task
from rankopt.core.run_folder import RESULT, check_same, folder_lock, open_folder
from rankopt.core.schema import checked
from rankopt.experiments.config import OBJECTIVES, StudyFile
from rankopt.experiments.experiment import Experiment, run_experiment, run_in_folder
from rankopt.search.loop import ALL_FAILED, Runner, RunUntil
from rankopt.search.result import Result
from rankopt.search.runners import pool_of
from rankopt.search.storage.local import STUDY, create_study, load_study, storage_errors
from rankopt.strategies.optuna import derived
from rankopt.strategies.optuna_plugins import SamplerFactory

FILE = "hyperparameters.db"


MIN_FOR_IMPORTANCE = 3  # searches


MIN_RANDOM = 10  # searches with random settings, before the sampler learns; at least two for each hyperparameter


LOST = "lost"  # attribute of the Optuna study: trials whose process was killed; they do not count


class Measured(TypedDict, total=False):
    """What a study keeps of a search; see `measurements`."""

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
        """Open the database; trials that still run in it were killed, and are marked as lost."""
        if not self.path.exists():
            directions = [OBJECTIVES[name] for name in self.objectives]
            write_beside(self.path, lambda p: create_study(p, STUDY, self.metadata(), directions))
        self.study = load_study(self.path)
        remedy = "Go on with the same file, or give another --out"
        check_same(self.study.user_attrs, self.metadata(), self.path, "study", remedy)
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

    def _ask(self) -> optuna.Trial:
        """Start the next trial; the first has the settings of the file, if they lie within the ranges."""
        number = len(self.done())
        n_random = max(MIN_RANDOM, 2 * len(self.distributions))
        seed = derived(self.study_file.experiment.search.seed, number)
        self.study.sampler = SamplerFactory("tpe", n_startup_trials=n_random).make(seed)
        usual = self.study_file.experiment.tunable()
        own = {h.name: h.to_optuna(usual[h.name]) for h in self.study_file.hyperparameters}
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))  # of a process that was killed
        if number == 0 and not waiting and None not in own.values():
            self.study.enqueue_trial(own)
        return self.study.ask(self.distributions)

    def run(self, deadline: float, runner: Runner, cache: Path | None, report: Report, progress: Progress) -> bool:
        """Search until the study is complete.

        Args:
            deadline: When to stop, on the clock of `time.monotonic`. No search begins that would probably not end by
                then, judged by the median of those before.
            runner: Runs the searches.
            cache: Folder of fitted candidates; None for the default.
            report: Shows a line on every search that ends.
            progress: Shows the progress of preparations.

        Returns:
            Whether the study is complete.

        Raises:
            StudyError: If all of the first searches failed.
        """
        spent: list[float] = []
        untested = dataclasses.replace(self.task, test=None)  # only the best search may see test data
        prepared: Prepared | None = None
        while len(self.done()) < self.study_file.searches:
            if time.monotonic() + (median(spent) if spent else 0) > deadline:
                return False
            start = time.monotonic()
            trial = self._ask()
            try:
                experiment = self.experiment(trial.params)
                if prepared is None or prepared.space != experiment.space:
                    prepared = prepare(untested, experiment.space, cache, progress, pool_of(runner), experiment.budget)
                result = run_experiment(experiment, prepared, runner)
                found = {**measurements(result), "seconds": round(time.monotonic() - start, 3)}
                self._record(trial, found, report)
            except Exception as error:  # noqa: BLE001  # otherwise each resumption would repeat it, and fail again
                said = str(error) if isinstance(error, RankoptError) else f"{type(error).__name__}: {error}"
                trial.set_user_attr("error", said)
                self.study.tell(trial, state=TrialState.FAIL)
                report(f"search {len(self.done())} of {self.study_file.searches}: failed, {said}")
                self._stop_if_hopeless(said)
            spent.append(time.monotonic() - start)
        return True

    def _record(self, trial: optuna.Trial, found: dict[str, Any], report: Report) -> None:
        """Store a search's measurements."""
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
        return run_in_folder(experiment, self.task, folder, runner, cache, stop, display)


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
