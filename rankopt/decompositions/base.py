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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core import FACTORISED, RECONSTRUCTED, Cost, Layer, Rank
from rankopt.decompositions.convolution import stage_convolution
from rankopt.decompositions.reconstructed import Reconstructed
from rankopt.kinds import describe, in_own_shape, matricise

Aspect = tuple[float, ...]
"""A direction in which ranks grow: proportions of full rank; an int is a rank that stays as it is."""

Factors = tuple[Tensor, ...]
"""The weights of a replacement's stages, in order and in the layout of their modules."""


class Stage(NamedTuple):
    """One convolution of a replacement; channels per group of the original layer.

    axes: whose stride, padding and dilation of the original it takes over, and whose kernel: "hw", "h", "w" or "".
    Of an Embedding a stage of "hw" is the look-up. Of a transposed convolution, stages of any axis are transposed.
    blocks: into how many equal parts the channels fall that do not mix; as many as channels is depthwise.
    shared: all blocks have one kernel; it is stored once.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    axes: str = ""
    blocks: int = 1
    shared: bool = False

    def shape(self, groups: int) -> tuple[int, ...]:
        out_channels = self.out_channels // self.blocks if self.shared else self.out_channels
        return (groups * out_channels, self.in_channels // self.blocks, *self.kernel)

    def weights(self, groups: int) -> int:
        return math.prod(self.shape(groups))

    def macs(self, groups: int) -> int:
        """Multiply-accumulates for one position."""
        return self.weights(groups) * (self.blocks if self.shared else 1)


class Bond(NamedTuple):
    """A bond between factors, of one group: it parts the modes of the weight in two, and bounds the rank there."""

    size: int
    inside: tuple[str, ...]  # the modes on the input's side


class Fit(NamedTuple):
    """A fitted candidate: its factors in the weight's dtype, and their relative error."""

    rank: Rank
    factors: Factors
    error: float


class Target(NamedTuple):
    """What a fit approximates, float64: weight (g, T, n), input moment S (g, n, n), output metric H (g, T, T).

    moment: of an Embedding, whose input is one-hot, only its diagonal (1, n).
    outer: where the weight is seen as (g, t2, t1 * n), because t1 of its T = t1 * t2 belong to what is searched,
    the metric of t1, (g, t1, t1); the input moment is then outer ⊗ S.
    plain: S is the identity, and products with it are left out.
    """

    weight: Tensor
    moment: Tensor
    metric: Tensor
    outer: Tensor | None = None
    plain: bool = False

    def times_moment(self, rows: Tensor) -> Tensor:
        """rows (g, m, n or t1 * n) times the input moment."""
        if self.moment.ndim == 2:
            return rows * self.moment.unsqueeze(1)
        product = rows.reshape(len(rows), -1, self.moment.shape[-1])
        product = product if self.plain else product @ self.moment
        if self.outer is not None:
            product = self.outer.unsqueeze(1) @ product.view(*rows.shape[:2], self.outer.shape[-1], -1)
        return product.view(rows.shape)

    def error(self, approximation: Tensor) -> float:
        """Relative squared error of an approximation (g, T, n)."""
        difference = self.weight - approximation
        whole = self.norm
        return self._square(difference) / whole if whole > 0 else 0.0

    @property
    def norm(self) -> float:
        """Squared norm of the weight itself."""
        return self._square(self.weight)

    def _square(self, w: Tensor) -> float:
        return ((self.metric @ w) * self.times_moment(w)).sum().item()


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
        return chain(module, self.stages(layer, rank), self.name, rank)


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


# --- replacement modules -------------------------------------------------------------------------


class Factorised(nn.Sequential):
    """A layer replaced by smaller ones in a row. Reads of .weight get the dense weight, rebuilt; .bias the bias."""

    method: str
    rank: Rank

    def __init__(self, stages: Sequence[nn.Module], method: str, rank: Rank, layer: Layer) -> None:
        super().__init__(*stages)
        self.method, self.rank, self.layer = method, rank, layer

    @property
    def factors(self) -> Factors:
        """The stages' weights as families see them."""
        parts = [(describe(s), s.weight) for s in self]
        return tuple(matricise(part, weight).reshape(part.shape) for part, weight in parts)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The dense weight in the shape of the original's."""
        from rankopt.decompositions import DECOMPOSITIONS

        return in_own_shape(self.layer, DECOMPOSITIONS[self.method].weight(self.layer, self.factors))

    @property
    def bias(self) -> Tensor | None:
        return self[-1].bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"method={self.method}, rank={self.rank}"


def chain(module: nn.Module, stages: Sequence[Stage], method: str, rank: Rank) -> nn.Module:
    """The stages as modules in a row, geometry taken from the original; the last one carries its bias."""
    last = len(stages) - 1
    weight: Tensor = module.weight  # type: ignore[assignment]
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    parts: list[nn.Module] = []
    for i, s in enumerate(stages):
        bias = i == last and getattr(module, "bias", None) is not None
        if isinstance(module, _ConvNd):
            parts.append(stage_convolution(module, s, bias, like))
        elif isinstance(module, nn.Embedding) and s.axes:
            parts.append(nn.Embedding(s.in_channels, s.out_channels, module.padding_idx, **like))
        elif s.blocks > 1:
            parts.append(BlockLinear(s.in_channels, s.out_channels, s.blocks, like))
        else:
            parts.append(nn.Linear(s.in_channels, s.out_channels, bias, **like))
    return Factorised(parts, method, rank, describe(module))


class BlockLinear(nn.Linear):
    """y = x Wᵀ with W block-diagonal, its blocks (out, in // blocks) one below the other; no bias."""

    def __init__(self, in_features: int, out_features: int, blocks: int, like: dict[str, Any]) -> None:
        super().__init__(in_features // blocks, out_features, bias=False, **like)
        self.blocks = blocks

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = input.reshape(-1, self.blocks, self.in_features).transpose(0, 1)
        y = x @ self.weight.unflatten(0, (self.blocks, -1)).mT  # (blocks, N, out // blocks)
        return y.transpose(0, 1).reshape(*input.shape[:-1], self.out_features)


GEOMETRY = (
    *("in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding"),
    *("num_embeddings", "embedding_dim", "padding_idx"),
)


def finish(replacement: nn.Module, module: nn.Module) -> nn.Module:
    """Copy the bias, mode and requires_grad of the original; factors take the weight's requires_grad."""
    for name in GEOMETRY:  # for whoever reads layer.out_channels and the like
        if hasattr(module, name):
            setattr(replacement, name, getattr(module, name))
    bias: Tensor | None = getattr(module, "bias", None)
    with torch.no_grad():
        for parameter in replacement.parameters():
            parameter.requires_grad_(module.weight.requires_grad)  # type: ignore[arg-type]
        if bias is not None:
            replacement.bias.copy_(bias)  # type: ignore[operator]
            replacement.bias.requires_grad_(bias.requires_grad)
    return replacement.train(module.training)


def load_factors(replacement: nn.Module, factors: Factors) -> None:
    """Write the factors into an empty replacement."""
    names = [name for name, _ in replacement.named_parameters() if not name.endswith("bias")]
    with torch.no_grad():
        for name, factor in zip(names, factors, strict=True):
            module = replacement.get_submodule(name.rpartition(".")[0])
            own = isinstance(module, (_ConvNd, nn.Embedding))  # of others the factor is the parameter as it is
            replacement.get_parameter(name).copy_(in_own_shape(describe(module), factor) if own else factor)
