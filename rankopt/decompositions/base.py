"""What every decomposition is: numbers in, module out.

Notation, per group of a layer: weight W (T, n) with n = C * kh * kw inputs of one output (kinds.py says what kh and
kw are of layers that have not two axes); S (n, n) second moment of the input patches; H (T, T) second moment of the
model's response to the layer's outputs. The error of an approximation is, relative to the same of W itself,

    ‖W − Ŵ‖² = tr(H (W − Ŵ) S (W − Ŵ)ᵀ)

which is the error of the layer's output, weighted by how much the model's output feels it. Without
calibration S and H are the identity: the plain weight error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankopt.core.records import FACTORISED, RECONSTRUCTED, Cost, Layer, Rank
from rankopt.decompositions.modules import Reconstructed, chain, finish
from rankopt.decompositions.types import Aspect, Bond, Factors, Fit, Stage


class Decomposition(ABC):
    """A family of replacements for a layer. One instance serves all layers; it holds no state."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True  # full rank reproduces the layer, so ranks are truncations
    effort: ClassVar[float] = 1.0  # share of the search space's steps that its fit takes
    density: ClassVar[float] = 1.0  # fractions tried per point of the search space's grid
    aspects: ClassVar[tuple[Aspect, ...]] = ((1.0,),)  # the directions in which ranks grow
    forms: ClassVar[tuple[str, ...]] = (FACTORISED, RECONSTRUCTED)  # those it has; the first is the usual one

    @abstractmethod
    def full_rank(self, layer: Layer) -> Rank | None:
        """The rank at which the layer is reproduced exactly; None if this family has no place there.

        Families that are not `exact` name the largest rank that makes sense.
        """

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        """The convolutions (1x1 for Linear; of an Embedding a look-up, then 1x1) that replace the layer.

        Empty for families of other parts, which say shapes, macs, weight and factorised themselves.
        """
        return ()

    @abstractmethod
    def fit(
        self,
        layer: Layer,
        weight: Tensor,
        ranks: Sequence[Rank],
        moment: Tensor | None = None,
        metric: Tensor | None = None,
        steps: int = 100,
    ) -> Iterator[Fit]:
        """Factors for each rank, which share what work they can.

        weight: the layer's own. moment: S, float64 (groups, n, n). metric: H, float64 (groups, T, T).
        """

    # --- ranks ---

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        """The rank cut to what the layer and its neighbours allow (a bond is at most the modes beside it)."""
        full = self.full_rank(layer)
        assert full is not None
        return tuple(max(1, min(r, f)) for r, f in zip(rank, full, strict=True))

    def ranks(self, layer: Layer, fractions: Sequence[float], nearest: bool = False) -> list[Rank]:
        """The largest ranks whose weights are at most each fraction of the layer's; cheaper than dense only.

        nearest: for families of one rank, the rank nearest to the fraction instead (Python's round).
        """
        full = self.full_rank(layer)
        if full is None:
            return []
        found = set()
        for aspect in self.directions(layer):
            for fraction in fractions:
                rank: Rank
                if nearest and len(full) == 1:
                    rank = (max(1, round(fraction * layer.weights / self.weights(layer, (1,)))),)
                else:
                    rank = self._largest(layer, full, aspect, fraction * layer.weights)
                if self.weights(layer, rank) < layer.weights:
                    found.add(rank)
        return sorted(found, key=lambda r: self.weights(layer, r))

    def directions(self, layer: Layer) -> Sequence[Aspect]:
        """The aspects to try on a layer."""
        return self.aspects

    def _largest(self, layer: Layer, full: Rank, aspect: Aspect, weights: float) -> Rank:
        """The largest rank in the direction aspect * full with at most so many weights (or the least there is)."""

        def at(scale: float) -> Rank:
            pairs = zip(aspect, full, strict=True)
            return self.valid(layer, tuple(a if isinstance(a, int) else int(scale * a * f) for a, f in pairs))

        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self.weights(layer, at(middle)) <= weights else (low, middle)
        found = at(low)
        return found if self.weights(layer, found) <= weights else self.valid(layer, (1,) * len(full))

    # --- cost, in closed form ---

    def shapes(self, layer: Layer, rank: Rank) -> tuple[tuple[int, ...], ...]:
        """The shapes of the factors, in order."""
        return tuple(s.shape(layer.groups)[: len(layer.shape)] for s in self.stages(layer, rank))

    def weights(self, layer: Layer, rank: Rank) -> int:
        """Elements of all factors."""
        return sum(math.prod(shape) for shape in self.shapes(layer, rank))

    def macs(self, layer: Layer, rank: Rank, form: str | None = None) -> int:
        """Multiply-accumulates for one example, in the usual form or another.

        Reconstructed they are the dense layer's: Reconstructed says why building the weight is not among them.
        """
        return layer.macs if (form or self.forms[0]) == RECONSTRUCTED else self.factorised_macs(layer, rank)

    def factorised_macs(self, layer: Layer, rank: Rank) -> int:
        """Multiply-accumulates for one example of contracting it with the factors."""
        return sum(call.maps * self._macs_of_map(layer, rank, call.size_in, call.size_out) for call in layer.calls)

    def _macs_of_map(self, layer: Layer, rank: Rank, size: tuple[int, int], size_out: tuple[int, int]) -> int:
        macs = 0
        for stage in self.stages(layer, rank):
            before = size
            size = (size_out[0] if "h" in stage.axes else size[0], size_out[1] if "w" in stage.axes else size[1])
            macs += stage.macs(layer.groups) * math.prod(before if layer.input_first and stage.axes else size)
        return macs

    def cost(self, layer: Layer, rank: Rank, form: str | None = None) -> Cost:
        """Parameters (bias included), MACs for one example and bytes of the replacement."""
        params = self.weights(layer, rank) + (layer.shape[0] if layer.bias else 0)
        return Cost(params, self.macs(layer, rank, form), params * layer.element_size)

    def forms_of_use(self, layer: Layer, rank: Rank) -> tuple[str, ...]:
        """The usual form, and the reconstructed one where it takes fewer MACs: all else is the same."""
        return self.forms if self.macs(layer, rank) > layer.macs else self.forms[:1]

    # --- bonds ---

    def bonds(self, layer: Layer, rank: Rank) -> tuple[Bond, ...]:
        """Its bonds, from the input on; none where the weight is no contraction of the factors."""
        inside: tuple[str, ...] = ("C",)
        found = []
        for stage in self.stages(layer, rank)[:-1]:
            inside += tuple(stage.axes) if len(layer.shape) == 4 else ()
            found.append(Bond(stage.out_channels, inside))
        return tuple(found)

    def tensor(self, layer: Layer, weight: Tensor) -> tuple[tuple[str, ...], Tensor]:
        """Names of the modes that the bonds part, and a weight as a tensor (g, *modes) over them."""
        if len(layer.shape) == 2:
            return ("T", "C"), weight.reshape(1, *layer.shape)
        return ("T", "C", "h", "w"), weight.reshape(layer.groups, layer.out_channels, *layer.shape[1:])

    # --- modules ---

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        """The dense weight that the factors stand for, of layer.shape (no stage shares its kernel)."""
        g = layer.groups
        first, *others = (f.reshape(g, f.shape[0] // g, f.shape[1], *_kernel(f)) for f in factors)
        product = _all_inputs(first, layer.in_channels)
        for stage in others:
            product = _compose(stage, product)
        return product.reshape(layer.shape)

    def build(self, module: nn.Module, layer: Layer, rank: Rank, form: str | None = None) -> nn.Module:
        """An empty replacement for the module: same bias, dtype, device, mode and requires_grad."""
        if (form or self.forms[0]) == RECONSTRUCTED:
            return finish(Reconstructed(self, module, layer, rank), module)
        return finish(self.factorised(module, layer, rank), module)

    def factorised(self, module: nn.Module, layer: Layer, rank: Rank) -> nn.Module:
        """The replacement that contracts its input with the factors."""
        return chain(module, self.stages(layer, rank), self, rank)


def _kernel(factor: Tensor) -> tuple[int, int]:
    return (factor.shape[2], factor.shape[3]) if factor.ndim == 4 else (1, 1)


def _compose(second: Tensor, first: Tensor) -> Tensor:
    """The kernel of two convolutions in a row, which must not both extend along an axis.

    (g, out, in, h, w) each; the second's inputs may be those of a block of its outputs.
    """
    blocks = first.shape[1] // second.shape[2]
    second, first = second.unflatten(1, (blocks, -1)), first.unflatten(1, (blocks, -1))
    product = torch.einsum("gzomab,gzmicd->gzoiacbd", second, first)
    return product.flatten(6, 7).flatten(4, 5).flatten(1, 2)


def _all_inputs(stage: Tensor, in_channels: int) -> Tensor:
    """The same kernel over all inputs, if it is one in blocks: zeros where blocks do not mix."""
    blocks = in_channels // stage.shape[2]
    if blocks == 1:
        return stage
    eye = torch.eye(blocks, dtype=stage.dtype, device=stage.device)
    spread = torch.einsum("gzoihw,zy->gzoyihw", stage.unflatten(1, (blocks, -1)), eye)
    return spread.flatten(3, 4).flatten(1, 2)
