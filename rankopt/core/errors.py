"""The errors that users can act on; every message says what is wrong and what to do."""

from __future__ import annotations

LONGEST = 1200
"""Characters of a message."""


class RankoptError(ValueError):
    """Base of all errors that users can act on.

    A message that is long, as it quotes a value of a file, is cut in the middle: its end says what to do.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 404]} … {text[-400:]}")


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
