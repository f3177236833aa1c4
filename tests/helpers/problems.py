"""Allocation problems made of numbers alone, without a model."""

from __future__ import annotations

import numpy as np

from rankopt.candidates.pareto import frontier
from rankopt.core.budget import Limit
from rankopt.core.problem import Problem
from rankopt.core.records import Candidate, Cost, Layer


def synthetic(share=0.3, n=12, seed=0):
    """Layers with decaying error curves; the true loss weighs them unlike the predicted one."""
    rng = np.random.default_rng(seed)
    layers, frontiers = [], []
    for i in range(n):
        size = int(rng.integers(16, 64))
        cost = Cost(size * size, size * size * 64, 4 * size * size)
        layer = Layer(f"l{i}", "Linear", (size, size), cost=cost)
        decay = rng.uniform(2, 8)
        options = []
        for rank in range(1, size // 2, 2):
            error = float(np.exp(-decay * rank / size))
            params = 2 * size * rank
            options.append(Candidate("svd_out", (rank,), Cost(params, params * 64, 4 * params), error, error))
        layers.append(layer)
        frontiers.append(frontier(layer, options, ["params"]))
    dense = Cost(*(sum(x.cost[m] for x in layers) for m in ("params", "macs", "bytes")))
    limits = (Limit("params", share, int(share * dense.params)),)
    weights = np.exp(rng.normal(0, 1, n))
    problem = Problem(tuple(layers), tuple(frontiers), dense, limits)

    def truth(proposal):
        return float(sum(w * c.loss for w, c in zip(weights, problem.candidates(proposal), strict=True))), None

    return problem, truth


def coupled(seed, n=22):
    """Errors of neighbouring layers add up in part, so that no weights on the layers' losses are right."""
    problem, _ = synthetic(0.3, n, seed)
    rng = np.random.default_rng(1000 + seed)
    near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) < 4
    correlation = np.abs(np.corrcoef(rng.normal(size=(n, n))))
    scale = np.exp(rng.normal(0, 0.5, n))
    matrix = (0.6 * np.eye(n) + 0.4 * correlation * near) * np.outer(scale, scale)

    def truth(proposal):
        x = np.sqrt([c.loss for c in problem.candidates(proposal)])
        return float(x @ matrix @ x), None

    return problem, truth
