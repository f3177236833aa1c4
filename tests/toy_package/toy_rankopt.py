"""What another package can add to rankopt: a decomposition (an instance) and a strategy (a class)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rankopt.core.records import Layer, Proposal, Rank
from rankopt.decompositions.linear_algebra import balanced, leading_rows
from rankopt.decompositions.types import Factors, Parameters, Stage, Target
from rankopt.decompositions.variable_projection import OutputSolved
from rankopt.strategies.allocation import allocate
from rankopt.strategies.base import Strategy


class WidthFirst(OutputSolved):
    """SVD of the weight unfolded as (out, height) x (in, width): 1 x k to R channels, then k x 1."""

    name = "toy_svd_spatial"
    effort = 0.2

    def full_rank(self, layer: Layer) -> Rank | None:
        height, width = layer.kernel
        if min(height, width) == 1:
            return None
        return (min(layer.in_channels * width, layer.out_channels * height),)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,), (height, width) = rank, layer.kernel
        return Stage(layer.in_channels, r, (1, width), "w"), Stage(r, layer.out_channels, (height, 1), "h")

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        kernel = target.weight.unflatten(-1, (layer.in_channels, *layer.kernel))  # (g, T, C, kh, kw)
        return (leading_rows(kernel.transpose(2, 3).flatten(1, 2).flatten(2), rank[0]),)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        columns = theta[0].unflatten(-1, (layer.in_channels, -1))
        eye = torch.eye(layer.kernel[0], dtype=columns.dtype, device=columns.device)
        return torch.einsum("grcw,jl->grjclw", columns, eye).flatten(3).flatten(1, 2)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        height, width = layer.kernel
        g, r, _ = theta[0].shape
        left = output.view(g, -1, r, height).transpose(-1, -2)  # (g, T, kh, R)
        new_left, right = balanced(left.flatten(1, 2), theta[0])
        second = new_left.view(left.shape).transpose(-1, -2)
        return right.reshape(-1, layer.in_channels, 1, width), second.reshape(-1, r, height, 1)


TOY = WidthFirst()


class Shaken(Strategy):
    """The exact allocation, then the same with some layers moved at random."""

    name = "toy_shaken"

    def propose(self, number: int) -> Proposal | None:
        best = allocate(self.problem).proposal
        if number == 0:
            return best
        moves = np.random.default_rng([self.seed, number]).integers(-3, 4, len(best))
        return tuple(
            int(np.clip(i + move, 0, len(f) - 1))
            for i, move, f in zip(best, moves, self.problem.frontiers, strict=True)
        )
