"""Factorised layers as tensors of tensorly, and back: its algorithms, metrics and plots for the factors of a layer.

| decomposition of a layer | tensorly's tensor | its modes |
|---|---|---|
| `cp` | `CPTensor` | T, C, kh, kw |
| `cp_merged` | `CPTensor` | T, C, kh kw |
| `svd_out` | `CPTensor` | T, C kh kw |
| `svd_in` | `CPTensor` | T kh kw, C |
| `svd_spatial` | `CPTensor` | T kw, C kh |
| `tucker`, `tucker2` | `TuckerTensor` | T, C, kh, kw |
| `tt` | `TTTensor` | C, kh, kw, T; of a Linear C1, C2, T1, T2 |
| `tr` | `TRTensor` | as `tt` |
| `tt_matrix` | `TTMatrix` | J1, J2, J3 x I1, I2, I3 |
| `tt_conv` | `TTMatrix` | kh kw, J1, J2, J3 x 1, I1, I2, I3 |

T and C are the layer's outputs and inputs, kh and kw the size of its kernel.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankopt.core.errors import RankoptError
from rankopt.core.records import Layer, Rank
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.tensor_ring import TensorRing
from rankopt.decompositions.tensor_train import TensorTrain
from rankopt.decompositions.tensor_train_matrix import TensorTrainMatrix
from rankopt.decompositions.types import Factors
from rankopt.model.layer_kinds import describe, is_kind


def to_tensorly(module: nn.Module) -> Any:
    """A factorised layer as a tensor of tensorly.

    Args:
        module: A layer of a compressed model, such as `result.model.conv1`.

    Returns:
        A CPTensor, TuckerTensor, TTTensor, TRTensor or TTMatrix with copies of the layer's factors, which are torch
        tensors: call tensorly's functions after `tensorly.set_backend("pytorch")`. The bias is not part of it.

    Raises:
        RankoptError: If the layer is not factorised, has several groups, or tensorly has no such tensor.
    """
    import tensorly

    method, layer, factors = _replaced(module)
    with tensorly.backend_context("pytorch"):
        return _made(FORMATS[method].kind, FORMATS[method].parts(layer, factors))


def from_tensorly(module: nn.Module, tensor: Any) -> nn.Module:
    """A replacement for a layer with the factors of a tensor of tensorly.

    Args:
        module: The dense layer, such as an `nn.Conv2d`, whose bias, geometry, dtype and device the replacement has; or
            a factorised layer of the tensor's rank. It is not changed.
        tensor: A CPTensor, TuckerTensor, TTTensor, TRTensor or TTMatrix of `to_tensorly`'s modes, or one of
            tensorly-torch's FactorizedTensors. Its factors may be arrays of any backend that numpy can read.

    Returns:
        A module to put in the layer's place. `rankopt.save` writes models that have such modules.

    Raises:
        RankoptError: If the tensor's kind, modes or rank do not fit the layer.
    """
    kind, parts = _read(tensor)
    if hasattr(module, "method"):
        method, layer, _ = _replaced(module)
        replacement = copy.deepcopy(module)
    else:
        layer = _described(module)
        method, replacement = "", module
    sizes = _sizes(kind, parts)
    fits = [m for m, f in FORMATS.items() if f.kind == kind and f.takes(layer, sizes, parts) and method in ("", m)]
    if not fits:
        raise RankoptError(_misfit(layer, kind, sizes, [method] if method else list(FORMATS)))
    rank, factors = FORMATS[fits[0]].factors(layer, parts)
    family = DECOMPOSITIONS[fits[0]]
    if (allowed := family.valid(layer, rank)) != rank:
        raise RankoptError(
            f"{_called(layer)}: rank {rank} of {fits[0]!r} is redundant, {allowed} can represent the same: round the "
            "tensor to that rank first"
        )
    if not method:
        replacement = family.build(module, layer, rank)
    elif replacement.rank != rank:
        raise RankoptError(
            f"{_called(layer)} has rank {replacement.rank}, the tensor {rank}: give the dense layer instead"
        )
    shaped = zip(factors, family.shapes(layer, rank), strict=True)
    load_factors(replacement, tuple(f.reshape(shape) for f, shape in shaped))
    return replacement.train(module.training)


# --- what is given -----------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a tensor of tensorly consists of.

    Attributes:
        head: The weights of a CPTensor, the core of a TuckerTensor; None of the others.
        factors: Factor matrices or cores.
    """

    head: Tensor | None
    factors: tuple[Tensor, ...]


