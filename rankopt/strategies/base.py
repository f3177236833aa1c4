"""The interface of search strategies. A strategy sees numbers, never modules."""

from __future__ import annotations

import inspect
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rankopt.candidates.effort import THOROUGH
from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Trial


@dataclass(frozen=True)
class ConfiguredStrategy:
    """A strategy with its options, without a problem yet: what `Mine(depth=3)` gives. Every search makes its own.

    Attributes:
        strategy: The class.
        options: Its options, as values.
    """

    strategy: type[Strategy]
    options: Mapping[str, Any]


class _StrategyMeta(ABCMeta):
    """Lets strategies be configured before their problem is known, which a search makes from model and budget."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if args or "problem" in options:
            return super().__call__(*args, **options)
        return ConfiguredStrategy(cls, options)  # type: ignore[arg-type]  # the metaclass of strategies alone

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of `__init__`, which help() and editors show; without it they would show that of `__call__`."""
        found = inspect.signature(cls.__init__)  # type: ignore[misc]
        return found.replace(parameters=list(found.parameters.values())[1:])


class Strategy(metaclass=_StrategyMeta):
    """Base class of search strategies.

    A strategy proposes plans as positions on the layers' frontiers. The search projects each proposal onto the budget,
    evaluates it and passes the trial back. A subclass implements `propose`, and `tell` if it learns from results.

    What `ask` returns must depend only on the problem, the seed, the options, the number of earlier asks and the
    trials passed to `tell`. Then a study that was stopped can be continued by telling the stored trials again.

    A strategy's own options are the keyword-only parameters of its `__init__`. Each has a default. Where that is a
    number, a string or a bool, options given as text are converted to its type; where it is None, any object is taken.

    `Mine(problem, seed, depth=3)` is a strategy at work. `Mine(depth=3)`, without a problem, is one with its options,
    for `rankopt.compress(strategy=...)`: each search makes its own from it.

    Attributes:
        name: Name in the registry, class attribute.
        one_shot: Whether the strategy proposes a single plan; class attribute.
        needs_model: Whether `measure` must be called before the first ask; class attribute.
        prunes: Whether `promote` decides; a search without fidelities then makes no sense.
        effort: The effort of search spaces that say none; class attribute. "thorough" fits whatever the strategy may
            propose; "normal" fits little beside plans that are nearly the exact allocation.
        trains: Whether it delivers a trained network, as `rankopt.strategies.trained.TrainingStrategy` does; class
            attribute.
        problem: The candidates of every layer, and the limits.
        seed: The same seed gives the same proposals.
        n_asked: Number of proposals made.
        notes: Layer name -> remark about the layer, for result.json.
        network: The trained network whose plan is the only proposal; None of strategies that do not train.
    """

    name: ClassVar[str]
    one_shot: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    prunes: bool = False
    effort: ClassVar[str] = THOROUGH
    trains: ClassVar[bool] = False

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem, self.seed = problem, seed
        self.n_asked = 0
        self.notes: dict[str, str] = {}
        self.network: Any = None

    def measure(self, prepared: Any, progress: Any) -> None:
        """Use the model and its data before the first ask, for strategies that train or calibrate.

        The outcome may depend only on these, the options and the seed, so that a resumed study arrives at the same.

        Args:
            prepared: The task with its candidates, a `rankopt.candidates.prepare.Prepared`.
            progress: Shows long work: `progress(items, what, total)` yields the items.
        """

    def ask(self) -> Proposal | None:
        """Make the next proposal.

        Returns:
            One frontier index per layer, or None if there is nothing to propose (any more, or until the next result).

        Raises:
            RankoptError: The strategy proposed something else.
        """
        proposal = self.propose(self.n_asked)
        self.n_asked += proposal is not None
        sizes = [len(f) for f in self.problem.frontiers]
        if proposal is None or (
            len(proposal) == len(sizes) and all(0 <= i < n for i, n in zip(proposal, sizes, strict=True))
        ):
            return proposal
        name = getattr(self, "name", type(self).__name__)
        raise RankoptError(
            f"the strategy {name!r} proposed {proposal!r}: a proposal has an index for each of the "
            f"{len(sizes)} layers, from 0 to below the length of its frontier"
        )

    @abstractmethod
    def propose(self, number: int) -> Proposal | None:
        """Make one proposal; it need not keep the budget.

        Args:
            number: Number of the ask, from 0.

        Returns:
            One frontier index per layer, or None for nothing.
        """

    def tell(self, trial: Trial) -> None:
        """Learn from an evaluated plan.

        Args:
            trial: The trial. Its proposal is the one that was evaluated, within the budget. Trials come in any order,
                and failed and stopped ones are included.
        """

    def promote(self, proposal: Proposal, rungs: Sequence[float]) -> bool | None:
        """Decide whether a trial goes on to the next fidelity.

        Args:
            proposal: The plan.
            rungs: Its objective at each fidelity so far; the last one is new.

        Returns:
            None leaves it to the search, which takes the best third of trials (ASHA).
        """
        return None

    def note(self, proposal: Proposal) -> tuple[float, ...]:
        """Numbers to store with a trial, if `tell` needs more than the proposal itself.

        Args:
            proposal: The plan that was evaluated.

        Returns:
            The numbers; they come back as `trial.note` when a study is resumed.
        """
        return ()

    def restore(self, trials: list[Trial], n_asked: int) -> None:
        """Continue a study.

        Args:
            trials: Its trials, in the order in which they were told.
            n_asked: Number of proposals to count as made. Those that were running when the study stopped are made
                again.
        """
        for trial in trials:
            self.tell(trial)
        self.n_asked = n_asked

    def expect(self, running: Mapping[Proposal, tuple[float, ...]]) -> None:
        """Know of proposals that are still being evaluated, after `restore`.

        Args:
            running: The proposals in the order in which they were made, each with its `note`.
        """
