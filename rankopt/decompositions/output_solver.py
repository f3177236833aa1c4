"""The least-squares problem inside of variable projection: the output factor B for given rows K, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankopt.decompositions.types import Target, is_sketch

RIDGE = 1e-10
"""Relative to each row's norm in K S Kᵀ: keeps nearly dependent rows solvable."""


class Blocks(NamedTuple):
    """A block-diagonal K, the rows of one block after those of the other. Products with it skip the zeros.

    Attributes:
        diagonal: The blocks (g, z, r, n / z): each holds r of the m = z r rows, over a z-th of the inputs.
        interleaved: Whether block i has the inputs i, i + z, i + 2 z, ...: K = A ⊗ I. Otherwise they follow each other.
    """

    diagonal: Tensor
    interleaved: bool = False

    def dense(self) -> Tensor:
        """K (g, m, n)."""
        z = self.diagonal.shape[1]
        eye = torch.eye(z, dtype=self.diagonal.dtype, device=self.diagonal.device)
        order = "gzrny" if self.interleaved else "gzryn"
        return torch.einsum(f"gzrn,zy->{order}", self.diagonal, eye).flatten(3).flatten(1, 2)


class OutputSolver:
    """Solves min_B ‖W − B K‖² for given rows K.

    Products with K are taken in the target's precision, and the small systems of equations solved in float64.

    Args:
        target: W and the norm, with the output metric absorbed.
        output_rank: As `OutputSolved.output_rank` returns it.
        ridge: Ridge relative to each row's norm.
        z: How many blocks K has.
        interleaved: How their inputs are arranged; see `Blocks`.
        weight_moment: W S, where it is known.
    """

    def __init__(
        self,
        target: Target,
        output_rank: tuple[int, int] | None,
        ridge: float = RIDGE,
        z: int = 1,
        interleaved: bool = False,
        weight_moment: Tensor | None = None,
    ) -> None:
        self.ridge, self.output_rank = ridge, output_rank
        if weight_moment is None:
            weight_moment = target.times_moment(target.weight)
        if interleaved:
            order = torch.arange(target.weight.shape[-1], device=target.weight.device).view(-1, z).T.flatten()
            target, weight_moment = target.inputs(order), weight_moment[..., order]
        self.target = target
        self.scales = (weight_moment.double() * target.weight).sum((-2, -1))
        self.weight, self.weight_moment = (  # (g, z, T, n / z)
            w.unflatten(-1, (z, -1)).transpose(1, 2).contiguous() for w in (target.weight, weight_moment)
        )

    def solve(self, blocks: Tensor, output_ranks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for the output factors of several K for each weight.

        Args:
            blocks: K as blocks (g, p, z, r, n / z).
            output_ranks: In place of the rank of `output_rank`, one for each p.

        Returns:
            The losses (g, p) in float64, B (g, p, T, m), and the gradients of the losses with respect to the blocks.
        """
        z, r = blocks.shape[2:4]
        moment, gram, cross = self._normal_equations(blocks)
        exact, ridge = self._solution(gram, cross, output_ranks)
        output = exact.to(blocks.dtype)
        own = output.unflatten(-1, (z, r)).movedim(-2, 2)  # (g, p, z, T, r)
        product = output @ moment.transpose(2, 3).flatten(3)  # not block by block: that would copy B for each of them
        rest_moment = self.weight_moment.unsqueeze(1) - product.unflatten(-1, (z, -1)).transpose(2, 3)
        # As a square, and not as a difference of squares, the loss keeps its digits in float32
        rest = self.weight.unsqueeze(1) - own @ blocks
        losses = (rest * rest_moment).sum((-3, -2, -1), dtype=torch.float64)
        losses = losses + (ridge * exact.square().sum(-2)).sum(-1)
        strength = ridge / gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300) * exact.square().sum(-2)
        inside = moment.unflatten(3, (z, r)).diagonal(dim1=2, dim2=3).movedim(-1, 2)
        gradient = strength.to(blocks.dtype).view(*blocks.shape[:4], 1) * inside - own.mT @ rest_moment
        return losses, output, 2 * gradient

    def losses(self, blocks: Tensor, output_ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `solve` in float64, without the ridge's penalty and gradients, in less than half of the time.

        Args:
            blocks: K as blocks (g, p, z, r, n / z), float64.
            output_ranks: As of `solve`.

        Returns:
            The losses (g, p) and B (g, p, T, m).
        """
        _, gram, cross = self._normal_equations(blocks)
        output, _ = self._solution(gram, cross, output_ranks)
        explained = (output * (2 * cross.mT - output @ gram)).sum((-2, -1))
        return (self.scales.unsqueeze(-1) - explained).clamp_min(0), output

    def _normal_equations(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K S by the block of its inputs (g, p, z, m, n / z), and in float64 K S Kᵀ (g, p, m, m) and
        K S Wᵀ (g, p, m, T)."""
        together = blocks.transpose(1, 2).flatten(2, 3)  # (g, z, p r, n / z)
        moment = self._times_moment(together, blocks.shape)
        gram = (moment @ blocks.mT).transpose(2, 3).flatten(3).double()
        cross = (together @ self.weight_moment.mT).unflatten(2, (-1, blocks.shape[3])).transpose(1, 2).flatten(2, 3)
        return moment, gram, cross.double()

    def _solution(self, gram: Tensor, cross: Tensor, output_ranks: Tensor | None) -> tuple[Tensor, Tensor]:
        """B (g, p, T, m), and what the ridge added to the diagonal."""
        exact, ridge = _solve(gram, cross, self.ridge)
        if self.output_rank and output_ranks is not None:
            exact = self._project(exact, cross, self.output_rank[0], output_ranks)
        return exact, ridge

    def _times_moment(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """K S by the block of its inputs, (g, p, z, m, n / z), of blocks (g, z, p r, n / z) of this shape."""
        g, p, z, r, n = shape
        s = self.target.moment
        if z == 1:
            return self.target.times_moment(blocks[:, 0]).view(g, p, 1, r, n)
        if self.target.plain or self.target.diagonal or is_sketch(s):
            product = self.target.times_moment(Blocks(blocks).dense())
        else:
            product = blocks @ s.view(g, z, n, z * n)
        return product.view(g, z, p, r, z, n).permute(0, 2, 4, 1, 3, 5).reshape(g, p, z, z * r, n)

    def _project(self, output: Tensor, cross: Tensor, t: int, ranks: Tensor) -> Tensor:
        """B projected onto the leading eigenvectors of B K S Wᵀ over t."""
        g, p, total, m = output.shape
        split = output.view(g, p, total // t, t, m)
        explained = (split @ cross.mT.reshape(g, p, total // t, t, m).mT).sum(2)
        basis = torch.linalg.eigh((explained + explained.mT) / 2)[1]
        led = torch.arange(t, 0, -1, device=ranks.device) <= ranks.unsqueeze(-1)  # eigenvalues ascend
        basis = (basis * led.unsqueeze(-2)).unsqueeze(2)
        return (basis @ (basis.mT @ split)).view(output.shape)


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """B = crossᵀ (gram + ridge · diag(gram))⁻¹; where this is not solvable, the ridge is multiplied by 100 until it is.

    Returns B and what was added to the diagonal, (..., m).
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = 1e-30 + 1e-14 * diagonal.amax(-1, keepdim=True)
    ridges = torch.full_like(floor, ridge)
    while True:
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridges * diagonal + floor))
        failed = (info > 0).unsqueeze(-1) & (ridges <= 1)
        if not failed.any():
            half = torch.linalg.solve_triangular(factor, cross, upper=False)
            return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT, ridges * diagonal
        ridges = torch.where(failed, 100 * ridges, ridges)
