"""The study in a run folder: SQLite through Optuna's storage, one trial written at a time.

All strategies' trials are kept in this form, so optuna-dashboard and Optuna's plots open every study.
"""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from typing_extensions import TypedDict

from rankopt.core.errors import StudyError
from rankopt.core.files import check_no_link, digest, is_disk_full, open_regular, temporary_beside, write_beside
from rankopt.core.problem import Problem
from rankopt.core.records import BUDGETS, Cost, Proposal, Trial
from rankopt.core.result_record import TrialRow
from rankopt.core.run_folder import DAMAGE, check_same, folder_lock, lock_folder
from rankopt.core.schema import checked
from rankopt.core.text import in_one_line, one_line, shortened
from rankopt.search.identity import HASHES, TOLERANCES

FILE = "study.db"


STUDY = "rankopt"
"""Name of the study in the file."""


STATES = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "stopped": TrialState.PRUNED}


NAMES = {state: name for name, state in STATES.items()}


COMPUTED = re.compile(r"\b(GENERATED|AS|VIRTUAL|COLLATE)\b|\bCHECK\s*\((?!\w+ ?= ?1\))", re.IGNORECASE)
"""What no definition of Optuna's holds; its one check is of a version's number."""


NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")
"""The end of an SQLite journal that names a further file, which SQLite deletes once it has used the journal."""


LONGEST_VALUE = 2**26
"""The longest text in a study.db, in bytes."""


STEPS_PER_TICK, TICKS = 10**6, 2000
"""A statement on a study.db may take this many steps of SQLite's virtual machine: about 20 seconds."""


class _Attributes(TypedDict):
    """A trial's user attributes; see `Trial`."""

    cost: list[int]
    score: float | None
    predicted: float | None
    seconds: float
    error: str | None
    note: list[float]
    asked: int
    checksum: str


class Store:
    """The trials of one search in a folder's study.db.

    A trial is durable when `add` returns. One process at a time holds a folder; `SharedStore` is for several processes
    on one study.

    Attributes:
        path: The file.
        space: Layer name -> Optuna's distribution of its frontier index.
        study: The study as Optuna has it.
        close: Call it to release the folder.
    """

    def __init__(self, folder: Path, problem: Problem, required: dict[str, Any], resume: bool) -> None:
        """Open the study, or create it.

        Args:
            folder: The run folder.
            problem: The problem that is searched.
            required: Settings that a resumed search must agree on: strategy, seed, limits, ...
            resume: Whether an existing study may be continued.

        Raises:
            StudyError: If the folder is in use, or holds a study that is damaged, not to be resumed, or of another
                search.
        """
        self.path = folder / FILE
        self.space: dict[str, BaseDistribution] = {
            layer.name or "model": IntDistribution(0, len(f) - 1)
            for layer, f in zip(problem.layers, problem.frontiers, strict=True)
        }
        with storage_errors(self.place):
            self.close = weakref.finalize(self, os.close, lock_folder(folder))
            try:
                self.study = self._open(required, resume)
            except BaseException:  # a traceback may keep this object, and with it the lock
                self.close()
                raise

    @property
    def place(self) -> str:
        """The storage's name for messages."""
        return str(self.path)

    def _open(self, required: dict[str, Any], resume: bool) -> optuna.Study:
        for stale in self.path.parent.glob(".*.part*"):  # left by a process that was killed
            stale.unlink()
        if not self.path.exists():
            write_beside(self.path, lambda part: create_study(part, STUDY, required))
        elif not resume:
            raise StudyError(f"{self.path} is there already: go on with --resume, or search into another folder")
        study = load_study(self.path)
        remedy = "Resume with the same settings, or search into another folder"
        check_same(study.user_attrs, required, self.path, "search", remedy, TOLERANCES, HASHES)
        return study

    def add(self, trial: Trial, n_asked: int) -> None:
        """Write a trial.

        Args:
            trial: The trial.
            n_asked: Number of proposals to count as made when the study is resumed.

        Raises:
            StudyError: If it cannot be written.
        """
        try:
            self.study.add_trial(self.frozen(trial, n_asked))
        except (SQLAlchemyError, OptunaError, OSError) as error:
            reason, remedy = _reason_and_remedy(error)
            raise StudyError(f"trial {trial.number} cannot be written to {self.path} ({reason}): {remedy}") from error

    def frozen(self, trial: Trial, n_asked: int) -> FrozenTrial:
        """Convert a trial to Optuna's form, with its rungs as intermediate values.

        Args:
            trial: The trial.
            n_asked: As in `add`.
        """
        attributes = {
            "cost": [trial.cost[m] for m in BUDGETS],
            "score": trial.score,
            "predicted": trial.predicted,
            "seconds": trial.seconds,
            "error": trial.error,
            "device": trial.device,
            "note": list(trial.note),
            "asked": n_asked,
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
        """Read the trials.

        Returns:
            The trials, each plan once, and the number of proposals to count as made.

        Raises:
            StudyError: If the storage cannot be read or is damaged.
        """
        trials: dict[Proposal, Trial] = {}
        n_asked = 0
        with storage_errors(self.place):
            for frozen in valid_trials(self.study):
                proposal = self._proposal(frozen)
                if proposal not in trials:
                    trials[proposal] = _thawed(frozen, proposal, len(trials))
                n_asked = frozen.user_attrs["asked"]  # of the last: plans that were running then are proposed again
        return list(trials.values()), n_asked

    def _proposal(self, frozen: FrozenTrial) -> Proposal:
        return tuple(int(frozen.params[name]) for name in self.space)

    def claim(self, proposal: Proposal, limit: int) -> bool:
        """Claim a plan for evaluation by this process.

        Args:
            proposal: The plan.
            limit: Distinct plans to evaluate in total.

        Returns:
            Whether the claim holds: here always, since there is no other process.
        """
        return True

    def claimed(self) -> set[Proposal]:
        """The plans that other processes are evaluating."""
        return set()

    def new_trials(self) -> list[Trial]:
        """The trials that other processes added since the last look."""
        return []

    def export(self) -> None:
        """Write the trials to the folder's study.db, where they already are."""

    def restart(self) -> None:
        """Ignore all trials so far; they stay in the file."""
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
        device=attributes.get("device", ""),  # absent in studies of earlier versions
    )


