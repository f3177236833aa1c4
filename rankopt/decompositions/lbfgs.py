"""L-BFGS (Liu and Nocedal 1989) on a batch of problems: a tensor program on one device.

Every problem has its own step size and its own end. Each round evaluates all of them once: a problem whose trial point
is not good enough tries a shorter step in the next round, while the others go on, so that no evaluation is repeated for
the sake of another problem. Directions come from the compact representation of the inverse Hessian (Byrd, Nocedal and
Schnabel 1994, equation 3.1), which takes two products with the history instead of a loop over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HISTORY = 30
"""Pairs of steps and gradient differences that approximate the inverse Hessian."""

WINDOW = 10
"""Rounds between two looks at which problems are done; each waits for the device."""

SUFFICIENT = 1e-4
"""Share of the decrease that the slope promises which a step has to reach (Armijo)."""

SHORTEST = 1e-6
"""A line search ends here: what is left is rounding."""

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps points (g, p, N) and the indices (p,) of their columns to losses (g, p) and gradients (g, p, N)."""


class Minimum(NamedTuple):
    """What a search found.

    Attributes:
        points: Tensor (g, p, N).
        losses: Tensor (g, p).
        rounds: How many rounds each column took, (p,).
    """

    points: Tensor
    losses: Tensor
    rounds: Tensor


def minimize(evaluate: Evaluate, start: Tensor, steps: Tensor, tolerance: float, floor: float) -> Minimum:
    """Minimise a batch of problems.

    Columns whose problems are all done leave the batch.

    Args:
        evaluate: Losses and gradients.
        start: Initial points (g, p, N).
        steps: The most rounds of each column, integers (p,) on the CPU.
        tolerance: A problem is done where its loss fell by less than this share of it in WINDOW rounds.
        floor: A problem is done where its loss is below.

    Returns:
        The points found; no loss is above that of the start.
    """
    columns = torch.arange(start.shape[1])
    points, rounds = start.clone(), torch.zeros_like(columns)
    state = _State(start, *evaluate(start, columns), min(HISTORY, int(steps.max())))
    losses, before = state.loss.clone(), state.loss
    done = state.loss <= floor
    for taken in range(int(steps.max()) + 1):
        if taken % WINDOW == 0 or bool((steps[columns] == taken).any()):
            if taken % WINDOW == 0 and taken:
                done |= (before - state.loss <= tolerance * state.loss) | (state.loss <= floor) | state.stuck
                before = state.loss
            left = ((steps[columns] > taken) & ~done.all(0).cpu()).nonzero()[:, 0]
            if len(left) < len(columns):
                points[:, columns], losses[:, columns], rounds[columns] = state.point, state.loss, taken
                columns, index = columns[left], left.to(start.device)
                done, before = done[:, index], before[:, index]
                state.keep(index)
            if not len(columns):
                break
        state.advance(*evaluate(state.trial, columns))
    return Minimum(points, losses, rounds)


