"""Which runner evaluates a search's plans: this process, or Ray Tune workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankopt.core.errors import RankoptError


def make_runner(
    workers: int,
    ray_address: str | None,
    gpus_per_trial: float,
    limits: tuple[float | None, float | None],
    logs: Path,
    tensorboard: bool,
) -> Any:
    """The search loop to use: in this process, or on Ray Tune."""
    from rankopt.search.loop import search as in_process

    if workers < 0 or gpus_per_trial < 0:
        raise RankoptError("--workers and --gpus-per-trial must not be negative")
    if not workers and not ray_address and not gpus_per_trial:
        if any(limits) or tensorboard:
            raise RankoptError(
                "--trial-timeout, --trial-memory and --tensorboard go with --workers: "
                "in this process nothing can stop a trial"
            )
        return in_process
    from rankopt.search.ray.runner import RaySearch
    from rankopt.search.ray.worker import Limits

    seconds, gigabytes = limits
    memory = None if gigabytes is None else int(gigabytes * 1e9)
    return RaySearch(max(workers, 1), ray_address, gpus_per_trial, Limits(seconds, memory), logs, tensorboard)
