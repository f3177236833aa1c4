"""How much of a search space is fitted: all of it, or only what can become part of a plan."""

from __future__ import annotations

from dataclasses import dataclass

NORMAL, THOROUGH = "normal", "thorough"


USUAL = THOROUGH
"""The default; NORMAL once its plans are shown to be as good at every budget of studies/no_training.py."""


SMALL = 10.0
"""Rough seconds of fitting, below which everything is fitted at any effort."""


@dataclass(frozen=True)
class Effort:
    """An effort that fits candidates as a budget asks for them.

    Attributes:
        points: Ranks of a family that are fitted for any budget; more for families of several bonds.
        steps: Share of the search space's steps that fits take.
        width: Candidates are fitted that are best for losses of one layer up to e^width times larger or smaller.
        slack: And those that are worse than the best by this share of an average layer's loss.
        rounds: How often to allocate and fit, at most.
    """

    points: int
    steps: float
    width: float
    slack: float
    rounds: int


EFFORTS = {
    "quick": Effort(points=4, steps=0.2, width=0.3, slack=0.02, rounds=2),
    NORMAL: Effort(points=5, steps=1.0, width=0.6, slack=0.1, rounds=6),
}
"""The efforts below THOROUGH."""
