"""A race between plans: all are measured on some examples, and those that are clearly behind on no more.

Plans are compared on the same examples, so that most of the chance in these cancels: what counts is the standard error
of the difference. Successive rejection by confidence bounds: Maron and Moore 1994, "Hoeffding Races".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from rankopt.candidates.probing import Sample, examples_are_apart
from rankopt.core.progress import Progress
from rankopt.core.records import Proposal
from rankopt.model.memory import stored_bytes
from rankopt.model.objective import Divergence

FIRST = 128
"""Examples that all plans are measured on."""

CLEAR = 2.0
"""Standard errors by which a plan is behind that is given up."""

CLOSE = 0.02
"""The race ends where the standard errors of all differences are below this share of the best plan's objective."""

KEPT_BYTES = 2**28
"""Bytes of models that are kept from one measurement to the next: building one takes as long as running it on 50 images
of a ResNet-20."""


def race(
    divergence: Divergence,
    dense: nn.Module,
    build: Callable[[Proposal], nn.Module],
    plans: Sequence[Proposal],
    progress: Progress,
) -> dict[Proposal, float]:
    """Measure plans on twice as many examples each time, and give up those that are clearly behind the best.

    It ends with a single plan left, or where more examples would hardly tell the others apart.

    Args:
        divergence: The objective.
        dense: The dense model.
        build: Makes a plan's model; whatever it or its forward raises loses the plan.
        plans: The plans.
        progress: Progress callback.

    Returns:
        The objective of the plans that are left, as estimated from the examples that they were measured on; empty if
        none could be measured.
    """
    sample, units = Sample(divergence.expected()), divergence.units
    first = FIRST if examples_are_apart(divergence, dense) else units
    rises, models = {plan: torch.zeros(0, dtype=torch.float64) for plan in plans}, _Models(build)
    seen, n = 0, min(first, units)
    close = False
    while rises and seen < units and not close:
        ascending, place = sample.order[seen:n].sort()
        part = divergence.part(ascending).beside(dense)
        for plan in progress(list(rises), f"measuring contenders on {n - seen:,} examples", len(rises)):
            rise = _measured(part, models, plan)
            if rise is None:
                del rises[plan]
            else:
                rises[plan] = torch.cat([rises[plan], rise[place.argsort()]])
        rises, close = _near_the_best(sample, rises)
        models.keep(rises)
        seen, n = n, min(2 * n, units)
    return {plan: sample.mean(rise)[0] for plan, rise in rises.items()}


class _Models:
    """Builds the models of plans, and keeps as many as there is room for.

    Args:
        build: Makes a plan's model.
    """

    def __init__(self, build: Callable[[Proposal], nn.Module]) -> None:
        self.build, self.room = build, KEPT_BYTES
        self.kept: dict[Proposal, nn.Module] = {}

    def __call__(self, plan: Proposal) -> nn.Module:
        """The model of a plan."""
        if plan in self.kept:
            return self.kept[plan]
        model = self.build(plan)
        if (size := stored_bytes(model)) <= self.room:
            self.kept[plan], self.room = model, self.room - size
        return model

    def keep(self, plans: Collection[Proposal]) -> None:
        """Let go of the models of other plans."""
        for plan in self.kept.keys() - plans:
            self.room += stored_bytes(self.kept.pop(plan))


def _measured(part: Divergence, build: Callable[[Proposal], nn.Module], plan: Proposal) -> Tensor | None:
    """The rise of each unit; None if it cannot be measured."""
    try:
        rise = part.by_unit(build(plan))
    except Exception:  # noqa: BLE001  # a user's code: if no plan can be measured, the search's evaluation reports it
        return None
    return rise if rise.isfinite().all() else None


def _near_the_best(sample: Sample, rises: dict[Proposal, Tensor]) -> tuple[dict[Proposal, Tensor], bool]:
    """The plans that may still be the best, and whether their order is known well enough."""
    if not rises:
        return {}, True
    best = min(rises.values(), key=lambda rise: sample.mean(rise)[0])
    kept, close = {}, True
    for plan, rise in rises.items():
        behind, error = sample.mean(rise - best)
        if behind <= 0 or error * CLEAR >= 1 or len(rise) == len(sample.order):
            kept[plan] = rise
            close = close and behind * error <= CLOSE * sample.mean(best)[0]
    return kept, close