def _made(kind: str, parts: Parts) -> Any:
    import tensorly.cp_tensor
    import tensorly.tr_tensor
    import tensorly.tt_matrix
    import tensorly.tt_tensor
    import tensorly.tucker_tensor

    factors = [f.detach().clone() for f in parts.factors]
    if kind == "CPTensor":
        return tensorly.cp_tensor.CPTensor((None, factors))
    if kind == "TuckerTensor":
        assert parts.head is not None
        return tensorly.tucker_tensor.TuckerTensor((parts.head.detach().clone(), factors))
    kinds = {
        "TTTensor": tensorly.tt_tensor.TTTensor,
        "TRTensor": tensorly.tr_tensor.TRTensor,
        "TTMatrix": tensorly.tt_matrix.TTMatrix,
    }
    return kinds[kind](factors)


def _read(tensor: Any) -> tuple[str, Parts]:
    """The kind of a tensor, and what it consists of. Classes of tensorly-torch have tensorly's names, but for one."""
    kind = {"BlockTT": "TTMatrix"}.get(type(tensor).__name__, type(tensor).__name__)
    if kind not in {f.kind for f in FORMATS.values()}:
        raise RankoptError(
            f"the tensor is a {kind}: give a CPTensor, TuckerTensor, TTTensor, TRTensor or TTMatrix of tensorly, or a "
            "FactorizedTensor of tensorly-torch"
        )
    content = getattr(tensor, "decomposition", tensor)  # tensorly-torch's are modules
    head, factors = content if kind in ("CPTensor", "TuckerTensor") else (None, content)
    read = tuple(_torch(f) for f in factors)
    if kind == "CPTensor" and head is not None:  # weights of the components go into the first factor
        read, head = (read[0] * _torch(head), *read[1:]), None
    return kind, Parts(None if head is None else _torch(head), read)


def _torch(array: Any) -> Tensor:
    return array.detach() if isinstance(array, Tensor) else torch.as_tensor(array)


def _sizes(kind: str, parts: Parts) -> tuple[int, ...]:
    """The sizes of a tensor's modes; of a train of matrices, outputs before inputs."""
    if kind in ("CPTensor", "TuckerTensor"):
        return tuple(f.shape[0] for f in parts.factors)
    if kind == "TTMatrix":
        return (*(f.shape[1] for f in parts.factors), *(f.shape[2] for f in parts.factors))
    return tuple(f.shape[1] for f in parts.factors)


def _replaced(module: nn.Module) -> tuple[str, Layer, Factors]:
    """The method, layer and factors of a module that replaces a layer."""
    method: Any = getattr(module, "method", None)
    if method is None:
        raise RankoptError(f"the {type(module).__name__} is not factorised: give a layer that rankopt has replaced")
    layer: Any = module.layer
    if method not in FORMATS:
        raise RankoptError(f"{_called(layer)} is factorised as {method!r}, for which tensorly has no tensor")
    _one_group(layer)
    factors: Any = getattr(module, "factors", None)
    return method, layer, tuple(factors if factors is not None else module.cores)  # type: ignore[arg-type]


def _described(module: nn.Module) -> Layer:
    if not is_kind(type(module)):
        raise RankoptError(f"a {type(module).__name__} cannot be factorised: give a convolution, Linear or Embedding")
    layer = describe(module)
    _one_group(layer)
    return layer


def _one_group(layer: Layer) -> None:
    if layer.groups > 1:
        raise RankoptError(f"{_called(layer)} has {layer.groups} groups: each would be a tensor of its own")


def _called(layer: Layer) -> str:
    return f"{layer.kind} {layer.name}".strip()


def _misfit(layer: Layer, kind: str, sizes: tuple[int, ...], methods: Sequence[str]) -> str:
    known = [FORMATS[m].modes(layer) for m in methods if FORMATS[m].kind == kind]
    fitting = ", or ".join(dict.fromkeys(str(modes) for modes in known if modes)) or "none"
    return f"{_called(layer)} and a {kind} of modes {sizes} do not fit each other: modes that fit are {fitting}"


