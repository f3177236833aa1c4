"""The base class of all decomposition families.

Notation, for each group of a layer:

    W (T, n)    weight, T outputs, n = C · kh · kw inputs of one output (model/layer_kinds.py maps every kind of layer
                to these axes)
    S (n, n)    second moment of the input patches, from the calibration data
    H (T, T)    output metric: the Gauss-Newton metric of the layer's outputs (candidates/calibration.py)

The error of an approximation Ŵ is

    ‖W − Ŵ‖² / ‖W‖²    with    ‖A‖² = tr(H A S Aᵀ)

that is, the error of the layer's output, weighted by its effect on the model's output. Without calibration data S and
H are identities, and the error is the relative squared Frobenius norm.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankopt.core.errors import RankoptError
from rankopt.core.records import FACTORISED, RECONSTRUCTED, Cost, Layer, Rank
from rankopt.decompositions.modules import Reconstructed, build_chain, copy_settings
from rankopt.decompositions.types import Aspect, Bond, Factors, Fit, Nested, Original, Stage
from rankopt.model.forward import random_numbers


class Decomposition(ABC):
    """A family of factorised replacements for a layer.

    A family says which ranks a layer can have, what each rank costs, how to fit the factors and how to build the
    module that replaces the layer. Most families describe their replacement as a chain of convolutions (`stages`), from
    which shapes, MACs, the dense weight and the module follow. One stateless instance serves all layers.

    Attributes:
        name: Name of the family in search spaces and plans.
        exact: Whether full rank reproduces the layer, so that lower ranks are truncations.
        effort: Factor on the search space's number of optimisation steps.
        closed_form: Whether fits take no optimisation steps.
        density: Factor on the number of points of the search space's grid of compression rates.
        aspects: Directions in which ranks grow.
        forms: Forms of the replacement; the first is the default.
    """

    name: str
    exact: ClassVar[bool] = True
    effort: ClassVar[float] = 1.0
    closed_form: ClassVar[bool] = False
    density: ClassVar[float] = 1.0
    aspects: ClassVar[tuple[Aspect, ...]] = ((1.0,),)
    forms: ClassVar[tuple[str, ...]] = (FACTORISED, RECONSTRUCTED)

    @abstractmethod
    def full_rank(self, layer: Layer) -> Rank | None:
        """The rank at which the layer is reproduced exactly.

        Args:
            layer: Layer to decompose.

        Returns:
            The full rank, or the largest useful rank of families that are not `exact`; None if the family does not
            apply to the layer.
        """

    def stages(self, layer: Layer, rank: Rank) -> tuple[Stage, ...]:
        """The chain of convolutions that replaces the layer, input first.

        Linear layers are chains of 1 x 1 stages; an Embedding starts with a look-up.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.

        Returns:
            The stages; empty for families that are not chains, which override `shapes`, `factorised_macs`, `weight`
            and `factorised`.
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
        """Fit the factors for each rank; the ranks share work where possible.

        Args:
            layer: Layer to decompose.
            weight: The module's weight, in its own shape.
            ranks: Valid ranks.
            moment: Input moment S (groups, n, n), float64; of an Embedding and of very wide layers its diagonal
                (groups, n). None: identity.
            metric: Output metric H (groups, T, T), float64. None: identity.
            steps: Optimisation steps, multiplied by `effort`.

        Yields:
            One fit per rank, in order.
        """

    def nested(
        self, layer: Layer, weight: Tensor, moment: Tensor | None = None, metric: Tensor | None = None
    ) -> Nested | None:
        """The factors of all ranks at once, where they are truncations of the same ones.

        Args:
            layer: Layer to decompose.
            weight: The module's weight, in its own shape.
            moment: S or None, as of `fit`.
            metric: H or None.

        Returns:
            What `linear_algebra.cut` cuts ranks (R,) from. Default: None, each rank has its own factors.
        """
        return None

    def alike(self, layer: Layer, ranks: Sequence[Rank]) -> Hashable | None:
        """What ranks have in common that may be fitted in one stack, of layers of the same shape.

        Args:
            layer: One of the layers.
            ranks: Valid ranks of it.

        Returns:
            Default: None, each layer is fitted alone, as a stack of them would take as long.
        """
        return None

    @property
    def stacks_ranks(self) -> bool:
        """Whether fits of different ranks can be one stack (`alike`)."""
        return False

    def fit_stack(
        self, originals: Sequence[Original], ranks: Sequence[Sequence[Rank]], steps: int = 100
    ) -> list[list[Fit]]:
        """Fit layers of the same shape; families that can fit them at once override this.

        Args:
            originals: Layers with equal shapes and groups, whose moments, and whose metrics, are all of the same shape
                or all None.
            ranks: For each layer valid ranks, which are `alike`.
            steps: As of `fit`.

        Returns:
            For each layer one fit per rank, in order. On a CPU they are the same to the last digit in any stack.
        """
        given = zip(originals, ranks, strict=True)
        return [list(self.fit(x.layer, x.weight, r, x.moment, x.metric, steps)) for x, r in given]

    def errors(
        self, originals: Sequence[Original], ranks: Sequence[Sequence[Rank]], steps: int = 100
    ) -> list[list[Fit]]:
        """Estimate the errors of fits of which nothing else is needed; families that save work so override this.

        Args:
            originals: Layers, as of `fit_stack`.
            ranks: As of `fit_stack`.
            steps: As of `fit`.

        Returns:
            For each layer one fit per rank, in order, without factors. Default: the errors of `fit_stack`.
        """
        return [[fit._replace(factors=()) for fit in fits] for fits in self.fit_stack(originals, ranks, steps)]

    # --- ranks ---

    def valid(self, layer: Layer, rank: Rank) -> Rank:
        """Reduce a rank to the largest one that is not redundant.

        A bond can be no larger than the product of the modes and bonds on either side of it.

        Args:
            layer: Layer to decompose.
            rank: Any rank of the right length.
        """
        full = self.full_rank(layer)
        assert full is not None
        return tuple(max(1, min(r, f)) for r, f in zip(rank, full, strict=True))

    def ranks(self, layer: Layer, fractions: Sequence[float], nearest: bool = False) -> list[Rank]:
        """The ranks to try for given compression rates.

        Args:
            layer: Layer to decompose.
            fractions: Weights of the replacement over the layer's own. For each the largest rank below is taken.
            nearest: For families with a single rank, take the rank nearest to the fraction instead (Python's round).

        Returns:
            Ranks with fewer weights than the layer, in ascending number of weights.

        Raises:
            RankoptError: `aspects` do not fit the ranks.
        """
        full = self.full_rank(layer)
        if full is None:
            return []
        found = set()
        for aspect in self.directions(layer):
            if len(aspect) != len(full):
                raise RankoptError(
                    f"the decomposition {self.name!r} has the aspect {tuple(aspect)} for ranks such as {full}: give "
                    "`aspects` one entry for each number of a rank"
                )
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
        """The aspects to try on a layer.

        Args:
            layer: Layer to decompose.
        """
        return self.aspects

    def _largest(self, layer: Layer, full: Rank, aspect: Aspect, weights: float) -> Rank:
        """The largest rank along aspect * full with at most this many weights; the smallest rank if there is none."""

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
        """The shapes of the factors, in order.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """
        return tuple(s.shape(layer.groups)[: len(layer.shape)] for s in self.stages(layer, rank))

    def weights(self, layer: Layer, rank: Rank) -> int:
        """The number of weights of all factors together.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """
        return sum(math.prod(shape) for shape in self.shapes(layer, rank))

    def macs(self, layer: Layer, rank: Rank, form: str | None = None) -> int:
        """Multiply-accumulates for one example.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
            form: FACTORISED or RECONSTRUCTED; None: the default form. In reconstructed form these are the dense
                layer's MACs; `modules.Reconstructed` says why building the weight does not count.
        """
        return layer.macs if (form or self.forms[0]) == RECONSTRUCTED else self.factorised_macs(layer, rank)

    def factorised_macs(self, layer: Layer, rank: Rank) -> int:
        """Multiply-accumulates of contracting one example with the factors.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """
        return sum(call.maps * self._macs_of_map(layer, rank, call.size_in, call.size_out) for call in layer.calls)

    def _macs_of_map(self, layer: Layer, rank: Rank, size: tuple[int, int], size_out: tuple[int, int]) -> int:
        macs = 0
        for stage in self.stages(layer, rank):
            before = size
            size = (size_out[0] if "h" in stage.axes else size[0], size_out[1] if "w" in stage.axes else size[1])
            macs += stage.macs(layer.groups) * math.prod(before if layer.input_first and stage.axes else size)
        return macs

    def cost(self, layer: Layer, rank: Rank, form: str | None = None) -> Cost:
        """Parameters (bias included), MACs for one example and bytes of the replacement.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
            form: FACTORISED or RECONSTRUCTED; None: the default form.
        """
        params = self.weights(layer, rank) + (layer.shape[0] if layer.bias else 0)
        return Cost(params, self.macs(layer, rank, form), params * layer.element_size)

    def forms_of_use(self, layer: Layer, rank: Rank) -> tuple[str, ...]:
        """The forms worth a candidate: the default, and the reconstructed one where it takes fewer MACs.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """
        return self.forms if self.macs(layer, rank) > layer.macs else self.forms[:1]

    # --- bonds ---

    def bonds(self, layer: Layer, rank: Rank) -> tuple[Bond, ...]:
        """The bonds between the factors, input first; empty where the weight is not a contraction of the factors.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """
        inside: tuple[str, ...] = ("C",)
        found = []
        for i, stage in enumerate(self.stages(layer, rank)[:-1]):
            inside += tuple(stage.axes) if len(layer.shape) == 4 else ()
            found.append(Bond(stage.out_channels, inside, i))
        return tuple(found)

    def latent_bonds(self, layer: Layer, rank: Rank) -> tuple[Bond, ...]:
        """The bonds whose index runs along an axis of one of the factors: their channels can be switched off.

        Of a stage whose blocks share a kernel, these are the kernel's outputs, each in all blocks. A depthwise stage
        has the same channels before and after it, which are listed once.

        Args:
            layer: Layer to decompose.
            rank: A valid rank.
        """
        stages = self.stages(layer, rank) if len(layer.shape) == 4 else ()
        depthwise = [s.blocks == s.in_channels == s.out_channels and not s.shared for s in stages]
        same = {None, *(i for i, found in enumerate(depthwise) if found and i > 0)}
        return tuple(b for b in self.bonds(layer, rank) if b.factor not in same)

    def tensor(self, layer: Layer, weight: Tensor) -> tuple[tuple[str, ...], Tensor]:
        """A weight as a tensor over the modes that the bonds separate.

        Args:
            layer: Layer to decompose.
            weight: Dense weight of `layer.shape`.

        Returns:
            The names of the modes, and the weight in the shape (groups, *modes).
        """
        if len(layer.shape) == 2:
            return ("T", "C"), weight.reshape(1, *layer.shape)
        return ("T", "C", "h", "w"), weight.reshape(layer.groups, layer.out_channels, *layer.shape[1:])

    # --- modules ---

    def weight(self, layer: Layer, factors: Factors) -> Tensor:
        """The dense weight that the factors represent.

        Families whose stages share a kernel among blocks override this.

        Args:
            layer: The decomposed layer.
            factors: As `fit` returns them.

        Returns:
            The weight in `layer.shape`.
        """
        g = layer.groups
        first, *others = (f.reshape(g, f.shape[0] // g, f.shape[1], *_kernel(f)) for f in factors)
        product = _all_inputs(first, layer.in_channels)
        for stage in others:
            product = _compose(stage, product)
        return product.reshape(layer.shape)

    def build(self, module: nn.Module, layer: Layer, rank: Rank, form: str | None = None) -> nn.Module:
        """Build a replacement for a module, with uninitialised factors (see `modules.load_factors`).

        Bias, dtype, device, training mode and requires_grad are the module's.

        Args:
            module: Module to replace; it is not changed.
            layer: Its description.
            rank: A valid rank.
            form: FACTORISED or RECONSTRUCTED; None: the default form.
        """
        with random_numbers():  # torch's modules draw initial weights, from the caller's random state otherwise
            if (form or self.forms[0]) == RECONSTRUCTED:
                return copy_settings(Reconstructed(self, module, layer, rank), module)
            return copy_settings(self.factorised(module, layer, rank), module)

    def factorised(self, module: nn.Module, layer: Layer, rank: Rank) -> nn.Module:
        """Build the module that contracts its input with the factors one after the other.

        Args:
            module: Module to replace.
            layer: Its description.
            rank: A valid rank.
        """
        return build_chain(module, self.stages(layer, rank), self, rank)


def _kernel(factor: Tensor) -> tuple[int, int]:
    return (factor.shape[2], factor.shape[3]) if factor.ndim == 4 else (1, 1)


def _compose(second: Tensor, first: Tensor) -> Tensor:
    """The kernel (g, out, in, h, w) of two successive convolutions that do not both extend along the same axis.

    The second one may be grouped: its kernel then takes the inputs of one block.
    """
    blocks = first.shape[1] // second.shape[2]
    second, first = second.unflatten(1, (blocks, -1)), first.unflatten(1, (blocks, -1))
    product = torch.einsum("gzomab,gzmicd->gzoiacbd", second, first)
    return product.flatten(6, 7).flatten(4, 5).flatten(1, 2)


def _all_inputs(stage: Tensor, in_channels: int) -> Tensor:
    """A block-diagonal kernel as one over all inputs, with zeros between the blocks."""
    blocks = in_channels // stage.shape[2]
    if blocks == 1:
        return stage
    eye = torch.eye(blocks, dtype=stage.dtype, device=stage.device)
    spread = torch.einsum("gzoihw,zy->gzoyihw", stage.unflatten(1, (blocks, -1)), eye)
    return spread.flatten(3, 4).flatten(1, 2)
