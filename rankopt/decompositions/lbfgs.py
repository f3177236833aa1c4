"""L-BFGS (Liu and Nocedal 1989) on a batch of problems: a tensor program on one device.

Every problem has its own step size and its own end. Each round evaluates all of them once: a problem whose trial point
is not good enough tries a shorter step in the next round, while the others go on. Directions come from the compact
representation of the inverse Hessian (Byrd, Nocedal and Schnabel 1994, equation 3.1), which takes a few products with
the history instead of a loop over it.

They start from a multiple of the gradient, or of the preconditioned gradient: multiplied by the inverse of a curvature
that is cheap to compute. It is computed again from time to time, as points move; the history stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HISTORY = 30
"""Pairs of steps and gradient differences that approximate the inverse Hessian; half as many with a preconditioner."""

HISTORY_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
"""Bound on the elements of each buffer of pairs, by device: of very large problems fewer are kept."""

WINDOW = 10
"""Rounds between two looks at which problems are done; each waits for the device."""

SUFFICIENT = 1e-4
"""Share of the decrease that the slope promises which a step has to reach (Armijo)."""

LEAST_CURVATURE = 1e-6
"""Pairs whose slope changed by less than this share are not used."""

SHORTEST = 1e-6
"""A line search ends here: what is left is rounding."""

EARLY, LATE = 5, 20
"""Rounds between two preconditioners, first and later: points move far at the beginning."""

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps points (g, p, N) and the indices (p,) of their columns to losses (g, p) and gradients (g, p, N)."""

