"""The errors that users can act on; every message says what is wrong and what to do."""

from __future__ import annotations


class RankoptError(ValueError):
    """Base of all errors that users can act on."""


class BudgetError(RankoptError):
    """A budget cannot be read or cannot be met."""


class TaskError(RankoptError):
    """A task, model or calibration set cannot be used."""


class PlanError(RankoptError):
    """A plan is damaged or belongs to another model."""


class StudyError(RankoptError):
    """A run folder or study store cannot be used."""
