"""Which runner evaluates a search's plans: this process, or Ray Tune workers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rankopt.candidates.pool import Pool
from rankopt.core.errors import RankoptError
from rankopt.search.loop import Runner
from rankopt.search.loop import search as search_in_process
from rankopt.training.finetune import Trained, finetune

if TYPE_CHECKING:
    from rankopt.search.ray.away import Job, Update
    from rankopt.search.ray.worker import Limits


@dataclass(frozen=True)
class RunnerSettings:
    """Where trials are evaluated. With the defaults that is this process, one trial at a time.

    Attributes:
        workers: Ray Tune workers; 0 for none.
        ray_address: Address of a running Ray cluster, or "auto".
        gpus_per_trial: GPUs of one worker, may be a fraction.
        trial_timeout: Seconds until a worker's trial is stopped.
        trial_memory: Gigabytes that a worker's trial may take beyond model and data.
        tensorboard: Whether to keep Ray's TensorBoard files.
        cpus_per_trial: CPUs of one worker, as Ray counts them; a worker's torch uses as many threads.
        scheduler: Ray Tune's scheduler that stops trials at low fidelities, "asha" or "median". Default: our own.
        log_to: Where else Ray Tune logs trials: "mlflow", "wandb".
        dashboard: Whether Ray's dashboard runs.
    """

    workers: int = 0
    ray_address: str | None = None
    gpus_per_trial: float = 0.0
    trial_timeout: float | None = None
    trial_memory: float | None = None
    tensorboard: bool = False
    cpus_per_trial: float = 1.0
    scheduler: str | None = None
    log_to: tuple[str, ...] = ()
    dashboard: bool = False

    @property
    def any_given(self) -> bool:
        """Whether some setting differs from its default."""
        return self != RunnerSettings()


def make_runner(settings: RunnerSettings, folder: Path | None = None) -> Runner:
    """Make the runner of a search.

    Args:
        settings: Where trials are evaluated.
        folder: The run folder, for the workers' logs and Ray Tune's results; None keeps none.

    Returns:
        `search`, which works in this process, or a `RaySearch`.

    Raises:
        RankoptError: If the settings contradict each other, or Ray Tune is needed and not installed.
    """
    if settings.workers < 0 or settings.gpus_per_trial < 0:
        raise RankoptError("workers and gpus_per_trial must not be negative")
    if not settings.workers and not settings.ray_address and not settings.gpus_per_trial:
        if settings.any_given:
            raise RankoptError(
                "cpus_per_trial, trial_timeout, trial_memory, tensorboard, scheduler, log_to and dashboard go with "
                "workers: in this process nothing can stop a trial"
            )
        return search_in_process
    from rankopt.search.ray.runner import RaySearch
    from rankopt.search.ray.tune_options import TuneOptions
    from rankopt.search.ray.worker import Limits

    memory = None if settings.trial_memory is None else int(settings.trial_memory * 1e9)
    return RaySearch(
        max(settings.workers, 1),
        settings.ray_address,
        settings.gpus_per_trial,
        Limits(settings.trial_timeout, memory),
        folder,
        TuneOptions(settings.tensorboard, settings.scheduler, settings.log_to, settings.dashboard),
        settings.cpus_per_trial,
    )


def session(runner: Runner) -> AbstractContextManager[object]:
    """Context in which several searches share a start of Ray.

    Args:
        runner: Their runner; for `search` there is nothing to start.
    """
    opened: Callable[[], AbstractContextManager[object]] = getattr(runner, "session", nullcontext)
    return opened()


def pool_of(runner: Runner) -> Pool | None:
    """Where the task of a search is prepared.

    Args:
        runner: The search's runner.

    Returns:
        Its Ray cluster as a pool; None for the cores of this machine.
    """
    pool: Callable[[], Pool | None] = getattr(_innermost(runner), "task_pool", lambda: None)
    return pool()


def workers_of(runner: Runner) -> int | Pool | None:
    """Who prepares the task of a search, as `rankopt.candidates.prepare.prepare` takes it.

    Args:
        runner: The search's runner.

    Returns:
        Its Ray cluster, the number of processes that it allows, or None for one process per core.
    """
    processes: int | None = getattr(_innermost(runner), "processes", None)
    return pool_of(runner) or processes


def trainer_of(runner: Runner, on_ray: bool = False) -> Callable[..., Trained]:
    """What trains the plans that a search finds.

    Args:
        runner: The search's runner.
        on_ray: Whether to train on Ray also where that is nothing but this machine's CPUs, all of which a training in
            this process has.

    Returns:
        `finetune`, or the one of a `RaySearch`.
    """
    inner = _innermost(runner)
    trainer: Callable[..., Trained] = getattr(inner, "finetune", finetune)
    return trainer if on_ray or pool_of(runner) is not None or getattr(inner, "gpus", 0.0) > 0 else finetune


class Crew(Protocol):
    """Does jobs in Ray workers, each with the resources of a trial."""

    workers: int
    limits: Limits

    def do(self, next_job: Callable[[], Job | None], stop: Callable[[], bool] = ...) -> Generator[tuple[Job, Update]]:
        """Do jobs, `workers` at a time; see `rankopt.search.ray.runner.RaySearch.do`."""


def crew_of(runner: Runner) -> Crew | None:
    """Who does whole searches beside each other.

    Args:
        runner: The runner of one search.

    Returns:
        Its Ray workers; None if it has none.

    Raises:
        RankoptError: The workers have limits that only trials of their own can keep.
    """
    inner = _innermost(runner)
    if not hasattr(inner, "do"):
        return None
    crew: Crew = inner
    if crew.limits.seconds or crew.limits.memory:
        raise RankoptError(
            "trial_timeout and trial_memory limit trials that have workers of their own; here each worker does a whole "
            "search: leave them out, or name one case (--case)"
        )
    return crew


def _innermost(runner: Any) -> Any:
    """The runner that others wrap, such as LiveRunner and RunUntil."""
    while inner := getattr(runner, "runner", None):
        runner = inner
    return runner
