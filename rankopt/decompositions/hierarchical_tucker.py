"""Hierarchical Tucker (Hackbusch and Kühn 2009) on one dimension tree per kind of layer.

    convolution    tree ((C, kernel), T)           W = Σ_rps U(t, r) B(r, p, s) V(p, c) K(s, y x)
    Linear         tree ((C1, C2), (T1, T2))       W = Σ B(r, p, q) V1(p, c1) V2(q, c2) D(v, u, r) U1(u, t1) U2(t2, v)

The kernel is a single leaf, as in cp_merged: for a node of the same size it can express more than the R_h x R_w filters
of `tucker`, and R_s need not be a product. The other tree of a convolution, ((C, kh), (kw, T)), is `tt` once leaves as
small as kh and kw are absorbed, and no family of its own. The root of a Linear's tree is absorbed into a node;
C = C1 C2 and T = T1 T2 are factorised as evenly as possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.core_networks import CoreNetwork, linear_modes
from rankopt.decompositions.linear_algebra import balanced_bond, leading_rows
from rankopt.decompositions.tucker import balanced_tucker, kronecker, mode_bases, tucker_weight
from rankopt.decompositions.types import Aspect, Bond, Factors, Parameters, Stage, Target


class HierarchicalTucker(CoreNetwork):
    """Hierarchical Tucker: 1 x 1 to R_c, every channel through the same R_s filters of kh x kw, 1 x 1 to R, 1 x 1 to T.

    Convolution: rank (R_c, R_s, R); C R_c + kh kw R_s + R_c R_s R + R T weights.
    Linear: rank (R_1, R_2, R, R_3, R_4); C1 R_1 + C2 R_2 + R_1 R_2 R + R R_3 R_4 + T1 R_3 + T2 R_4 weights.
    """

    name = "ht"
    effort = 0.2
    density = 0.5  # there are several aspects for each point

    def directions(self, layer: Layer) -> Sequence[Aspect]:
        if len(layer.shape) == 2:
            return ((1.0, 1.0, 0.33, 1.0, 1.0), (1.0, 1.0, 0.66, 1.0, 1.0))
        area = layer.patch // layer.in_channels
        return (0.8, math.ceil(area / 3), 1.0), (0.5, math.ceil(area / 2), 1.0), (0.5, math.ceil(area * 3 / 4), 1.0)

    def full_rank(self, layer: Layer) -> Rank | None:
        if len(layer.shape) == 2:
            modes = linear_modes(layer)
            if modes is None:
                return None
            a, b, c, d = modes
            return min(a, b * c * d), min(b, a * c * d), min(a * b, c * d), min(c, a * b * d), min(d, a * b * c)
        area = layer.patch // layer.in_channels
        if area == 1:
            return None  # the same as svd_out
        c, t = layer.in_channels, layer.out_channels
        return min(c, t * area), min(area, c * t), min(t, layer.patch)

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        if len(layer.shape) == 2:
            r1, r2, r, r3, r4 = super().valid(layer, rank)
            r = min(r, r1 * r2, r3 * r4)
            return min(r1, r2 * r), min(r2, r1 * r), r, min(r3, r4 * r), min(r4, r3 * r)
        r_c, r_s, r = super().valid(layer, rank)
        return min(r_c, r_s * r), min(r_s, r_c * r), min(r, r_c * r_s)

    # --- convolutions: Tucker on the modes (C, kernel, T) ---

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        r_c, r_s, r = rank
        return (
            Stage(layer.in_channels, r_c),
            Stage(r_c, r_c * r_s, layer.kernel, "hw", r_c, shared=True),
            Stage(r_c * r_s, r),
            Stage(r, layer.out_channels),
        )

    def output_rank(self, layer: Layer, rank: Rank) -> tuple[int, int] | None:
        return (layer.out_channels, rank[2]) if len(layer.shape) == 4 else None

    def start(self, layer: Layer, target: Target, rank: Rank) -> Parameters:
        if len(layer.shape) == 4:
            return mode_bases(target.weight.unflatten(-1, (layer.in_channels, -1)), rank[:2])
        modes = linear_modes(layer)
        assert modes is not None
        weight = target.weight.view(-1, modes[3], modes[2], modes[0], modes[1])  # (g, T2, T1, C1, C2)
        third, first, second = mode_bases(weight, (rank[3], rank[0], rank[1]))
        left = torch.einsum("gxtab,gpa,gqb->gxtpq", weight, first, second)
        node = leading_rows(left.flatten(3).flatten(1, 2), rank[2])
        right = torch.einsum("gxtn,gnr,gst->gxsr", left.flatten(3), node.mT, third)
        return first, second, node, third, leading_rows(right.flatten(2), rank[4])

    def rows(self, layer: Layer, theta: Parameters) -> Tensor:
        if len(layer.shape) == 4:
            return kronecker(theta)
        first, second, node, third, last = theta
        inside = node @ kronecker((first, second))  # (g, R, n)
        outside = torch.einsum("gxsr,gst->gxtr", last.unflatten(-1, (third.shape[1], -1)), third)
        return (outside.flatten(1, 2) @ inside).reshape(*last.shape[:2], -1)

    def factors(self, layer: Layer, theta: Parameters, output: Tensor, rank: Rank) -> Factors:
        if len(layer.shape) == 4:
            last, core, (channels, spatial) = balanced_tucker(theta, output, rank[2])
            return (
                channels.reshape(-1, layer.in_channels, 1, 1),
                spatial.reshape(-1, 1, *layer.kernel),
                core.reshape(-1, rank[0] * rank[1], 1, 1),
                last.reshape(-1, rank[2], 1, 1),
            )
        first, second, node, third, top = theta
        node = node.unflatten(-1, rank[:2])  # (1, R, R_1, R_2)
        top = top.unflatten(-1, (rank[3], rank[2]))  # (1, R_4, R_3, R)
        node, first = balanced_bond(node, 2, first, 1)
        node, second = balanced_bond(node, 3, second, 1)
        top, third = balanced_bond(top, 2, third, 1)
        top, node = balanced_bond(top, 3, node, 1)
        output, top = balanced_bond(output, 2, top, 1)
        return tuple(f[0] for f in (first, second, node, top, third, output))

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        if len(layer.shape) == 4:
            return tucker_weight(layer, factors)
        return self.linear_weight(factors).reshape(layer.shape)

    # --- Linear ---

    def core_shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        modes = linear_modes(layer)
        assert modes is not None
        (r1, r2, r, r3, r4), (a, b, c, d) = rank, modes
        return (r1, a), (r2, b), (r, r1, r2), (r4, r3, r), (r3, c), (d, r4)

    def linear_bonds(self, rank: Rank) -> tuple[Bond, ...]:
        leaves = (("C1",), ("C2",), ("C1", "C2"), ("C1", "C2", "T2"), ("C1", "C2", "T1"))
        return tuple(map(Bond, rank, leaves, (0, 1, 2, 4, 3)))

    def linear_macs(self, layer: Layer, rank: Rank) -> int:
        modes = linear_modes(layer)
        assert modes is not None
        (r1, r2, r, r3, r4), (a, b, c, d) = rank, modes
        return pair_macs((a, b), (r1, r2))[0] + r1 * r2 * r + r * r3 * r4 + pair_macs((r3, r4), (c, d))[0]

    def contract(self, x: Tensor, cores: Factors) -> Tensor:
        first, second, node, top, third, last = cores
        y = contract_pair(x.unflatten(-1, (first.shape[1], -1)), first, second)  # (N, R_1, R_2)
        y = y.flatten(1) @ node.flatten(1).T @ top.flatten(0, 1).T  # (N, R_4 R_3)
        return contract_pair(y.unflatten(-1, top.shape[:2]).mT, third.T, last).flatten(1)

    def linear_weight(self, cores: Factors) -> Tensor:
        first, second, node, top, third, last = cores
        inside = torch.einsum("rpq,pa,qb->rab", node, first, second)
        outside = torch.einsum("ysr,sc,dy->cdr", top, third, last)
        return torch.einsum("cdr,rab->cdab", outside, inside)


# --- both modes of a matrix ---------------------------------------------------------------------


Pair = tuple[int, int]


def pair_macs(before: Pair, after: Pair) -> tuple[int, bool]:
    """The cost of multiplying both modes of a matrix in the cheaper order.

    Args:
        before: Sizes of the modes.
        after: Their new sizes.

    Returns:
        The multiply-accumulates, and whether the second mode goes first.
    """
    (i, j), (k, m) = before, after
    first, second = i * j * k + k * j * m, i * j * m + m * i * k
    return min(first, second), second < first


def contract_pair(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Multiply both modes of a batch of matrices in the cheaper order.

    Args:
        x: Tensor (N, i, j).
        first: Matrix (k, i).
        second: Matrix (m, j).

    Returns:
        Tensor (N, k, m).
    """
    _, second_first = pair_macs((x.shape[1], x.shape[2]), (len(first), len(second)))
    return ((x @ second.T).mT @ first.T).mT if second_first else (x.mT @ first.T).mT @ second.T
