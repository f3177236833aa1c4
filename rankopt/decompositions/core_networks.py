"""Families that are chains of convolutions on a convolution and networks of cores on a Linear.

A Linear is seen as a tensor over C = C1 C2 inputs and T = T1 T2 outputs. Such a family is linear in the core that holds
T2; all others are searched. The weight is then arranged as (T2, T1 n) with the input moment H1 ⊗ S, where H ≈ H1 ⊗ H2
follows from partial traces of H.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.linear_algebra import roots
from rankopt.decompositions.modules import OnBatches, empty_cores
from rankopt.decompositions.targets import full_target
from rankopt.decompositions.types import Bond, Factors, Target
from rankopt.decompositions.variable_projection import OutputSolved
from rankopt.model.layer_kinds import describe, in_own_shape

TRAIN = (("C1",), ("C1", "C2"), ("C1", "C2", "T1"))
"""The modes on the input's side of each bond of a train over C1, C2, T1, T2."""


class CoreNetwork(OutputSolved):
    """Base class of families that are chains of stages on a convolution and networks of cores on a Linear."""

    @abstractmethod
    def core_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """The shapes of a Linear's cores.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """

    @abstractmethod
    def linear_macs(self, layer: Layer, rank: Rank) -> int:
        """Multiply-accumulates of `contract` for one vector.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """

    @abstractmethod
    def contract(self, x: Tensor, cores: Factors) -> Tensor:
        """Contract vectors with the cores.

        Args:
            x: Tensor (N, C).
            cores: Cores of `core_shapes`.

        Returns:
            Tensor (N, T).
        """

    @abstractmethod
    def linear_weight(self, cores: Factors) -> Tensor:
        """The dense weight (T1, T2, C1, C2).

        Args:
            cores: Cores of `core_shapes`.
        """

    @abstractmethod
    def linear_bonds(self, rank: Rank) -> tuple[Bond, ...]:
        """The bonds of a Linear, which split the modes C1, C2, T1, T2.

        Args:
            rank: A valid rank.
        """

    def bonds(self, layer: Layer, rank: Rank) -> tuple[Bond, ...]:
        return super().bonds(layer, rank) if len(layer.shape) == 4 else self.linear_bonds(rank)

    def tensor(self, layer: Layer, weight: Tensor) -> tuple[tuple[str, ...], Tensor]:
        modes = linear_modes(layer)
        if len(layer.shape) == 4 or modes is None:
            return super().tensor(layer, weight)
        return ("T1", "T2", "C1", "C2"), weight.reshape(1, *modes[2:], *modes[:2])

    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        return super().shapes(layer, rank) if len(layer.shape) == 4 else self.core_shapes(layer, rank)

    def factorised_macs(self, layer: Layer, rank: Rank) -> int:
        if len(layer.shape) == 4:
            return super().factorised_macs(layer, rank)
        return self.linear_macs(layer, rank) * sum(call.maps for call in layer.calls)

    def factorised(self, module: nn.Module, layer: Layer, rank: Rank) -> nn.Module:
        if len(layer.shape) == 4:
            return super().factorised(module, layer, rank)
        return CoreNetworkLinear(self, module, layer, rank)

    def target(
        self, layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None
    ) -> tuple[Target, Tensor]:
        modes = linear_modes(layer)
        if len(layer.shape) == 4 or modes is None:
            return super().target(layer, weight, moment, metric)
        whole = full_target(layer, weight, moment, metric)
        t1, t2 = modes[2:]
        h = whole.metric.view(t1, t2, t1, t2)
        outer = torch.einsum("ajbj->ab", h)[None]
        outer = outer / outer.diagonal(dim1=-2, dim2=-1).mean()
        half, undo = roots(torch.einsum("ajak->jk", h)[None] / t1)
        turned = whole.weight.view(t1, t2, -1).transpose(0, 1).reshape(1, t2, -1)
        identity = torch.eye(t2, dtype=half.dtype, device=half.device)[None]
        return whole._replace(weight=half @ turned, metric=identity, outer=outer), undo

    def searches_error(self, layer: Layer) -> bool:
        return len(layer.shape) == 4 or linear_modes(layer) is None


class CoreNetworkLinear(nn.Module):
    """A Linear y = x Wᵀ + b that contracts x (..., C) with a network of cores.

    Args:
        family: The decomposition.
        module: The original layer.
        layer: Its description.
        rank: The rank.
    """

    def __init__(self, family: CoreNetwork, module: nn.Module, layer: Layer, rank: Rank) -> None:
        super().__init__()
        self.family, self.method, self.rank, self.layer = family, family.name, rank, describe(module)
        self.cores = empty_cores(module, family.core_shapes(layer, rank))
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))

    @property
    def weight(self) -> Tensor:
        """The dense weight in the original's own shape."""
        return in_own_shape(self.layer, self.family.linear_weight(tuple(self.cores)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.family.contract(x.reshape(-1, x.shape[-1]), tuple(self.cores))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles."""
        return OnBatches(self, self.cores[0].new_zeros(2, self.layer.shape[1]))

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"


# --- factorising channels -------------------------------------------------------------------------


def square_factors(n: int) -> tuple[int, int]:
    """Factors a <= b of n that are as close as possible.

    Args:
        n: A positive number.
    """
    a = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return a, n // a


def linear_modes(layer: Layer) -> tuple[int, int, int, int] | None:
    """The most even factorisations of a Linear's channels.

    Args:
        layer: Layer to decompose.

    Returns:
        (C1, C2, T1, T2); None if both sizes are prime, and for an Embedding.
    """
    if layer.kind == "Embedding":
        return None
    c, t = square_factors(layer.in_channels), square_factors(layer.out_channels)
    return None if c[0] == 1 and t[0] == 1 else (*c, *t)
