"""CP (Lebedev 2015): 1 x 1 to R, k x 1 and 1 x k depthwise, 1 x 1 to T."""

from __future__ import annotations

import torch
from torch import Tensor

from rankopt.core import Layer, Rank
from rankopt.decompositions.base import Factors, Stage, Target
from rankopt.decompositions.cp_merged import khatri_rao, rank_one_rows
from rankopt.decompositions.fitting import OutputSolved, Parameters, equal_norms


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
