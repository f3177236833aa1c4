"""SVD of the weight unfolded along its output channels: k x k to R channels, then 1 x 1.

Of an Embedding: rows of R entries, then a Linear.

In the output metric this is reduced-rank regression (Izenman 1975): Ŵ = U Uᵀ W with U the leading
eigenvectors of W S Wᵀ. Closed form; one eigendecomposition serves every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rankopt.core import Layer, Rank
from rankopt.decompositions.base import Decomposition, Fit, Stage
from rankopt.decompositions.fitting import balanced, declare, prepare


class SvdOut(Decomposition):
    name = "svd_out"
    density = 4.0  # a further rank costs next to nothing

    def full_rank(self, layer: Layer) -> Rank | None:
        return (min(layer.out_channels, layer.patch),)

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        (r,) = rank
        return (Stage(layer.in_channels, r, layer.kernel, "hw"), Stage(r, layer.out_channels))

    def fit(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> Iterator[Fit]:
        target, undo = prepare(layer, weight, moment, metric)
        vectors = torch.linalg.eigh(target.times_moment(target.weight) @ target.weight.mT)[1].flip(-1)
        for rank in ranks:
            u = vectors[..., : rank[0]]
            left, right = balanced(undo @ u, u.mT @ target.weight)
            first = right.reshape(-1, layer.in_channels, *layer.kernel)
            second = left.reshape(-1, rank[0], 1, 1)
            if len(layer.shape) == 2:
                first, second = first.flatten(1), second.flatten(1)
            yield declare(self, layer, weight, (first, second), rank, moment, metric)
