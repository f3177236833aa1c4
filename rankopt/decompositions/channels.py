"""The channels of a factorised layer's bonds: what each adds to the weight.

The weight of a contraction is a sum over the index of any of its bonds, Ŵ = Σ_r W_r. The component W_r is what the
layer loses when channel r is switched off. More generally, the component of a direction q of the bond is what the
projection I − q qᵀ at the bond takes from the weight. This also holds for weights that are nonlinear in their factors,
whose components need not add up to the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Bond, Factors
from rankopt.model.layer_kinds import in_own_shape


def factors_of(module: nn.Module) -> Factors:
    """The factors of a module that replaces a layer, float64.

    Args:
        module: The module; its weights are not quantized.
    """
    found = getattr(module, "factors", None)
    return tuple(f.detach().double() for f in (module.cores if found is None else found))  # type: ignore[union-attr]


def channel_count(factors: Factors, bond: Bond) -> int:
    """The number of channels of a bond, of all groups together.

    Args:
        factors: Factors of the layer.
        bond: One of its `latent_bonds`.
    """
    assert bond.factor is not None
    return factors[bond.factor].shape[bond.axis]


def rotation(layer: Layer, method: str, rank: Rank, channels: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions of a bond, float64 (channels, channels).

    Args:
        layer: The layer. Of a chain of stages, channels of different groups do not mix.
        method: Its decomposition.
        rank: Its rank.
        channels: Channels of the bond, of all groups.
        generator: Source of the random numbers.
    """
    groups = layer.groups if layer.groups > 1 and DECOMPOSITIONS[method].stages(layer, rank) else 1
    drawn = torch.randn(groups, *[channels // groups] * 2, generator=generator, dtype=torch.float64)
    return torch.block_diag(*torch.linalg.qr(drawn)[0])


def components(layer: Layer, method: str, factors: Factors, bond: Bond, directions: Tensor) -> Iterator[Tensor]:
    """The components of directions of a bond.

    Args:
        layer: The layer.
        method: Its decomposition.
        factors: Its factors, float64.
        bond: One of its `latent_bonds`.
        directions: Unit vectors, float64 (n, channels).

    Yields:
        For each direction a weight in the layer's own shape.
    """
    assert bond.factor is not None
    family = DECOMPOSITIONS[method]
    whole = family.weight(layer, factors)
    turned = factors[bond.factor].movedim(bond.axis, -1)
    for q in directions.to(turned):
        without = turned - (turned @ q)[..., None] * q
        rest = [*factors]
        rest[bond.factor] = without.movedim(-1, bond.axis)
        yield in_own_shape(layer, whole - family.weight(layer, tuple(rest)))


def output_directions(layer: Layer, weight: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """What random directions of the layer's output take of a weight: u uᵀ Ŵ, each u within one group.

    Args:
        layer: The layer.
        weight: Ŵ in `Layer.shape`.
        count: How many.
        generator: Source of the random numbers.

    Yields:
        For each direction a weight in the layer's own shape.
    """
    rows = weight.double().reshape(layer.groups, layer.out_channels, layer.patch)
    for i in range(count):
        part = torch.zeros_like(rows)
        u = torch.randn(layer.out_channels, generator=generator, dtype=torch.float64).to(rows)
        u = u / u.norm()
        part[i % layer.groups] = torch.outer(u, u @ rows[i % layer.groups])
        yield in_own_shape(layer, part.reshape(layer.shape))
