"""Types shared by all decompositions: stages, bonds, fits and fit targets."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank

Aspect = tuple[float, ...]
"""A direction in which ranks grow: per rank a float, the proportion of the full rank, or an int, a fixed rank."""

Factors = tuple[Tensor, ...]
"""The weights of a replacement's stages or its cores, in the order and layout of the module's parameters."""

Parameters = tuple[Tensor, ...]
"""The searched parameters θ of a fit by variable projection, float64 tensors (g, ...)."""


class Stage(NamedTuple):
    """One convolution of a replacement.

    Attributes:
        in_channels: Input channels per group of the original layer.
        out_channels: Output channels per group of the original layer.
        kernel: Kernel size (height, width).
        axes: Axes along which the stage has the original's kernel, stride, padding and dilation: "hw", "h", "w" or "".
            The "hw" stage of an Embedding is the look-up; with a transposed convolution, stages with axes are
            transposed.
        blocks: Number of equal blocks of channels that do not mix; equal to the channels it is depthwise.
        shared: Whether all blocks use the same kernel, stored once.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    axes: str = ""
    blocks: int = 1
    shared: bool = False

    def shape(self, groups: int) -> tuple[int, ...]:
        """Shape of the stage's weight, (out, in, height, width).

        Args:
            groups: Groups of the original layer.
        """
        out_channels = self.out_channels // self.blocks if self.shared else self.out_channels
        return (groups * out_channels, self.in_channels // self.blocks, *self.kernel)

    def weights(self, groups: int) -> int:
        """Number of weights.

        Args:
            groups: Groups of the original layer.
        """
        return math.prod(self.shape(groups))

    def macs(self, groups: int) -> int:
        """Multiply-accumulates for one position.

        Args:
            groups: Groups of the original layer.
        """
        return self.weights(groups) * (self.blocks if self.shared else 1)


class Bond(NamedTuple):
    """A bond between factors of one group.

    It splits the modes of the weight in two; the rank of the weight's unfolding along that split is at most its size.

    Attributes:
        size: Dimension of the bond.
        inside: Names of the modes on the input's side.
        factor: Number of the factor along one of whose axes the bond's index runs; None if no axis is known.
        axis: This axis; along the first one, the indices of all groups follow each other.
    """

    size: int
    inside: tuple[str, ...]
    factor: int | None = None
    axis: int = 0


class Original(NamedTuple):
    """A layer whose weight a fit approximates, and the norm of its error.

    Attributes:
        layer: The layer.
        weight: The module's weight, in its own shape.
        moment: Input moment S (groups, n, n), float64; of an Embedding its diagonal (groups, n), of very wide layers
            as of `Target`. None: identity.
        metric: Output metric H (groups, T, T), float64. None: identity.
    """

    layer: Layer
    weight: Tensor
    moment: Tensor | None = None
    metric: Tensor | None = None


class Fit(NamedTuple):
    """A fitted decomposition.

    Attributes:
        rank: The rank.
        factors: Factors in the weight's dtype; none where only the error was estimated.
        error: Relative squared error of these factors (see base.py).
        start: The error that the search for them started from; None if there was no search, or that is not known.
        ended: Whether the search came to its own end, so that more steps would change nothing; False if not known.
    """

    rank: Rank
    factors: Factors
    error: float
    start: float | None = None
    ended: bool = False


class Nested(NamedTuple):
    """Factors of all ranks: rank r has the first r columns of the left one and the first r rows of the right one.

    Attributes:
        left: Tensor (g, T, R), float64.
        right: Tensor (g, R, n), float64.
        errors: Relative squared error of each rank from 0 to R, float64.
        dtype: The precision of the factors that are cut from these.
    """

    left: Tensor
    right: Tensor
    errors: Tensor
    dtype: torch.dtype


class Target(NamedTuple):
    """The weight that a fit approximates and the norm of its error; tensors are float64.

    Attributes:
        weight: W (g, T, n).
        moment: Input moment S (g, n, n); its diagonal (g, n) for an Embedding, whose input is one-hot; for a layer too
            wide for a whole matrix (g, 1 + l, n), l < n - 1: S = diag(d) + Bᵀ B, d in the first row, B in the others.
        metric: Output metric H (g, T, T).
        outer: Metric of t1 (g, t1, t1), if the weight is arranged as (g, t2, t1 * n) with T = t1 * t2 so that t1
            belongs to the searched side of the fit; the input moment is then outer ⊗ S.
        plain: Whether S is the identity; products with it are then skipped.
    """

    weight: Tensor
    moment: Tensor
    metric: Tensor
    outer: Tensor | None = None
    plain: bool = False

    def times_moment(self, rows: Tensor) -> Tensor:
        """Multiply rows by the input moment.

        Args:
            rows: Tensor (g, m, n), or (g, m, t1 * n) if `outer` is set.
        """
        product = rows.reshape(len(rows), -1, self.moment.shape[-1])
        if not self.plain:
            product = _times(product, self.moment)
        if self.outer is not None:
            product = self.outer.unsqueeze(1) @ product.view(*rows.shape[:2], self.outer.shape[-1], -1)
        return product.view(rows.shape)

    def error(self, approximation: Tensor, norm: float | None = None) -> float:
        """Relative squared error of an approximation; 0 for a weight of zeros.

        Args:
            approximation: Ŵ (g, T, n).
            norm: `norm`, where it is known.
        """
        difference = self.weight - approximation
        whole = self.norm if norm is None else norm
        return max(self._square(difference), 0.0) / whole if whole > 0 else 0.0

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal of S is known, or is not zero."""
        return self.moment.ndim == 2

    def to(self, dtype: torch.dtype) -> Target:
        """The same in another precision.

        Args:
            dtype: The precision.
        """
        outer = None if self.outer is None else self.outer.to(dtype)
        return Target(self.weight.to(dtype), self.moment.to(dtype), self.metric.to(dtype), outer, self.plain)

    def inputs(self, part: slice | Tensor) -> Target:
        """The same for some of the inputs alone, or in another order.

        Args:
            part: Which inputs.
        """
        moment = self.moment[..., part]
        if not (self.diagonal or is_sketch(self.moment)):
            moment = moment[:, part]
        return self._replace(weight=self.weight[..., part], moment=moment)

    @property
    def norm(self) -> float:
        """Squared norm of the weight, tr(H W S Wᵀ)."""
        return self._square(self.weight)

    def _square(self, w: Tensor) -> float:
        return ((self.metric @ w) * self.times_moment(w)).sum().item()


def is_sketch(moment: Tensor) -> bool:
    """Whether an input moment is given as a diagonal and a factor; see `Target`.

    Args:
        moment: S in any of its three forms.
    """
    return moment.ndim == 3 and moment.shape[1] != moment.shape[2]


def mean_squares(moment: Tensor) -> Tensor:
    """The diagonal (g, n) of an input moment.

    Args:
        moment: S in any of its three forms; see `Target`.
    """
    if moment.ndim == 2:
        return moment
    return moment[:, 0] + moment[:, 1:].square().sum(1) if is_sketch(moment) else moment.diagonal(dim1=1, dim2=2)


def _times(rows: Tensor, moment: Tensor) -> Tensor:
    """Rows (g, m, n) times an input moment."""
    if is_sketch(moment):
        factor = moment[:, 1:]
        return rows * moment[:, :1] + (rows @ factor.mT) @ factor
    return rows * moment.unsqueeze(1) if moment.ndim == 2 else rows @ moment


class Family(Protocol):
    """The part of a decomposition that a replacement module keeps, to rebuild its dense weight."""

    name: str

    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """As `Decomposition.shapes`."""

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        """As `Decomposition.weight`."""


class FactorLookup(Protocol):
    """Source of a plan's factors: a dictionary or the candidate cache."""

    def __getitem__(self, key: str, /) -> Factors:
        """The factors stored under a candidate's key.

        Args:
            key: `Candidate.key`.
        """
