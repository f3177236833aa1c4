"""Tucker decompositions of a weight W(t, c, y, x).

    tucker2    W = Σ_pq U(t, q) G(q, p, y, x) V(p, c)                      over the channel modes (Kim 2016)
    tucker     W = Σ_pijq U(t, q) G(q, p, i, j) V(p, c) A(i, y) B(j, x)    over all modes (Tucker 1966)

Only the input side is searched; core and output factor follow by reduced-rank regression.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.linear_algebra import balanced, balanced_bond, leading_rows
from rankopt.decompositions.output_solver import Blocks
from rankopt.decompositions.svd import input_blocks, input_start, split_input
from rankopt.decompositions.types import Aspect, Factors, Parameters, Stage, Target
from rankopt.decompositions.variable_projection import OutputSolved

SWEEPS = 20
"""Passes of HOOI over all modes."""


class Tucker2(OutputSolved):
    """Tucker-2 (Kim 2016): 1 x 1 to R_in, the core of kh x kw to R_out, 1 x 1 to T.

    Rank (R_in, R_out); C R_in + kh kw R_in R_out + R_out T weights.
    """

    name = "tucker2"
    effort = 0.2
    density = 0.5  # there are several aspects for each point
    aspects = ((1.0, 1.0), (0.7, 1.0), (1.0, 0.7))

    def full_rank(self, layer: Layer) -> Rank | None:
        if layer.patch == layer.in_channels:
            return None  # the same as svd_out
        area = layer.patch // layer.in_channels
        return min(layer.in_channels, layer.out_channels * area), min(layer.out_channels, layer.patch)

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        area = layer.patch // layer.in_channels
        r_in, r_out = super().valid(layer, rank)
        return min(r_in, r_out * area), min(r_out, r_in * area)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        r_in, r_out = rank
        return (
            Stage(layer.in_channels, r_in),
            Stage(r_in, r_out, layer.kernel, "hw"),
            Stage(r_out, layer.out_channels),
        )

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return ()

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        if target.plain:
            return plain_bases(target.weight.unflatten(-1, (layer.in_channels, -1)), rank[:1], rank[1])
        return (input_start(layer, target, rank[0]),)

    def blocks(self, layer: Layer, theta: Parameters) -> Blocks:
        return input_blocks(layer, theta[0])

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return self.blocks(layer, theta).dense()

    def output_rank(self, layer: Layer, rank: Rank) -> tuple[int, int] | None:
        return layer.out_channels, rank[1]

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        r_in, r_out = rank
        channels, output = split_input(layer, theta[0], output)
        last, core = low_rank(output, r_out)
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            core.reshape(-1, r_in, *layer.kernel),
            last.reshape(-1, r_out, 1, 1),
        )


class Tucker(OutputSolved):
    """Tucker over all four modes (Tucker 1966): 1 x 1, shared kh x 1, shared 1 x kw, 1 x 1 core, 1 x 1.

    Each of the R_in channels passes the same R_h vertical and then the same R_w horizontal filters. (Absorbing the
    spatial factors into the core would give a Tucker-2.)

    Rank (R_in, R_h, R_w, R_out); C R_in + kh R_h + kw R_w + R_in R_h R_w R_out + R_out T weights, fewer than Tucker-2
    where R_h R_w < kh kw.
    """

    name = "tucker"
    effort = 0.2
    density = 0.5  # there are several aspects for each point

    def directions(self, layer: Layer) -> Sequence[Aspect]:
        height, width = layer.kernel
        most, more = math.ceil(height * 2 / 3), math.ceil(width * 2 / 3)
        return (0.5, most, more, 1.0), (0.8, most, more, 1.0), (0.5, height, more, 1.0)

    def full_rank(self, layer: Layer) -> Rank | None:
        if min(layer.kernel) == 1:
            return None  # the same as ht
        area = layer.patch // layer.in_channels
        inputs = min(layer.in_channels, layer.out_channels * area)
        return inputs, *layer.kernel, min(layer.out_channels, layer.patch)

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        rank = super().valid(layer, rank)
        return tuple(min(r, math.prod(rank) // r) for r in rank)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r_in, r_h, r_w, r_out), (height, width) = rank, layer.kernel
        return (
            Stage(layer.in_channels, r_in),
            Stage(r_in, r_in * r_h, (height, 1), "h", r_in, shared=True),
            Stage(r_in * r_h, r_in * r_h * r_w, (1, width), "w", r_in * r_h, shared=True),
            Stage(r_in * r_h * r_w, r_out),
            Stage(r_out, layer.out_channels),
        )

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return rank[1:3]  # the product of ranks would grow with the largest of each

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        weight = target.weight.unflatten(-1, (layer.in_channels, *layer.kernel))
        return plain_bases(weight, rank[:3], rank[3]) if target.plain else mode_bases(weight, rank[:3])

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return kronecker(theta)

    def output_rank(self, layer: Layer, rank: Rank) -> tuple[int, int] | None:
        return layer.out_channels, rank[3]

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        last, core, (channels, vertical, horizontal) = balanced_tucker(theta, output, rank[3])
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            vertical.reshape(-1, 1, layer.kernel[0], 1),
            horizontal.reshape(-1, 1, 1, layer.kernel[1]),
            core.reshape(-1, math.prod(rank[:3]), 1, 1),
            last.reshape(-1, rank[3], 1, 1),
        )

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        return tucker_weight(layer, factors)


# --- Tucker with any number of input modes --------------------------------------------------------


def mode_bases(weight: Tensor, ranks: Sequence[int]) -> Parameters:
    """The leading directions of each input mode: HOSVD (De Lathauwer 2000).

    Args:
        weight: Tensor (g, T, *modes).
        ranks: One rank per leading input mode.

    Returns:
        One basis (g, rank, mode) per rank.
    """
    return tuple(leading_rows(weight.movedim(i + 2, -1).flatten(1, -2), r) for i, r in enumerate(ranks))


def plain_bases(weight: Tensor, ranks: Sequence[int], output_rank: int) -> Parameters:
    """The best basis of each input mode for a fit without data: HOOI (De Lathauwer 2000), by tensorly.

    With a moment the best bases have no closed form.

    Args:
        weight: Tensor (g, T, *modes).
        ranks: One rank per leading input mode.
        output_rank: Rank over T.

    Returns:
        One basis (g, rank, mode) per rank.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    rank, modes = [output_rank, *ranks], list(range(len(ranks) + 1))
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        fits = [partial_tucker(w, rank, modes=modes, n_iter_max=SWEEPS, tol=0)[0][1][1:] for w in weight]
    return tuple(torch.stack([basis.mT for basis in bases]) for bases in zip(*fits, strict=True))


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of input factors, (g, product of ranks, product of modes).

    Args:
        factors: Tensors (g, rank, mode).
    """
    product = factors[0]
    for factor in factors[1:]:
        product = torch.einsum("gra,gsb->grsab", product, factor).flatten(3, 4).flatten(1, 2)
    return product


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix of a given rank, by SVD, as balanced factors.

    Args:
        matrix: Tensor (g, a, b).
        rank: The rank.

    Returns:
        Factors (g, a, rank) and (g, rank, b).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return balanced(u[..., :rank], s[..., :rank].unsqueeze(-1) * vh[..., :rank, :])


def balanced_tucker(theta: Parameters, output: Tensor, rank: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Split B into core and output factor, and balance all factors.

    Args:
        theta: Input factors (g, rank, mode).
        output: B (g, T, product of ranks).
        rank: Rank over T.

    Returns:
        Output factor (g, T, rank), core (g, rank, *ranks) and the input factors.
    """
    last, core = low_rank(output, rank)
    core = core.unflatten(-1, tuple(f.shape[1] for f in theta))
    balanced_factors = []
    for i, factor in enumerate(theta):
        core, new = balanced_bond(core, i + 2, factor, 1)
        balanced_factors.append(new)
    last, core = balanced_bond(last, 2, core, 1)
    return last, core, balanced_factors


def tucker_weight(layer: Layer, factors: Factors) -> Tensor:
    """The dense weight of a Tucker decomposition with shared spatial stages.

    Args:
        layer: The decomposed layer.
        factors: Input factor, spatial factors, core and output factor, as stage weights.
    """
    g = layer.groups
    channels, *spatial, core, last = (f.reshape(g, f.shape[0] // g, -1) for f in factors)
    return (last @ core @ kronecker([channels, *spatial])).reshape(layer.shape)
