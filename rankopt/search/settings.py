"""The settings of a search, in one record for the command line, Python and TOML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from rankopt.core.errors import RankoptError
from rankopt.search.fidelity import FULL_FIDELITY, FidelitySchedule
from rankopt.search.loop import Callback
from rankopt.strategies.registry import StrategyLike, configured, strategy_class


@dataclass(frozen=True)
class SearchSettings:
    """How to search, whatever the model and its budget.

    Attributes:
        strategy: Name of the strategy.
        trials: Distinct plans to evaluate in total, those of a resumed search included. None: 30, or 1 for a strategy
            that proposes a single plan.
        seed: The same seed gives the same plans.
        options: The strategy's own options.
        refine: Whether to refit the chosen plan's layers one after the other against the dense model's outputs, and
            then to recalibrate its batch norms. Each step is kept only if it lowers the objective.
        fidelities: The fidelities that trials are evaluated at.
        timeout: Seconds after the first trial's start from which no further one starts. None: no limit.
        callbacks: Called with the study and every trial that ends, as Optuna's.
        storage: SQLAlchemy URL of a study that several processes share. None: study.db in the run folder.
        resume: Whether to continue the study that the storage holds.
    """

    strategy: str = "knapsack"
    trials: int | None = None
    seed: int = 0
    _: KW_ONLY
    options: Mapping[str, Any] = field(default_factory=dict)
    refine: bool = False
    fidelities: FidelitySchedule = FULL_FIDELITY
    timeout: float | None = None
    callbacks: tuple[Callback, ...] = ()
    storage: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise RankoptError(f"timeout is {self.timeout}: give seconds above 0")
        if not all(map(callable, self.callbacks)):
            raise RankoptError(f"callbacks are {self.callbacks!r}: give functions of the study and a trial")

    def changed(self) -> dict[str, str]:
        """The settings that have no key of their own in result.json, as text; those at their default are left out."""
        default = SearchSettings()
        names = ("trials", "refine", "fidelities", "timeout")
        return {name: str(value) for name in names if (value := getattr(self, name)) != getattr(default, name)}

    @property
    def effort(self) -> str:
        """The effort of search spaces that say none."""
        return strategy_class(self.strategy).effort

    @classmethod
    def parse(
        cls,
        strategy: StrategyLike = "knapsack",
        options: Mapping[str, Any] | None = None,
        fidelities: str | None = None,
        **others: Any,
    ) -> SearchSettings:
        """Build settings from options and fidelities as a user writes them.

        Args:
            strategy: Name of the strategy, "module:Class", "FILE.py:Class", the class, or the class with its options.
            options: The strategy's own options, as values or as text.
            fidelities: A schedule as `FidelitySchedule.parse` reads it; None for full fidelity.
            others: The remaining fields, as they are.

        Raises:
            RankoptError: For an unknown strategy or option, or for fidelities that are not understood.
        """
        name, read = configured(strategy, options)
        schedule = FULL_FIDELITY if fidelities is None else FidelitySchedule.parse(fidelities)
        return cls(name, options=read, fidelities=schedule, **others)
