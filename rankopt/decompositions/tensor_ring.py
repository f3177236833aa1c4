"""Tensor ring (Zhao 2016; Wang 2018 for networks): a tensor train whose ends are joined by a bond R0.

    W(m₁, m₂, m₃, m₄) = Σ_zpqr G₁(z, p, m₁) G₂(q, p, m₂) G₃(r, q, m₃) G₄(m₄, z, r)

The modes are those of the tensor train: C, kh, kw, T, or C1, C2, T1, T2 of a Linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.core_networks import TRAIN, CoreNetwork, linear_modes
from rankopt.decompositions.linear_algebra import balanced_bond, leading_rows
from rankopt.decompositions.types import Bond, Factors, Parameters, Stage, Target


class TensorRing(CoreNetwork):
    """Tensor ring: 1 x 1 to R0 R1; each of R0 blocks through the same kh x 1 to R2 and 1 x kw to R3; 1 x 1 to T.

    The last stage sums the blocks. R0 = 1 is `tt`. Every core but the last is searched, starting from the TR-SVD.

    Rank (R0, R1, R2, R3); R0 C R1 + kh R1 R2 + kw R2 R3 + R0 R3 T weights of a convolution,
    R0 C1 R1 + C2 R1 R2 + T1 R2 R3 + R0 R3 T2 of a Linear.
    """

    name = "tr"
    effort = 0.5
    density = 0.5  # there are several aspects for each point
    aspects = ((2, 0.75, 0.35, 1.0), (4, 0.6, 0.4, 1.0), (8, 0.65, 0.6, 1.0))

    def modes(self, layer: Layer) -> tuple[int, int, int, int] | None:
        """The sizes of the four modes in the order of the ring; None if the family does not apply to the layer.

        Args:
            layer: Layer to decompose.
        """
        if len(layer.shape) == 2:
            return linear_modes(layer)
        return None if min(layer.kernel) == 1 else (layer.in_channels, *layer.kernel, layer.out_channels)

    def full_rank(self, layer: Layer) -> Rank | None:
        modes = self.modes(layer)
        if modes is None:
            return None
        a, b, c, d = modes
        return 1, min(a, b * c * d), min(a * b, c * d), min(a * b * c, d)

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        """Besides the bounds of `tt`, R0 R1 is at most the first mode and R0 R3 at most the last."""
        modes = self.modes(layer)
        assert modes is not None
        a, b, c, d = modes
        r0, r1, r2, r3 = (max(1, r) for r in rank)
        r0 = min(r0, a, d)
        r1, r3 = min(r1, a // r0), min(r3, d // r0)
        r2 = min(r2, r1 * b, r3 * c)
        return r0, min(r1, b * r2), r2, min(r3, c * r2)

    # --- fit, of a weight (g, T, C, kh, kw), or (1, T2, C1, C2, T1) of a Linear ---

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        modes = self.modes(layer)
        assert modes is not None
        (r0, r1, r2, r3), (a, b, c, d) = rank, modes
        if len(layer.shape) == 4:
            weight = target.weight.unflatten(-1, (a, b, c))
        else:
            weight = target.weight.view(-1, d, c, a, b).movedim(2, -1)
        first = leading_rows(weight.movedim(2, -1).flatten(1, -2), r0 * r1)
        first = first.unflatten(1, (r1, r0)).transpose(1, 2)  # so that every block has strong and weak directions
        rest = torch.einsum("gtabc,gzpa->gtzcpb", weight, first)
        second = leading_rows(rest.flatten(4).flatten(1, 3), r2)
        rest = torch.einsum("gtzcn,gqn->gtzqc", rest.flatten(4), second)
        return first.contiguous(), second, leading_rows(rest.flatten(3).flatten(1, 2), r3)

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        first, second, third = theta
        second = second.unflatten(-1, (first.shape[2], -1))
        third = third.unflatten(-1, (second.shape[1], -1))
        columns = torch.einsum("gzpa,gqpb->gzqab", first, second)
        order = "gzrabc" if len(layer.shape) == 4 else "gzrcab"
        return torch.einsum(f"gzqab,grqc->{order}", columns, third).flatten(3).flatten(1, 2)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        r0, r1, r2, r3 = rank
        first, second, third = theta  # (g, R0, R1, a), (g, R2, R1, b), (g, R3, R2, c)
        second, third = second.unflatten(-1, (r1, -1)), third.unflatten(-1, (r2, -1))
        last = output.unflatten(-1, (r0, r3))  # (g, d, R0, R3)
        last, third = balanced_bond(last, 3, third, 1)
        third, second = balanced_bond(third, 2, second, 1)
        second, first = balanced_bond(second, 2, first, 2)
        last, first = balanced_bond(last, 2, first, 1)
        first, last = first.flatten(1, 2), last.flatten(2)
        if len(layer.shape) == 2:
            return first[0], second[0], third[0], last[0]
        height, width = layer.kernel
        return (
            first.reshape(-1, layer.in_channels, 1, 1),
            second.reshape(-1, r1, height, 1),
            third.reshape(-1, r2, 1, width),
            last.reshape(-1, r0 * r3, 1, 1),
        )

    # --- Conv2d ---

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r0, r1, r2, r3), (height, width) = rank, layer.kernel
        return (
            Stage(layer.in_channels, r0 * r1),
            Stage(r0 * r1, r0 * r2, (height, 1), "h", r0, shared=True),
            Stage(r0 * r2, r0 * r3, (1, width), "w", r0, shared=True),
            Stage(r0 * r3, layer.out_channels),
        )

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        if len(layer.shape) == 2:
            return self.linear_weight(factors).reshape(layer.shape)
        first, second, third, last = (f.reshape(layer.groups, -1, f.shape[1], f.shape[2] * f.shape[3]) for f in factors)
        first = first.squeeze(-1).unflatten(1, (-1, second.shape[2]))
        last = last.squeeze(-1).unflatten(2, (-1, third.shape[1]))
        columns = torch.einsum("gzpa,gqpb->gzqab", first, second)
        whole = torch.einsum("gzqab,grqc,gtzr->gtabc", columns, third, last)
        return whole.reshape(layer.shape)

    # --- Linear ---

    def core_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        modes = self.modes(layer)
        assert modes is not None
        (r0, r1, r2, r3), (a, b, c, d) = rank, modes
        return (r0 * r1, a), (r2, r1, b), (r3, r2, c), (d, r0 * r3)

    def linear_bonds(self, rank: Rank) -> tuple[Bond, ...]:
        # Every split of the ring also cuts R0. The index of the middle one runs along R2 alone.
        places = ((0, 0), (1, 0), (3, 1))
        bonds = zip(rank[1:], TRAIN, places, strict=True)
        return tuple(Bond(rank[0] * r, inside, *place) for r, inside, place in bonds)

    def linear_macs(self, layer: Layer, rank: Rank) -> int:
        modes = self.modes(layer)
        assert modes is not None
        (r0, r1, r2, r3), (a, b, c, d) = rank, modes
        return r0 * (b * a * r1 + r1 * b * r2 + r2 * c * r3 + c * r3 * d)

    def contract(self, x: Tensor, cores: Factors) -> Tensor:
        first, second, third, last = cores
        y = (x.unflatten(-1, (first.shape[1], -1)).mT @ first.T).mT  # (N, R0 R1, C2)
        y = y.unflatten(1, (-1, second.shape[1])).flatten(2) @ second.flatten(1).T  # (N, R0, R2)
        y = y @ third.permute(1, 2, 0).flatten(1)  # (N, R0, T1 R3)
        y = y.unflatten(-1, (third.shape[2], -1)).transpose(1, 2).flatten(2)  # (N, T1, R0 R3)
        return (y @ last.T).flatten(1)

    def linear_weight(self, cores: Factors) -> Tensor:
        first, second, third, last = cores
        columns = torch.einsum("zpa,qpb->zqab", first.unflatten(0, (-1, second.shape[1])), second)
        right = torch.einsum("rqc,dzr->cdzq", third, last.unflatten(-1, (-1, third.shape[0])))
        return torch.einsum("cdzq,zqab->cdab", right, columns)
