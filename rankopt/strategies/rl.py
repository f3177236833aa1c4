"""An agent that walks the layers, and learns by posterior sampling (PSRL: Osband, Russo, Van Roy 2013).

In this decision process costs and limits are known exactly; unknown is only how much each layer's predicted loss
really counts. The agent keeps a posterior of these weights given the trials told; for every walk it draws them once
and acts greedily under the draw: at each layer, among the positions that can still be completed, the least
w loss + λ cost, λ the Lagrange multiplier of the layers still to come under what remains of the budget.
That explores along whole plans, needs no step size and is far cheaper in trials than a policy gradient
(which was measured beside it); it is a function of the trials told, so that many asks may be open at once.
Its first walks are demonstrations: `knapsack`'s contenders, the exact allocation first.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Trial
from rankopt.strategies.allocation import fill
from rankopt.strategies.base import Strategy
from rankopt.strategies.corrections import CONTENDERS, Corrections
from rankopt.strategies.layer_walk import LayerMdp

TRIES = 10  # draws for a plan that was not told yet


BOLDNESS = 0.5  # of the posterior's standard deviations: with tens of trials, whole ones seldom come home


class Agent(Strategy):
    """spread: prior standard deviation of the log weights. noise: relative error expected of the model, before any
    residual is seen. temperature: of the policy when a draw gave a plan that was told already (0 before, doubling
    after), in units of the exact plan's mean loss per layer.
    """

    name = "rl"

    def __init__(
        self, problem: Problem, seed: int = 0, *, spread: float = 0.4, noise: float = 0.03, temperature: float = 0.03
    ) -> None:
        super().__init__(problem, seed)
        for option, value in (("spread", spread), ("noise", noise), ("temperature", temperature)):
            if not 0 < value < np.inf:
                raise RankoptError(f"strategy 'rl': option {option} is {value}: give a finite number above 0")
        self.spread, self.noise = spread, noise
        self.walk, self.demonstrations = LayerMdp(problem), Corrections(problem)
        self.warmer = temperature * max(problem.loss(self.walk.start), 1e-300) / max(len(problem.layers), 1)
        self.slopes = [_Slopes(self.walk, m) for m in range(len(self.walk.room))]
        self.seen: set[Proposal] = set()
        self.told: list[tuple[list[float], float]] = []  # predicted losses of the layers, objective
        self.posterior: tuple[np.ndarray, np.ndarray] | None = None

    def propose(self, number: int) -> Proposal | None:
        if number < CONTENDERS:
            return self.demonstrations.contender(self.seed, number)
        rng = np.random.default_rng([self.seed, number])
        if self.posterior is None:
            self.posterior = log_weights(self.told, len(self.problem.layers), self.spread, self.noise)
        mean, root = self.posterior
        for attempt in range(TRIES):
            weights = np.exp(mean + BOLDNESS * root @ rng.standard_normal(len(mean)))[:-1]
            plan = fill(self.problem, self._episode(weights, (2**attempt - 1) * self.warmer, rng))
            if plan not in self.seen:
                break
        return plan

    def tell(self, trial: Trial) -> None:
        self.seen.add(trial.proposal)
        if trial.objective is not None:
            losses = [max(c.loss, 0.0) for c in self.problem.candidates(trial.proposal)]
            self.told.append((losses, trial.objective))
            self.posterior = None

    def _episode(self, weights: np.ndarray, temperature: float, rng: np.random.Generator) -> Proposal:
        """One walk under the weights (layers,), softmax(−(w loss + λ cost) / temperature) over the allowed."""
        walk, plan = self.walk, []
        spent = np.zeros_like(walk.room)
        multipliers = [s.weighted(weights) for s in self.slopes]
        for layer, (losses, costs) in enumerate(zip(walk.losses, walk.costs, strict=True)):
            price = np.max([x(layer, r) for x, r in zip(multipliers, walk.room - spent, strict=True)] * costs, axis=1)
            value = weights[layer] * losses + price - temperature * rng.gumbel(size=len(losses))
            at = int(np.where(walk.mask(layer, spent), value, np.inf).argmin())
            spent = spent + costs[at]
            plan.append(at)
        return tuple(plan)


class _Slopes:
    """The lower convex hulls of all layers' (cost, loss) in one metric, as steps: owner, loss freed per cost, cost."""

    def __init__(self, walk: LayerMdp, metric: int) -> None:
        hulls = [_hull(c[:, metric], x) for c, x in zip(walk.costs, walk.losses, strict=True)]
        steps = [(i, (a - b) / (d - c), d - c) for i, h in enumerate(hulls) for (c, a), (d, b) in pairwise(h)]
        table = np.array(steps, float).reshape(-1, 3)
        self.owner, self.slope, self.cost = table[:, 0].astype(int), table[:, 1], table[:, 2]
        self.least = np.append(np.cumsum([c[:, metric].min() for c in walk.costs[::-1]])[::-1], 0)

    def weighted(self, weights: np.ndarray) -> _Multiplier:
        slope = self.slope * weights[self.owner]
        order = np.argsort(-slope, kind="stable")
        return _Multiplier(self.owner[order], slope[order], self.cost[order], self.least)


