"""What a fit approximates: the weight with its norm, as one target or those of several layers, and the error in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.linear_algebra import roots
from rankopt.decompositions.types import Factors, Fit, Target
from rankopt.model.layer_kinds import as_matrix

Result = TypeVar("Result")


def full_target(layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None) -> Target:
    """The target of a layer, in float64 on the weight's device.

    Args:
        layer: Layer to decompose.
        weight: The module's weight, in its own shape.
        moment: S; None: identity.
        metric: H; None: identity.
    """
    w = as_matrix(layer, weight.detach().double())

    s = w.new_ones(len(w), layer.patch) if moment is None else moment.to(w)
    identity = torch.eye(layer.out_channels, dtype=w.dtype, device=w.device).expand(layer.groups, -1, -1)
    return Target(w, s, identity if metric is None else metric.to(w), plain=moment is None)


def absorb_metric(layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None) -> tuple[Target, Tensor]:
    """The target H^½ W with an identity as output metric.

    Args:
        layer: Layer to decompose.
        weight: The module's weight.
        moment: S or None.
        metric: H or None.

    Returns:
        The target, and the matrix (g, T, T) that undoes the absorption: H^−½.
    """
    target = full_target(layer, weight, moment, metric)
    if metric is None:
        return target, target.metric
    half, undo = _roots_once(target.metric)
    identity = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device).expand_as(half)
    return target._replace(weight=half @ target.weight, metric=identity), undo


_of_metric = WeakTensorKeyDictionary()


def _roots_once(metric: Tensor) -> tuple[Tensor, Tensor]:
    """`roots`, kept as long as the metric is: on a GPU all families of a layer are fitted with the same tensor."""
    if metric not in _of_metric:
        _of_metric[metric] = roots(metric)
    found: tuple[Tensor, Tensor] = _of_metric[metric]
    return found


def stacked(targets: Sequence[Target]) -> Target:
    """The targets of layers of the same shape as one, along the groups.

    Args:
        targets: Their targets.
    """
    if len(targets) == 1:
        return targets[0]
    first = targets[0]
    return first._replace(
        weight=torch.cat([t.weight for t in targets]),
        moment=torch.cat([t.moment for t in targets]),
        metric=torch.cat([t.metric for t in targets]),
        outer=None if first.outer is None else torch.cat([t.outer for t in targets if t.outer is not None]),
    )


_of_target = WeakTensorKeyDictionary()


def once_per_target(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator: what a function of a layer, its target and other arguments returns is kept as long as the target is.

    Starts of all ranks are truncations of one decomposition, which is taken once.

    Args:
        compute: The function. It returns new tensors: one that refers to the target's would keep it for ever.
    """

    @wraps(compute)
    def known(layer: Layer, target: Target, *others: Any) -> Result:
        of_target: dict[Any, Result] = _of_target.setdefault(target.weight, {})
        if (key := (compute, layer.shape, others)) not in of_target:
            of_target[key] = compute(layer, target, *others)
        return of_target[key]

    return known


class StoredError:
    """Rounds factors of a layer to the weight's dtype and measures the error of the rounded ones.

    Args:
        family: The decomposition.
        layer: The decomposed layer.
        weight: The module's weight, in its own shape.
        moment: S or None.
        metric: H or None.
    """

    def __init__(
        self, family: Decomposition, layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None
    ) -> None:
        self.family, self.layer, self.dtype = family, layer, weight.dtype
        self.target = full_target(layer, weight, moment, metric)
        self.norm = self.target.norm

    def __call__(self, factors: Factors, rank: Rank) -> Fit:
        """The fit of some factors.

        Args:
            factors: The fitted factors, float64.
            rank: Their rank.
        """
        stored = tuple(f.to(self.dtype).contiguous() for f in factors)
        rebuilt = self.family.weight(self.layer, tuple(f.double() for f in stored))
        return Fit(rank, stored, self.target.error(rebuilt.reshape(self.target.weight.shape), self.norm))


def stored_fit(
    family: Decomposition,
    layer: Layer,
    weight: Tensor,
    factors: Factors,
    rank: Rank,
    moment: Tensor | None,
    metric: Tensor | None,
) -> Fit:
    """Round the factors to the weight's dtype and measure the error of the rounded factors.

    Args:
        family: The decomposition.
        layer: The decomposed layer.
        weight: The module's weight, in its own shape.
        factors: The fitted factors, float64.
        rank: Their rank.
        moment: S or None.
        metric: H or None.
    """
    return StoredError(family, layer, weight, moment, metric)(factors, rank)
