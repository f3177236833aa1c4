"""How a search is to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rankopt.fidelity import WHOLE, Ladder


@dataclass(frozen=True)
class Settings:
    """How to search. trials: distinct plans in total, resumed ones included (30; one-shot strategies: 1).

    options: the strategy's own.
    refine: refit the chosen plan's layers one after the other, against the dense model's outputs, and move its
    batch norms to what they now see; each is kept if the objective falls.
    ladder: the fidelities that trials are evaluated at. storage: an SQLAlchemy URL of a study that several processes
    share; default: study.db in the run folder.
    """

    strategy: str = "knapsack"
    trials: int | None = None
    seed: int = 0
    resume: bool = False
    refine: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    ladder: Ladder = WHOLE
    storage: str | None = None
