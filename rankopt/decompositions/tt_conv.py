"""Tensor train of a convolution (Garipov 2016): kernel positions first, then pairs of an output and an input mode.

    W(l, t, c) = G₀[l] G₁[t₁, c₁] G₂[t₂, c₂] G₃[t₃, c₃],    l a position of the d × d kernel

over the modes d², C₁T₁, C₂T₂, C₃T₃ (thesis, equations 6.11 and 6.12, where the channels' factors are given and
sizes without them get empty channels; here as in tt_matrix.py). Kernels of one position have no G₀.

The weight is built from the cores, then applied as one dense convolution: contracting the input with them would
hold C R₁ maps of the input's size. So parameters fall, MACs do not.
"""

from __future__ import annotations

import math

from rankopt.core import RECONSTRUCTED, Layer, Rank
from rankopt.decompositions.tt_matrix import TensorTrainMatrix


class TensorTrainConvolution(TensorTrainMatrix):
    name = "tt_conv"
    effort = 0.3
    density = 0.5  # several aspects at each
    aspects = ((1.0, 0.2, 1.0), (1.0, 0.6, 1.0))

    forms = (RECONSTRUCTED,)

    def has_place(self, layer: Layer) -> bool:
        return len(layer.shape) == 4

    def modes(self, layer: Layer) -> tuple[int, ...]:
        area = math.prod(layer.kernel)
        return (area, *super().modes(layer)) if area > 1 else super().modes(layer)

    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        area = math.prod(layer.kernel)
        if area == 1:
            return super().shapes(layer, rank)
        (_, *first), *others = super().shapes(layer, rank[1:])
        return (1, area, rank[0]), (rank[0], *first), *others

    def _largest(self, layer: Layer, full: Rank, aspect: tuple[float, ...], weights: float) -> Rank:
        return super()._largest(layer, full, aspect[-len(full) :], weights)  # no G₀, no first proportion
