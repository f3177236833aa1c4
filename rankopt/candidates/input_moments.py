"""Input moments: the second moment S = E[x xᵀ] of each layer's inputs, over patches of convolutions, or vectors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.core.errors import TaskError
from rankopt.core.records import Layer
from rankopt.model.forward import batch_size, hooked, inference, run, to_device

log = logging.getLogger(__name__)

CHUNK = 2**23  # elements of a patch matrix held at once (32 MB in float32)

LEAST_SHRINKAGE = 1e-4
"""Of second moments towards their diagonal and mean, however many rows there are."""

ROW_BLOCKS, LEAST_ROWS = 4, 256
"""How many blocks of rows a product a aᵀ is taken in, at most, and the least rows of a block."""

WIDEST = 8192
"""The most inputs (or outputs, of one group) for which S (or H) is a full matrix: 512 MiB in float64.

Of a wider layer's S a `Sketch` is kept, of as many numbers as the widest full matrix has. A layer with more outputs
stays dense: fits take H apart into eigenvectors, whose time grows with the cube.
"""

ROWS, ROWS_EACH = 2**15, 100
"""How many vectors an input moment is averaged over: ROWS, or ROWS_EACH times the layer's inputs if that is more.

Of a layer that sees more, a random sample is drawn. Measured on a ResNet-20 with 2,000 images: the error of a
truncated SVD rises by 0.01 to 0.03 % with 1/4 to 1/30 of the vectors, and by 0.03 to 0.08 % with half of the images."""


def moments(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    on_batch: Any = None,
    rows: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """Measure the second moment of each layer's input, S = E[x xᵀ], over patches (convolutions) or vectors (Linear).

    Products are taken in the input's precision and summed in float64. Of a layer that sees many vectors a random sample
    counts; see `ROWS`.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        on_batch: Called after every batch.
        rows: If given, how many vectors each layer saw is written there, by layer name.

    Returns:
        By layer name, S as `shrunk` leaves it, float64 (groups, patch, patch) on the model's device, with patch =
        in_channels // groups * height * width in the order that decompositions see. For an Embedding, whose input is
        one-hot, the diagonal (1, vocabulary) as in `frequencies`; for a layer of more than `WIDEST` inputs a sketch
        (groups, 1 + l, patch), as `decompositions.types.Target` has it. Layers that no input reached, or nothing but
        zeros, are missing.

    Raises:
        TaskError: The model does not run on a batch, or the input of a layer, or its square, is not finite.
    """
    by_name = {layer.name: layer for layer in layers}
    sums: dict[str, Tensor] = {}
    sketches = {layer.name: Sketch(layer) for layer in layers if is_wide(layer)}
    counts: dict[str, int] = dict.fromkeys(by_name, 0)
    examples = sum(map(batch_size, batches))
    samples = {name: Sample.of(layer, examples) for name, layer in by_name.items()}

    def collect(name: str, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if not torch.isfinite(x).all():
            raise TaskError(f"the input of layer {name!r} is NaN or infinite on the calibration data")
        with torch.inference_mode(mode=False), torch.no_grad():  # sums of inference tensors could not be changed later
            given = by_name[name], model.get_submodule(name), x.detach(), samples[name]
            if name in sketches:
                for part in columns(*given):
                    sketches[name].add(part)
                counts[name] = sketches[name].rows
                return
            gram, rows = _gram(*given)
        _accumulate(sums, name, gram)
        counts[name] += rows

    try:
        with inference(model), hooked(model, by_name, on_input=collect):
            for batch in batches:
                run(model, to_device(batch, model))
                if on_batch:
                    on_batch()
    except (RuntimeError, TypeError) as error:
        raise TaskError(f"the model does not run on a calibration batch: {type(error).__name__}: {error}") from error
    rows = {} if rows is None else rows
    found: dict[str, Tensor] = {}
    for name in (name for name in by_name if counts[name]):  # an idle expert has none
        seen = round(counts[name] * samples[name].seen_by_drawn)
        if name in sketches:
            moment = sketches.pop(name).moment()
        else:
            moment = _finished(by_name[name], sums.pop(name), counts[name], seen)
        if _is_any(name, moment):
            found[name], rows[name] = moment, seen
    return found


def _is_any(name: str, moment: Tensor) -> bool:
    """Whether a layer saw anything but zeros; raises TaskError if that was too large."""
    if not torch.isfinite(moment).all():
        raise TaskError(f"the squares of the inputs of layer {name!r} overflow on the calibration data")
    return bool(moment.any())


def _accumulate(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add to a sum in place: a second copy of a wide layer's matrix would take as much memory again."""
    if name in sums:
        sums[name] += part
    else:
        sums[name] = part


