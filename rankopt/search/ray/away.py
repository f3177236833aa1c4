"""Jobs in Ray workers, each in a folder of its own: what they write comes back here, and a lost machine is replaced."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rankopt.candidates.pool import pack, unpack
from rankopt.core.errors import RankoptError, StudyError, TaskError
from rankopt.core.files import write_beside
from rankopt.core.progress import StopCondition
from rankopt.core.run_folder import process_name
from rankopt.core.task_file import Parcel
from rankopt.model.forward import move
from rankopt.search.ray.session import OWNER, check_resources, line, other_machines

log = logging.getLogger(__name__)


LOSSES = 3
"""Machines that are lost one after the other, without a new file, until a job is given up."""


WAIT = 0.5
"""Seconds between questions to a job."""


CLOSING = 15
"""Seconds that a worker has to clean up."""


NOT_KEPT = (".part", "-journal", "-wal", "-shm")
"""Ends of names of files that hold half of something."""


@dataclass(frozen=True)
class Resources:
    """What a job gets.

    Attributes:
        cpus: CPUs, as Ray counts them.
        gpus: GPUs; with any, its models are moved to "cuda".
        threads: Threads of torch.
    """

    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True, eq=False)
class Job:
    """Something to do in a worker.

    Attributes:
        name: What it is, for messages, as "the training".
        function: Does it: `function(shared, desk, *arguments)`. Workers import it.
        shared: What it is given first. Several jobs may share it; it may come from task files.
        arguments: What else it is given.
        folder: The folder here that its files come back to; None if they are of no use afterwards.
        files: Names of the files of this folder that it begins with.
    """

    name: str
    function: Callable[..., Any]
    shared: Any
    arguments: tuple[Any, ...] = ()
    folder: Path | None = None
    files: Iterable[str] = ()


class Update(NamedTuple):
    """How far a job is.

    Attributes:
        note: Its last note.
        shown: What progress displays were given: (number of the display, what it shows, items, items that began).
        files: Files that are new or have changed since the last update, by name, in the order of their writing.
        removed: Names of files that were removed since.
        ended: Whether it has ended.
        result: What it returned.
        error: Why it ended, if it failed.
        stopped: Whether it ended because it was asked to.
    """

    note: str = ""
    shown: tuple[int, str, int, int] | None = None
    files: Mapping[str, bytes] = {}
    removed: tuple[str, ...] = ()
    ended: bool = False
    result: Any = None
    error: RankoptError | None = None
    stopped: bool = False


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """List the whole files of a folder.

    Args:
        folder: The folder, which need not exist.

    Returns:
        Name within the folder -> (time of the last change, size).
    """
    found = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # it may be gone
            if path.is_file() and not path.is_symlink() and not path.name.endswith(NOT_KEPT):
                stat = path.stat()
                found[path.relative_to(folder).as_posix()] = stat.st_mtime_ns, stat.st_size
    return found


# --- in the worker -------------------------------------------------------------------------------------


class Desk:
    """Where a job works; a `Display` whose texts are shown where it was asked for.

    Attributes:
        folder: Its folder.
        resources: What it gets.
        stop: Whether it is to stop.
    """

    def __init__(self, folder: Path, resources: Resources) -> None:
        """Make the folder."""
        folder.mkdir(parents=True)
        self.folder, self.resources, self.stop = folder, resources, StopCondition()
        self.update, self.displays = Update(), 0

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """Go through items; a progress display that is read by `Workplace.poll`."""
        self.displays += 1
        self.note(what)
        for number, item in enumerate(items):
            self.update = self.update._replace(shown=(self.displays, what, total, number + 1))
            yield item

    def note(self, text: str) -> None:
        """Change the text that is shown.

        Args:
            text: The text.
        """
        self.update = self.update._replace(note=text)

    def say(self, text: str) -> None:
        """Show a line: here, a note.

        Args:
            text: The line.
        """
        self.note(text)

    def place(self, *models: nn.Module | None) -> None:
        """Move models to the GPU, if the job has one.

        Args:
            models: The models; None are left out.

        Raises:
            TaskError: One does not move.
        """
        for model in models if self.resources.gpus else ():
            if model is not None:
                move(model, "cuda")


class Workplace:
    """Becomes a Ray actor: does a job in a thread, so that it can be asked how far it is.

    Args:
        parcel: What `pool.pack` made of the job's `shared`.
        job: The job without it.
        files: The files that it begins with.
        resources: What it gets.
    """

    def __init__(self, parcel: Parcel, job: Job, files: Mapping[str, bytes], resources: Resources) -> None:
        self.root = Path(tempfile.mkdtemp(prefix=f"rankopt-{os.getpid()}-away-"))
        (self.root / OWNER).write_text(process_name())  # if this process is killed, a later start of Ray cleans up
        self.desk, self.job = Desk(self.root / "work", resources), job
        for name, content in files.items():
            path = self.desk.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.seen = files_in(self.desk.folder)
        self.end: dict[str, Any] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._work, args=(parcel,), daemon=True).start()

    def poll(self, seconds: float) -> Update:
        """Say how far the job is.

        Args:
            seconds: How long to wait for its end first.
        """
        self._ended.wait(seconds)
        ended = self._ended.is_set()  # before files are listed: then all of them are there
        files, removed = self._changes() if self.job.folder else ({}, ())
        update = self.desk.update._replace(files=files, removed=removed)
        return update._replace(ended=True, **self.end) if ended else update

    def _changes(self) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """The files that have changed since the last call, and the names of those that were removed.

        Whoever takes them one after the other has at any time what the job once had: they come in the order of their
        writing, and are read after they were listed.
        """
        folder, seen = self.desk.folder, self.seen
        now = files_in(folder)
        while now.keys() != (again := files_in(folder)).keys():  # one that is listed may have needed one that is not
            now = again
        changed = sorted((name for name in now if now[name] != seen.get(name)), key=lambda name: now[name])
        content = {name: found for name in changed if (found := _content(folder / name)) is not None}
        missed = [name for name in changed if name not in content]
        self.seen = {name: stat for name, stat in now.items() if name not in missed}
        self.seen |= {name: seen[name] for name in missed if name in seen}
        return content, tuple(seen.keys() - now.keys())

    def close(self) -> None:
        """Remove what was written on this machine."""
        shutil.rmtree(self.root, ignore_errors=True)

    def stop(self) -> None:
        """Let the job end."""
        self.desk.stop.stopping = True

    def _work(self, parcel: Parcel) -> None:
        torch.set_num_threads(self.desk.resources.threads)
        try:
            content = unpack(parcel, self.root / "task")
            self.end["result"] = self.job.function(content, self.desk, *self.job.arguments)
        except KeyboardInterrupt:
            self.end["stopped"] = True
        except RankoptError as error:
            text = str(error).replace(str(self.desk.folder), str(self.job.folder))
            self.end["error"] = type(error)(text)
        except BaseException as error:  # noqa: BLE001  # of a user's code, too
            traceback.print_exc()  # into the worker's log
            self.end["error"] = TaskError(f"{self.job.name} failed: {line(error)}")
        finally:
            self._ended.set()


def _content(path: Path) -> bytes | None:
    """The content of a file; None if it is gone. A database is copied as it is between two transactions."""
    try:
        if path.suffix != ".db":
            return path.read_bytes()
        file = sqlite3.connect(f"{path.as_uri()}?mode=ro", WAIT, isolation_level=None, uri=True)
        with closing(file), closing(sqlite3.connect(":memory:")) as copy:
            file.execute("BEGIN")
            file.execute("SELECT * FROM sqlite_master").fetchone()  # fails where others write; `backup` would wait
            file.backup(copy)
            return copy.serialize()
    except (OSError, sqlite3.Error):  # a database that is busy for long is fetched the next time
        return None


# --- here ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Running:
    """A job on its way."""

    job: Job
    parcel: Any  # where Ray keeps it
    names: set[str]  # files in its folder here that it would begin with elsewhere
    actor: Any = None
    answer: Any = None  # to come: how far it is
    begun: bool = False
    stopping: bool = False
    lost: int = 0

    def start(self, resources: Resources) -> None:
        """Begin, or go on in another worker."""
        import ray

        check_resources(resources.gpus, resources.cpus)
        folder = self.job.folder or Path()
        files = {name: (folder / name).read_bytes() for name in sorted(self.names)}
        lean = dataclasses.replace(self.job, shared=None, files=())
        make = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(Workplace)
        self.actor, self.begun, self.stopping = make.remote(self.parcel, lean, files, resources), False, False
        self.ask()

    def ask(self) -> None:
        """Ask how far it is."""
        self.answer = self.actor.poll.remote(WAIT)

    def take(self, update: Update) -> None:
        """Write what has come."""
        self.begun = True
        if self.job.folder is None or not (update.files or update.removed):
            return
        for name, content in update.files.items():
            _write(self.job.folder / name, content)
        for name in update.removed:
            (self.job.folder / name).unlink(missing_ok=True)
        self.names = (self.names | update.files.keys()) - set(update.removed)
        self.lost = 0

    def end(self) -> None:
        """Give the worker back."""
        import ray

        if self.begun:
            with suppress(Exception):  # it may be gone
                ray.get(self.actor.close.remote(), timeout=CLOSING)
        ray.kill(self.actor)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda part: part.write_bytes(content))


@dataclass
class Dispatcher:
    """Does jobs in workers of the Ray that this process is connected to, some at a time.

    Attributes:
        next_job: Returns the next job; None if there is none now. It is asked again when one has ended.
        at_once: How many jobs run at a time.
        resources: What each gets.
        stop: Asked all the time: once it is True nothing begins, and what runs is asked to stop.
    """

    next_job: Callable[[], Job | None]
    at_once: int
    resources: Resources
    stop: Callable[[], bool]
    running: list[_Running] = field(default_factory=list)
    sent: tuple[Any, Any] = (None, None)  # what jobs shared at last, and where Ray keeps it

    def step(self) -> list[tuple[Job, Update]] | None:
        """Begin what there is room for, and wait for news, at most half a second.

        Returns:
            The news; the first of a job is that it waits for a worker. None if all is done.

        Raises:
            RankoptError: No machine has what a job needs, or a file cannot be written.
        """
        import ray

        news = self._begin()
        if not self.running:
            return news or None
        if self.stop():
            news += self._stop()
        answers = [running.answer for running in self.running]
        ready = ray.wait(answers, timeout=WAIT)[0] if answers else []
        return news + [(x.job, self._answer(x)) for x in list(self.running) if x.answer in ready]

    def close(self) -> None:
        """End what still runs."""
        while self.running:
            self.running.pop().end()

    def _begin(self) -> list[tuple[Job, Update]]:
        begun = []
        while len(self.running) < self.at_once and not self.stop() and (job := self.next_job()) is not None:
            try:
                parcel = self._send(job.shared)
            except RankoptError as error:  # that of another job may be sent
                begun.append((job, Update(ended=True, error=error)))
                continue
            self.running.append(_Running(job, parcel, set(job.files)))
            self.running[-1].start(self.resources)
            begun.append((job, Update("waiting for a worker")))
        return begun

    def _send(self, shared: Any) -> Any:
        """Make Ray keep what jobs share, as long as one of them runs. Returns the reference."""
        import ray

        if self.sent[1] is None or self.sent[0] is not shared:
            self.sent = shared, ray.put(pack(shared, other_machines()))
        return self.sent[1]

    def _stop(self) -> list[tuple[Job, Update]]:
        """Ask what runs to stop; what waits for a worker ends."""
        waiting = [running for running in self.running if not running.begun]
        for running in waiting:
            self._end(running)
        for running in self.running:
            if not running.stopping:
                running.stopping = True
                running.actor.stop.remote()
        return [(running.job, Update(ended=True, stopped=True)) for running in waiting]

    def _answer(self, running: _Running) -> Update:
        """Take an answer, and ask again; the job goes on elsewhere if its worker was lost."""
        import ray

        try:
            update: Update = ray.get(running.answer)
        except ray.exceptions.RayTaskError as error:
            self._end(running)
            failed = TaskError(f"{running.job.name} failed: what it made cannot be sent back ({line(error.cause)})")
            return Update(ended=True, error=failed)
        except ray.exceptions.RayError as error:
            return self._replace(running, error)
        running.take(update)
        if update.ended:
            self._end(running)
        else:
            running.ask()
        return update

    def _replace(self, running: _Running, error: Exception) -> Update:
        running.end()
        running.lost += 1
        if running.lost == LOSSES:
            self.running.remove(running)
            lost = StudyError(f"the machine of {running.job.name} was lost {LOSSES} times: {line(error)}")
            return Update(ended=True, error=lost)
        log.warning("the machine of %s was lost: another one goes on from what had come here", running.job.name)
        running.start(self.resources)
        return Update("waiting for another worker")

    def _end(self, running: _Running) -> None:
        self.running.remove(running)
        running.end()