def valid_trials(study: optuna.Study) -> Iterator[FrozenTrial]:
    """Iterate over the trials that count, and check their attributes and checksums.

    Args:
        study: The study.

    Yields:
        Its finished, failed and stopped trials since the last restart.

    Raises:
        ValueError: If a trial is not what rankopt writes, or was changed since.
    """
    since = study.user_attrs.get("since", 0)
    for frozen in study.get_trials(deepcopy=False):
        if frozen.number < since or frozen.state not in NAMES or "void" in frozen.user_attrs:
            continue
        if checked(frozen.user_attrs, _Attributes)["checksum"] != checksum(frozen):
            raise ValueError(f"trial {frozen.number} is not what was written")
        yield frozen


def checksum(frozen: FrozenTrial) -> str:
    """Hash everything that a trial records.

    Args:
        frozen: The trial.
    """
    value = frozen.value if frozen.state == TrialState.COMPLETE else None
    others = {k: v for k, v in frozen.user_attrs.items() if k not in {"checksum", "owner"}}
    return digest(frozen.state.name, value, frozen.params, sorted(frozen.intermediate_values.items()), others)


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Context: turn the errors of a storage into a StudyError.

    Args:
        path: The storage, for the message.

    Raises:
        StudyError: If the storage cannot be used or its content is damaged.
    """
    try:
        yield
    except (SQLAlchemyError, OptunaError, sqlite3.Error, OSError) as error:
        reason, remedy = _reason_and_remedy(error)
        raise StudyError(f"{path} cannot be used ({reason}): {remedy}, or search into another folder") from error
    except (*DAMAGE, RuntimeError) as error:  # RuntimeError: of another version of Optuna
        if isinstance(error, StudyError):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")
        raise StudyError(
            f"{path} is damaged ({reason}): restore it from a copy, or search into another folder"
        ) from error


def _reason_and_remedy(error: BaseException) -> tuple[str, str]:
    """What the database said below Optuna's and SQLAlchemy's errors, in one line, and what to do about it."""
    while error.__cause__ is not None:
        error = error.__cause__
    error = getattr(error, "orig", None) or error
    # SQLite: a full disk and a missing right are OperationalErrors, a file that is no database is not.
    damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    if is_disk_full(error):
        remedy = "make room there, then go on with --resume"
    else:
        remedy = "restore it from a copy" if damaged else "mend that, then go on with --resume"
    return one_line(str(error).partition("\n")[0]), remedy


def sqlite_url(path: Path) -> str:
    """Make the SQLAlchemy URL of an SQLite file. Its name may hold ?, %, # and { }, which mean something in URLs.

    Args:
        path: The file.
    """
    return URL.create("sqlite", database=path.absolute().as_uri(), query={"uri": "true"}).render_as_string()


def create_study(path: Path, name: str, attributes: dict[str, Any], directions: Sequence[Any] = ("minimize",)) -> None:
    """Create a study in a file.

    Args:
        path: The file, which is empty or does not exist.
        name: Name of the study.
        attributes: Its user attributes.
        directions: "minimize" or "maximize" for each objective.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.write_bytes(_empty_database())
    storage = RDBStorage(sqlite_url(path), skip_compatibility_check=True, skip_table_creation=True)
    study = optuna.create_study(storage=storage, study_name=name, directions=list(directions))
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    storage.engine.dispose()