Precondition = Callable[[Tensor], Tensor]
"""Multiplies vectors (g, p, h, N) by a symmetric positive definite matrix of each problem."""


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
        evaluate: Losses and gradients.
        preconditioner: Maps points (g, p, N) and the indices (p,) of their columns to a preconditioner; None: there is
            none.
    """

    evaluate: Evaluate
    preconditioner: Callable[[Tensor, Tensor], Precondition] | None = None


class Minimum(NamedTuple):
    """What a search found.

    Attributes:
        points: Tensor (g, p, N).
        losses: Tensor (g, p).
        start: The losses of the initial points (g, p).
        rounds: How many rounds each column took, (p,).
        ended: Whether all problems of a column were done before its rounds were out, (p,).
    """

    points: Tensor
    losses: Tensor
    start: Tensor
    rounds: Tensor
    ended: Tensor


def minimize(objective: Objective, start: Tensor, steps: Tensor, tolerance: float, floor: float) -> Minimum:
    """Minimise a batch of problems.

    Columns whose problems are all done leave the batch.

    Args:
        objective: Losses, gradients and preconditioners.
        start: Initial points (g, p, N).
        steps: The most rounds of each column, integers (p,) on the CPU.
        tolerance: A problem is done where its loss fell by less than this share of it in WINDOW rounds.
        floor: A problem is done where its loss is below.

    Returns:
        The points found; no loss is above that of the start.
    """
    columns = torch.arange(start.shape[1])
    points, rounds = start.clone(), torch.zeros_like(columns)
    evaluate, preconditioner = objective
    losses, gradient = evaluate(start, columns)
    apply = preconditioner and preconditioner(start, columns)
    state = _State(start, losses, gradient, int(steps.max()), apply)
    losses, first, before = state.loss.clone(), state.loss, state.loss
    done = state.loss <= floor
    stops, renewal = {*range(0, int(steps.max()) + 1, WINDOW), *steps.tolist()}, EARLY
    for taken in range(int(steps.max()) + 1):
        if taken in stops:
            if taken % WINDOW == 0 and taken:
                done |= (before - state.loss <= tolerance * state.loss) | (state.loss <= floor) | state.stuck
                before = state.loss
            left = ((steps[columns] > taken) & ~done.all(0).cpu()).nonzero()[:, 0]
            if len(left) < len(columns):
                points[:, columns], losses[:, columns], rounds[columns] = state.point, state.loss, taken
                columns, index = columns[left], left.to(start.device)
                done, before = done[:, index], before[:, index]
                state.keep(index)
                renewal = taken
            if not len(columns):
                break
        if preconditioner and taken >= renewal:
            state.precondition(preconditioner(state.point, columns))
            renewal = taken + min(max(taken, EARLY), LATE)
        state.advance(*evaluate(state.trial, columns))
    return Minimum(points, losses, first, rounds, rounds < steps)


class _State:
    """Points, their histories and the trial points of all problems that are left.

    Pairs are kept from the oldest to the newest in a window that moves along a longer buffer.
    """

    def __init__(
        self, point: Tensor, loss: Tensor, gradient: Tensor, rounds: int, apply: Precondition | None = None
    ) -> None:
        self.point, self.loss, self.gradient, self.apply = point, loss, gradient, apply
        affordable = HISTORY_ELEMENTS.get(point.device.type, 2**25) // max(1, point.numel()) - WINDOW
        self.history = min(HISTORY // 2 if apply else HISTORY, rounds, max(affordable, 5))
        self.slack, self.first = max(1, min(WINDOW, rounds - self.history)), 0
        shape, size = point.shape[:2], self.history + self.slack
        self.steps, self.differences = (point.new_zeros(*shape, size, point.shape[-1]) for _ in range(2))
        self.turned = torch.zeros_like(self.differences) if apply else self.differences  # P Y
        # Sᵀ Y, of which the upper triangle is used, and Yᵀ P Y; a pair of zeros has no effect with a diagonal of one
        self.across = torch.eye(size, dtype=torch.float64, device=point.device).repeat(*shape, 1, 1)
        self.within = torch.zeros_like(self.across)
        self.curvature = torch.zeros(*shape, size, 1, dtype=torch.float64, device=point.device)
        self.scale = point.new_ones(shape)
        self.direction = -self._turn(gradient)
        self.size = 1 / self.direction.norm(dim=-1).clamp_min(1e-30)
        self.slope = (self.direction * gradient).sum(-1)
        self.stuck = self.slope == 0
        self.trial = point + self.size.unsqueeze(-1) * self.direction

    def keep(self, index: Tensor) -> None:
        """Leave only some columns; those of the preconditioner stay."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[:, index])
        if not self.apply:
            self.turned = self.differences

    def precondition(self, apply: Precondition) -> None:
        """Go on with another preconditioner."""
        self.apply, window = apply, slice(self.first, self.first + self.history)
        differences = self.differences[:, :, window]
        self.turned[:, :, window] = turned = apply(differences)
        self.within[:, :, window, window] = (differences @ turned.mT).double()
        last = self.first + self.history - 1
        curvature, square = (m[:, :, last, i] for m, i in ((self.curvature, 0), (self.within, last)))
        self.scale = torch.where(square > 0, curvature / square, self.scale.double()).to(self.scale.dtype)

    def _turn(self, vectors: Tensor) -> Tensor:
        """Preconditioned vectors (g, p, N)."""
        return self.apply(vectors.unsqueeze(2))[:, :, 0] if self.apply else vectors

    def advance(self, loss: Tensor, gradient: Tensor) -> None:
        """Take the trial points that are good enough, and choose the next ones."""
        promised = self.size * self.slope
        better = (loss <= self.loss + SUFFICIENT * promised) & gradient.isfinite().all(-1)
        taken = better.unsqueeze(-1)
        # The minimum of the parabola through what is known, safeguarded
        shorter = (-promised / (2 * (loss - self.loss - promised))).nan_to_num(0.1).clamp(0.1, 0.5).to(promised.dtype)
        self._remember(better, promised, gradient)
        self.point, self.loss = torch.where(taken, self.trial, self.point), torch.where(better, loss, self.loss)
        self.gradient = torch.where(taken, gradient, self.gradient)
        self.direction = torch.where(taken, self._direction(), self.direction)
        self.slope = (self.direction * self.gradient).sum(-1)
        self.size = torch.where(better, 1.0, self.size * shorter)
        self.stuck = (self.size < SHORTEST) | (self.slope >= 0)  # by rounding
        self.trial = self.point + self.size.unsqueeze(-1) * self.direction

    def _remember(self, better: Tensor, promised: Tensor, gradient: Tensor) -> None:
        """Append a pair to the window; one without positive curvature as zeros, which have no effect."""
        h = self.history
        if self.first == self.slack:
            self._rewind()
        new, window = self.first + h, slice(self.first + 1, self.first + 1 + h)
        step, difference = self.trial - self.point, gradient - self.gradient
        turned = self._turn(difference)
        curvature, square = (step * difference).sum(-1), (turned * difference).sum(-1)
        useful = better & (curvature > -LEAST_CURVATURE * promised)
        step, difference, turned = (torch.where(useful.unsqueeze(-1), v, 0) for v in (step, difference, turned))
        self.scale = torch.where(useful, curvature / square, self.scale)
        self.steps[:, :, new], self.differences[:, :, new], self.turned[:, :, new] = step, difference, turned
        row = difference.unsqueeze(-2)  # as a column it would take ten times as long on a CPU
        self.across[:, :, window, new] = (row @ self.steps[:, :, window].mT)[..., 0, :].double()
        inner = (row @ self.turned[:, :, window].mT)[..., 0, :].double()
        self.within[:, :, window, new] = self.within[:, :, new, window] = inner
        self.curvature[:, :, new, 0] = self.across[:, :, new, new]
        self.across[:, :, new, new] += (~useful).double()
        self.first += 1

    def _rewind(self) -> None:
        """Move the window to the beginning of the buffers."""
        h, moved = self.history, slice(self.slack, None)
        turned = (self.turned,) if self.apply else ()
        for buffer in (self.steps, self.differences, self.curvature, *turned):
            buffer[:, :, :h] = buffer[:, :, moved].clone()
        for buffer in (self.across, self.within):
            buffer[:, :, :h, :h] = buffer[:, :, moved, moved].clone()
        self.first = 0

    def _direction(self) -> Tensor:
        """−H g, where H is the compact representation of the inverse Hessian that starts from a multiple of P."""
        window = slice(self.first, self.first + self.history)
        steps, differences = self.steps[:, :, window], self.turned[:, :, window]
        triangle, within = (m[:, :, window, window] for m in (self.across, self.within))
        scale = self.scale[..., None, None]
        gradient = self.gradient.unsqueeze(-2)
        inner = torch.linalg.solve_triangular(triangle, (gradient @ steps.mT).double().mT, upper=True)
        turned = (gradient @ differences.mT).double()
        rest = self.curvature[:, :, window] * inner + scale * (inner.mT @ within - turned).mT
        outer = torch.linalg.solve_triangular(triangle.mT, rest, upper=False)
        inner, outer = inner.mT.to(gradient.dtype), outer.mT.to(gradient.dtype)
        gradient = self._turn(self.gradient).unsqueeze(-2)
        return -(scale * (gradient - inner @ differences) + outer @ steps)[..., 0, :]
