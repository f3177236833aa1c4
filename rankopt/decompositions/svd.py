"""Low-rank matrix decompositions of a weight W(t, c, y, x) with T outputs, C inputs and a kernel of kh x kw.

    svd_out        W(t, c y x) = Σ_r U(t, r) V(r, c y x)    kh x kw to R channels, 1 x 1 to T
    svd_in         W(t y x, c) = Σ_r U(t y x, r) V(r, c)    1 x 1 to R, kh x kw to T
    svd_spatial    W(t x, c y) = Σ_r U(t x, r) V(r, c y)    kh x 1 to R, 1 x kw to T (Jaderberg 2014)
    svd_grouped    [U₁ V₁ … U_b V_b], svd_out of the slice of each of b blocks of input channels (Liebenwein 2021)

Numbers of weights here and in the other families' docstrings are those of one group.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.linear_algebra import balanced, cut, first_rows, singular_rows
from rankopt.decompositions.output_solver import Blocks
from rankopt.decompositions.targets import absorb_metric, full_target, once_per_target
from rankopt.decompositions.types import Aspect, Factors, Fit, Nested, Parameters, Stage, Target
from rankopt.decompositions.variable_projection import OutputSolved

BLOCKS = (16, 8, 4, 2)
"""Numbers of blocks that svd_grouped tries."""


class SvdOut(Decomposition):
    """SVD of the weight unfolded along its output channels; of an Embedding, rows of R entries and a Linear.

    In the norm of base.py this is reduced-rank regression (Izenman 1975), solved in closed form: Ŵ = U Uᵀ W with U the
    leading eigenvectors of W S Wᵀ. One eigendecomposition serves every rank.

    Rank (R,); R (C kh kw + T) weights.
    """

    name = "svd_out"
    closed_form = True
    density = 4.0  # further ranks are almost free to fit

    def full_rank(self, layer: Layer) -> Rank | None:
        return (min(layer.out_channels, layer.patch),)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,) = rank
        return (Stage(layer.in_channels, r, layer.kernel, "hw"), Stage(r, layer.out_channels))

    def fit(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> Iterator[Fit]:
        found = self.nested(layer, weight, moment, metric)
        for rank in ranks:
            factors = cut(found.left, found.right, self.shapes(layer, rank), found.dtype)
            yield Fit(rank, factors, found.errors[rank[0]].item())

    def nested(
        self, layer: Layer, weight: Tensor, moment: Tensor | None = None, metric: Tensor | None = None
    ) -> Nested:
        target, undo = absorb_metric(layer, weight, moment, metric)
        values, vectors = torch.linalg.eigh(target.times_moment(target.weight) @ target.weight.mT)
        rank = min(layer.out_channels, layer.patch)
        values, vectors = (v.flip(-1)[..., :rank] for v in (values.clamp_min(0), vectors))
        left, right = undo @ vectors, vectors.mT @ target.weight
        # In the metric itself, which differs from the absorbed one where that had to be invertible
        h = full_target(layer, weight, moment, metric).metric
        lost = (values * (left * (h @ left)).sum(-2)).sum(0)
        errors = torch.nn.functional.pad(lost.flip(0).cumsum(0).flip(0), (0, 1))
        return Nested(left, right, errors / errors[0].clamp_min(1e-300), weight.dtype)


class SvdIn(OutputSolved):
    """SVD of the weight unfolded along its input channels.

    Rank (R,); R (C + kh kw T) weights.
    """

    name = "svd_in"
    effort = 0.2

    def full_rank(self, layer: Layer) -> Rank | None:
        if layer.patch == layer.in_channels:
            return None  # the same as svd_out
        return (min(layer.in_channels, layer.out_channels * layer.patch // layer.in_channels),)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,) = rank
        return (Stage(layer.in_channels, r), Stage(r, layer.out_channels, layer.kernel, "hw"))

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return ()

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        return (input_start(layer, target, rank[0]),)

    def blocks(self, layer: Layer, theta: Parameters) -> Blocks:
        return input_blocks(layer, theta[0])

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return self.blocks(layer, theta).dense()

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        channels, output = split_input(layer, theta[0], output)
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            output.reshape(-1, rank[0], *layer.kernel),
        )


class SvdSpatial(OutputSolved):
    """Separable kernels (Jaderberg 2014): the kernel's height goes with the inputs, its width with the outputs.

    Rank (R,); R (C kh + kw T) weights.
    """

    name = "svd_spatial"
    effort = 0.2

    def full_rank(self, layer: Layer) -> Rank | None:
        height, width = layer.kernel
        if min(height, width) == 1:
            return None  # the same as svd_out or svd_in
        return (min(layer.in_channels * height, layer.out_channels * width),)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,), (height, width) = rank, layer.kernel
        return (
            Stage(layer.in_channels, r, (height, 1), "h"),
            Stage(r, layer.out_channels, (1, width), "w"),
        )

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return ()

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        return (first_rows(_spatial_rows(layer, target), rank[0]),)

    def blocks(self, layer: Layer, theta: Parameters) -> Blocks:
        return width_blocks(layer, theta[0])

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return self.blocks(layer, theta).dense()

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        height, width = layer.kernel
        g, r, _ = theta[0].shape
        left = output.view(g, -1, width, r)
        new_left, right = balanced(left.flatten(1, 2), theta[0])
        second = new_left.view(left.shape).transpose(-1, -2)
        return (
            right.reshape(-1, layer.in_channels, height, 1),
            second.reshape(-1, r, 1, width),
        )


class SvdGrouped(OutputSolved):
    """SVD of each block of input channels (ALDS, Liebenwein 2021): kh x kw in blocks to blocks * R, then 1 x 1.

    One block is svd_out; one block per channel is a depthwise separable convolution. ALDS fits each slice alone in
    closed form, which is where this search starts (in the metric of the slice's inputs). As inputs of different slices
    are correlated, all U are then solved together.

    Rank (blocks, R of each block); R (C kh kw + blocks T) weights.
    """

    name = "svd_grouped"
    effort = 0.2
    density = 0.5  # there are several aspects for each point

    def divisors(self, layer: Layer) -> list[int]:
        """The numbers of blocks that divide the input channels, in descending order.

        Args:
            layer: Layer to decompose.
        """
        return [b for b in BLOCKS if layer.in_channels % b == 0]

    def directions(self, layer: Layer) -> Sequence[Aspect]:
        most, *fewer = self.divisors(layer)
        return (most, 1.0), *((b, most / b) for b in fewer)  # fewer blocks with a higher rank each

    def full_rank(self, layer: Layer) -> Rank | None:
        blocks = [] if layer.kind == "Embedding" else self.divisors(layer)
        return (blocks[0], min(layer.out_channels, layer.patch // blocks[0])) if blocks else None

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        allowed = self.divisors(layer)
        blocks = next((b for b in allowed if b <= rank[0]), allowed[-1])
        return blocks, max(1, min(rank[1], layer.out_channels, layer.patch // blocks))

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        blocks, r = rank
        return (
            Stage(layer.in_channels, blocks * r, layer.kernel, "hw", blocks),
            Stage(blocks * r, layer.out_channels),
        )

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return rank[0]

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        blocks, r = rank
        return (_slices(layer, target, blocks)[:, :, -r:].contiguous(),)

    def blocks(self, layer: Layer, theta: Parameters) -> Blocks:
        return Blocks(theta[0])

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return self.blocks(layer, theta).dense()

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        blocks, r = rank
        left, right = balanced(output.unflatten(-1, (blocks, r)).transpose(1, 2).flatten(0, 1), theta[0].flatten(0, 1))
        first = right.reshape(-1, layer.in_channels // blocks, *layer.kernel)
        last = left.unflatten(0, (-1, blocks)).transpose(1, 2).reshape(-1, blocks * r, 1, 1)
        return (first, last) if len(layer.shape) == 4 else (first.flatten(1), last.flatten(1))


# --- shared with other families -------------------------------------------------------------------


def input_start(layer: Layer, target: Target, rank: int) -> Tensor:
    """The leading combinations of input channels, (g, rank, C).

    Args:
        layer: Layer to decompose.
        target: What is fitted.
        rank: Number of combinations.
    """
    return first_rows(_input_rows(layer, target), rank)


@once_per_target
def _input_rows(layer: Layer, target: Target) -> Tensor:
    """The singular rows of the weight's unfolding (g, kh kw T, C)."""
    return singular_rows(target.weight.unflatten(-1, (layer.in_channels, -1)).transpose(-1, -2).flatten(1, 2))


@once_per_target
def _spatial_rows(layer: Layer, target: Target) -> Tensor:
    """The singular rows of the weight's unfolding (g, kw T, C kh)."""
    return singular_rows(target.weight.unflatten(-1, (-1, layer.kernel[1])).transpose(-1, -2).flatten(1, 2))


@once_per_target
def _slices(layer: Layer, target: Target, blocks: int) -> Tensor:
    """The SVD of each slice of the inputs alone, in their metric: rows of unit norm, by rising importance.

    With W = Q R of a slice of fewer inputs than rows, W S Wᵀ = Q (R S Rᵀ) Qᵀ. The shape is (g, blocks, r, inputs).
    """
    size = layer.patch // blocks
    found = []
    for i in range(blocks):
        part = target.inputs(slice(i * size, (i + 1) * size))
        r = part.weight if part.weight.shape[1] <= size else torch.linalg.qr(part.weight, mode="r")[1]
        u = torch.linalg.eigh(part.times_moment(r) @ r.mT)[1]
        found.append(torch.nn.functional.normalize(u.mT @ r, dim=-1))
    return torch.stack(found, 1)


def input_blocks(layer: Layer, channels: Tensor) -> Blocks:
    """K = V ⊗ I over kernel positions, in blocks of (R, C).

    Args:
        layer: Layer to decompose.
        channels: V (g, R, C).
    """
    return Blocks(channels.unsqueeze(1).expand(-1, layer.patch // layer.in_channels, -1, -1), interleaved=True)


def split_input(layer: Layer, channels: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Balance V and B (see `linear_algebra.balanced`).

    Args:
        layer: Layer to decompose.
        channels: V (g, R, C).
        output: B (g, T, kh * kw * R).

    Returns:
        V in the same shape, and B (g, T, R * kh * kw).
    """
    g, r, _ = channels.shape
    left = output.view(g, layer.out_channels, -1, r)
    new_left, new_right = balanced(left.flatten(1, 2), channels)
    return new_right, new_left.view(left.shape).transpose(-1, -2).flatten(2)


def width_blocks(layer: Layer, columns: Tensor) -> Blocks:
    """K = A ⊗ I over the kernel's width, in blocks of (R, C * kh).

    Args:
        layer: Layer to decompose.
        columns: A (g, R, C * kh).
    """
    return Blocks(columns.unsqueeze(1).expand(-1, layer.kernel[1], -1, -1), interleaved=True)
