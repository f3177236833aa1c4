"""The study on disk: SQLite through Optuna's storage, one finished trial written at a time.

Any strategy's trials land here, so optuna-dashboard and Optuna's plots open every study.
"""

from __future__ import annotations

import os
import sqlite3
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from rankopt.core.errors import StudyError
from rankopt.core.files import digest, write_beside
from rankopt.core.problem import Problem
from rankopt.core.records import BUDGETS, Cost, Proposal, Trial
from rankopt.core.run_folder import lock_folder

FILE, STUDY = "study.db", "rankopt"


STATES = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "stopped": TrialState.PRUNED}


NAMES = {state: name for name, state in STATES.items()}


class Store:
    """The trials of one search in a folder's study.db. Every told trial is durable when add() returns.

    One process at a time has a folder. `SharedStore` is for several processes on one study.
    """

    def __init__(self, folder: Path, problem: Problem, about: dict[str, Any], resume: bool) -> None:
        """about: what a resumed search must agree on (strategy, seed, budget, ...). Raises StudyError."""
        self.path = folder / FILE
        self.space: dict[str, BaseDistribution] = {
            layer.name or "model": IntDistribution(0, len(f) - 1)
            for layer, f in zip(problem.layers, problem.frontiers, strict=True)
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with storage_errors(self.place):
            self.close = weakref.finalize(self, os.close, lock_folder(folder))
            self.study = self._open(about, resume)

    @property
    def place(self) -> str:
        """Where the trials are, for messages."""
        return str(self.path)

    def _open(self, about: dict[str, Any], resume: bool) -> optuna.Study:
        for stale in self.path.parent.glob(".*.part*"):  # of a process that was killed
            stale.unlink()
        if not self.path.exists():
            write_beside(self.path, lambda part: create_study(f"sqlite:///{part}", STUDY, about))
        elif not resume:
            raise StudyError(f"{self.path} is there already: go on with --resume, or search into another folder")
        study = load_study(self.path)
        for key, value in about.items():
            if study.user_attrs.get(key) != value:
                raise StudyError(
                    f"{self.path} belongs to another search: its {key} is {study.user_attrs.get(key)!r}, "
                    f"asked is {value!r}. Resume with the same settings, or search into another folder"
                )
        return study

    def add(self, trial: Trial, asked: int) -> None:
        """Write a trial; asked: how often the strategy had been asked by then. Raises StudyError."""
        try:
            self.study.add_trial(self.frozen(trial, asked))
        except (SQLAlchemyError, OptunaError, OSError) as error:
            raise StudyError(
                f"trial {trial.number} cannot be written to {self.path} ({error}): make room, then use --resume"
            ) from error

    def frozen(self, trial: Trial, asked: int) -> FrozenTrial:
        """A trial as Optuna keeps it; its rungs are the intermediate values."""
        attributes = {
            "cost": [trial.cost[m] for m in BUDGETS],
            "score": trial.score,
            "predicted": trial.predicted,
            "seconds": trial.seconds,
            "error": trial.error,
            "note": list(trial.note),
            "asked": asked,
        }
        found = create_trial(
            state=STATES[trial.state],
            value=trial.objective,
            params=dict(zip(self.space, trial.proposal, strict=True)),
            distributions=self.space,
            user_attrs=attributes,
            intermediate_values=dict(enumerate(trial.rungs)),
        )
        found.user_attrs["checksum"] = checksum(found)
        return found

    def trials(self) -> tuple[list[Trial], int]:
        """The trials written so far, each plan once, and how often the strategy had been asked. Raises StudyError."""
        found: dict[Proposal, Trial] = {}
        asked = 0
        with storage_errors(self.place):
            for frozen in valid_trials(self.study):
                proposal = self._proposal(frozen)
                if proposal not in found:
                    found[proposal] = _thawed(frozen, proposal, len(found))
                asked = frozen.user_attrs["asked"]  # of the last one told: what was running then is asked for again
        return list(found.values()), asked

    def _proposal(self, frozen: FrozenTrial) -> Proposal:
        return tuple(int(frozen.params[name]) for name in self.space)

    def claim(self, proposal: Proposal, limit: int) -> bool:
        """Whether this process is to evaluate a plan: there is no other."""
        return True

    def claimed(self) -> set[Proposal]:
        """The plans that other processes evaluate now."""
        return set()

    def news(self) -> list[Trial]:
        """What other processes told since the last look."""
        return []

    def export(self) -> None:
        """Write the trials to the folder's study.db: they are there."""

    def restart(self) -> None:
        """Leave what was told so far behind: it stays in the file, but is read no more."""
        with storage_errors(self.place):
            self.study.set_user_attr("since", len(self.study.get_trials(deepcopy=False)))


def _thawed(frozen: FrozenTrial, proposal: Proposal, number: int) -> Trial:
    attributes = frozen.user_attrs
    return Trial(
        number=number,
        proposal=proposal,
        state=NAMES[frozen.state],
        cost=Cost(*attributes["cost"]),
        objective=frozen.value if frozen.state == TrialState.COMPLETE else None,
        score=attributes["score"],
        predicted=attributes["predicted"],
        seconds=attributes["seconds"],
        error=attributes["error"],
        note=tuple(attributes["note"]),
        rungs=tuple(value for _, value in sorted(frozen.intermediate_values.items())),
    )


def valid_trials(study: optuna.Study) -> Iterator[FrozenTrial]:
    """The trials that count, checked against their checksums."""
    since = study.user_attrs.get("since", 0)
    for frozen in study.get_trials(deepcopy=False):
        if frozen.number < since or frozen.state not in NAMES or "void" in frozen.user_attrs:
            continue
        if frozen.user_attrs["checksum"] != checksum(frozen):
            raise ValueError(f"trial {frozen.number} is not what was written")
        yield frozen


def checksum(frozen: FrozenTrial) -> str:
    """Of all that a trial says."""
    value = frozen.value if frozen.state == TrialState.COMPLETE else None
    others = {k: v for k, v in frozen.user_attrs.items() if k not in {"checksum", "owner"}}
    return digest(frozen.state.name, value, frozen.params, sorted(frozen.intermediate_values.items()), others)


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Whatever a storage raises becomes a StudyError."""
    try:
        yield
    except (SQLAlchemyError, OptunaError, sqlite3.Error, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise StudyError(
            f"{path} cannot be used ({reason}): restore it from a copy, or search into another folder"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StudyError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise StudyError(
            f"{path} is damaged ({reason}): restore it from a copy, or search into another folder"
        ) from error


def create_study(url: str, name: str, about: dict[str, Any], directions: Sequence[Any] = ("minimize",)) -> None:
    storage = RDBStorage(url)
    study = optuna.create_study(storage=storage, study_name=name, directions=list(directions))
    for key, value in about.items():
        study.set_user_attr(key, value)
    storage.engine.dispose()


def load_study(path: Path) -> optuna.Study:
    """The study in a file, which is looked through first: SQLite notices damage when it comes upon it only."""
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    with closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{path}")


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The trials of a run folder for a report: number, state, objective, score, cost, ... Raises StudyError."""
    path = folder / FILE
    if not path.is_file():
        raise StudyError(f"there is no {path}: name the folder that a search wrote")
    with storage_errors(path):
        return trial_rows(valid_trials(load_study(path)))


def trial_rows(trials: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "state": NAMES[t.state],
            "objective": t.value if t.state == TrialState.COMPLETE else None,
            "rungs": [value for _, value in sorted(t.intermediate_values.items())],
            **{key: t.user_attrs[key] for key in ("score", "predicted", "seconds", "error", "cost")},
        }
        for number, t in enumerate(trials)
    ]
