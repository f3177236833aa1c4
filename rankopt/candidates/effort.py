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
    """An effort that fits all candidates with few steps, and to the end only what a budget asks for.

    Attributes:
        stride: Of how many neighbouring ranks one is fitted before a budget is known.
        rungs: Optimisation steps, rising, after each of which the candidates that others have beaten are given up.
        steps: Share of the search space's steps that fits to the end take.
        width: Candidates are fitted that are best for losses of one layer up to e^width times larger or smaller.
        slack: And those that are worse than the best by this share of an average layer's loss.
        rounds: How often to allocate and fit, at most.
    """

    stride: int
    rungs: tuple[int, ...]
    steps: float
    width: float
    slack: float
    rounds: int


EFFORTS = {
    "quick": Effort(stride=3, rungs=(5, 20), steps=0.2, width=0.0, slack=0.0, rounds=2),
    NORMAL: Effort(stride=3, rungs=(5, 40), steps=1.0, width=0.15, slack=0.02, rounds=6),
}
"""The efforts below THOROUGH."""
