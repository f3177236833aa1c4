"""Experiments in Ray workers, each as a whole: the search within it runs in the worker's process."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from rankopt.candidates.cache import Cache
from rankopt.core.progress import Display, StopCondition, graceful_interrupt
from rankopt.core.records import Task, Trial
from rankopt.experiments.experiment import TRAINED, Experiment, load_teacher, run_in_folder
from rankopt.search.loop import Evaluate, Study, search
from rankopt.search.progress import trial_line
from rankopt.search.ray.away import Desk, Job, Update, files_in
from rankopt.search.runners import Crew

Shared = tuple[Task, Task | None]
"""The task, and the teacher if there is one."""


# --- in a worker ---------------------------------------------------------------------------------------


class WorkerSearch:
    """A runner in a worker's process: it shows its trials, and ends when the job is asked to stop.

    Args:
        desk: Where the job works.

    Attributes:
        processes: How many processes may prepare the task.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk, self.processes = desk, desk.resources.threads

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        """Run a search.

        Raises:
            KeyboardInterrupt: It was asked to stop; its trials are kept where the study keeps them.
        """

        def report(trial: Trial) -> None:
            self.desk.note(trial_line(trial))
            study.stopping = study.stopping or self.desk.stop()

        study.report, study.stopping = report, self.desk.stop()
        trials = search(study, evaluate)
        if study.stopping:
            raise KeyboardInterrupt
        return trials


def machine() -> str:
    """What works here: threads, architecture and torch's version."""
    return f"{torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}"


def to_device(desk: Desk, shared: Shared) -> None:
    """Move the models of a task and its teacher to the device of a job.

    Args:
        desk: Where the job works.
        shared: Task and teacher.
    """
    desk.place(*(task.model for task in shared if task is not None))


def _do(shared: Shared, desk: Desk, experiment: Experiment, cache: Path) -> str:
    """Do an experiment in the job's folder, or go on with it. Returns the machine that did it."""
    task, teacher = shared
    to_device(desk, shared)
    found = run_in_folder(experiment, task, desk.folder, WorkerSearch(desk), cache, desk.stop, desk, teacher)
    if found is None:
        raise KeyboardInterrupt
    return machine()


# --- here ----------------------------------------------------------------------------------------------


def experiment_job(name: str, experiment: Experiment, task: Task, folder: Path, cache: Path | None) -> Job:
    """The job of doing an experiment in a run folder, as `run_in_folder` does it.

    Args:
        name: What it is, for messages.
        experiment: What to do.
        task: The task.
        folder: The run folder.
        cache: Folder of fitted candidates, on all machines; None for the default here.
    """
    shared: Shared = task, load_teacher(experiment.teacher)
    arguments = experiment, Cache(cache).folder.resolve()
    return Job(name, _do, shared, arguments, folder, tuple(files_in(folder)))


def result_folder(experiment: Experiment, folder: Path) -> Path:
    """Where the result of a finished experiment is.

    Args:
        experiment: The experiment.
        folder: Its run folder.
    """
    return folder / TRAINED if experiment.training.trains else folder


def status(update: Update) -> str:
    """How far a job is, in a few words.

    Args:
        update: Its last update.
    """
    if not update.note:
        return "starting"
    _, what, total, begun = update.shown or (0, "", 0, 0)
    return f"{update.note}, {begun} of {total}" if what == update.note and total else update.note


def run_in_folder_away(
    crew: Crew,
    experiment: Experiment,
    task: Task,
    folder: Path,
    cache: Path | None,
    stop: StopCondition,
    display: Display,
) -> Path | None:
    """Do an experiment as `run_in_folder` does it, in a worker.

    Args:
        crew: Does it.
        experiment: As of `run_in_folder`, as the rest.
        task: The task.
        folder: The run folder.
        cache: Folder of fitted candidates.
        stop: Whether to stop.
        display: Shows how far it is.

    Returns:
        The folder that holds the result; None if it was stopped before there was one.

    Raises:
        RankoptError: It failed.
    """
    jobs: Iterator[Job] = iter([experiment_job("the search", experiment, task, folder, cache)])
    update = Update()
    with graceful_interrupt(stop, display.say), closing(crew.do(lambda: next(jobs, None), stop)) as news:
        for _, update in news:
            display.note(status(update))
    if update.error is not None:
        raise update.error
    return result_folder(experiment, folder) if update.result else None
