"""The study on disk: SQLite through Optuna's storage, one finished trial written at a time.

Any strategy's trials land here, so optuna-dashboard and Optuna's plots open every study.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import OptunaError
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from rankopt.budget import Problem
from rankopt.core import Cost, StudyError, Trial

FILE, STUDY = "study.db", "rankopt"


class Store:
    """The trials of one search in a folder's study.db. Every told trial is durable when add() returns."""

    def __init__(self, folder: Path, problem: Problem, about: dict[str, Any], resume: bool) -> None:
        """about: what a resumed search must agree on (strategy, seed, budget, ...). Raises StudyError."""
        self.path = folder / FILE
        self.problem = problem
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space: dict[str, BaseDistribution] = {
            layer.name or "model": IntDistribution(0, len(f) - 1)
            for layer, f in zip(problem.layers, problem.frontiers, strict=True)
        }
        try:
            self.study = self._open(about, resume)
        except (SQLAlchemyError, OptunaError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise StudyError(
                f"{self.path} cannot be used ({reason}): restore it from a copy, or search into another folder"
            ) from error

    def _open(self, about: dict[str, Any], resume: bool) -> optuna.Study:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(
                storage=f"sqlite:///{self.path}", study_name=STUDY, direction="minimize", load_if_exists=resume
            )
        for key, value in about.items():
            if study.user_attrs.setdefault(key, value) != value:
                raise StudyError(
                    f"{self.path} belongs to another search: its {key} is {study.user_attrs[key]!r}, "
                    f"asked is {value!r}. Resume with the same settings, or search into another folder"
                )
            study.set_user_attr(key, value)
        return study

    def add(self, trial: Trial, asked: int) -> None:
        """Write a finished or failed trial; asked: how often the strategy had been asked by then."""
        params = dict(zip(self.space, trial.proposal, strict=True))
        attributes = {
            "cost": [trial.cost.params, trial.cost.macs, trial.cost.bytes],
            "score": trial.score,
            "predicted": trial.predicted,
            "seconds": trial.seconds,
            "error": trial.error,
            "note": list(trial.note),
            "asked": asked,
        }
        finished = trial.state == "finished"
        try:
            self.study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE if finished else TrialState.FAIL,
                    value=trial.objective if finished else None,
                    params=params,
                    distributions=self.space,
                    user_attrs=attributes,
                )
            )
        except (SQLAlchemyError, OptunaError, OSError) as error:
            raise StudyError(
                f"trial {trial.number} cannot be written to {self.path} ({error}): make room, then use --resume"
            ) from error

    def trials(self) -> tuple[list[Trial], int]:
        """The trials written so far, in order, and how often the strategy had been asked."""
        found, asked = [], 0
        try:
            for frozen in self.study.get_trials(deepcopy=False):
                attributes = frozen.user_attrs
                found.append(
                    Trial(
                        number=frozen.number,
                        proposal=tuple(int(frozen.params[name]) for name in self.space),
                        state="finished" if frozen.state == TrialState.COMPLETE else "failed",
                        cost=Cost(*attributes["cost"]),
                        objective=frozen.value if frozen.state == TrialState.COMPLETE else None,
                        score=attributes["score"],
                        predicted=attributes["predicted"],
                        seconds=attributes["seconds"],
                        error=attributes["error"],
                        note=tuple(attributes["note"]),
                    )
                )
                asked = attributes["asked"]  # of the last one told: what was running then is asked for again
        except (SQLAlchemyError, OptunaError, KeyError, TypeError, ValueError) as error:
            raise StudyError(f"{self.path} is damaged ({type(error).__name__}: {error})") from error
        return found, asked


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The trials of a run folder for a report: number, state, objective, score, cost. Raises StudyError."""
    path = folder / FILE
    if not path.is_file():
        raise StudyError(f"there is no {path}: name the folder that a search wrote")
    try:
        study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{path}")
        return [
            {
                "number": t.number,
                "state": "finished" if t.state == TrialState.COMPLETE else "failed",
                "objective": t.value if t.state == TrialState.COMPLETE else None,
                **{key: t.user_attrs.get(key) for key in ("score", "predicted", "seconds", "error", "cost")},
            }
            for t in study.get_trials(deepcopy=False)
        ]
    except (SQLAlchemyError, OptunaError, KeyError) as error:
        raise StudyError(f"{path} is damaged: {error}") from error
