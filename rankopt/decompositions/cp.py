"""CP decompositions of a weight W(t, c, y, x), with the spatial modes separate or merged.

cp           W = Σ_r a_r(c) b_r(y) d_r(x) u_r(t)    1 x 1 to R, kh x 1 and 1 x kw depthwise, 1 x 1 to T (Lebedev 2015)
cp_merged    W = Σ_r a_r(c) s_r(y, x) u_r(t)        1 x 1 to R, kh x kw depthwise, 1 x 1 to T
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.linear_algebra import equal_norms
from rankopt.decompositions.targets import once_per_target
from rankopt.decompositions.types import Factors, Parameters, Stage, Target, is_sketch
from rankopt.decompositions.variable_projection import OutputSolved

SIZES = (2**13, 2**15)
"""Elements of K above which ranks are filled up to finer sizes (`next_size`)."""


class Cp(OutputSolved):
    """CP over the modes C, kh, kw, T (Lebedev 2015).

    Rank (R,); R (C + kh + kw + T) weights.
    """

    name = "cp"
    effort = 0.7

    def full_rank(self, layer: Layer) -> Rank | None:
        if min(layer.kernel) == 1:
            return None  # the same as cp_merged
        return (layer.patch,)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,), (height, width) = rank, layer.kernel
        return (
            Stage(layer.in_channels, r),
            Stage(r, r, (height, 1), "h", blocks=r),
            Stage(r, r, (1, width), "w", blocks=r),
            Stage(r, layer.out_channels),
        )

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return ()

    def filled(self, layer: Layer, rank: Rank) -> Rank:
        return (next_size(rank[0], layer.patch),)

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        channels, spatial = rank_one_rows(layer, target, rank[0])
        u, s, vh = torch.linalg.svd(spatial.unflatten(-1, layer.kernel))
        root = s[..., :1].sqrt()
        return channels, (u[..., 0] * root).contiguous(), (vh[..., 0, :] * root).contiguous()

    def mode_moments(self, layer: Layer, target: Target) -> Parameters:
        channels, spatial = channel_and_spatial_moments(layer, target)
        pixels = spatial.unflatten(-1, layer.kernel).unflatten(1, layer.kernel)
        return channels, torch.einsum("gyxzx->gyz", pixels), torch.einsum("gyxyz->gxz", pixels)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        channels, vertical, horizontal = theta
        return khatri_rao(channels, khatri_rao(vertical, horizontal))

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        channels, vertical, horizontal, out = equal_norms([*theta, output.mT])
        height, width = layer.kernel
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            vertical.reshape(-1, 1, height, 1),
            horizontal.reshape(-1, 1, 1, width),
            out.mT.reshape(-1, rank[0], 1, 1),
        )


class CpMerged(OutputSolved):
    """CP over the modes C, kh kw, T: at least as accurate as CP of the same rank, and one operation shorter.

    Rank (R,); R (C + kh kw + T) weights.
    """

    name = "cp_merged"
    effort = 0.9

    def full_rank(self, layer: Layer) -> Rank | None:
        if layer.patch == layer.in_channels:
            return None  # the same as svd_out
        return (layer.patch,)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,) = rank
        return (
            Stage(layer.in_channels, r),
            Stage(r, r, layer.kernel, "hw", blocks=r),
            Stage(r, layer.out_channels),
        )

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return ()

    def filled(self, layer: Layer, rank: Rank) -> Rank:
        return (next_size(rank[0], layer.patch),)

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        return rank_one_rows(layer, target, rank[0])

    def mode_moments(self, layer: Layer, target: Target) -> Parameters:
        return channel_and_spatial_moments(layer, target)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return khatri_rao(*theta)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        channels, spatial, out = equal_norms([*theta, output.mT])
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            spatial.reshape(-1, 1, *layer.kernel),
            out.mT.reshape(-1, rank[0], 1, 1),
        )


def next_size(rank: int, inputs: int) -> int:
    """The next of 8, 16, 32, ...; of larger fits there are two or four sizes from each power of two to the next.

    A step of small fits takes as long, whatever their size.

    Args:
        rank: Number of components.
        inputs: Inputs of the layer.
    """
    halvings = sum(rank * inputs > size for size in SIZES)
    step = 2 ** max(0, (rank - 1).bit_length() - 1 - halvings)
    return max(8, -(-rank // step) * step)


# --- start ----------------------------------------------------------------------------------------


def rank_one_rows(layer: Layer, target: Target, rank: int) -> tuple[Tensor, Tensor]:
    """The vectors from which a CP starts.

    Each row of W along its principal output directions is a matrix C x (kh * kw), whose SVD gives rank-one terms. The
    R terms with the most energy are taken, and unit vectors if there are fewer.

    Args:
        layer: Layer to decompose.
        target: What is fitted.
        rank: Number of components R.

    Returns:
        Input vectors (g, R, C) and spatial vectors (g, R, kh * kw).
    """
    w = target.weight
    g, area = len(w), layer.patch // layer.in_channels
    channels, spatial, order = rank_one_terms(layer, target)
    order = order[:, :rank]
    picked = [torch.gather(v, 1, order.unsqueeze(-1).expand(-1, -1, v.shape[-1])) for v in (channels, spatial)]
    short = rank - order.shape[-1]
    if rank >= layer.patch or short > 0:  # one unit vector per input of the patch: exact
        index = torch.arange(rank if rank >= layer.patch else short, device=w.device) % layer.patch
        unit = [_one_hot(index // area, layer.in_channels, w), _one_hot(index % area, area, w)]
        unit = [v.expand(g, -1, -1) for v in unit]
        picked = unit if rank >= layer.patch else [torch.cat(pair, 1) for pair in zip(picked, unit, strict=True)]
    channels, spatial = equal_norms(picked)
    return channels.contiguous(), spatial.contiguous()


@once_per_target
def rank_one_terms(layer: Layer, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """The rank-one terms of each row of W along its principal output directions.

    Args:
        layer: Layer to decompose.
        target: What is fitted.

    Returns:
        Input vectors (g, n, C), spatial vectors (g, n, kh * kw), and the order of the terms by falling energy (g, n).
    """
    w = target.weight
    directions = torch.linalg.eigh(target.times_moment(w) @ w.mT)[1]
    rows = (directions.mT @ w).unflatten(-1, (layer.in_channels, -1))
    channels, spatial = (x.flatten(1, 2) for x in rank_one_parts(rows))
    single = target.to(torch.float32)  # enough for their order
    vectors = (
        v.to(single.weight.dtype).split(layer.patch, 1) for v in (channels, spatial)
    )  # in parts, to bound memory
    energy = torch.cat([(single.times_moment(x) * x).sum(-1) for x in map(khatri_rao, *vectors)], 1)
    return channels, spatial, energy.argsort(-1, descending=True)


def rank_one_parts(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The terms s_i u_i v_iᵀ of the SVDs of many small matrices, by eigenvectors of their smaller Gram matrix.

    A GPU takes many small SVDs one after the other. Terms below 1e-8 of a matrix's largest one are not exact.

    Args:
        matrices: Tensor (..., a, b).

    Returns:
        Vectors (..., min(a, b), a) and (..., min(a, b), b), of the same norms s_i^½ in each term.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return rank_one_parts(matrices.mT)[::-1]
    right = torch.linalg.eigh(matrices.mT @ matrices)[1].mT.flip(-2)
    left = right @ matrices.mT
    root = left.norm(dim=-1, keepdim=True).sqrt()
    return left / root.clamp_min(1e-150), right * root


@once_per_target
def channel_and_spatial_moments(layer: Layer, target: Target) -> tuple[Tensor, Tensor]:
    """Partial traces of the input moment: of the channels (g, C, C) and of the kernel's pixels (g, kh kw, kh kw).

    Args:
        layer: Layer to decompose.
        target: What is fitted.
    """
    size = (layer.in_channels, layer.patch // layer.in_channels)
    moment = target.moment
    if target.diagonal or is_sketch(moment):
        squares = (moment if target.diagonal else moment[:, 0]).unflatten(1, size)
        factor = moment[:, 1:].unflatten(2, size) if is_sketch(moment) else moment.new_zeros(len(moment), 0, *size)
        return (
            torch.diag_embed(squares.sum(2)) + torch.einsum("glcp,gldp->gcd", factor, factor),
            torch.diag_embed(squares.sum(1)) + torch.einsum("glcp,glcq->gpq", factor, factor),
        )
    moment = moment.unflatten(2, size).unflatten(1, size)
    return torch.einsum("gcpdp->gcd", moment), torch.einsum("gcpcq->gpq", moment)


def _one_hot(index: Tensor, size: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(index, size).to(like)


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise Kronecker product, (g, r, i * j).

    Args:
        a: Tensor (g, r, i).
        b: Tensor (g, r, j).
    """
    return torch.einsum("gri,grj->grij", a, b).flatten(2)


# --- diagnosis ------------------------------------------------------------------------------------


def divergence(factors: Factors, groups: int = 1) -> float:
    """Measure how much the rank-one terms of a CP cancel: Σ_r ‖term_r‖² / ‖Σ_r term_r‖².

    The value is at least 1 / R and unbounded for degenerate decompositions (Krijnen 2008; Phan 2020), whose terms can
    be neither stored in few bits nor fine-tuned.

    Args:
        factors: Factors as `Cp` and `CpMerged` return them.
        groups: Groups of the layer.

    Returns:
        The highest value of all groups.
    """
    *inputs, last = (f.double().reshape(groups, f.shape[0] // groups, -1) for f in factors)
    grams = [v @ v.mT for v in [*inputs, last.mT]]
    products = torch.stack(grams).prod(0)  # inner products of all pairs of terms
    apart = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (apart / products.sum((-2, -1)).clamp_min(1e-300)).max().item()
