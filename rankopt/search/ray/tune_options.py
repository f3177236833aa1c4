"""What Ray Tune offers beside running trials: schedulers, loggers and its dashboard."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rankopt.core.errors import RankoptError
from rankopt.search.loop import ETA

SCHEDULERS = ("asha", "median")


TIME, VALUE = "effort", "value"
"""What a scheduler compares trials by: the fidelity, ETA times as much at each, and the objective there."""


LATEST = ETA**20  # an effort that no trial reaches


@dataclass(frozen=True)
class TuneOptions:
    """Options of Ray Tune.

    Attributes:
        tensorboard: Whether to keep TensorBoard's files.
        scheduler: One of SCHEDULERS; None for the search's own.
        log_to: Of "mlflow" and "wandb", those that trials are logged to.
        dashboard: Whether Ray's dashboard runs, where Ray is started here.

    Raises:
        RankoptError: A name is unknown, or a package is not installed.
    """

    tensorboard: bool = False
    scheduler: str | None = None
    log_to: tuple[str, ...] = ()
    dashboard: bool = False

    def __post_init__(self) -> None:
        if self.scheduler in ("pbt", "hyperband", "bohb", "pb2"):
            raise RankoptError(
                f"scheduler {self.scheduler!r} pauses trials and changes what they do; a plan is measured from start "
                f"to end: choose from {', '.join(SCHEDULERS)}"
            )
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise RankoptError(f"there is no scheduler {self.scheduler!r}: choose from {', '.join(SCHEDULERS)}")
        if unknown := set(self.log_to) - {"mlflow", "wandb"}:
            raise RankoptError(f"trials cannot be logged to {min(unknown)!r}: choose mlflow or wandb")
        if missing := [name for name in self.log_to if find_spec(name) is None]:
            raise RankoptError(f"{missing[0]} is not installed: pip install {missing[0]}, or do not log to it")

    def callbacks(self) -> list[Any]:
        """Make Tune's callbacks, which log trials."""
        found: list[Any] = []
        if self.tensorboard:
            from ray.tune.logger import TBXLoggerCallback

            found.append(TBXLoggerCallback())
        if "mlflow" in self.log_to:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            found.append(MLflowLoggerCallback(experiment_name="rankopt"))
        if "wandb" in self.log_to:
            from ray.air.integrations.wandb import WandbLoggerCallback

            found.append(WandbLoggerCallback(project="rankopt"))
        return found

    def scheduler_class(self) -> tuple[type, dict[str, Any]]:
        """The class of Tune's scheduler, and its arguments."""
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

        compare = {"time_attr": TIME, "metric": VALUE, "mode": "min"}
        if self.scheduler == "asha":
            return ASHAScheduler, {**compare, "max_t": LATEST, "grace_period": 1, "reduction_factor": ETA}
        if self.scheduler == "median":
            return MedianStoppingRule, {**compare, "grace_period": 1, "min_samples_required": ETA}
        return FIFOScheduler, {}