class _State:
    """Points, their histories and the trial points of all problems that are left."""

    def __init__(self, point: Tensor, loss: Tensor, gradient: Tensor, history: int) -> None:
        self.point, self.loss, self.gradient = point, loss, gradient
        shape = point.shape[:2]
        self.history, self.newest = history, -1
        self.pairs = point.new_zeros(*shape, 2 * history, point.shape[-1])  # steps, then differences of gradients
        self.steps_differences = torch.eye(history, dtype=torch.float64, device=point.device).repeat(*shape, 1, 1)
        self.differences = torch.zeros_like(self.steps_differences)
        self.curvature = torch.zeros(*shape, history, dtype=torch.float64, device=point.device)
        self.scale = point.new_ones(shape)
        self.direction = -gradient
        self.size = 1 / gradient.norm(dim=-1).clamp_min(1e-30)
        self.slope = -gradient.square().sum(-1)
        self.stuck = self.slope == 0

    @property
    def trial(self) -> Tensor:
        """Where to evaluate next."""
        return self.point + self.size.unsqueeze(-1) * self.direction

    def keep(self, index: Tensor) -> None:
        """Leave only some columns."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[:, index])

    def advance(self, loss: Tensor, gradient: Tensor) -> None:
        """Take the trial points that are good enough, and choose the next ones."""
        promised = self.size * self.slope
        better = (loss <= self.loss + SUFFICIENT * promised) & gradient.isfinite().all(-1)
        taken = better.unsqueeze(-1)
        step = torch.where(taken, self.size.unsqueeze(-1) * self.direction, 0)
        difference = torch.where(taken, gradient - self.gradient, 0)
        # The minimum of the parabola through what is known, safeguarded
        shorter = (-promised / (2 * (loss - self.loss - promised))).nan_to_num(0.1).clamp(0.1, 0.5).to(step.dtype)
        self.point, self.loss = self.point + step, torch.where(better, loss, self.loss)
        self.gradient = torch.where(taken, gradient, self.gradient)
        self._remember(step, difference)
        direction = self._direction()
        slope = (direction * self.gradient).sum(-1)
        uphill = (slope >= 0).unsqueeze(-1)  # only by rounding
        direction = torch.where(uphill, -self.scale.unsqueeze(-1) * self.gradient, direction)
        slope = torch.where(uphill[..., 0], -self.scale * self.gradient.square().sum(-1), slope)
        self.direction = torch.where(taken, direction, self.direction)
        self.slope = torch.where(better, slope, self.slope)
        self.size = torch.where(better, 1.0, self.size * shorter)
        self.stuck = (self.size < SHORTEST) | (self.slope == 0)

    def _remember(self, step: Tensor, difference: Tensor) -> None:
        """Replace the oldest pair; one without positive curvature is stored as zeros, which have no effect."""
        curvature, square = (step * difference).sum(-1), difference.square().sum(-1)
        useful = curvature > 1e-7 * square.sqrt() * step.norm(dim=-1)
        self.scale = torch.where(useful, curvature / square, self.scale)
        step, difference = (torch.where(useful.unsqueeze(-1), v, 0) for v in (step, difference))
        h, slot = self.history, (self.newest + 1) % self.history
        self.pairs[:, :, slot], self.pairs[:, :, h + slot], self.newest = step, difference, slot
        products = (self.pairs @ difference.unsqueeze(-1)).squeeze(-1).double()
        self.steps_differences[:, :, slot] = 0
        self.steps_differences[:, :, :, slot] = products[..., :h]
        self.differences[:, :, slot] = self.differences[:, :, :, slot] = products[..., h:]
        self.curvature[:, :, slot] = products[..., slot]
        self.steps_differences[:, :, slot, slot] = torch.where(useful, products[..., slot], 1.0)

    def _direction(self) -> Tensor:
        """−H g, where H is the compact representation of the inverse Hessian."""
        h = self.history
        order = (torch.arange(h, device=self.point.device) + self.newest + 1) % h  # oldest first
        back = order.argsort()
        triangle = self.steps_differences[:, :, order][..., order]
        scale = self.scale.double().unsqueeze(-1)
        products = (self.pairs @ self.gradient.unsqueeze(-1)).squeeze(-1).double()
        along, turned = products[..., :h], products[..., h:]
        solved = torch.linalg.solve_triangular(triangle, along[..., order].unsqueeze(-1), upper=True)
        inner = solved.squeeze(-1)[..., back]
        rest = self.curvature * inner + scale * ((self.differences @ inner.unsqueeze(-1)).squeeze(-1) - turned)
        outer = torch.linalg.solve_triangular(triangle.mT, rest[..., order].unsqueeze(-1), upper=False)
        weights = torch.cat([outer.squeeze(-1)[..., back], -scale * inner], -1).to(self.point.dtype)
        return -(self.scale.unsqueeze(-1) * self.gradient + (weights.unsqueeze(-2) @ self.pairs).squeeze(-2))
