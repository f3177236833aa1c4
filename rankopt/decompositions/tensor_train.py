"""Tensor train over four modes (Oseledets 2011).

    W(m₁, m₂, m₃, m₄) = Σ_pqr G₁(p, m₁) G₂(q, p, m₂) G₃(r, q, m₃) G₄(m₄, r)

The modes of a convolution are C, kh, kw, T; those of a Linear C1, C2, T1, T2 with C = C1 C2 and T = T1 T2 factorised as
evenly as possible.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.core_networks import TRAIN, CoreNetwork, linear_modes
from rankopt.decompositions.linear_algebra import balanced_bond, leading_rows
from rankopt.decompositions.output_solver import Blocks
from rankopt.decompositions.svd import input_start, width_blocks
from rankopt.decompositions.tucker import low_rank
from rankopt.decompositions.types import Bond, Factors, Parameters, Stage, Target
from rankopt.decompositions.variable_projection import OutputSolved


class TensorTrain(CoreNetwork):
    """Tensor train (Oseledets 2011): 1 x 1 to R1, kh x 1 to R2, 1 x kw to R3, 1 x 1 to T.

    Rank (R1, R2, R3); C R1 + kh R1 R2 + kw R2 R3 + T R3 weights of a convolution,
    C1 R1 + C2 R1 R2 + T1 R2 R3 + T2 R3 of a Linear.
    """

    name = "tt"
    effort = 0.2
    density = 0.5  # there are several aspects for each point
    aspects = ((1.0, 0.33, 1.0), (1.0, 0.66, 1.0))

    def modes(self, layer: Layer) -> tuple[int, int, int, int] | None:
        """The sizes of the four modes in the order of the train; None if the family does not apply to the layer.

        Args:
            layer: Layer to decompose.
        """
        if len(layer.shape) == 2:
            return linear_modes(layer)
        if min(layer.kernel) == 1:
            return None
        return (layer.in_channels, *layer.kernel, layer.out_channels)

    def full_rank(self, layer: Layer) -> Rank | None:
        modes = self.modes(layer)
        if modes is None:
            return None
        a, b, c, d = modes
        return min(a, b * c * d), min(a * b, c * d), min(a * b * c, d)

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        modes = self.modes(layer)
        assert modes is not None
        r1, r2, r3 = super().valid(layer, rank)
        _, b, c, _ = modes
        r2 = min(r2, r1 * b, r3 * c)
        return min(r1, b * r2), r2, min(r3, c * r2)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        r1, r2, r3 = rank
        height, width = layer.kernel
        return (
            Stage(layer.in_channels, r1),
            Stage(r1, r2, (height, 1), "h"),
            Stage(r2, r3, (1, width), "w"),
            Stage(r3, layer.out_channels),
        )

    # --- fit: the first two cores are searched ---

    def padding(self, layer: Layer, rank: Rank) -> Hashable:
        return ()

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        modes = self.modes(layer)
        assert modes is not None
        a, b, _, _ = modes
        if len(layer.shape) == 2:
            unfolded = target.weight.unflatten(-1, (a, b)).transpose(-1, -2).flatten(1, 2)
            first = leading_rows(unfolded, rank[0])
        else:
            first = input_start(layer, target, rank[0])
        first = torch.linalg.qr(first.mT)[0].mT.contiguous()
        # W in the basis of the first core, unfolded as (T, width) x (R1, height)
        projected = torch.einsum("gtabk,gra->gtkrb", target.weight.unflatten(-1, (a, b, -1)), first)
        second = leading_rows(projected.flatten(3, 4).flatten(1, 2), rank[1])
        return first, second.unflatten(-1, (rank[0], -1))

    def blocks(self, layer: Layer, theta: Parameters) -> Blocks:
        first, second = theta
        columns = torch.einsum("gra,gsrb->gsab", first, second).flatten(2)
        return Blocks(columns.unsqueeze(1)) if len(layer.shape) == 2 else width_blocks(layer, columns)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        return self.blocks(layer, theta).dense()

    def output_rank(self, layer: Layer, rank: Rank) -> tuple[int, int] | None:
        modes = self.modes(layer)
        assert modes is not None
        return modes[3], rank[2]

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        modes = self.modes(layer)
        assert modes is not None
        (r1, r2, r3), (a, b, c, d) = rank, modes
        first, second = theta
        g = len(first)
        if len(layer.shape) == 2:  # B (T1 T2, R2) -> (T2, R2 T1)
            output = output.view(g, c, d, r2).permute(0, 2, 3, 1).reshape(g, d, r2 * c)
        else:  # B (T, kw R2)
            output = output.view(g, d, c, r2).transpose(2, 3).flatten(2)
        last, third = low_rank(output, r3)  # (g, d, R3), (g, R3, R2 * c)
        third, second = balanced_bond(third.view(g, r3, r2, c), 2, second, 1)
        second, first = balanced_bond(second, 2, first, 1)
        if len(layer.shape) == 2:
            return first[0], second[0], third[0], last[0]
        return (
            first.reshape(-1, a, 1, 1),
            second.reshape(-1, r1, b, 1),
            third.reshape(-1, r2, 1, c),
            last.reshape(-1, r3, 1, 1),
        )

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        if len(layer.shape) == 2:
            return self.linear_weight(factors).reshape(layer.shape)
        return super().weight(layer, factors)

    # --- Linear ---

    target = OutputSolved.target  # B spans T1 and T2, so the output metric need not factorise

    def core_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        modes = self.modes(layer)
        assert modes is not None
        (r1, r2, r3), (a, b, c, d) = rank, modes
        return (r1, a), (r2, r1, b), (r3, r2, c), (d, r3)

    def linear_bonds(self, rank: Rank) -> tuple[Bond, ...]:
        return tuple(map(Bond, rank, TRAIN, range(3)))

    def linear_macs(self, layer: Layer, rank: Rank) -> int:
        modes = self.modes(layer)
        assert modes is not None
        (r1, r2, r3), (a, b, c, d) = rank, modes
        return a * b * r1 + r1 * b * r2 + r2 * c * r3 + r3 * c * d

    def contract(self, x: Tensor, cores: Factors) -> Tensor:
        first, second, third, last = cores
        y = x.unflatten(-1, (first.shape[1], -1)).mT @ first.T  # (N, C2, R1)
        y = y.mT.flatten(1) @ second.flatten(1).T  # (N, R2)
        y = y @ third.permute(1, 2, 0).flatten(1)  # (N, T1 R3)
        return (y.unflatten(-1, (third.shape[2], -1)) @ last.T).flatten(1)

    def linear_weight(self, cores: Factors) -> Tensor:
        return torch.einsum("pa,qpb,rqc,dr->cdab", *cores)
