"""How much of a search space is fitted: all of it, or only what can become part of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NORMAL, THOROUGH = "normal", "thorough"


SMALL = 10.0
"""Rough seconds of fitting, below which everything is fitted at any effort."""


class Rung(NamedTuple):
    """One of the rounds of fits before a budget is known.

    Attributes:
        steps: Optimisation steps.
        stride: Of how many neighbouring ranks one is fitted.
        pieces: The least pieces that a path of ranks is cut into, if it has more ranks.
    """

    steps: int
    stride: int
    pieces: int


@dataclass(frozen=True)
class Effort:
    """An effort that fits all candidates with few steps, and to the end only what a budget asks for.

    Attributes:
        rungs: What is fitted before a budget is known, from few steps and ranks to more. After each rung the
            candidates that others have beaten are given up.
        dear: The same for families and layers whose fits take long; there are as many as in `rungs`.
        share: How large a share of the search space's steps a fit to the end takes.
        width: Candidates are fitted that are best for losses of one layer up to e^width times larger or smaller.
        slack: And those that are worse than the best by this share of an average layer's loss.
        rounds: How often to allocate and fit, at most.
        passes: The most forward passes of all examples that sensitivities take.
    """

    rungs: tuple[Rung, ...]
    dear: tuple[Rung, ...]
    share: float
    width: float
    slack: float
    rounds: int
    passes: int


_DEAR = (Rung(5, 8, 2), Rung(12, 8, 2))


EFFORTS = {
    "quick": Effort(
        rungs=(Rung(5, 8, 2), Rung(20, 3, 4)), dear=_DEAR, share=0.2, width=0.0, slack=0.0, rounds=2, passes=15
    ),
    NORMAL: Effort(
        rungs=(Rung(5, 8, 2), Rung(25, 3, 4)), dear=_DEAR, share=1.0, width=0.2, slack=0.05, rounds=6, passes=20
    ),
}
"""The efforts below THOROUGH."""
