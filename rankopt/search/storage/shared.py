"""A study that several processes and machines share, in any storage that Optuna opens by an SQLAlchemy URL.

A plan is claimed before it is evaluated: a running trial is added. The claim holds unless a trial of a lower number has
the same plan; the storage assigns numbers one at a time. A claim is renewed by a heartbeat, and void when that stops,
or at once when its process is known to have ended.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from rankopt.core.errors import StudyError
from rankopt.core.files import digest, write_beside
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Trial
from rankopt.core.run_folder import check_same, has_ended, process_name
from rankopt.search.identity import HASHES, TOLERANCES
from rankopt.search.storage.local import FILE, STUDY, Store, create_study, sqlite_url, storage_errors, valid_trials
from rankopt.search.storage.private import stale_trials, study_id, trial_id

BEAT = 20  # seconds between heartbeats


GRACE = 90  # seconds without a heartbeat after which a claim is void


PATIENCE = 300  # seconds to wait for a storage that does not answer


BUSY = 60  # seconds to wait while other processes create the tables, or write to SQLite


T = TypeVar("T")


log = logging.getLogger(__name__)


class SharedStore(Store):
    """Like `Store`, for several processes.

    The study's name is made of the settings that searches must agree on: equal searches share a study, others do not
    meet.
    """

    def __init__(self, url: str, folder: Path, problem: Problem, required: dict[str, Any], resume: bool) -> None:
        """Open the study, or create it.

        Args:
            url: SQLAlchemy URL of the storage.
            folder: The run folder, to which `export` writes.
            problem: The problem that is searched.
            required: Settings that processes sharing the study agree on.
            resume: Not used: a study that exists is always joined.

        Raises:
            StudyError: If the storage cannot be used.
        """
        self.url = read_url(url)
        self.claims: dict[Proposal, int] = {}  # claims of this process -> trial id
        self.owner = process_name()
        self.known: set[Proposal] = set()  # plans whose trials this process has added or read
        self.heart: threading.Thread | None = None
        self.folder = folder
        super().__init__(folder, problem, required, resume)

    @property
    def place(self) -> str:
        return self.url.render_as_string(hide_password=True)

    def _open(self, required: dict[str, Any], resume: bool) -> optuna.Study:
        exact = {k: v for k, v in required.items() if k not in TOLERANCES}
        name = f"{STUDY}-{required['strategy']}-{required['seed']}-{digest(exact)[:12]}"
        return _retried(partial(self._join, name, required))

    def _join(self, name: str, required: dict[str, Any]) -> optuna.Study:
        self.storage = connect(self.url)
        study = optuna.create_study(storage=self.storage, study_name=name, direction="minimize", load_if_exists=True)
        kept = study.user_attrs
        remedy = "Use the same task everywhere, or another storage"
        known = {k: v for k, v in required.items() if k in kept}  # another process may be writing the others
        check_same(kept, known, self.place, "search", remedy, TOLERANCES, HASHES)
        for key in required.keys() - kept.keys():
            study.set_user_attr(key, required[key])
        return study

    def claim(self, proposal: Proposal, limit: int) -> bool:
        """Claim a plan for evaluation by this process.

        Args:
            proposal: The plan.
            limit: Distinct plans to evaluate in total.

        Returns:
            Whether the claim holds: no process has evaluated the plan or claimed it earlier, and fewer plans than the
            limit were evaluated or claimed before.
        """
        params = dict(zip(self.space, proposal, strict=True))
        claim = create_trial(
            state=TrialState.RUNNING, params=params, distributions=self.space, user_attrs={"owner": self.owner}
        )
        mine = self._patiently(lambda: self.storage.create_new_trial(study_id(self.study), claim))
        standing = self._standing()
        number = next(t.number for t in standing if trial_id(t) == mine)
        before = [t.params for t in standing if t.number < number or t.state != TrialState.RUNNING]
        if params in before or len({tuple(p.values()) for p in before}) >= limit:
            self._void(mine)
            return False
        self.claims[proposal] = mine
        self._patiently(lambda: self.storage.record_heartbeat(mine))
        if self.heart is None:
            self.heart = threading.Thread(target=_beat, args=(weakref.ref(self),), daemon=True)
            self.heart.start()
        return True

    def claimed(self) -> set[Proposal]:
        """The plans that other processes are evaluating."""
        running = (t for t in self._standing() if t.state == TrialState.RUNNING)
        return {self._proposal(t) for t in running if trial_id(t) not in self.claims.values()}

    def add(self, trial: Trial, n_asked: int) -> None:
        """Write a trial, and remove the claim on its plan.

        Args:
            trial: The trial.
            n_asked: Number of proposals to count as made when the study is resumed.

        Raises:
            StudyError: If the storage does not answer.
        """
        frozen = self.frozen(trial, n_asked)
        self._patiently(lambda: self.study.add_trial(frozen))
        self.known.add(trial.proposal)
        if (claim := self.claims.pop(trial.proposal, None)) is not None:
            self._void(claim)

    def trials(self) -> tuple[list[Trial], int]:
        trials, n_asked = super().trials()
        self.known = {t.proposal for t in trials}
        return trials, n_asked

    def new_trials(self) -> list[Trial]:
        """The trials that other processes added since the last look."""
        fresh = [t for t in super().trials()[0] if t.proposal not in self.known]
        self.known.update(t.proposal for t in fresh)
        return fresh

    def export(self) -> None:
        """Write the trials to the folder's study.db, for reports."""
        with storage_errors(self.place):
            trials, attributes = list(valid_trials(self.study)), self.study.user_attrs

        def write(part: Path) -> None:
            create_study(part, STUDY, attributes)
            optuna.load_study(study_name=STUDY, storage=sqlite_url(part)).add_trials(trials)

        write_beside(self.folder / FILE, write)

    def _standing(self) -> list[FrozenTrial]:
        """The trials that ended, and the claims of living processes. Other claims are made void."""
        trials = self._patiently(lambda: self.study.get_trials(deepcopy=False))
        since = self._patiently(lambda: self.study.user_attrs.get("since", 0))
        standing = [t for t in trials if t.number >= since and "void" not in t.user_attrs]
        if any(t.state == TrialState.RUNNING for t in standing):
            silent = self._patiently(lambda: stale_trials(self.storage, self.study))
            gone = [t for t in standing if t.state == TrialState.RUNNING and self._gone(t, silent)]
            for trial in gone:
                self._void(trial_id(trial))
            standing = [t for t in standing if t not in gone]
        return standing

    def _gone(self, trial: FrozenTrial, silent: list[int]) -> bool:
        return trial_id(trial) in silent or has_ended(trial.user_attrs["owner"])

    def _void(self, trial: int) -> None:
        def write() -> None:
            with suppress(UpdateFinishedTrialError):  # another process was faster
                self.storage.set_trial_user_attr(trial, "void", True)
                self.storage.set_trial_state_values(trial, TrialState.FAIL)

        self._patiently(write)

    def _patiently(self, action: Callable[[], T]) -> T:
        """Repeat an action while the storage does not answer. Raises StudyError after PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return action()
            except (StorageInternalError, DBAPIError) as error:
                if time.monotonic() > end:
                    raise StudyError(
                        f"{self.place} did not answer for {PATIENCE} s: use --resume when it does"
                    ) from error
                log.warning("%s does not answer: waiting for it", self.place)
                time.sleep(5)


def read_url(url: str) -> URL:
    """Parse the URL of a storage.

    Args:
        url: SQLAlchemy URL.

    Raises:
        StudyError: If it is not one.
    """
    try:
        return make_url(url)
    except ArgumentError as error:
        raise StudyError(
            f"storage {url!r} is no SQLAlchemy URL: give one as postgresql+psycopg://user@host/db"
        ) from error


def connect(url: URL) -> RDBStorage:
    """Connect to a storage, and create its tables if it has none.

    Args:
        url: The storage.

    Raises:
        StudyError: If the database's driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.get_backend_name() == "sqlite":  # one process writes at a time; the default is to give up after 5 s
        options["connect_args"] = {"timeout": BUSY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs=options,
                heartbeat_interval=BEAT,
                grace_period=GRACE,
            )
        except ImportError as error:
            raise StudyError(f"the driver of {url.drivername} is not installed ({error}): pip install it") from error


