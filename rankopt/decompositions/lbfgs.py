"""L-BFGS (Liu and Nocedal 1989) on a batch of problems: a tensor program on one device.

Every problem has its own step size and its own end: what is found for it does not depend on the others of its batch.
Each round evaluates all of them once: a problem whose trial point is not good enough tries a shorter step in the next
round, while the others go on. Directions come from the compact
representation of the inverse Hessian (Byrd, Nocedal and Schnabel 1994, equation 3.1), which takes a few products with
the history instead of a loop over it.

They start from a multiple of the gradient, or of the preconditioned gradient: multiplied by the inverse of a curvature
that is cheap to compute. It is computed again from time to time, as points move; the history stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HISTORY = 30
"""Pairs of steps and gradient differences that approximate the inverse Hessian; half as many with a preconditioner."""

HISTORY_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
"""Bound on a group's elements in each buffer of pairs, by device: of very large problems fewer are kept."""

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


class Preconditioner(Protocol):
    """A symmetric positive definite matrix of each problem (g, p)."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Its products with vectors (g, p, h, N)."""

    def keep(self, index: Tensor) -> Preconditioner:
        """Only those of some columns."""


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
        evaluate: Losses and gradients.
        preconditioner: Maps points (g, p, N) and the indices (p,) of their columns to a preconditioner; None: there is
            none.
    """

    evaluate: Evaluate
    preconditioner: Callable[[Tensor, Tensor], Preconditioner] | None = None


class Minimum(NamedTuple):
    """What a search found.

    Attributes:
        points: Tensor (g, p, N).
        losses: Tensor (g, p).
        start: The losses of the initial points (g, p).
        rounds: How many rounds each took, (g, p), on the CPU.
        ended: Whether each was done before its rounds were out, (g, p), on the CPU.
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
        steps: The most rounds of each problem, integers (g, p) on the CPU.
        tolerance: A problem is done where its loss fell by less than this share of it in WINDOW rounds.
        floor: A problem is done where its loss is below.

    Returns:
        The points found; no loss is above that of the start.
    """
    columns, most = torch.arange(start.shape[1]), int(steps.max())
    evaluate, preconditioner = objective
    losses, gradient = evaluate(start, columns)
    state = _State(start, losses, gradient, most, preconditioner and preconditioner(start, columns))
    found = _Found(start, losses, steps)
    before, done = state.loss, state.loss <= floor
    stops, renewal = {*range(0, most + 1, WINDOW), *steps.unique().tolist()}, EARLY
    for taken in range(most + 1):
        if taken in stops:
            if taken % WINDOW == 0 and taken:
                done = done | (before - state.loss <= tolerance * state.loss) | (state.loss <= floor) | state.stuck
                before = state.loss
            left = found.note(columns, state, taken, done)
            if len(left) < len(columns):
                columns, index = columns[left], left.to(start.device)
                done, before = done[:, index], before[:, index]
                state.keep(index)
            if not len(columns):
                break
        if preconditioner and taken >= renewal:
            state.precondition(preconditioner(state.point, columns))
            renewal = taken + min(max(taken, EARLY), LATE)
        state.advance(*evaluate(state.trial, columns))
    return Minimum(found.points, found.losses, losses, found.rounds, found.ended)


class _Found:
    """Where each problem of a batch was when it was done or its rounds were out.

    Args:
        start: Initial points (g, p, N).
        losses: Their losses (g, p).
        steps: The most rounds of each problem (g, p), on the CPU.
    """

    def __init__(self, start: Tensor, losses: Tensor, steps: Tensor) -> None:
        self.points, self.losses, self.steps = start.clone(), losses.clone(), steps
        self.rounds = torch.zeros_like(steps)
        self.over, self.ended = (torch.zeros_like(steps, dtype=torch.bool) for _ in range(2))

    def note(self, columns: Tensor, state: _State, taken: int, done: Tensor) -> Tensor:
        """Note the points of the problems that are not over yet; of those that are done now, for the last time.

        Args:
            columns: The columns that are left.
            state: Their points.
            taken: How many rounds they have taken.
            done: Whether each of their problems is done.

        Returns:
            Which of these columns hold a problem that is not over.
        """
        going_on, ended = ~self.over[:, columns], done.cpu()
        moved = going_on.to(done.device)
        self.points[:, columns] = torch.where(moved.unsqueeze(-1), state.point, self.points[:, columns])
        self.losses[:, columns] = torch.where(moved, state.loss, self.losses[:, columns])
        self.rounds[:, columns] = torch.where(going_on, taken, self.rounds[:, columns])
        self.ended[:, columns] |= going_on & ended
        self.over[:, columns] |= ended | (self.steps[:, columns] <= taken)
        return (~self.over[:, columns]).any(0).nonzero()[:, 0]


class _State:
    """Points, their histories and the trial points of all problems that are left.

    Pairs are kept from the oldest to the newest in a window that moves along a longer buffer.
    """

    def __init__(
        self, point: Tensor, loss: Tensor, gradient: Tensor, rounds: int, apply: Preconditioner | None = None
    ) -> None:
        self.point, self.loss, self.gradient, self.apply = point, loss, gradient, apply
        affordable = HISTORY_ELEMENTS.get(point.device.type, 2**25) // max(1, point[0].numel()) - WINDOW
        self.history = min(HISTORY // 2 if apply else HISTORY, rounds, max(affordable, 5))
        self.slack, self.first = max(1, min(WINDOW, rounds - self.history)), 0
        shape, size = point.shape[:2], self.history + self.slack
        self.steps, self.turns = (point.new_zeros(*shape, size, point.shape[-1]) for _ in range(2))  # S and P Y
        self.differences = torch.zeros_like(self.turns) if apply else self.turns  # Y
        # Sᵀ Y, of which the upper triangle is used, and Yᵀ P Y; a pair of zeros has no effect with a diagonal of one
        self.products = point.new_zeros(*shape, 2, size, size, dtype=torch.float64)
        self.products[:, :, 0].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        self.curvature = torch.zeros(*shape, size, 1, dtype=torch.float64, device=point.device)
        self.scale = point.new_ones(shape)
        self.turned = self._turn(gradient)  # P g
        self.direction = -self.turned
        self.size = 1 / self.direction.norm(dim=-1).clamp_min(1e-30)
        self.slope = (self.direction * gradient).sum(-1)
        self.stuck = self.slope == 0
        self.trial = point + self.size.unsqueeze(-1) * self.direction

    def keep(self, index: Tensor) -> None:
        """Leave only some columns."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[:, index])
        if self.apply:
            self.apply = self.apply.keep(index)
        else:
            self.differences = self.turns

    def precondition(self, apply: Preconditioner) -> None:
        """Go on with another preconditioner."""
        self.apply, window = apply, slice(self.first, self.first + self.history)
        differences = self.differences[:, :, window]
        self.turned = self._turn(self.gradient)
        self.turns[:, :, window] = turned = apply(differences)
        self.products[:, :, 1, window, window] = (differences @ turned.mT).double()
        last = self.first + self.history - 1
        curvature, square = self.curvature[:, :, last, 0], self.products[:, :, 1, last, last]
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
        turned = self._turn(gradient)
        self._remember(better, promised, gradient, turned)
        self.point, self.loss = torch.where(taken, self.trial, self.point), torch.where(better, loss, self.loss)
        self.gradient = torch.where(taken, gradient, self.gradient)
        self.turned = torch.where(taken, turned, self.turned)
        self.direction = torch.where(taken, self._direction(), self.direction)
        self.slope = (self.direction * self.gradient).sum(-1)
        self.size = torch.where(better, 1.0, self.size * shorter)
        self.stuck = (self.size < SHORTEST) | (self.slope >= 0)  # by rounding
        self.trial = self.point + self.size.unsqueeze(-1) * self.direction

    def _remember(self, better: Tensor, promised: Tensor, gradient: Tensor, turned: Tensor) -> None:
        """Append a pair to the window; one without positive curvature as zeros, which have no effect."""
        h = self.history
        if self.first == self.slack:
            self._rewind()
        new, window = self.first + h, slice(self.first + 1, self.first + 1 + h)
        step, difference, turn = self.trial - self.point, gradient - self.gradient, turned - self.turned
        curvature, square = (step * difference).sum(-1), (turn * difference).sum(-1)
        useful = better & (curvature > -LEAST_CURVATURE * promised)
        self.scale = torch.where(useful, curvature / square, self.scale)
        step, difference, turn = (v.where(useful.unsqueeze(-1), 0.0) for v in (step, difference, turn))
        self.steps[:, :, new], self.turns[:, :, new] = step, turn
        if self.apply:
            self.differences[:, :, new] = difference
        row = difference.unsqueeze(2)  # as a column it would take ten times as long on a CPU
        products = torch.cat([row @ pairs[:, :, window].mT for pairs in (self.steps, self.turns)], 2).double()
        self.products[:, :, :, window, new] = products
        self.products[:, :, 1, new, window] = products[:, :, 1]
        last = self.products[:, :, 0, new, new]
        self.curvature[:, :, new, 0] = last
        last += ~useful
        self.first += 1

    def _rewind(self) -> None:
        """Move the window to the beginning of the buffers."""
        h, moved = self.history, slice(self.slack, None)
        own = (self.differences,) if self.apply else ()
        for buffer in (self.steps, self.turns, self.curvature, *own):
            buffer[:, :, :h] = buffer[:, :, moved].clone()
        self.products[:, :, :, :h, :h] = self.products[:, :, :, moved, moved].clone()
        self.first = 0

    def _direction(self) -> Tensor:
        """−H g, where H is the compact representation of the inverse Hessian that starts from a multiple of P."""
        window = slice(self.first, self.first + self.history)
        steps, turns, gradient = self.steps[:, :, window], self.turns[:, :, window], self.gradient.unsqueeze(2)
        triangle, within = self.products[:, :, :, window, window].unbind(2)
        scale = self.scale[..., None, None]
        inner = torch.linalg.solve_triangular(triangle, (gradient @ steps.mT).double().mT, upper=True)
        across = inner.mT @ within - (gradient @ turns.mT).double()
        rest = self.curvature[:, :, window] * inner + scale * across.mT
        outer = torch.linalg.solve_triangular(triangle.mT, rest, upper=False)
        inner, outer = inner.mT.to(gradient.dtype), outer.mT.to(gradient.dtype)
        return -(scale * (self.turned.unsqueeze(2) - inner @ turns) + outer @ steps)[..., 0, :]
