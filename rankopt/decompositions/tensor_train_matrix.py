"""Tensor trains over pairs of an output and an input mode.

The channels T = J₁ J₂ J₃ and C = I₁ I₂ I₃ are factorised as evenly as possible; a size without an even factorisation
(a prime, for example) is padded with empty channels up to the next one that has it. Cores Gₖ have the shape
(Rₖ₋₁, Jₖ, Iₖ, Rₖ).

    tt_matrix    W(j, i) = G₁[j₁, i₁] G₂[j₂, i₂] G₃[j₃, i₃]             of a Linear (Novikov 2015)
    tt_conv      W(l, j, i) = G₀[l] G₁[j₁, i₁] G₂[j₂, i₂] G₃[j₃, i₃]    of a convolution, l the position in its kernel
                                                                        (Garipov 2016)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankopt.core.records import RECONSTRUCTED, Layer, Rank
from rankopt.decompositions.joint_fit import Joint
from rankopt.decompositions.linear_algebra import balanced, leading_basis
from rankopt.decompositions.modules import OnBatches, empty_cores
from rankopt.decompositions.types import Aspect, Bond, Factors
from rankopt.model.layer_kinds import describe, in_own_shape

UNEVEN = 3
"""Largest ratio of the factors of an even factorisation."""


Shapes = tuple[tuple[int, ...], ...]
"""Shapes (Rₖ₋₁, Jₖ, Iₖ, Rₖ) of a train's cores."""


# --- families -------------------------------------------------------------------------------------