def check_storage(url: str) -> None:
    """Check that a storage can be used, before the work whose results it is to keep. It gets its tables.

    Args:
        url: SQLAlchemy URL.

    Raises:
        StudyError: If it cannot be used.
    """
    storage = read_url(url)
    with storage_errors(storage.render_as_string(hide_password=True)):
        _retried(partial(connect, storage)).engine.dispose()


def _retried(opening: Callable[[], T]) -> T:
    """Repeat the opening of a storage while other processes are opening it for the first time.

    Optuna looks which tables there are and then creates the others: of processes that start together, those that
    looked too early fail. At the next look the tables are there.
    """
    end = time.monotonic() + BUSY
    while True:
        try:
            return opening()
        except (OptunaError, SQLAlchemyError) as error:
            if not _others_were_faster(error) or time.monotonic() > end:
                raise
            time.sleep(random.uniform(0.05, 0.25))


def _others_were_faster(error: BaseException | None) -> bool:
    """Whether another process created a table or a row, or had locked the database."""
    if isinstance(error, DBAPIError):
        return isinstance(error, IntegrityError) or any(x in str(error.orig) for x in ("already exists", "locked"))
    return error is not None and _others_were_faster(error.__cause__)


def _beat(store: weakref.ref[SharedStore]) -> None:
    """Renew a store's claims until it is gone."""
    while (held := store()) is not None:
        for trial in list(held.claims.values()):
            with suppress(SQLAlchemyError, OptunaError):
                held.storage.record_heartbeat(trial)
        del held
        time.sleep(BEAT)
