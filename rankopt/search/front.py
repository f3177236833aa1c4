"""The front of a search: the trials that no other beats in the objective and in every metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

from rankopt.core.errors import RankoptError
from rankopt.core.records import BUDGETS, Trial
from rankopt.core.result_record import FrontRow, Metric


def searched_metrics(options: Mapping[str, str]) -> list[str]:
    """The metrics among a search's objectives.

    Args:
        options: The strategy's options, as text.
    """
    return [m for name in options.get("objectives", "").split(",") if (m := name.strip()) in BUDGETS]


@dataclass(frozen=True)
class Front(Sequence[Trial]):
    """The Pareto front of trials, by rising cost in the first metric.

    Attributes:
        metrics: The metrics that count beside the objective.
        trials: Its trials.
    """

    metrics: tuple[Metric, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, trials: Sequence[Trial], metrics: Sequence[str]) -> Front:
        """Find the finished trials that no other beats: as good in all, and better in one.

        Args:
            trials: The trials of a search.
            metrics: Metrics of the cost.

        Raises:
            RankoptError: There is no such metric, or none is given.
        """
        for metric in metrics:
            if metric not in BUDGETS:
                raise RankoptError(f"unknown metric {metric!r}: choose from {', '.join(BUDGETS)}")
        if not metrics:
            raise RankoptError(f"a front needs a metric beside the objective: give one of {', '.join(BUDGETS)}")
        ordered = tuple(cast(Metric, m) for m in dict.fromkeys(metrics))
        points = {t.number: _point(t, ordered) for t in trials if t.objective is not None}
        kept: list[Trial] = []
        for trial in sorted((t for t in trials if t.number in points), key=lambda t: (*points[t.number], t.number)):
            # In lexicographic order only earlier ones can be as good in all; equals are kept once.
            if not any(_no_worse(points[k.number], points[trial.number]) for k in kept):
                kept.append(trial)
        return cls(ordered, tuple(kept))

    @property
    def rows(self) -> list[FrontRow]:
        """The front as result.json holds it."""
        rows: list[FrontRow] = []
        for trial in self.trials:
            assert trial.objective is not None
            row: FrontRow = {"trial": trial.number, "objective": trial.objective}
            for metric in self.metrics:
                row[metric] = trial.cost[metric]
            rows.append(row)
        return rows

    @overload
    def __getitem__(self, at: int) -> Trial: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[Trial, ...]: ...

    def __getitem__(self, at: Any) -> Any:
        return self.trials[at]

    def __len__(self) -> int:
        return len(self.trials)


def _point(trial: Trial, metrics: Sequence[Metric]) -> tuple[float, ...]:
    assert trial.objective is not None
    return (*(trial.cost[m] for m in metrics), trial.objective)


def _no_worse(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))
