"""What a strategy is: it sees numbers, never modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Trial


class Strategy(ABC):
    """Proposes frontier positions; the search projects them onto the budget, evaluates and tells the outcome.

    What ask() returns depends only on the problem, the seed, how often it was asked and the trials told:
    so a study resumes where it stopped by telling the finished trials again (`restore`).
    A strategy's own options are keyword-only arguments of __init__ with a default: a number, a string or a bool.
    """

    name: ClassVar[str]
    one_shot: ClassVar[bool] = False  # proposes a single plan
    needs_model: ClassVar[bool] = False  # has nothing to propose before `measure`

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem, self.seed = problem, seed
        self.asked = 0
        self.notes: dict[str, str] = {}  # by layer: what the strategy found there, for result.json

    def measure(self, prepared: Any, progress: Any) -> None:  # noqa: B027  (most see numbers only)
        """Look at the model and its data (a `Prepared`) before the first ask, for strategies that train or calibrate.

        What is found may depend on these, the options and the seed only, so that a resumed study finds the same.
        """

    def ask(self) -> Proposal | None:
        """One frontier index per layer; None: nothing more to propose."""
        proposal = self.propose(self.asked)
        self.asked += proposal is not None
        return proposal

    @abstractmethod
    def propose(self, number: int) -> Proposal | None:
        """The proposal of ask number `number`, counted from 0."""

    def tell(self, trial: Trial) -> None:  # noqa: B027  (one-shot strategies learn nothing)
        """Learn from an evaluated proposal, projected as it was scored; in any order, failures included."""

    def note(self, proposal: Proposal) -> tuple[float, ...]:
        """Numbers to keep with a proposal's trial, where tell() needs more than the proposal itself."""
        return ()

    def restore(self, trials: list[Trial], asked: int) -> None:
        """Take up a study: trials already told, in the order they were told, and how often was asked."""
        for trial in trials:
            self.tell(trial)
        self.asked = asked
