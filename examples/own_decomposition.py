"""A decomposition of your own: the SVD of a k×k kernel unfolded as (out, height) × (in, width).

It turns a convolution into 1×k to R channels and k×1 to T: as `svd_spatial`, but the other axis first. It is fitted by
itself, and then takes part in a search (docs/how-to/add-decomposition.md).

Run: python examples/own_decomposition.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rankopt
from rankopt.core.records import Layer, Rank
from rankopt.decompositions.linear_algebra import balanced, leading_rows
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.types import Factors, Parameters, Stage, Target
from rankopt.decompositions.variable_projection import OutputSolved


class WidthFirst(OutputSolved):
    """Ŵ[t, c, i, j] = Σ_r B[t, i, r] A[r, c, j], with A searched and B solved for."""

    name = "width_first"

    def full_rank(self, layer: Layer) -> Rank | None:
        height, width = layer.kernel
        if min(height, width) == 1:
            return None  # has no place on 1×1, 1×k and Linear layers
        return (min(layer.in_channels * width, layer.out_channels * height),)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,), (height, width) = rank, layer.kernel
        return Stage(layer.in_channels, r, (1, width), "w"), Stage(r, layer.out_channels, (height, 1), "h")

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        """A, of shape (groups, R, C * width), from the leading rows of the unfolded weight."""
        kernel = target.weight.unflatten(-1, (layer.in_channels, *layer.kernel))
        return (leading_rows(kernel.transpose(2, 3).flatten(1, 2).flatten(2), rank[0]),)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        """K(θ) with Ŵ = B K: what the input side can express, (groups, R * height, C * height * width)."""
        columns = theta[0].unflatten(-1, (layer.in_channels, -1))
        eye = torch.eye(layer.kernel[0], dtype=columns.dtype, device=columns.device)
        return torch.einsum("grcw,jl->grjclw", columns, eye).flatten(3).flatten(1, 2)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        """The weights of the two stages, their norms balanced so that they can be trained."""
        height, width = layer.kernel
        g, r, _ = theta[0].shape
        left = output.view(g, -1, r, height).transpose(-1, -2)  # (g, T, height, R)
        new_left, right = balanced(left.flatten(1, 2), theta[0])
        second = new_left.view(left.shape).transpose(-1, -2)
        return right.reshape(-1, layer.in_channels, 1, width), second.reshape(-1, r, height, 1)


def main() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1)
    x = torch.randn(4, 16, 8, 8)
    (layer,) = rankopt.inventory(conv, x)
    family = WidthFirst()
    ranks = family.ranks(layer, fractions=(0.25, 0.5, 0.75))
    for fit in family.fit(layer, conv.weight, ranks):
        small = family.build(conv, layer, fit.rank)
        load_factors(small, fit.factors)
        distance = (small(x) - conv(x)).norm() / (conv(x) - conv.bias.view(-1, 1, 1)).norm()
        share = family.weights(layer, fit.rank) / layer.weights
        print(f"rank {fit.rank}: {share:.0%} of the weights, error {fit.error:.3f}, outputs {distance:.3f} apart")

    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    batches = [torch.randn(64, 16, 8, 8) for _ in range(2)]
    space = rankopt.SearchSpace(points=6, steps=20)  # quick
    result = rankopt.compress(model, batches, {"params": 0.5}, families=[WidthFirst(), "svd_out"], space=space)
    print(result.summary())


if __name__ == "__main__":
    main()
