"""CP decomposition, with the spatial modes separate or merged."""

from __future__ import annotations

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.types import Factors, Stage, Target
from rankopt.decompositions.variable_projection import OutputSolved, Parameters, equal_norms


def rank_one_rows(layer: Layer, target: Target, rank: int) -> tuple[Tensor, Tensor]:
    """Input (g, R, C) and spatial (g, R, kh * kw) vectors to start a CP from.

    The rows of W along its strongest output directions, as C x (kh * kw) matrices, fall into rank-one
    terms; the R terms that carry most are taken. If there are fewer, unit vectors fill up.
    """
    w = target.weight
    g, area = len(w), layer.patch // layer.in_channels
    directions = torch.linalg.eigh(target.times_moment(w) @ w.mT)[1]
    rows = (directions.mT @ w).unflatten(-1, (layer.in_channels, area))
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    channels = (u * s.sqrt().unsqueeze(-2)).transpose(-1, -2).flatten(1, 2)
    spatial = (vh * s.sqrt().unsqueeze(-1)).flatten(1, 2)
    parts = map(khatri_rao, channels.split(layer.patch, 1), spatial.split(layer.patch, 1))  # all at once is too large
    energy = torch.cat([(target.times_moment(terms) * terms).sum(-1) for terms in parts], 1)
    order = energy.argsort(-1, descending=True)[:, :rank]
    picked = [torch.gather(v, 1, order.unsqueeze(-1).expand(-1, -1, v.shape[-1])) for v in (channels, spatial)]
    short = rank - order.shape[-1]
    if rank >= layer.patch or short > 0:  # one unit vector of the patch each: exact at full rank
        index = torch.arange(rank if rank >= layer.patch else short, device=w.device) % layer.patch
        unit = [_one_hot(index // area, layer.in_channels, w), _one_hot(index % area, area, w)]
        unit = [v.expand(g, -1, -1) for v in unit]
        picked = unit if rank >= layer.patch else [torch.cat(pair, 1) for pair in zip(picked, unit, strict=True)]
    channels, spatial = equal_norms(picked)
    return channels.contiguous(), spatial.contiguous()


def _one_hot(index: Tensor, size: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(index, size).to(like)


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise Kronecker product: (g, r, i) and (g, r, j) -> (g, r, i * j)."""
    return torch.einsum("gri,grj->grij", a, b).flatten(2)


def divergence(factors: Factors, groups: int = 1) -> float:
    """Energy of the rank-one terms of a CP over that of their sum, ≥ 1 / R; without bound where it is degenerate.

    Terms then grow and cancel, and can be neither stored in few bits nor fine-tuned (Krijnen 2008; Phan 2020).
    factors: as `Cp` and `CpMerged` fit them. The highest of all groups.
    """
    *inputs, last = (f.double().reshape(groups, f.shape[0] // groups, -1) for f in factors)
    grams = [v @ v.mT for v in [*inputs, last.mT]]
    products = torch.stack(grams).prod(0)  # of every two terms
    apart = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (apart / products.sum((-2, -1)).clamp_min(1e-300)).max().item()


class CpMerged(OutputSolved):
    name = "cp_merged"
    effort = 1.6  # the family that mostly wins: its steps are worth most

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

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        return rank_one_rows(layer, target, rank[0])

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return khatri_rao(*theta)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        channels, spatial, out = equal_norms([*theta, output.mT])
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            spatial.reshape(-1, 1, *layer.kernel),
            out.mT.reshape(-1, rank[0], 1, 1),
        )


class Cp(OutputSolved):
    name = "cp"

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

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        channels, spatial = rank_one_rows(layer, target, rank[0])
        u, s, vh = torch.linalg.svd(spatial.unflatten(-1, layer.kernel))
        root = s[..., :1].sqrt()
        return channels, (u[..., 0] * root).contiguous(), (vh[..., 0, :] * root).contiguous()

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