@cache
def _empty_database() -> bytes:
    """A file with Optuna's tables and without studies. Making the tables takes longer than copying them."""
    storage = RDBStorage("sqlite://")
    with closing(storage.engine.raw_connection()) as connection:
        content: bytes = connection.driver_connection.serialize()  # type: ignore[union-attr]  # an sqlite3.Connection
    storage.engine.dispose()
    return content


def load_study(path: Path) -> optuna.Study:
    """Load the study in a file, after a check of the whole file: SQLite itself notices damage only where it reads.

    Args:
        path: The file.

    Raises:
        StudyError: If it is a link.
        ValueError: If it is empty or damaged.
    """
    check_no_link(path, StudyError)
    _check_beside(path)
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    if not path.is_file():
        raise ValueError("it is no regular file")
    with closing(sqlite3.connect(path, factory=_LimitedConnection)) as connection:
        # Optuna has nothing but plain tables and indexes; views, triggers and expressions would be code to run.
        for name, sql in connection.execute("SELECT name, sql FROM sqlite_master"):
            if not re.match(r"CREATE (TABLE|(UNIQUE )?INDEX)\b", sql or "CREATE INDEX") or COMPUTED.search(sql or ""):
                raise ValueError(f"its {shortened(str(name), 100)!r} is no plain table or index")
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = RDBStorage(sqlite_url(path), engine_kwargs={"connect_args": {"factory": _LimitedConnection}})
        return optuna.load_study(study_name=STUDY, storage=storage)


def _check_beside(path: Path) -> None:
    """Raise where SQLite's own files beside a study would make it touch others: a killed writer leaves a plain one."""
    for beside in (Path(f"{path}{end}") for end in ("-journal", "-wal", "-shm")):
        check_no_link(beside, StudyError)
        if beside.exists():
            with open_regular(beside) as file:
                file.seek(max(0, beside.stat().st_size - len(NAMES_ANOTHER)))
                if file.read() == NAMES_ANOTHER:
                    raise ValueError(f"{beside.name} names another file, which SQLite would delete")


class _LimitedConnection(sqlite3.Connection):
    """A connection to a file that may come from elsewhere: what a damaged one may cost is bounded.

    A statement ends with an error after STEPS steps of SQLite's virtual machine; reading a trial takes some hundreds.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        self.set_progress_handler(lambda: next(self.ticks) >= TICKS, STEPS_PER_TICK)
        self.set_trace_callback(self._begin)
        self._begin()

    def _begin(self, _statement: str = "") -> None:
        self.ticks = itertools.count()


def check_folder(folder: Path) -> None:
    """Check that a study can be kept in a folder, before the work whose results it is to keep.

    Args:
        folder: The run folder.

    Raises:
        StudyError: If the folder is in use, cannot be written, or holds a damaged study.
    """
    path = folder / FILE
    with storage_errors(path), folder_lock(folder):
        if path.exists():
            load_study(path)
        else:
            with temporary_beside(path) as probe:
                create_study(probe, STUDY, {})


def read_trials(folder: Path) -> list[TrialRow]:
    """Read the trials of a run folder for a report.

    Args:
        folder: The run folder.

    Raises:
        StudyError: If it holds no study, or a damaged one.
    """
    path = folder / FILE
    if not path.is_file():
        raise StudyError(f"there is no {path}: name the folder that a search wrote")
    rows: list[TrialRow] = in_one_line([trial.row for trial in read_run_trials(folder)])
    return rows


def read_run_trials(folder: Path) -> list[Trial]:
    """Read the trials of a run folder as records; layers are indexed as in its search.

    Args:
        folder: The run folder.

    Raises:
        StudyError: If its study is damaged.
    """
    path = folder / FILE
    with storage_errors(path):
        found = list(valid_trials(load_study(path)))
        return [_thawed(t, tuple(map(int, t.params.values())), number) for number, t in enumerate(found)]
