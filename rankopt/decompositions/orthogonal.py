"""Cores of generators that stay orthogonal while they are trained, as those of a MERA are in physics.

A core is a matrix from its incoming to its outgoing bonds. Where it splits a bond it is kept an isometry, where it
mixes two bonds it is kept orthogonal; each up to a scale of its own, since the activations between the levels of a
network need states of a certain size. The first level, which has no incoming bonds, is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from rankopt.decompositions.generators import WeightGenerator
from rankopt.decompositions.modules import Reconstructed


class ScaledIsometry(nn.Module):
    """A parametrization: a core is a scale times a matrix with orthonormal rows or columns.

    Args:
        core: The core; what is nearest to it is where the parametrization starts.
        into: Number of its incoming bonds.
    """

    def __init__(self, core: Tensor, into: int) -> None:
        super().__init__()
        self.shape, self.rows = core.shape, math.prod(core.shape[:into])
        holder = nn.ParameterDict({"weight": self._nearest(core)[0]})  # torch parametrizes tensors of modules only
        # Not "householder", torch's own choice for rectangular matrices: its reflectors' signs are parameters, which
        # weight decay would bring to 0.
        orthogonal(holder, "weight", orthogonal_map="matrix_exp")
        self.isometry: Any = holder.get_submodule("parametrizations.weight.0")

    def forward(self, tangent: Tensor, scale: Tensor) -> Tensor:
        return (scale * self.isometry(tangent)).view(self.shape)

    def right_inverse(self, core: Tensor) -> tuple[Tensor, Tensor]:
        nearest, scale = self._nearest(core)
        return self.isometry.right_inverse(nearest), scale

    def _nearest(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest matrix with orthonormal rows or columns times a scale: the polar factor (Higham 1986)."""
        left, values, right = torch.linalg.svd(core.detach().reshape(self.rows, -1), full_matrices=False)
        return left @ right, values.mean()


def keep_orthogonal(model: nn.Module) -> int:
    """Bring the cores of a model's generators to their nearest isometries, and keep them there in training.

    Until `make_ordinary` the model's state dict holds what the cores are computed from.

    Args:
        model: The model, changed in place.

    Returns:
        The number of cores.
    """
    found = [*_isometric(model)]
    with torch.random.fork_rng(devices=[]):  # torch completes a rectangular matrix by random columns
        torch.manual_seed(0)
        for cores, name, into in found:
            wanted = cores.get_parameter(name).requires_grad
            parametrize.register_parametrization(
                cores, name, ScaledIsometry(cores.get_parameter(name), into), unsafe=True
            )
            for parameter in _sources(cores, name):
                parameter.requires_grad_(wanted)
    return len(found)


def make_ordinary(model: nn.Module) -> None:
    """Make the cores that `keep_orthogonal` changed ordinary parameters again, at the same values.

    Args:
        model: The model, changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.ParameterList) and parametrize.is_parametrized(module):
            for name in [name for name, _ in module.get_submodule("parametrizations").named_children()]:
                sources = _sources(module, name)
                wanted = all(p.requires_grad for p in sources)
                for parameter in sources:  # torch makes a parameter only of what has a gradient
                    parameter.requires_grad_(True)
                with torch.enable_grad():
                    parametrize.remove_parametrizations(module, name)
                module.get_parameter(name).requires_grad_(wanted)


def _sources(cores: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that a core is computed from."""
    return [*cores.get_submodule(f"parametrizations.{name}").parameters(recurse=False)]


def residual(model: nn.Module) -> float:
    """How far cores are from scaled isometries: the largest entry of |A Aᵀ / s² − 1| over all, A with fewer rows.

    Args:
        model: A model with generators.
    """
    worst = 0.0
    for cores, name, into in _isometric(model):
        core = getattr(cores, name).detach().double()
        matrix = core.reshape(math.prod(core.shape[:into]), -1)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        product = matrix @ matrix.mT
        scale = product.diagonal().mean()
        worst = max(worst, (product / scale - torch.eye(len(product)).to(product)).abs().max().item())
    return worst


def _isometric(model: nn.Module) -> Iterator[tuple[nn.ParameterList, str, int]]:
    """For each core with incoming bonds: the list that holds it, its name there, and the number of these bonds."""
    for module in model.modules():
        if isinstance(module, Reconstructed) and isinstance(module.family, WeightGenerator):
            for number, into in enumerate(module.family.isometries(module.layer, module.rank)):
                if into:
                    yield module.cores, str(number), into
