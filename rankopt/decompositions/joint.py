"""Families without a free output factor: all cores are searched together, and the layer stays one dense operation.

The weight is a differentiable function of the cores; L-BFGS through autograd minimises ‖W − Ŵ(cores)‖² in the norm
of base.py from where the family starts (a truncated SVD of its unfoldings). Beside what autograd keeps of the
weight's own construction, a step holds three tensors of the weight's size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core import Layer, Rank
from rankopt.decompositions.base import Decomposition, Factors, Fit, Target, finish
from rankopt.decompositions.fitting import MAX_FLOPS, declare, full_target
from rankopt.kinds import convolve, describe, in_own_shape


class Joint(Decomposition):
    """A family that supplies the shapes of its cores, their start and the weight that they stand for.

    MACs are those of the dense operation: see Reconstructed for why the weight's construction is not among them.
    """

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
            felt = target.metric @ difference @ target.moment
            (gradient,) = torch.autograd.grad(weight, flat, felt.mul_(-2 / scale))
            return -0.5 * (felt * difference).sum().item(), gradient.cpu().numpy()

        flat = torch.cat([core.reshape(-1) for core in start])
        if steps > 0 and scale > 0 and loss(flat.cpu().numpy())[0] > 1e-12:
            options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 10, "ftol": 1e-9, "gtol": 0.0}
            found = minimize(loss, flat.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
            flat = torch.as_tensor(found.x, device=flat.device)
        return unpack(flat)

    # --- cost and module ---

    def weights(self, layer: Layer, rank: Rank) -> int:
        return sum(math.prod(shape) for shape in self.shapes(layer, rank))

    def macs(self, layer: Layer, rank: Rank) -> int:
        return layer.weights * layer.positions

    def build(self, module: nn.Module, layer: Layer, rank: Rank) -> nn.Module:
        return finish(Reconstructed(self, module, layer, rank), module)


def empty_cores(module: nn.Module, shapes: Sequence[Sequence[int]]) -> nn.ParameterList:
    """Cores still to be filled, in the dtype and on the device of the module's weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return nn.ParameterList(nn.Parameter(weight.new_empty(s)) for s in shapes)


class Reconstructed(nn.Module):
    """A convolution or Linear whose weight is built from cores, then applied as one dense operation.

    In eval mode the weight is built once, by .eval(), and again at the first forward after a core has changed;
    building it is therefore no part of an example's MACs, and rankopt.count, which calls .eval() first, never sees
    it. It is built at every forward in training, where gradients of the cores are wanted, and in a compiled or
    exported program, which so keeps the cores instead of the weight. The kept weight takes memory, but is neither
    a parameter nor a buffer and is not saved. Writes to core.data are seen at the next .eval().
    """

    def __init__(self, family: Joint, module: nn.Module, layer: Layer, rank: Rank) -> None:
        super().__init__()
        self.family, self.method, self.rank = family, family.name, rank
        self.layer = describe(module)
        self.cores = empty_cores(module, family.shapes(layer, rank))
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))
        if isinstance(module, _ConvNd):
            self._reversed_padding_repeated_twice = module._reversed_padding_repeated_twice
        self._kept: tuple[Any, Any, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight in the shape of the original's."""
        cores = tuple(self.cores)
        wanted = torch.is_grad_enabled() and any(c.requires_grad for c in cores)
        if self.training or wanted or torch.compiler.is_compiling() or any(c.is_inference() for c in cores):
            return in_own_shape(self.layer, self.family.weight(self.layer, cores))
        return self._keep(cores)

    def _keep(self, cores: Factors) -> Tensor:
        """The weight as built before; built anew if a core is another or was written to since."""
        state = [(c.data_ptr(), c._version) for c in cores]
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(mode=False), torch.no_grad():
                pins = [c.detach() for c in cores]  # keep the memory, so that no other core can be at its address
                self._kept = state, pins, in_own_shape(self.layer, self.family.weight(self.layer, cores))
        return self._kept[2]

    def train(self, mode: bool = True) -> Reconstructed:
        super().train(mode)
        self._kept = None
        if not mode:
            with torch.no_grad():
                _ = self.weight
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def forward(self, x: Tensor) -> Tensor:
        if len(self.layer.shape) == 2:
            return nn.functional.linear(x, self.weight, self.bias)
        return convolve(self, x, self.weight)

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"
