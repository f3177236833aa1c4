"""Thompson sampling: an agent that walks the layers under losses drawn from a posterior.

PSRL (Osband, Russo, Van Roy 2013, "(More) Efficient Reinforcement Learning via Posterior Sampling"). In this decision
process costs and limits are known exactly; unknown is only how much each layer's predicted loss really counts. The
agent keeps a posterior of these weights given the trials so far. For every episode it draws weights w once and acts
greedily under them: at each layer it takes, among the positions that can still be completed within the budget, the one
with the least w·loss + λ·cost, where λ is the Lagrange multiplier of the remaining layers under the remaining budget.

This explores along whole plans, needs no step size, and took far fewer trials than a policy gradient in comparison. The
agent is a function of the trials, so that several proposals may be evaluated at once. Its first episodes are
demonstrations: the contenders of `knapsack`, the exact allocation first.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Trial
from rankopt.strategies.allocation import fill
from rankopt.strategies.base import Strategy
from rankopt.strategies.corrections import WARM, Corrections
from rankopt.strategies.layer_walk import LayerMdp

TRIES = 10  # draws per ask in search of a new plan


BOLDNESS = 0.5  # share of the posterior's standard deviation to draw with; 1 explores too far for tens of trials


class WeighsLosses(Strategy):
    """Base class of strategies that learn from trials how much each layer's predicted loss counts.

    Attributes:
        seen: The plans that were evaluated.
        results: Of each that did not fail, the predicted losses of its layers and its objective.
    """

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        super().__init__(problem, seed)
        self.seen: set[Proposal] = set()
        self.results: list[tuple[list[float], float]] = []

    def tell(self, trial: Trial) -> None:
        self.seen.add(trial.proposal)
        if trial.objective is not None:
            losses = [max(c.loss, 0.0) for c in self.problem.candidates(trial.proposal)]
            self.results.append((losses, trial.objective))


class Thompson(WeighsLosses):
    """Proposes plans by walking the layers under losses drawn from a posterior."""

    name = "thompson"

    def __init__(
        self, problem: Problem, seed: int = 0, *, spread: float = 0.4, noise: float = 0.03, temperature: float = 0.03
    ) -> None:
        """Set up the decision process and the prior.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: The same seed gives the same proposals.
            spread: Prior standard deviation of the logarithmic weights.
            noise: Prior relative error of the weighted sum as a model of the objective.
            temperature: Temperature of the policy after a draw gave a known plan, doubling with each such draw; in
                units of the exact plan's mean loss per layer. The first draw is greedy.

        Raises:
            RankoptError: If an option is not a finite number above 0.
        """
        super().__init__(problem, seed)
        for option, value in (("spread", spread), ("noise", noise), ("temperature", temperature)):
            if not 0 < value < np.inf:
                raise RankoptError(f"strategy 'thompson': option {option} is {value}: give a finite number above 0")
        self.spread, self.noise = spread, noise
        self.walk, self.demonstrations = LayerMdp(problem), Corrections(problem)
        self.warmer = temperature * max(problem.loss(self.walk.start), 1e-300) / max(len(problem.layers), 1)
        self.slopes = [_Slopes(self.walk, m) for m in range(len(self.walk.room))]
        self.posterior: tuple[np.ndarray, np.ndarray] | None = None

    def propose(self, number: int) -> Proposal | None:
        if number < WARM:
            return self.demonstrations.contender(self.seed, number)
        rng = np.random.default_rng([self.seed, number])
        if self.posterior is None:
            self.posterior = log_weights(self.results, len(self.problem.layers), self.spread, self.noise)
        mean, root = self.posterior
        for attempt in range(TRIES):
            weights = np.exp(mean + BOLDNESS * root @ rng.standard_normal(len(mean)))[:-1]
            plan = fill(self.problem, self._episode(weights, (2**attempt - 1) * self.warmer, rng))
            if plan not in self.seen:
                break
        return plan

    def tell(self, trial: Trial) -> None:
        super().tell(trial)
        if trial.objective is not None:
            self.posterior = None

    def _episode(self, weights: np.ndarray, temperature: float, rng: np.random.Generator) -> Proposal:
        """One walk under weights (layers,), by softmax(−(w·loss + λ·cost) / temperature) on the allowed positions."""
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
    """Steps along the lower convex hulls of all layers' (cost, loss) in one metric: layer, loss per cost, cost."""

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
    """λ of the layers from `layer` on under the remaining budget: the slope of the first step that no longer fits."""

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
            continue  # costs more and is no better
        while len(hull) > 1 and (hull[-1][1] - x) * (hull[-1][0] - hull[-2][0]) >= (hull[-2][1] - hull[-1][1]) * (
            c - hull[-1][0]
        ):
            hull.pop()
        hull.append((c, x))
    return hull


def log_weights(
    results: list[tuple[list[float], float]], layers: int, spread: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the posterior of the logarithmic weights by Laplace's approximation.

    The model is log objective = log Σᵢ exp(θᵢ) lossᵢ + ε with the prior θ ~ N(0, spread²). The last θ belongs to an
    offset, a tenth of the mean predicted loss, with three times the spread. The variance of ε is estimated from the
    residuals, with a prior worth four residuals of size `noise`.

    Args:
        results: (predicted losses of the layers, objective) of each trial.
        layers: Number of layers.
        spread: Prior standard deviation of θ.
        noise: Prior standard deviation of ε.

    Returns:
        The mode (layers + 1,), and a root of the covariance (layers + 1, layers + 1).
    """
    prior = np.diag(np.append(np.full(layers, spread), 3 * spread) ** -2.0)
    theta, variance = np.zeros(layers + 1), noise**2
    if not results:
        return theta, np.linalg.cholesky(np.linalg.inv(prior))
    x = np.array([losses for losses, _ in results]).reshape(len(results), layers)
    x = np.column_stack([x, np.full(len(x), 0.1)]) / np.append(np.full(layers, x.sum(1).mean() or 1.0), 1.0)
    y = np.array([objective for _, objective in results])
    if y.min() <= 0:  # for the logarithm
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
    """Minimise ½‖residual‖² + ½ θᵀ prior θ by damped Gauss-Newton."""

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
    """Residuals of the logarithmic objectives (trials,), and the model's derivative by θ (trials, layers + 1)."""
    parts = x * np.exp(theta)
    total = parts.sum(1)
    return y - np.log(total), parts / total[:, None]
