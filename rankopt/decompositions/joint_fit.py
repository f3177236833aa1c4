"""Families without a free output factor: all cores are searched together.

The weight is a differentiable function of the cores; L-BFGS through autograd minimises ‖W − Ŵ(cores)‖² in the norm
of base.py from where the family starts (a truncated SVD of its unfoldings). Beside what autograd keeps of the
weight's own construction, a step holds three tensors of the weight's size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import minimize
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.types import Factors, Fit, Target
from rankopt.decompositions.variable_projection import MAX_FLOPS, declare, full_target


class Joint(Decomposition):
    """A family that supplies the shapes of its cores, their start and the weight that they stand for."""

    @abstractmethod
    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """The shapes of the cores, in order."""

    @abstractmethod
    def starts(self, layer: Layer, weight: Tensor, ranks: Sequence[Rank]) -> Iterator[Factors]:
        """Where the search starts, for each rank; weight: float64, in the layer's shape."""

    @abstractmethod
    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        """The dense weight in the layer's shape, differentiable over the factors."""

    def balance(self, layer: Layer, factors: Factors) -> Factors:
        """The same weight from cores that training can start from."""
        return factors

    def fit(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> Iterator[Fit]:
        target = full_target(layer, weight, moment, metric)
        dense = target.weight.reshape(layer.shape)
        steps = min(math.ceil(steps * self.effort), int(MAX_FLOPS / (2 * dense.numel() * sum(target.weight.shape[1:]))))
        for rank, start in zip(ranks, self.starts(layer, dense, ranks), strict=True):
            factors = self.balance(layer, self._minimise(layer, start, target, steps))
            yield declare(self, layer, weight, factors, rank, moment, metric)

    def _minimise(self, layer: Layer, start: Factors, target: Target, steps: int) -> Factors:
        """L-BFGS over all cores, flattened."""
        sizes = [core.numel() for core in start]
        scale = target.norm

        def unpack(flat: Tensor) -> Factors:
            return tuple(c.view(s.shape) for c, s in zip(flat.split(sizes), start, strict=True))

        def loss(x: object) -> tuple[float, object]:
            flat = torch.as_tensor(x, device=target.weight.device).requires_grad_()
            weight = self.weight(layer, unpack(flat)).reshape(target.weight.shape)
            difference = target.weight - weight.detach()
            felt = target.times_moment(target.metric @ difference)
            (gradient,) = torch.autograd.grad(weight, flat, felt.mul_(-2 / scale))
            return -0.5 * (felt * difference).sum().item(), gradient.cpu().numpy()

        flat = torch.cat([core.reshape(-1) for core in start])
        if steps > 0 and scale > 0 and loss(flat.cpu().numpy())[0] > 1e-12:
            options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 10, "ftol": 1e-9, "gtol": 0.0}
            found = minimize(loss, flat.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
            flat = torch.as_tensor(found.x, device=flat.device)
        return unpack(flat)
