"""Fidelities: cheaper measurements of the objective that stop bad trials early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from rankopt.core.errors import RankoptError
from rankopt.core.records import Trial
from rankopt.core.result_record import FidelityRow
from rankopt.core.statistics import correlation


@dataclass(frozen=True)
class FidelitySchedule:
    """The fidelities that a trial is evaluated at, cheapest first.

    The last fidelity alone gives the trial's objective; the values at the lower ones are its rungs. Training uses the
    task's `train` and `loss` if the task has an objective of its own, otherwise distillation from the dense model on
    the calibration batches, which the default objective is measured on.

    Attributes:
        shares: Rising shares of the objective's examples; the last is 1.
        steps: Training steps after which the objective is measured once more, as the last fidelity; 0 for no training.
    """

    shares: tuple[float, ...] = (1.0,)
    steps: int = 0

    @classmethod
    def parse(cls, text: str) -> FidelitySchedule:
        """Read a schedule from text.

        Args:
            text: "0.1,0.5" measures on these shares of the examples, then on all; "0.1,train=9" on a tenth, on all,
                and on all after 9 steps of training.

        Raises:
            RankoptError: If the text is not understood, or names a single fidelity.
        """
        words = [word.strip() for word in text.split(",") if word.strip()]
        try:
            steps = int(words.pop().removeprefix("train=")) if words and words[-1].startswith("train=") else 0
            shares = [float(word) for word in words]
        except ValueError:
            raise RankoptError(
                f"fidelities {text!r}: give shares of the examples as 0.1,0.5 or 0.1,train=100"
            ) from None
        shares += [1.0] if not shares or shares[-1] != 1 else []
        if not all(0 < a < b <= 1 for a, b in zip([1e-9, *shares], shares, strict=False)) or steps < 0:
            raise RankoptError(f"fidelities {text!r}: shares lie above 0 and below 1, and rise; steps are 1 or more")
        schedule = cls(tuple(shares), steps)
        if not schedule.names[1:]:
            raise RankoptError(f"fidelities {text!r}: there is only one; give shares as 0.1,0.5, or train=100")
        return schedule

    @property
    def names(self) -> list[str]:
        """Descriptions of all fidelities, the full one last."""
        slices = [f"{share:.3g} of the examples" for share in self.shares[:-1]]
        return [*slices, "all examples", *([f"{self.steps} steps of training"] if self.steps else [])]

    def __str__(self) -> str:
        return ",".join([*(f"{share:g}" for share in self.shares), *([f"train={self.steps}"] if self.steps else [])])


FULL_FIDELITY = FidelitySchedule()
"""The objective on all examples, without training."""


def fidelity_rows(schedule: FidelitySchedule, trials: Sequence[Trial]) -> list[FidelityRow]:
    """Summarise for result.json how each fidelity below the full one did.

    Args:
        schedule: The fidelities of the search.
        trials: Its trials.

    Returns:
        One row for each lower fidelity: its name, how many trials it measured, the numbers of those it stopped, and
        how well it predicted the full objective: `correlation`, and `agreement`, the share of pairs of finished trials
        that it put in the same order.
    """
    rows: list[FidelityRow] = []
    for level, name in enumerate(schedule.names[:-1]):
        values = [(t.rungs[level], t.objective) for t in trials if t.objective is not None and len(t.rungs) > level]
        pairs = [(a, b) for a, b in combinations(values, 2) if a[1] != b[1]]
        rows.append(
            {
                "name": name,
                "measured": sum(len(t.rungs) > level for t in trials),
                "stopped": [t.number for t in trials if t.state == "stopped" and len(t.rungs) == level + 1],
                "correlation": correlation(*map(list, zip(*values, strict=True))) if values else None,
                "agreement": sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs) / len(pairs) if pairs else None,
            }
        )
    return rows
