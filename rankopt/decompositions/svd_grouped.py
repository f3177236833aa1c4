"""Grouped SVD (ALDS, Liebenwein 2021): k x k in blocks of input channels to blocks * R channels, then 1 x 1.

The input channels fall into equal blocks, and each slice of the weight has an SVD of its own (the folding of
svd_out): W ≈ [U₁V₁ … U_kV_k], with R (C kh kw + blocks T) weights and as many MACs for each output position.
One block is svd_out; a block for every channel is a depthwise separable convolution.

ALDS fits each slice alone, in closed form (Eckart-Young; here in the metric of the slice's inputs, which is where
the search starts). Inputs of different slices are correlated, so all U are solved together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankopt.core import Layer, Rank
from rankopt.decompositions.base import Aspect, Factors, Stage, Target
from rankopt.decompositions.fitting import OutputSolved, Parameters, balanced

BLOCKS = (16, 8, 4, 2)


class SvdGrouped(OutputSolved):
    """Rank (blocks, R of each)."""

    name = "svd_grouped"
    effort = 0.2
    density = 0.5  # several aspects at each

    def blocks(self, layer: Layer) -> list[int]:
        """Into how many blocks the input channels may fall."""
        return [b for b in BLOCKS if layer.in_channels % b == 0]

    def directions(self, layer: Layer) -> Sequence[Aspect]:
        most, *fewer = self.blocks(layer)
        return (most, 1.0), *((b, most / b) for b in fewer)  # fewer blocks, more rank in each

    def full_rank(self, layer: Layer) -> Rank | None:
        blocks = [] if layer.kind == "Embedding" else self.blocks(layer)
        return (blocks[0], min(layer.out_channels, layer.patch // blocks[0])) if blocks else None

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        allowed = self.blocks(layer)
        blocks = next((b for b in allowed if b <= rank[0]), allowed[-1])
        return blocks, max(1, min(rank[1], layer.out_channels, layer.patch // blocks))

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        blocks, r = rank
        return (
            Stage(layer.in_channels, blocks * r, layer.kernel, "hw", blocks),
            Stage(blocks * r, layer.out_channels),
        )

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        blocks, r = rank
        size = layer.patch // blocks
        rows = []
        for i, w in enumerate(target.weight.split(size, -1)):
            own = target.moment[:, i * size :, i * size :][:, :size, :size]
            u = torch.linalg.eigh(w @ own @ w.mT)[1][..., -r:]
            rows.append(torch.nn.functional.normalize(u.mT @ w, dim=-1))
        return (torch.stack(rows, 1),)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        (right,) = theta
        eye = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)
        return torch.einsum("gzrm,zy->gzrym", right, eye).flatten(3, 4).flatten(1, 2)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        blocks, r = rank
        left, right = balanced(output.unflatten(-1, (blocks, r)).transpose(1, 2).flatten(0, 1), theta[0].flatten(0, 1))
        first = right.reshape(-1, layer.in_channels // blocks, *layer.kernel)
        last = left.unflatten(0, (-1, blocks)).transpose(1, 2).reshape(-1, blocks * r, 1, 1)
        return (first, last) if len(layer.shape) == 4 else (first.flatten(1), last.flatten(1))
