"""Trainings on a machine of a Ray cluster: progress and checkpoints come back here, and a lost machine is replaced."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankopt.candidates.pool import pack, unpack
from rankopt.core.errors import RankoptError, StudyError, TaskError
from rankopt.core.files import write_beside
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task
from rankopt.core.run_folder import process_name
from rankopt.core.task_file import Parcel
from rankopt.model.forward import device_of
from rankopt.search.ray.session import OWNER, check_resources, line
from rankopt.training import checkpoint
from rankopt.training.finetune import Trained, finetune
from rankopt.training.recipe import Recipe

log = logging.getLogger(__name__)


LOSSES = 3
"""Machines that are lost one after the other, without a new checkpoint, until a training is given up."""


WAIT = 0.5
"""Seconds between questions to a training."""


@dataclass(frozen=True)
class Resources:
    """What a training gets.

    Attributes:
        cpus: CPUs, as Ray counts them.
        gpus: GPUs; with any, the models are moved to "cuda".
        threads: Threads of torch.
    """

    cpus: float
    gpus: float
    threads: int


class Update(NamedTuple):
    """How far a training is.

    Attributes:
        note: Its last note.
        shown: What progress displays were given: (number of the display, what it shows, items, items that began).
        checkpoint: The content of a checkpoint that is new since the last update.
        trained: What it returned, at its end.
        error: Why it ended, if it failed.
        stopped: Whether it ended because it was asked to.
    """

    note: str = ""
    shown: tuple[int, str, int, int] | None = None
    checkpoint: bytes | None = None
    trained: Trained | None = None
    error: RankoptError | None = None
    stopped: bool = False


# --- on the other machine ----------------------------------------------------------------------------


class Training:
    """Becomes a Ray actor: trains in a thread, so that it can be asked how far it is.

    Args:
        parcel: The model, the task, the recipe and the teacher.
        kept: The content of a checkpoint to go on from; None to begin.
        resources: What the training gets.
        place: The folder of checkpoints where it was asked for; errors name it.
    """

    def __init__(self, parcel: Parcel, kept: bytes | None, resources: Resources, place: str) -> None:
        self.folder, self.place = Path(tempfile.mkdtemp(prefix=f"rankopt-{os.getpid()}-train-")), place
        (self.folder / OWNER).write_text(process_name())  # if this process is killed, a later start of Ray cleans up
        self.stopping, self.ended = threading.Event(), threading.Event()
        self.update, self.written, self.displays = Update(), 0, 0
        if kept is not None:
            self.file.write_bytes(kept)
            self.written = self.file.stat().st_mtime_ns
        threading.Thread(target=self._train, args=(parcel, kept is not None, resources), daemon=True).start()

    @property
    def file(self) -> Path:
        """The checkpoint."""
        return self.folder / checkpoint.FILE

    def poll(self, seconds: float) -> Update:
        """Say how far the training is.

        Args:
            seconds: How long to wait for its end first.
        """
        self.ended.wait(seconds)
        update = self.update
        if self.file.is_file() and self.file.stat().st_mtime_ns > self.written:
            self.written = self.file.stat().st_mtime_ns
            update = update._replace(checkpoint=self.file.read_bytes())
        return update

    def close(self) -> None:
        """Remove what was written on this machine."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """Let the training end, with a checkpoint."""
        self.stopping.set()

    def _train(self, parcel: Parcel, resume: bool, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        try:
            trained = self._finetune(parcel, resume, resources)
            self.update = self.update._replace(trained=trained)
        except KeyboardInterrupt:
            self.update = self.update._replace(stopped=True)
        except RankoptError as error:
            text = str(error).replace(str(self.folder), self.place)
            self.update = self.update._replace(error=type(error)(text))
        except BaseException as error:  # noqa: BLE001  # of a user's code, too
            traceback.print_exc()  # into the worker's log
            self.update = self.update._replace(error=TaskError(f"the training failed: {line(error)}"))
        finally:
            self.ended.set()

    def _finetune(self, parcel: Parcel, resume: bool, resources: Resources) -> Trained:
        model, task, recipe, teacher = unpack(parcel, self.folder)
        if resources.gpus:
            for each in (model, task.model, teacher):
                if each is not None and device_of(each.to("cuda")).type != "cuda":
                    raise TaskError("a model was moved to cuda and is not there: its own to() does not move it")

        def note(text: str) -> None:
            self.update = self.update._replace(note=text)

        trained = finetune(
            model,
            task,
            recipe,
            teacher=teacher,
            folder=self.folder,
            resume=resume,
            stop=self.stopping.is_set,
            progress=self._shown,
            note=note,
        )
        trained.model.cpu()
        return trained

    def _shown(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """A progress display that is read by `poll`."""
        self.displays += 1
        for number, item in enumerate(items):
            self.update = self.update._replace(shown=(self.displays, what, total, number + 1))
            yield item


# --- here --------------------------------------------------------------------------------------------


@dataclass
class _Shown:
    """Shows here what a training elsewhere has done."""

    progress: Progress
    number: int = 0
    items: Iterator[Any] = field(default_factory=lambda: iter(()))
    begun: int = 0

    def show(self, number: int, what: str, total: int, begun: int) -> None:
        if self.number != number:
            self.end()
            self.number, self.items, self.begun = number, iter(self.progress(range(total), what, total)), 0
        for _ in range(self.begun, begun):
            next(self.items, None)
        self.begun = max(self.begun, begun)

    def end(self) -> None:
        """Let the display see that nothing follows."""
        next(self.items, None)


def train_away(  # noqa: PLR0913  # those of `finetune`
    model: torch.nn.Module,
    task: Task,
    recipe: Recipe,
    resources: Resources,
    *,
    other_machines: bool,
    folder: Path,
    teacher: torch.nn.Module | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Do what `finetune` does, on the Ray that this process is connected to.

    Args:
        model: As of `finetune`.
        task: As of `finetune`.
        recipe: As of `finetune`.
        resources: What the training gets.
        other_machines: Whether it may run on a machine that lacks the task's files.
        folder: Where checkpoints are kept, on this machine.
        teacher: As of `finetune`.
        resume: As of `finetune`.
        stop: As of `finetune`; asked twice a second.
        progress: As of `finetune`.
        note: As of `finetune`.

    Returns:
        What `finetune` returns, with the model on the device that it came from.

    Raises:
        RankoptError: As `finetune`, or no machine has what the training needs, or it was lost again and again.
        KeyboardInterrupt: It was stopped, and left a checkpoint.
    """
    import ray

    parcel = ray.put(pack((model, task, recipe, teacher), other_machines))
    actor = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(Training)
    file, lost = folder / checkpoint.FILE, 0
    resume = resume and file.is_file()
    while True:
        check_resources(resources.gpus, resources.cpus)
        training = actor.remote(parcel, file.read_bytes() if resume else None, resources, str(folder))
        shown = _Shown(progress)
        try:
            for update in _updates(training, stop):
                if update.checkpoint is not None:
                    _write(file, update.checkpoint)
                    resume, lost = True, 0
                if update.shown:
                    shown.show(*update.shown)
                note(update.note)
        except ray.exceptions.RayActorError as error:
            if (lost := lost + 1) == LOSSES:
                raise StudyError(f"the machine that trained was lost {LOSSES} times: {line(error)}") from error
            log.warning("the machine that trained was lost: another one goes on from the last checkpoint")
            continue
        finally:
            with suppress(Exception):  # it may be gone
                ray.get(training.close.remote(), timeout=5)
            ray.kill(training)
        shown.end()
        if update.stopped:
            raise KeyboardInterrupt
        if update.error is not None:
            raise update.error
        assert update.trained is not None
        update.trained.model.to(device_of(model))
        return update.trained


def _write(file: Path, content: bytes) -> None:
    write_beside(file, lambda path: path.write_bytes(content))


def _updates(training: Any, stop: Callable[[], bool]) -> Iterator[Update]:
    """What a training says until its end."""
    import ray

    begun, stopping, ended = False, False, False
    while not ended:
        asked = training.poll.remote(WAIT)
        while not ray.wait([asked], timeout=WAIT)[0]:
            if stop() and not begun:  # it waits for a machine that is free
                raise KeyboardInterrupt
        update: Update = ray.get(asked)
        yield update
        begun, ended = True, update.trained is not None or update.error is not None or update.stopped
        if not stopping and stop():
            stopping = True
            training.stop.remote()