class TensorTrainMatrix(Joint):
    """Tensor train of a Linear (Novikov 2015): W(j, i) = G₁[j₁, i₁] G₂[j₂, i₂] G₃[j₃, i₃].

    Rank (R₁, R₂); R₁ J₁ I₁ + R₁ J₂ I₂ R₂ + R₂ J₃ I₃ weights.
    """

    name = "tt_matrix"
    aspects: ClassVar[tuple[tuple[float, ...], ...]] = ((1.0, 1.0),)

    def full_rank(self, layer: Layer) -> Rank | None:
        modes = self.modes(layer)
        if not self.applies_to(layer) or sum(m > 1 for m in modes) < 2:
            return None
        return tuple(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes)))

    def applies_to(self, layer: Layer) -> bool:
        """Whether the family applies to layers of this kind.

        Args:
            layer: Layer to decompose.
        """
        return layer.kind != "Embedding" and len(layer.shape) == 2

    def channels(self, layer: Layer) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The factors (J₁, J₂, J₃) and (I₁, I₂, I₃), one descending and the other ascending.

        The products Jₖ Iₖ are then even, too.

        Args:
            layer: Layer to decompose.
        """
        c, b, a = even_factors(layer.shape[0])
        return (a, b, c), even_factors(layer.in_channels)

    def modes(self, layer: Layer) -> tuple[int, ...]:
        """The sizes of the train's modes: (kh kw,) J₁ I₁, J₂ I₂, J₃ I₃.

        Args:
            layer: Layer to decompose.
        """
        return tuple(j * i for j, i in zip(*self.channels(layer), strict=True))

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        modes, bonds = self.modes(layer), [1, *super().valid(layer, rank), 1]
        for k in range(1, len(modes)):
            bonds[k] = min(bonds[k], bonds[k - 1] * modes[k - 1])
        for k in range(len(modes) - 1, 0, -1):
            bonds[k] = min(bonds[k], bonds[k + 1] * modes[k])
        return tuple(bonds[1:-1])

    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        bonds = (1, *rank, 1)
        return tuple((bonds[k], j, i, bonds[k + 1]) for k, (j, i) in enumerate(zip(*self.channels(layer), strict=True)))

    # --- fit, starting from the TT-SVD ---

    def starts(self, layer: Layer, weight: Tensor, ranks: Sequence[Rank]) -> Iterator[Factors]:
        tensor = self.tensorise(layer, weight)
        for rank in ranks:
            cores = tt_svd(tensor, self.modes(layer), rank)
            yield tuple(c.reshape(s) for c, s in zip(cores, self.shapes(layer, rank), strict=True))

    def balance(self, layer: Layer, factors: Factors) -> Factors:
        cores = list(factors)
        for k in range(len(cores) - 1, 0, -1):
            left, right = balanced(cores[k - 1].flatten(0, -2)[None], cores[k].flatten(1)[None])
            cores[k - 1], cores[k] = left.view(cores[k - 1].shape), right.view(cores[k].shape)
        return tuple(cores)

    # --- tensor <-> weight ---

    def bonds(self, layer: Layer, rank: Rank) -> tuple[Bond, ...]:
        """The bonds between the cores; the modes include padded channels."""
        names = self.names(layer)
        return tuple(Bond(r, names[:k], k - 1, -1) for k, r in enumerate(rank, 1))

    def tensor(self, layer: Layer, weight: Tensor) -> tuple[tuple[str, ...], Tensor]:
        return self.names(layer), self.tensorise(layer, weight).reshape(1, *self.modes(layer))

    def names(self, layer: Layer) -> tuple[str, ...]:
        """The names of the modes.

        Args:
            layer: Layer to decompose.
        """
        pairs = ("J1I1", "J2I2", "J3I3")
        return pairs if len(self.modes(layer)) == 3 else ("hw", *pairs)

    def tensorise(self, layer: Layer, weight: Tensor) -> Tensor:
        """The weight as a flat tensor over the train's modes; padded channels are zero.

        Args:
            layer: Layer to decompose.
            weight: Dense weight of `layer.shape`.
        """
        j, i = self.channels(layer)
        t, c = layer.shape[:2]
        by_position = weight.reshape(t, c, -1).permute(2, 0, 1)
        padded = nn.functional.pad(by_position, (0, math.prod(i) - c, 0, math.prod(j) - t))
        return padded.reshape(-1, *j, *i).permute(0, 1, 4, 2, 5, 3, 6).flatten()

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        j, i = channel_modes(factors)
        t, c = layer.shape[:2]
        product = factors[0].flatten(0, -2)
        for core in factors[1:]:
            product = (product @ core.flatten(1)).reshape(-1, core.shape[-1])
        split = product.view(-1, j[0], i[0], j[1], i[1], j[2], i[2]).permute(0, 1, 3, 5, 2, 4, 6)
        return split.reshape(-1, math.prod(j), math.prod(i))[:, :t, :c].permute(1, 2, 0).reshape(layer.shape)

    # --- contracting the input with the cores ---

    def factorised_macs(self, layer: Layer, rank: Rank) -> int:
        shapes = self.shapes(layer, rank)
        return min(train_macs(shapes), train_macs(reversed_shapes(shapes))) * sum(call.maps for call in layer.calls)

    def factorised(self, module: nn.Module, layer: Layer, rank: Rank) -> nn.Module:
        return TensorTrainMatrixLinear(self, module, layer, rank)


class TensorTrainConvolution(TensorTrainMatrix):
    """Tensor train of a convolution (Garipov 2016): W(l, j, i) = G₀[l] G₁[j₁, i₁] G₂[j₂, i₂] G₃[j₃, i₃].

    G₀ is left out for kernels of one position. The cores are contracted to the weight, which is applied as one dense
    convolution: contracting the input with the cores would hold C R₁ maps of the input's size. Parameters fall, MACs
    do not.

    Rank (R₀, R₁, R₂); kh kw R₀ + R₀ J₁ I₁ R₁ + R₁ J₂ I₂ R₂ + R₂ J₃ I₃ weights.
    """

    name = "tt_conv"
    effort = 0.3
    density = 0.5  # there are several aspects for each point
    aspects = ((1.0, 0.2, 1.0), (1.0, 0.6, 1.0))
    forms = (RECONSTRUCTED,)

    def applies_to(self, layer: Layer) -> bool:
        return len(layer.shape) == 4

    def modes(self, layer: Layer) -> tuple[int, ...]:
        area = math.prod(layer.kernel)
        return (area, *super().modes(layer)) if area > 1 else super().modes(layer)

    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        area = math.prod(layer.kernel)
        if area == 1:
            return super().shapes(layer, rank)
        (_, *first), *others = super().shapes(layer, rank[1:])
        return (1, area, rank[0]), (rank[0], *first), *others

    def directions(self, layer: Layer) -> Sequence[Aspect]:
        bonds = len(self.modes(layer)) - 1
        return [aspect[-bonds:] for aspect in self.aspects]  # a kernel of one position has no G₀, and no first bond


# --- the module of a Linear -----------------------------------------------------------------------


class TensorTrainMatrixLinear(nn.Module):
    """A Linear y = x Wᵀ + b that contracts x (..., C) with the cores of a train, from the cheaper end.

    Args:
        family: The decomposition.
        module: The original layer.
        layer: Its description.
        rank: The rank.
    """

    def __init__(self, family: TensorTrainMatrix, module: nn.Module, layer: Layer, rank: Rank) -> None:
        super().__init__()
        self.family, self.method, self.rank, self.layer = family, family.name, rank, describe(module)
        shapes = family.shapes(layer, rank)
        self.cores = empty_cores(module, shapes)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))
        self.from_the_end = train_macs(reversed_shapes(shapes)) < train_macs(shapes)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the original's own shape."""
        return in_own_shape(self.layer, self.family.weight(self.layer, tuple(self.cores)))

    def forward(self, x: Tensor) -> Tensor:
        cores = list(self.cores)
        (t, c), (j, i) = self.layer.shape, channel_modes(cores)
        n = math.prod(x.shape[:-1])
        y = nn.functional.pad(x, (0, math.prod(i) - c)).reshape(n, *i)
        if self.from_the_end:
            reversed_cores = [core.permute(3, 1, 2, 0) for core in reversed(cores)]
            y = contract_train(y.permute(0, 3, 2, 1), reversed_cores).reshape(n, *j[::-1]).permute(0, 3, 2, 1)
        else:
            y = contract_train(y, cores)
        y = y.reshape(n, math.prod(j))[:, :t].reshape(*x.shape[:-1], t)
        return y if self.bias is None else y + self.bias

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles."""
        return OnBatches(self, self.cores[0].new_zeros(2, self.layer.shape[1]))

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"


# --- trains ---------------------------------------------------------------------------------------


@cache
def even_factors(n: int) -> tuple[int, int, int]:
    """The most even factors a ≤ b ≤ c of n, or of the next larger number that has factors with c ≤ 3 a.

    Args:
        n: A positive number.
    """
    while True:
        found = [
            (a, b, n // (a * b))
            for a in range(1, round(n ** (1 / 3)) + 1)
            if n % a == 0
            for b in range(a, math.isqrt(n // a) + 1)
            if n // a % b == 0 and n // (a * b) <= UNEVEN * a
        ]
        if found:
            return min(found, key=sum)
        n += 1


def channel_modes(cores: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """The factors (J₁, J₂, J₃) and (I₁, I₂, I₃), read from the cores.

    Args:
        cores: The train's cores; the last three hold channels.
    """
    return [core.shape[1] for core in cores[-3:]], [core.shape[2] for core in cores[-3:]]


def tt_svd(tensor: Tensor, modes: Sequence[int], rank: Rank) -> list[Tensor]:
    """TT-SVD: the cores of a tensor by successive truncation (Oseledets 2011, algorithm 1).

    Args:
        tensor: The tensor, flat.
        modes: Sizes of its modes.
        rank: The bonds between them.

    Returns:
        Cores (Rₖ₋₁, modeₖ, Rₖ).
    """
    cores, rest, before = [], tensor, 1
    for mode, r in zip(modes, rank, strict=False):
        rest = rest.reshape(before * mode, -1)
        basis = leading_basis(rest, r)
        cores.append(basis.view(before, mode, r))
        rest, before = basis.mT @ rest, r
    return [*cores, rest.reshape(before, modes[-1], 1)]


def reversed_shapes(shapes: Shapes) -> Shapes:
    """The shapes of the train read from its other end.

    Args:
        shapes: Shapes of the cores.
    """
    return tuple((after, j, i, before) for before, j, i, after in reversed(shapes))


def train_macs(shapes: Shapes) -> int:
    """Multiply-accumulates of contracting one vector with the cores, first to last.

    Args:
        shapes: Shapes of the cores.
    """
    macs, done, left = 0, 1, math.prod(s[2] for s in shapes)
    for before, j, i, after in shapes:
        left //= i
        macs += done * before * i * j * after * left
        done *= j
    return macs


def contract_train(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Contract vectors with the cores of a train, first to last.

    Args:
        x: Tensor (n, I₁, I₂, ...).
        cores: Cores (Rₖ₋₁, Jₖ, Iₖ, Rₖ).

    Returns:
        Tensor (n J₁ J₂ ..., 1, 1).
    """
    rows, left = x.shape[0], math.prod(x.shape[1:])
    for core in cores:
        before, j, i, after = core.shape
        left //= i
        matrix = core.permute(0, 2, 1, 3).reshape(before * i, j * after)
        y = x.reshape(rows, before * i, left).mT @ matrix
        rows, x = rows * j, y.view(rows, left, j, after).permute(0, 2, 3, 1)
    return x