def _finished(layer: Layer, total: Tensor, rows: int, seen: int) -> Tensor:
    """The second moment: the mean of a sum over `rows` vectors, a sample of those `seen`. The sum is overwritten."""
    return frequencies(total) if layer.kind == "Embedding" else shrunk(total.div_(rows), seen)


def shrunk(moment: Tensor, rows: int) -> Tensor:
    """Shrink a second moment towards its diagonal and its mean, so that directions that few examples show count.

        S' = (1 − ρ) S + ρ (diag S + (tr S / n) I) / 2

    A fit would otherwise give up, or inflate, whatever the weight does in directions that were never seen. ρ is that of
    Chen et al. 2010 (OAS, eq. 23) for as many independent rows, at least `LEAST_SHRINKAGE`: rows of one image depend on
    each other. It fades with the number of rows.

    Args:
        moment: S, float64 (groups, n, n).
        rows: How many vectors it is the mean of, or of how many these are a sample: images count, not positions.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    rho, added = _shrinkage(diagonal, moment.square().sum((-2, -1)), rows)
    mixed = (1 - rho[..., None]) * moment
    mixed.diagonal(dim1=-2, dim2=-1).add_(added)
    return mixed


def _shrinkage(diagonal: Tensor, square: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """ρ (groups, 1) of `shrunk`, and what is added to the diagonal then, (groups, n).

    diagonal: Of S, (groups, n).
    square: Its squared Frobenius norm (groups,).
    """
    n, trace = diagonal.shape[-1], diagonal.sum(-1)
    above = (1 - 2 / n) * square + trace**2
    below = (rows + 1 - 2 / n) * (square - trace**2 / n)
    rho = (above / below.clamp_min(1e-300)).clamp(LEAST_SHRINKAGE, 1)[..., None]
    return rho, rho * (diagonal + trace[..., None] / n) / 2


class Sketch:
    """The second moment of inputs too many for a matrix, S ≈ diag(d) + Bᵀ B, from one run over the data.

    B comes from Frequent Directions (Liberty 2013; Ghashami et al. 2016): inputs are collected as rows; whenever there
    are twice as many as are kept, all squared singular values are lowered by that of the first row to go. The trace and
    the diagonal of S stay exact, as d makes up for what was taken. With no more inputs than `kept`, S is exact.

    Args:
        layer: The layer.

    Attributes:
        kept: Rows of B.
        rows: Inputs that were seen.
        error: The most by which Bᵀ B differs from the sum over all inputs, in any direction.
    """

    def __init__(self, layer: Layer) -> None:
        self.kept = sketch_rows(layer)
        self.rows, self.error = 0, 0.0
        self._factor = torch.zeros(layer.groups, 0, layer.patch)
        self._squares = torch.zeros(layer.groups, layer.patch, dtype=torch.float64)

    def add(self, columns: Tensor) -> None:
        """See more inputs.

        Args:
            columns: (groups, patch, rows).
        """
        self.rows += columns.shape[-1]
        self._squares = self._squares.to(columns.device) + columns.double().square().sum(-1)
        for part in columns.mT.float().split(self.kept, 1):
            self._factor = torch.cat([self._factor.to(part.device), part], 1)
            if self._factor.shape[1] > 2 * self.kept:
                self._shrink()

    def _shrink(self) -> None:
        """Keep the leading directions."""
        gram = (self._factor @ self._factor.mT).double()
        values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        lost = values[:, -self.kept - 1, None].clamp_min(0)
        self.error += float(lost.max())
        values, vectors = values[:, -self.kept :], vectors[..., -self.kept :]
        scale = ((values - lost).clamp_min(0) / values.clamp_min(1e-300)).sqrt()
        self._factor = (vectors * scale.unsqueeze(1)).mT.float() @ self._factor

    def moment(self) -> Tensor:
        """d and B as `Target` takes them, float64 (groups, 1 + l, patch), shrunk as `shrunk` says."""
        if self._factor.shape[1] > self.kept:
            self._shrink()
        if self.error:
            share = self.error / float(self._squares.sum(-1).min().clamp_min(1e-300))
            log.info("a sketch of %d of %d inputs: off by up to %.2g of the trace", self.kept, self.rows, share)
        factor = self._factor.double() / math.sqrt(self.rows)
        diagonal = self._squares / self.rows
        rest = (diagonal - factor.square().sum(1)).clamp_min(0)
        inner = (factor @ factor.mT).square().sum((-2, -1))
        square = rest.square().sum(-1) + 2 * (rest * (diagonal - rest)).sum(-1) + inner
        rho, added = _shrinkage(diagonal, square, self.rows)
        rest = (1 - rho) * rest + added
        return torch.cat([rest.unsqueeze(1), (1 - rho).sqrt().unsqueeze(-1) * factor], 1)


def is_wide(layer: Layer) -> bool:
    """Whether a layer has too many inputs for a whole input moment.

    Args:
        layer: The layer.
    """
    return layer.patch > WIDEST and layer.kind != "Embedding"


def sketch_rows(layer: Layer) -> int:
    """Rows of a wide layer's `Sketch`: together as many numbers as the widest full matrix.

    Args:
        layer: The layer.
    """
    return max(1, min(WIDEST, WIDEST**2 // layer.patch) - 1)


def frequencies(counts: Tensor) -> Tensor:
    """Estimate token probabilities from counts in the calibration data.

    With plain relative frequencies, a fit would sacrifice the rows of tokens that did not occur. Together these have
    a probability of about N₁ / N, N₁ being the number of tokens that occurred once (Good 1953). Here (N₁ + 1) / N is
    spread evenly over them, but none gets more than a token that occurred once.

    Args:
        counts: Occurrences of each token (1, vocabulary).

    Returns:
        Probabilities (1, vocabulary), none of them zero.
    """
    once, unseen = (counts == 1).sum(), (counts == 0).sum()
    each = ((once + 1) / unseen.clamp_min(1)).clamp_max(1).to(counts)
    counts = torch.where(counts == 0, each, counts)
    return counts / counts.sum()


class Sample:
    """Draws some of the vectors that a layer sees, the same ones in every process.

    Args:
        share: Their share of all.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._seen = self._drawn = 0
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def of(cls, layer: Layer, examples: int) -> Sample:
        """As many as the layer's moment takes.

        Args:
            layer: The layer.
            examples: How many examples it sees.
        """
        return cls(max(ROWS, ROWS_EACH * layer.patch) / max(1, examples * layer.positions))

    @property
    def seen_by_drawn(self) -> float:
        """How many times as many vectors there were as were drawn."""
        return self._seen / self._drawn if self._drawn else 1.0

    def __call__(self, groups: int, size: int, like: Tensor) -> Tensor | None:
        """Draw from each of some groups of vectors, with replacement.

        Args:
            groups: How many groups.
            size: Vectors in each.
            like: A tensor on the device of the result.

        Returns:
            Indices (groups, drawn); None for all.
        """
        drawn = math.ceil(self.share * size)
        all_of_them = not size or 2 * drawn > size  # an expert may get no token
        self._seen += groups * size
        self._drawn += groups * (size if all_of_them else drawn)
        if all_of_them:
            return None
        return torch.randint(size, (groups, drawn), generator=self._generator).to(like.device)


