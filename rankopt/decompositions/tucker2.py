"""Tucker-2 over the channel modes (Kim 2016): 1 x 1 to R_in, k x k core to R_out, 1 x 1 to T.

Only the input factor is searched; core and output factor follow by reduced-rank regression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankopt.core import Layer, Rank
from rankopt.decompositions.base import Factors, Stage, Target
from rankopt.decompositions.fitting import OutputSolved, Parameters, balanced, hooi
from rankopt.decompositions.svd_in import input_rows, input_start, split_input


class Tucker2(OutputSolved):
    name = "tucker2"
    effort = 0.2
    density = 0.5  # several aspects at each
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

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        channels = input_start(layer, target, rank[0])
        if target.plain:
            (channels,) = hooi(target.weight.unflatten(-1, (layer.in_channels, -1)), (channels,), rank[1])
        return (channels,)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return input_rows(layer, theta[0])

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


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A matrix (g, a, b) of at most this rank as balanced factors (g, a, rank) and (g, rank, b)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return balanced(u[..., :rank], s[..., :rank].unsqueeze(-1) * vh[..., :rank, :])