# --- formats -----------------------------------------------------------------------------------------


class Format(ABC):
    """How the factors of a decomposition are those of a tensor of tensorly.

    Args:
        method: The decomposition.
    """

    kind: str

    def __init__(self, method: str) -> None:
        self.method = method

    def takes(self, layer: Layer, sizes: tuple[int, ...], parts: Parts) -> bool:
        """Whether a tensor is one of a layer.

        Args:
            layer: The layer.
            sizes: The sizes of the tensor's modes.
            parts: The tensor.
        """
        return sizes == self.modes(layer)

    def modes(self, layer: Layer) -> tuple[int, ...] | None:
        """The sizes of the modes; None if the decomposition does not apply to the layer.

        Args:
            layer: The layer.
        """
        return None if DECOMPOSITIONS[self.method].full_rank(layer) is None else self.sizes(layer)

    @abstractmethod
    def sizes(self, layer: Layer) -> tuple[int, ...]:
        """The sizes of the modes of a layer to which the decomposition applies.

        Args:
            layer: The layer.
        """

    @abstractmethod
    def parts(self, layer: Layer, factors: Factors) -> Parts:
        """The tensor of a layer's factors.

        Args:
            layer: The layer.
            factors: Its factors.
        """

    @abstractmethod
    def factors(self, layer: Layer, parts: Parts) -> tuple[Rank, Factors]:
        """The rank of a tensor, and the layer's factors in any shape.

        Args:
            layer: The layer.
            parts: The tensor.
        """


class Components(Format):
    """CP: a matrix for each mode, whose columns are the components. The stages are stored input first.

    Args:
        method: The decomposition.
        modes: The axes "t", "c", "h", "w" of the weight in each mode, outputs first.
    """

    kind = "CPTensor"

    def __init__(self, method: str, *modes: str) -> None:
        super().__init__(method)
        self.axes = modes

    def sizes(self, layer: Layer) -> tuple[int, ...]:
        size = _axes(layer)
        return tuple(math.prod(size[a] for a in mode) for mode in self.axes)

    def parts(self, layer: Layer, factors: Factors) -> Parts:
        *inputs, last = factors
        r = last.shape[1]
        # (T, R, kernel) -> (T kernel, R)
        out = last.reshape(layer.out_channels, r, -1).transpose(1, 2).reshape(-1, r)
        return Parts(None, (out, *(f.reshape(r, -1).T for f in inputs)))

    def factors(self, layer: Layer, parts: Parts) -> tuple[Rank, Factors]:
        out, *inputs = parts.factors
        r = out.shape[1]
        last = out.reshape(layer.out_channels, -1, r).transpose(1, 2)
        return (r,), (*(f.T for f in inputs), last)


class Core(Format):
    """Tucker over T, C, kh, kw whose core has the kernel's size: factors of its modes are multiplied into the core."""

    kind = "TuckerTensor"

    def sizes(self, layer: Layer) -> tuple[int, ...]:
        return tuple(_axes(layer).values())

    def takes(self, layer: Layer, sizes: tuple[int, ...], parts: Parts) -> bool:
        assert parts.head is not None
        return sizes == self.modes(layer) and tuple(parts.head.shape[2:]) == layer.kernel

    def parts(self, layer: Layer, factors: Factors) -> Parts:
        first, core, last = factors
        eyes = (torch.eye(k, dtype=core.dtype, device=core.device) for k in layer.kernel)
        return Parts(core, (last.flatten(1), first.flatten(1).T, *eyes))

    def factors(self, layer: Layer, parts: Parts) -> tuple[Rank, Factors]:
        out, channels, height, width = parts.factors
        core = torch.einsum("qpij,yi,xj->qpyx", parts.head, height, width)
        return (channels.shape[1], out.shape[1]), (channels.T, core, out)


class WholeCore(Core):
    """Tucker with factors of the kernel's modes."""

    def takes(self, layer: Layer, sizes: tuple[int, ...], parts: Parts) -> bool:
        return sizes == self.modes(layer)

    def parts(self, layer: Layer, factors: Factors) -> Parts:
        first, height, width, core, last = factors
        inputs = tuple(f.reshape(len(f), -1) for f in (first, height, width))
        core = core.reshape(core.shape[0], *map(len, inputs))
        return Parts(core, (last.flatten(1), *(f.T for f in inputs)))

    def factors(self, layer: Layer, parts: Parts) -> tuple[Rank, Factors]:
        assert parts.head is not None
        out, channels, height, width = parts.factors
        q, p, i, j = parts.head.shape
        return (p, i, j, q), (channels.T, height.T, width.T, parts.head, out)