class _Multiplier:
    """λ of the layers from `layer` on under what remains: the slope of the first step that no longer fits."""

    def __init__(self, owner: np.ndarray, slope: np.ndarray, cost: np.ndarray, least: np.ndarray) -> None:
        self.owner, self.slope, self.cost, self.least = owner, slope, cost, least

    def __call__(self, layer: int, remaining: float) -> float:
        ahead = self.owner >= layer
        fitting = np.searchsorted(np.cumsum(self.cost[ahead]), remaining - self.least[layer], side="right")
        return float(self.slope[ahead][fitting]) if fitting < ahead.sum() else 0.0


def _hull(cost: np.ndarray, loss: np.ndarray) -> list[tuple[float, float]]:
    """Lower convex hull from the cheapest point down to the least loss (Andrew 1979's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for c, x in sorted(zip(cost.tolist(), loss.tolist(), strict=True)):
        if hull and x >= hull[-1][1]:
            continue  # dearer and no better
        while len(hull) > 1 and (hull[-1][1] - x) * (hull[-1][0] - hull[-2][0]) >= (hull[-2][1] - hull[-1][1]) * (
            c - hull[-1][0]
        ):
            hull.pop()
        hull.append((c, x))
    return hull


def log_weights(
    told: list[tuple[list[float], float]], layers: int, spread: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Laplace's approximation of the posterior of θ in log objective = log Σ exp(θ) loss + noise, θ ~ N(0, spread²).

    The last of θ (layers + 1,) is an offset's, a tenth of the mean predicted loss, wider by a factor of three.
    The noise's variance is estimated from the residuals (four residuals of the prior's `noise` beside them).
    Returns the mode (layers + 1,) and a root of the covariance (layers + 1, layers + 1).
    """
    prior = np.diag(np.append(np.full(layers, spread), 3 * spread) ** -2.0)
    theta, variance = np.zeros(layers + 1), noise**2
    if not told:
        return theta, np.linalg.cholesky(np.linalg.inv(prior))
    x = np.array([losses for losses, _ in told]).reshape(len(told), layers)
    x = np.column_stack([x, np.full(len(x), 0.1)]) / np.append(np.full(layers, x.sum(1).mean() or 1.0), 1.0)
    y = np.array([objective for _, objective in told])
    if y.min() <= 0:  # a logarithm wants positive ones
        y = y - y.min() + (y.std() or 1.0)
    y = np.log(y) - np.median(np.log(y / x.sum(1)))
    for _ in range(3):
        theta = _mode(theta, x, y, prior * variance)
        residual, slope = _linear(theta, x, y)
        precision = slope.T @ slope / variance + prior
        fitted = layers + 1 - np.trace(np.linalg.solve(precision, prior))  # degrees of freedom
        variance = ((residual**2).sum() + 4 * noise**2) / (max(len(y) - fitted, 0) + 4)
    return theta, np.linalg.cholesky(np.linalg.inv(slope.T @ slope / variance + prior))


def _mode(theta: np.ndarray, x: np.ndarray, y: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Damped Gauss-Newton on ½‖residual‖² + ½ θᵀ prior θ."""

    def energy(at: np.ndarray) -> float:
        return float((_linear(at, x, y)[0] ** 2).sum() + at @ prior @ at)

    for _ in range(15):
        residual, slope = _linear(theta, x, y)
        step = np.linalg.solve(slope.T @ slope + prior, slope.T @ residual - prior @ theta)
        while energy(theta + step) > energy(theta) and np.abs(step).max() > 1e-6:
            step = step / 2
        if np.abs(step).max() < 1e-3:
            break
        theta = theta + step
    return theta


def _linear(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residuals of the log objectives, and the model's derivative by θ."""
    parts = x * np.exp(theta)
    total = parts.sum(1)
    return y - np.log(total), parts / total[:, None]
