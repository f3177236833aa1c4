"""Trainings on a machine of a Ray cluster: progress and checkpoints come back here, and a lost machine is replaced."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.core.progress import Progress, silent
from rankopt.core.records import Task
from rankopt.model.forward import device_of
from rankopt.search.ray.away import Desk, Job, Update
from rankopt.training import checkpoint
from rankopt.training.finetune import Trained, finetune
from rankopt.training.recipe import Recipe


def _train(shared: tuple[nn.Module, Task, Recipe, nn.Module | None], desk: Desk) -> Trained:
    """In a worker: train, from the checkpoint in the folder if there is one. The model comes back on the CPU."""
    model, task, recipe, teacher = shared
    desk.place(model, task.model, teacher)
    trained = finetune(
        model,
        task,
        recipe,
        teacher=teacher,
        folder=desk.folder,
        resume=(desk.folder / checkpoint.FILE).is_file(),
        stop=desk.stop,
        progress=desk,
        note=desk.note,
    )
    trained.model.cpu()
    return trained


@dataclass
class Shown:
    """Shows here what displays elsewhere have shown."""

    progress: Progress
    number: int = 0
    items: Iterator[Any] = field(default_factory=lambda: iter(()))
    begun: int = 0

    def show(self, number: int, what: str, total: int, begun: int) -> None:
        """Go on to what has begun elsewhere.

        Args:
            number: Number of the display.
            what: What it shows.
            total: How many items it has.
            begun: How many of them have begun.
        """
        if self.number != number:
            self.end()
            self.number, self.items, self.begun = number, iter(self.progress(range(total), what, total)), 0
        for _ in range(self.begun, begun):
            next(self.items, None)
        self.begun = max(self.begun, begun)

    def end(self) -> None:
        """Let the display see that nothing follows."""
        next(self.items, None)


Do = Callable[[Callable[[], Job | None], Callable[[], bool]], Generator[tuple[Job, Update]]]
"""Does jobs: (what returns the next one, whether to stop) -> news of them."""


def train_away(  # noqa: PLR0913  # those of `finetune`
    do: Do,
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    folder: Path,
    teacher: nn.Module | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Do what `finetune` does in a Ray worker.

    Args:
        do: Does jobs.
        model: As of `finetune`.
        task: As of `finetune`.
        recipe: As of `finetune`.
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
    kept = [checkpoint.FILE] if resume and (folder / checkpoint.FILE).is_file() else []
    jobs = iter([Job("the training", _train, (model, task, recipe, teacher), folder=folder, files=kept)])
    shown = Shown(progress)
    update = Update()
    with closing(do(lambda: next(jobs, None), stop)) as news:
        for _, update in news:
            if update.shown:
                shown.show(*update.shown)
            note(update.note)
    shown.end()
    if update.error is not None:
        raise update.error
    if update.result is None:
        raise KeyboardInterrupt
    trained: Trained = update.result
    trained.model.to(device_of(model))
    return trained
