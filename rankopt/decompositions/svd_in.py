"""SVD of the weight unfolded along its input channels: 1 x 1 to R channels, then k x k."""

from __future__ import annotations

import torch
from torch import Tensor

from rankopt.core import Layer, Rank
from rankopt.decompositions.base import Factors, Stage, Target
from rankopt.decompositions.fitting import OutputSolved, Parameters, balanced, leading_rows


def input_start(layer: Layer, target: Target, rank: int) -> Tensor:
    """(g, rank, C): the leading combinations of input channels."""
    unfolded = target.weight.unflatten(-1, (layer.in_channels, -1)).transpose(-1, -2).flatten(1, 2)
    return leading_rows(unfolded, rank)


def input_rows(layer: Layer, channels: Tensor) -> Tensor:
    """K = V ⊗ I over kernel positions: (g, R, C) -> (g, R * kh * kw, n)."""
    eye = torch.eye(layer.patch // layer.in_channels, dtype=channels.dtype, device=channels.device)
    return torch.einsum("grc,kl->grkcl", channels, eye).flatten(3, 4).flatten(1, 2)


def split_input(layer: Layer, channels: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Balance V (g, R, C) against B (g, T, R * kh * kw); returns them in the same shapes."""
    g, r, _ = channels.shape
    left = output.view(g, layer.out_channels, r, -1).transpose(-1, -2)  # (g, T, k, R)
    new_left, new_right = balanced(left.flatten(1, 2), channels)
    return new_right, new_left.view(left.shape).transpose(-1, -2).flatten(2)


class SvdIn(OutputSolved):
    name = "svd_in"
    effort = 0.2

    def full_rank(self, layer: Layer) -> Rank | None:
        if layer.patch == layer.in_channels:
            return None  # the same as svd_out
        return (min(layer.in_channels, layer.out_channels * layer.patch // layer.in_channels),)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,) = rank
        return (Stage(layer.in_channels, r), Stage(r, layer.out_channels, layer.kernel, "hw"))

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        return (input_start(layer, target, rank[0]),)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return input_rows(layer, theta[0])

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        channels, output = split_input(layer, theta[0], output)
        return (
            channels.reshape(-1, layer.in_channels, 1, 1),
            output.reshape(-1, rank[0], *layer.kernel),
        )
