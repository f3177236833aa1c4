"""The bonds of factorised layers: how many of their directions are used.

A bond is where two factors of a layer meet. It separates the modes of the weight into an input side and an output side,
and its size R bounds the rank of the weight as a matrix between the two. Bond indices are latent spaces that a dense
network does not have (Hamreras et al. 2025): the singular spectrum across a bond shows how many directions are used.

If one side holds the input channels and some kernel positions, and the other the output channels and the rest, the
spectrum is that of

    (H^½ ⊗ I) Ŵ S^½,    Ŵ unfolded into (T, outer positions) x (C, inner positions)

with the input moment S and the output metric H of `rankopt.candidates.calibration`, S averaged over the outer
positions, whose inputs count as uncorrelated. This approximates the metric in which layers are fitted, and equals it
for a bond with only T on its output side. Bonds between other modes (of a Linear on a factorised shape) have the plain
spectrum of the unfolded weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Bond, is_sketch, mean_squares
from rankopt.model.layer_kinds import as_matrix


@dataclass(frozen=True)
class BondSpectrum:
    """Singular values across a bond.

    Attributes:
        bond: Its modes, as "inner | outer".
        size: Size of the bond, all groups together.
        metric: "output" (weighted by S and H) or "plain".
        dense: Singular values of the dense layer, all groups together, descending.
        small: Singular values of the compressed layer, likewise.
        lost: Energy of the difference of the two layers over that of the dense one, in the same metric.
    """

    bond: str
    size: int
    metric: str
    dense: tuple[float, ...]
    small: tuple[float, ...]
    lost: float = 0.0

    @property
    def possible(self) -> int:
        """The largest possible rank. The components of a CP can outnumber the directions that there are."""
        return min(self.size, len(self.dense))

    @property
    def effective(self) -> float:
        """Effective rank of the compressed layer."""
        return effective_rank(self.small)

    @property
    def used(self) -> float:
        """The effective rank over the possible one; at most 1, though cutting off a train's padding adds directions."""
        return min(1.0, self.effective / max(self.possible, 1))

    @property
    def kept(self) -> float:
        """The share of the dense layer's energy that the compressed layer reproduces, 0 to 1.

        If what is left out is orthogonal to what is kept, this is the ratio of the two energies.
        """
        return max(0.0, 1.0 - self.lost)


def effective_rank(values: Sequence[float]) -> float:
    """The effective rank: exp of the entropy of the normalised squared singular values.

    After Roy and Vetterli (2007), who normalise the values themselves. 1 if one direction carries all energy, n if n
    directions carry the same.

    Args:
        values: Singular values; of zeros the rank is 0.
    """
    energy = [v * v for v in values if v > 0]
    total = sum(energy)
    return math.exp(-sum(e / total * math.log(e / total) for e in energy)) if total > 0 else 0.0


def spectra(
    layer: Layer, family: str, rank: Rank, dense: Tensor, small: Tensor, moment: Any, metric: Any
) -> tuple[BondSpectrum, ...]:
    """The spectrum of every bond of a layer.

    Args:
        layer: The layer.
        family: Its decomposition.
        rank: Its rank.
        dense: The dense weight, in the layer's own shape.
        small: The weight that the factors make, in the same shape.
        moment: Input moment S; None for the identity.
        metric: Output metric H; None for the identity.
    """
    decomposition = DECOMPOSITIONS[family]
    weights = [as_matrix(layer, w.detach().double().cpu()).reshape(layer.shape) for w in (dense, small)]
    (names, a), (_, b) = (decomposition.tensor(layer, w) for w in weights)
    found = []
    for bond in decomposition.bonds(layer, rank):
        outside = tuple(n for n in names if n not in bond.inside)
        felt = {n[0] for n in bond.inside} <= set("Chw") and {n[0] for n in outside} <= set("Thw")
        roots = (_root(metric), _root(inner_moment(layer, bond, moment))) if felt else (None, None)
        whole, part = (_across(names, t, bond, outside, roots) for t in (a, b))
        lost = ((whole - part).square().sum() / whole.square().sum().clamp_min(1e-300)).item()
        size = bond.size * layer.groups
        text = f"{' '.join(bond.inside)} | {' '.join(outside)}"
        found.append(
            BondSpectrum(
                text, size, "output" if felt else "plain", _singular_values(whole), _singular_values(part), lost
            )
        )
    return tuple(found)


def _singular_values(matrix: Tensor) -> tuple[float, ...]:
    return tuple(torch.linalg.svdvals(matrix).flatten().sort(descending=True).values.tolist())


def _across(
    names: tuple[str, ...], tensor: Tensor, bond: Bond, outside: tuple[str, ...], roots: tuple[Any, Any]
) -> Tensor:
    """A tensor (g, *modes) as matrices across a bond, with H^½ and S^½ on either side (None: the identity)."""
    order = [0, *(1 + names.index(n) for n in (*outside, *bond.inside))]
    split = 1 + len(outside)
    turned = tensor.permute(order)
    matrix = turned.reshape(len(tensor), math.prod(turned.shape[1:split]), -1)
    h, s = roots
    if h is not None:
        matrix = (h @ matrix.reshape(len(tensor), h.shape[-1], -1)).reshape(matrix.shape)
    if s is not None:
        matrix = matrix @ s if s.ndim == 3 else matrix * s.unsqueeze(1)
    return matrix


def inner_moment(layer: Layer, bond: Bond, moment: Tensor | None) -> Tensor | None:
    """The part of the input moment that the input side of a bond sees, averaged over the other kernel positions.

    Args:
        layer: The layer.
        bond: The bond.
        moment: Input moment S in any form that `decompositions.types.Target` has; of a sketch the diagonal is used.

    Returns:
        (g, n, n) or (g, n), n the size of the input side.
    """
    if moment is None:
        return None
    moment = mean_squares(moment) if is_sketch(moment) else moment
    sizes = (layer.in_channels, *layer.kernel)
    inner = (True, "h" in bond.inside, "w" in bond.inside)
    # Of outer positions only the diagonal: one index for both sides of S.
    other = "".join(b if on else a for a, b, on in zip("chw", "dyx", inner, strict=True))
    kept = "".join(a for a, on in zip("chw", inner, strict=True) if on)
    also = "".join(b for b, on in zip(other, inner, strict=True) if on)
    n = math.prod(size for size, on in zip(sizes, inner, strict=True) if on)
    if moment.ndim == 2:
        summed = torch.einsum(f"gchw->g{kept}", moment.double().cpu().reshape(-1, *sizes))
        return summed.reshape(-1, n) / (layer.patch / n)
    summed = torch.einsum(f"gchw{other}->g{kept}{also}", moment.double().cpu().reshape(-1, *sizes, *sizes))
    return summed.reshape(-1, n, n) / (layer.patch / n)


def _root(m: Tensor | None) -> Tensor | None:
    """The symmetric square root of matrices (g, n, n), or of a diagonal (g, n)."""
    if m is None:
        return None
    if m.ndim == 2:
        return m.double().cpu().sqrt()
    values, vectors = torch.linalg.eigh(m.double().cpu())
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
