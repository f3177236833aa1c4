"""SVD of the weight unfolded as (out, width) x (in, height): k x 1 to R channels, then 1 x k (Jaderberg 2014)."""

from __future__ import annotations

import torch
from torch import Tensor

from rankopt.core import Layer, Rank
from rankopt.decompositions.base import Factors, Stage, Target
from rankopt.decompositions.fitting import OutputSolved, Parameters, balanced, leading_rows


class SvdSpatial(OutputSolved):
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

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        unfolded = target.weight.unflatten(-1, (-1, layer.kernel[1])).transpose(-1, -2).flatten(1, 2)
        return (leading_rows(unfolded, rank[0]),)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return width_rows(layer, theta[0])

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        height, width = layer.kernel
        g, r, _ = theta[0].shape
        left = output.view(g, -1, r, width).transpose(-1, -2)  # (g, T, kw, R)
        new_left, right = balanced(left.flatten(1, 2), theta[0])
        second = new_left.view(left.shape).transpose(-1, -2)
        return (
            right.reshape(-1, layer.in_channels, height, 1),
            second.reshape(-1, r, 1, width),
        )


def width_rows(layer: Layer, columns: Tensor) -> Tensor:
    """K = A ⊗ I over the kernel's width: (g, R, C * kh) -> (g, R * kw, n)."""
    eye = torch.eye(layer.kernel[1], dtype=columns.dtype, device=columns.device)
    return torch.einsum("gra,jl->grjal", columns, eye).flatten(3, 4).flatten(1, 2)
