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


def not_scriptable(what: str) -> RankoptError:
    """The error for torch.jit.script of what it cannot compile.

    Args:
        what: The module, in words.
    """
    return RankoptError(f"torch.jit.script cannot compile {what}: trace it for inputs of one size, or keep it dense")
