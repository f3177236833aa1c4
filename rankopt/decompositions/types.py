"""The records that decompositions share: stages, bonds, fits and the target of a fit."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from rankopt.core.records import Layer, Rank

Aspect = tuple[float, ...]
"""A direction in which ranks grow: proportions of full rank; an int is a rank that stays as it is."""


Factors = tuple[Tensor, ...]
"""The weights of a replacement's stages, in order and in the layout of their modules."""


class Stage(NamedTuple):
    """One convolution of a replacement; channels per group of the original layer.

    axes: whose stride, padding and dilation of the original it takes over, and whose kernel: "hw", "h", "w" or "".
    Of an Embedding a stage of "hw" is the look-up. Of a transposed convolution, stages of any axis are transposed.
    blocks: into how many equal parts the channels fall that do not mix; as many as channels is depthwise.
    shared: all blocks have one kernel; it is stored once.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    axes: str = ""
    blocks: int = 1
    shared: bool = False

    def shape(self, groups: int) -> tuple[int, ...]:
        out_channels = self.out_channels // self.blocks if self.shared else self.out_channels
        return (groups * out_channels, self.in_channels // self.blocks, *self.kernel)

    def weights(self, groups: int) -> int:
        return math.prod(self.shape(groups))

    def macs(self, groups: int) -> int:
        """Multiply-accumulates for one position."""
        return self.weights(groups) * (self.blocks if self.shared else 1)


class Bond(NamedTuple):
    """A bond between factors, of one group: it parts the modes of the weight in two, and bounds the rank there."""

    size: int
    inside: tuple[str, ...]  # the modes on the input's side


class Fit(NamedTuple):
    """A fitted candidate: its factors in the weight's dtype, and their relative error."""

    rank: Rank
    factors: Factors
    error: float


class Target(NamedTuple):
    """What a fit approximates, float64: weight (g, T, n), input moment S (g, n, n), output metric H (g, T, T).

    moment: of an Embedding, whose input is one-hot, only its diagonal (1, n).
    outer: where the weight is seen as (g, t2, t1 * n), because t1 of its T = t1 * t2 belong to what is searched,
    the metric of t1, (g, t1, t1); the input moment is then outer ⊗ S.
    plain: S is the identity, and products with it are left out.
    """

    weight: Tensor
    moment: Tensor
    metric: Tensor
    outer: Tensor | None = None
    plain: bool = False

    def times_moment(self, rows: Tensor) -> Tensor:
        """rows (g, m, n or t1 * n) times the input moment."""
        if self.moment.ndim == 2:
            return rows * self.moment.unsqueeze(1)
        product = rows.reshape(len(rows), -1, self.moment.shape[-1])
        product = product if self.plain else product @ self.moment
        if self.outer is not None:
            product = self.outer.unsqueeze(1) @ product.view(*rows.shape[:2], self.outer.shape[-1], -1)
        return product.view(rows.shape)

    def error(self, approximation: Tensor) -> float:
        """Relative squared error of an approximation (g, T, n)."""
        difference = self.weight - approximation
        whole = self.norm
        return self._square(difference) / whole if whole > 0 else 0.0

    @property
    def norm(self) -> float:
        """Squared norm of the weight itself."""
        return self._square(self.weight)

    def _square(self, w: Tensor) -> float:
        return ((self.metric @ w) * self.times_moment(w)).sum().item()


class Family(Protocol):
    """What a replacement module keeps of the decomposition that built it: enough to rebuild its dense weight."""

    name: ClassVar[str]

    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """The shapes of the factors, in order."""

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        """The dense weight that the factors stand for, of layer.shape."""


class FactorLookup(Protocol):
    """Where a plan's factors come from: a dictionary, or the candidate cache."""

    def __getitem__(self, key: str, /) -> Factors:
        """The factors stored under a candidate's key."""