def _gram(layer: Layer, module: nn.Module, x: Tensor, sample: Sample) -> tuple[Tensor, int]:
    """Sum of x xᵀ over patches, float64 (groups, patch, patch), and their number; counts of an Embedding's tokens."""
    if layer.kind == "Embedding":
        return torch.bincount(x.flatten(), minlength=layer.patch).double()[None], x.numel()
    total = torch.zeros(layer.groups, layer.patch, layer.patch, dtype=torch.float64, device=x.device)
    rows = 0
    for part in columns(layer, module, x, sample):
        add_gram(total, part)
        rows += part.shape[-1]
    return total, rows


def columns(layer: Layer, module: nn.Module, x: Tensor, sample: Sample | None = None) -> Iterator[Tensor]:
    """Yield the input vectors that a layer's outputs are computed from, a chunk at a time.

    Args:
        layer: The layer.
        module: Its module.
        x: Its input.
        sample: Draws which of them. Default: all.

    Yields:
        Tensors (groups, patch, rows).
    """
    if not isinstance(module, _ConvNd):
        for part in x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // x.shape[-1])):
            chosen = sample(1, len(part), x) if sample else None
            yield (part if chosen is None else part[chosen[0]]).T[None]
        return
    x = x if x.ndim == len(module.kernel_size) + 2 else x[None]
    positions = math.prod(x.shape[2:]) * (math.prod(module.stride) if module.transposed else 1)
    for part in x.split(max(1, CHUNK // (positions * layer.patch * layer.groups))):
        seen = patches(module, part, sample)  # (b, groups * patch, positions)
        yield seen.unflatten(1, (layer.groups, layer.patch)).permute(1, 2, 0, 3).flatten(2)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum the outer products of columns, a bᵀ.

    Args:
        a: (groups, p, rows).
        b: (groups, q, rows).

    Returns:
        float64 (groups, p, q).
    """
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (a, b))
    return (a @ b.mT).double()


def add_gram(total: Tensor, a: Tensor) -> None:
    """Add the sum of the outer products of columns with themselves, a aᵀ; the half that follows by symmetry is copied.

    Args:
        total: (groups, p, p), float64; it is changed.
        a: (groups, p, rows).
    """
    size = max(LEAST_ROWS, math.ceil(a.shape[1] / ROW_BLOCKS))
    for i in range(0, a.shape[1], size):
        rows = slice(i, i + size)
        product = outer(a[:, rows], a[:, i:])
        total[:, rows, i:] += product
        total[:, i + size :, rows] += product[..., size:].mT


def patches(conv: _ConvNd, x: Tensor, sample: Sample | None = None) -> Tensor:
    """Extract the patches that a convolution's outputs are computed from.

    Args:
        conv: A convolution, transposed or not.
        x: Its input (b, c, *size).
        sample: Draws at which positions, for each example. Default: at all.

    Returns:
        (b, c * kernel, positions), one patch per position of the output.
    """
    n = len(conv.kernel_size)
    if conv.transposed:
        seen, stride = _zeros_between(conv, x), (1,) * n
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        seen, stride = F.pad(x, conv._reversed_padding_repeated_twice, mode), conv.stride
    for i, (size, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        seen = seen.unfold(2 + i, (size - 1) * dilation + 1, stride[i])[..., ::dilation]
    sizes = seen.shape[2 : 2 + n]
    seen = seen.movedim(1, 1 + n)  # (b, *positions, c, *kernel), not copied yet
    chosen = sample(len(x), math.prod(sizes), x) if sample else None
    if chosen is not None:
        images = torch.arange(len(x), device=x.device).unsqueeze(-1)
        seen = seen[(images, *torch.unravel_index(chosen, sizes))].unflatten(1, (-1, *[1] * (n - 1)))
    if conv.transposed:  # what comes first in the input meets the kernel's end
        seen = seen.flip(tuple(range(-n, 0)))
    return seen.flatten(1 + n).flatten(1, n).mT


def _zeros_between(conv: _ConvNd, x: Tensor) -> Tensor:
    """The input over which a transposed convolution is an ordinary one: stride - 1 zeros between, zeros around."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], conv.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    steps: list[Any] = [slice(None, None, step) for step in conv.stride]
    spread[..., *steps] = x
    around: list[int] = []
    for i in reversed(range(len(sizes))):
        before = conv.dilation[i] * (conv.kernel_size[i] - 1) - int(conv.padding[i])
        around += [before, before + conv.output_padding[i]]
    return F.pad(spread, around)


# --- output metrics: how strongly the model responds to a layer's output ---------------------------
