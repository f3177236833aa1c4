"""The errors that a user can act on; every message says what is wrong and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class RankoptError(ValueError):
    """Base of every error that a user can mend; the message says what is wrong and what to do."""


class BudgetError(RankoptError):
    """A budget that cannot be read or cannot be met."""


class TaskError(RankoptError):
    """A task, model or calibration set that cannot be used."""


class PlanError(RankoptError):
    """A plan that is damaged or belongs to another model."""


class StudyError(RankoptError):
    """A run folder or study store that cannot be used."""
