"""Block-term decomposition into Tucker-2 terms (De Lathauwer 2008; Ye 2020 for networks).

W(t, c, y, x) = Σ_z Σ_pq U_z(t, q) G_z(q, p, y, x) V_z(p, c)    over z = 1 ... blocks
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.cp import rank_one_rows
from rankopt.decompositions.linear_algebra import balanced_bond, leading_rows
from rankopt.decompositions.types import Factors, Parameters, Stage, Target
from rankopt.decompositions.variable_projection import OutputSolved


class BlockTerm(OutputSolved):
    """Block-term Tucker-2: 1 x 1 to blocks * R_in, kh x kw in blocks to blocks * R_out, 1 x 1 to T.

    Blocks of rank (1, 1) are the components of a cp_merged; one block is tucker2.

    Rank (blocks, R_in, R_out), the same for every block; blocks (C R_in + kh kw R_in R_out + T R_out) weights.
    """

    name = "btt"
    effort = 0.5
    density = 0.5  # there are several aspects for each point
    aspects = ((2, 0.5, 1.0), (4, 0.5, 1.0), (8, 0.5, 1.0))

    def full_rank(self, layer: Layer) -> Rank | None:
        area = layer.patch // layer.in_channels
        if area == 1:
            return None  # the same as svd_out
        return 1, min(layer.in_channels, layer.out_channels * area), min(layer.out_channels, layer.patch)

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        area = layer.patch // layer.in_channels
        blocks, r_in, r_out = (max(1, r) for r in rank)
        r_in, r_out = min(r_in, layer.in_channels), min(r_out, layer.out_channels)
        return min(blocks, layer.patch), min(r_in, r_out * area), min(r_out, r_in * area)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        blocks, r_in, r_out = rank
        return (
            Stage(layer.in_channels, blocks * r_in),
            Stage(blocks * r_in, blocks * r_out, layer.kernel, "hw", blocks),
            Stage(blocks * r_out, layer.out_channels),
        )

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return rank[0]  # blocks times ranks would grow with the largest of both

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        blocks, r_in, r_out = rank
        if r_in == r_out == 1:
            vectors, spatial = rank_one_rows(layer, target, blocks)
            return vectors.unsqueeze(2), spatial[:, :, None, None]
        # One block after the other, each fitted to the residual of those before: (g, T, C, kh * kw)
        rest = target.weight.unflatten(-1, (layer.in_channels, -1))
        channels: list[Tensor] = []
        cores: list[Tensor] = []
        for _ in range(blocks):
            v = leading_rows(rest.transpose(-1, -2).flatten(1, 2), r_in)
            v = torch.linalg.qr(v.mT)[0].mT
            inside = torch.einsum("gtck,gic->gtik", rest, v)
            core = leading_rows(inside.flatten(2), r_out)
            taken = inside.flatten(2) @ core.mT @ core
            rest = rest - torch.einsum("gtik,gic->gtck", taken.view(inside.shape), v)
            channels.append(v)
            cores.append(core.unflatten(-1, (r_in, -1)))
        return torch.stack(channels, 1), torch.stack(cores, 1)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        channels, core = theta  # (g, blocks, R_in, C), (g, blocks, R_out, R_in, kh * kw)
        return torch.einsum("gzic,gzoik->gzock", channels, core).flatten(3, 4).flatten(1, 2)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        blocks, r_in, r_out = rank
        channels, core = (t.flatten(0, 1) for t in theta)
        output = output.unflatten(-1, (blocks, r_out)).transpose(1, 2).flatten(0, 1)  # (g * blocks, T, R_out)
        output, core = balanced_bond(output, 2, core, 1)
        core, channels = balanced_bond(core, 2, channels, 1)
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            core.reshape(-1, r_in, *layer.kernel),
            output.unflatten(0, (-1, blocks)).transpose(1, 2).reshape(-1, blocks * r_out, 1, 1),
        )
