"""`rankopt run`: one search as a study's file says, or many, whose settings a TPE sampler chooses (Bergstra 2011).

Each search of a study with hyperparameters is one trial of an Optuna study in OUT/hyperparameters.db, on disk before
the next begins. The sampler is made anew for every trial, seeded by the study's seed and the number of trials told,
and sees only these: so a study that was killed goes on as if it had not been.
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
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import rankdata

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.progress import Display, Progress, StopCondition
from rankopt.core.records import METRICS, Task
from rankopt.core.run_folder import RESULT, folder_lock, open_folder
from rankopt.experiments.config import OBJECTIVES, StudyFile
from rankopt.experiments.experiment import Experiment, run_experiment, run_in_folder
from rankopt.search.loop import ALL_FAILED, Runner, RunUntil
from rankopt.search.result import Result
from rankopt.search.storage.local import STUDY, create_study, load_study, storage_errors
from rankopt.strategies.optuna import derived, make_sampler

FILE = "hyperparameters.db"


FEWEST = 3  # searches for importances


FIRST = 10  # random searches, at least; two for each hyperparameter


LOST = "lost"  # trials whose process ended before they did: each is made again


Report = Callable[[str], None]


class Searches:
    """The searches of a study with hyperparameters, in a folder's hyperparameters.db; one process has it at a time."""

    def __init__(self, study: StudyFile, task: Task, out: Path) -> None:
        """Raises StudyError if the folder is another study's, or in use."""
        self.file, self.out = study, out
        self.objectives = study.objectives or ("score" if task.score else "objective",)
        if "score" in self.objectives and not task.score:
            raise RankoptError(f"study {study.path}: the task gives no score, choose other objectives")
        self.task = task
        self.distributions = {h.name: h.distribution for h in study.hyperparameters}
        self.path = out / FILE
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    @contextmanager
    def open(self) -> Iterator[Searches]:
        """Hold the folder; trials whose process was killed are marked as lost."""
        if (self.out / RESULT).is_file():
            raise StudyError(f"{self.out} holds another study's run: give another --out")
        open_folder(self.out, self.path.exists(), FILE)
        with folder_lock(self.out):
            with storage_errors(self.path):
                self._open()
            yield self

    def _open(self) -> None:
        if not self.path.exists():
            directions = [OBJECTIVES[name] for name in self.objectives]
            write_beside(self.path, lambda p: create_study(f"sqlite:///{p}", STUDY, self.about(), directions))
        self.study = load_study(self.path)
        self._check()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.set_user_attr(LOST, [*self.study.user_attrs.get(LOST, ()), trial.number])
            self.study.tell(trial.number, state=TrialState.FAIL)

    def about(self) -> dict[str, Any]:
        """What a study that goes on must agree on: all but how many searches."""
        ranges = {
            name: json.loads(optuna.distributions.distribution_to_json(d)) for name, d in self.distributions.items()
        }
        asked = self.file.request.described(self.task.name)
        return {**asked, "objectives": list(self.objectives), "hyperparameters": ranges}

    def _check(self) -> None:
        for key, value in self.about().items():
            if (found := self.study.user_attrs.get(key)) != value:
                raise StudyError(
                    f"{self.path} belongs to another study: its {key} is {found!r}, asked is {value!r}. "
                    "Go on with the same file, or give another --out"
                )

    def done(self) -> list[FrozenTrial]:
        """The searches that count, failed ones too."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        lost = set(self.study.user_attrs.get(LOST, ()))
        return [t for t in trials if t.number not in lost]

    def finished(self) -> list[FrozenTrial]:
        return [t for t in self.done() if t.state == TrialState.COMPLETE]

    def best(self) -> FrozenTrial:
        """The finished search with the best first objective; of equals the one that is better in the others."""
        signs = [-1 if OBJECTIVES[name] == "maximize" else 1 for name in self.objectives]
        return min(self.finished(), key=lambda t: [s * v for s, v in zip(signs, t.values, strict=True)])

    def importance(self, at: int) -> dict[str, float]:
        """The share of each hyperparameter in the variance of an objective's ranks: fANOVA (Hutter 2014).

        Of ranks, since a few searches that went wrong would else be all the variance. Empty if there is none.
        """
        values = {t.number: t.values[at] for t in self.finished()}
        if len(values) < FEWEST or len(set(values.values())) == 1:
            return {}
        ranks = dict(zip(values, rankdata(list(values.values())), strict=True))
        found = optuna.importance.get_param_importances(
            self.study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            target=lambda trial: float(ranks[trial.number]),
        )
        return {name: float(v) for name, v in found.items() if math.isfinite(v)}

    def request(self, params: Mapping[str, Any]) -> Experiment:
        """The search that a trial's parameters stand for."""
        values = {h.name: h.value(params[h.name]) for h in self.file.hyperparameters}
        return self.file.request.changed(values)

    def _ask(self) -> optuna.Trial:
        """The next trial; the first has the settings of the file, if they lie within the ranges."""
        number = len(self.done())
        first = max(FIRST, 2 * len(self.distributions))
        seed = derived(self.file.request.seed, number)
        self.study.sampler = make_sampler(TPESampler, seed, n_startup_trials=first)
        known = self.file.request.known()
        usual = {h.name: h.drawn(known[h.name]) for h in self.file.hyperparameters}
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))  # of a process that was killed
        if number == 0 and not waiting and None not in usual.values():
            self.study.enqueue_trial(usual)
        return self.study.ask(self.distributions)

    def run(self, deadline: float, runner: Runner, cache: Path | None, report: Report, progress: Progress) -> bool:
        """Search until the study is complete; returns False if there was not the time. Raises StudyError."""
        spent: list[float] = []
        untested = dataclasses.replace(self.task, test=None)  # test data are for the chosen search alone
        prepared: Prepared | None = None
        while len(self.done()) < self.file.searches:
            if time.monotonic() + (median(spent) if spent else 0) > deadline:
                return False
            start = time.monotonic()
            asked = self._ask()
            try:
                request = self.request(asked.params)
                if prepared is None or prepared.space != request.space:
                    prepared = prepare(untested, request.space, cache, progress, budget=request.budget)
                result = run_experiment(request, prepared, runner)
                found = {**measured(result), "seconds": round(time.monotonic() - start, 3)}
                self._tell(asked, found, report)
            except Exception as error:  # else it would be made again, and fail again, for ever
                said = str(error) if isinstance(error, RankoptError) else f"{type(error).__name__}: {error}"
                asked.set_user_attr("error", said)
                self.study.tell(asked, state=TrialState.FAIL)
                report(f"search {len(self.done())} of {self.file.searches}: failed, {said}")
                self._stop_if_hopeless(said)
            spent.append(time.monotonic() - start)
        return True

    def _tell(self, asked: optuna.Trial, found: dict[str, Any], report: Report) -> None:
        for key, value in found.items():
            asked.set_user_attr(key, value)
        self.study.tell(asked, [found[name] for name in self.objectives])
        shown = ", ".join(f"{name} {found[name]:,.5g}" for name in self.objectives)
        settings = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in asked.params.items())
        report(f"search {len(self.done())} of {self.file.searches}: {shown}; {settings}")

    def _stop_if_hopeless(self, error: str) -> None:
        if not self.finished() and len(self.done()) >= min(ALL_FAILED, self.file.searches):
            raise StudyError(f"every search failed; the last said: {error}")

    def keep_best(self, runner: Runner, cache: Path | None, patience: StopCondition, display: Display) -> Path | None:
        """Make the best search's plan and model again, with the test score, in a run folder of its own."""
        trial = self.best()
        folder, request = self.out / f"search-{trial.number}", self.request(trial.params)
        if not request.training.trains and (folder / RESULT).is_file():
            return folder
        return run_in_folder(request, self.task, folder, runner, cache, patience, display)


def measured(result: Result) -> dict[str, Any]:
    """What of a result a study keeps. milliseconds: of one forward pass of the compressed model."""
    info = result.info
    found = {
        "score": info["score"]["compressed"]["validation"],
        "objective": info["objective"]["best"],
        **{metric: info["cost"]["compressed"][metric] for metric in METRICS},
        "milliseconds": info["milliseconds"]["compressed"],
        "dense": {**info["cost"]["dense"], "score": info["score"]["dense"]["validation"]},
    }
    return {k: v for k, v in found.items() if v is not None}


# --- the whole study -----------------------------------------------------------------------------------------


class RunFinished(NamedTuple):
    """A run folder is there; complete: False if the time was over before all was done."""

    folder: Path | None
    complete: bool


def run_study(
    file: StudyFile,
    task: Task,
    out: Path,
    runner: Runner,
    cache: Path | None,
    patience: StopCondition,
    display: Display,
) -> RunFinished:
    """Do the one search that a study's file describes, or go on with it, until it is done or patience is over."""
    folder = run_in_folder(file.request, task, out, RunUntil(runner, patience.end), cache, patience, display)
    return RunFinished(folder or (out if (out / RESULT).is_file() else None), folder is not None)