class Train(Format):
    """Tensor train, input first; of cores (R, R before, mode) here and (R before, mode, R) there."""

    kind = "TTTensor"

    def sizes(self, layer: Layer) -> tuple[int, ...]:
        family = DECOMPOSITIONS[self.method]
        assert isinstance(family, TensorTrain | TensorRing)
        modes = family.modes(layer)
        assert modes is not None
        return modes

    def parts(self, layer: Layer, factors: Factors) -> Parts:
        *others, last = factors
        bonds = [1, *(len(f) for f in others)]
        cores = [f.reshape(r, before, -1) for f, before, r in zip(others, bonds, bonds[1:], strict=False)]
        return Parts(None, (*(c.permute(1, 2, 0) for c in cores), last.flatten(1).T.unsqueeze(-1)))

    def factors(self, layer: Layer, parts: Parts) -> tuple[Rank, Factors]:
        *others, last = parts.factors
        return tuple(f.shape[2] for f in others), (*(f.permute(2, 0, 1) for f in others), last.squeeze(-1).T)


class Ring(Train):
    """Tensor ring: as a train, with R0 blocks in the first and in the last core."""

    kind = "TRTensor"

    def parts(self, layer: Layer, factors: Factors) -> Parts:
        first, second, third, last = factors
        r2, r1, r3 = second.shape[0], second.shape[1], third.shape[0]
        return Parts(
            None,
            (
                first.reshape(-1, r1, self.sizes(layer)[0]).transpose(1, 2),
                second.reshape(r2, r1, -1).permute(1, 2, 0),
                third.reshape(r3, r2, -1).permute(1, 2, 0),
                last.reshape(len(last), -1, r3).permute(2, 0, 1),
            ),
        )

    def factors(self, layer: Layer, parts: Parts) -> tuple[Rank, Factors]:
        first, second, third, last = parts.factors
        rank = (first.shape[0], *(f.shape[2] for f in (first, second, third)))
        inner = (second.permute(2, 0, 1), third.permute(2, 0, 1))
        return rank, (first.transpose(1, 2), *inner, last.permute(1, 2, 0))


class MatrixTrain(Format):
    """Tensor train over pairs of an output and an input mode, stored in the same way."""

    kind = "TTMatrix"

    def sizes(self, layer: Layer) -> tuple[int, ...]:
        family = DECOMPOSITIONS[self.method]
        assert isinstance(family, TensorTrainMatrix)
        outputs, inputs = family.channels(layer)
        area = (math.prod(layer.kernel),) if len(family.modes(layer)) == 4 else ()
        return (*area, *outputs, *(1 for _ in area), *inputs)

    def parts(self, layer: Layer, factors: Factors) -> Parts:
        return Parts(None, tuple(f if f.ndim == 4 else f.unsqueeze(2) for f in factors))

    def factors(self, layer: Layer, parts: Parts) -> tuple[Rank, Factors]:
        return tuple(f.shape[3] for f in parts.factors[:-1]), parts.factors


def _axes(layer: Layer) -> dict[str, int]:
    return dict(zip("tchw", (layer.out_channels, layer.in_channels, *layer.kernel), strict=True))


FORMATS: dict[str, Format] = {
    "svd_out": Components("svd_out", "t", "chw"),
    "svd_in": Components("svd_in", "thw", "c"),
    "svd_spatial": Components("svd_spatial", "tw", "ch"),
    "cp_merged": Components("cp_merged", "t", "c", "hw"),
    "cp": Components("cp", "t", "c", "h", "w"),
    "tucker2": Core("tucker2"),
    "tucker": WholeCore("tucker"),
    "tt": Train("tt"),
    "tr": Ring("tr"),
    "tt_matrix": MatrixTrain("tt_matrix"),
    "tt_conv": MatrixTrain("tt_conv"),
}
"""Decomposition -> how its factors are those of a tensor of tensorly."""
