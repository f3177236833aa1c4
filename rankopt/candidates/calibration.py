"""Calibration statistics: input moments and output metrics of all layers, measured on real batches.

The error of a candidate weight Ŵ is measured as tr(H (W − Ŵ) S (W − Ŵ)ᵀ), with the input moment S = E[x xᵀ] and the
output metric H = E[g gᵀ], which says how strongly the model's outputs respond to each output of the layer.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.candidates.cache import Cache
from rankopt.candidates.pool import WORKER_BYTES, NotSentError, Pool
from rankopt.candidates.probing import examples_are_apart
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.files import available_memory, gigabytes
from rankopt.core.progress import Progress
from rankopt.core.records import Layer
from rankopt.model.forward import (
    batch_size,
    class_axis,
    hooked,
    inference,
    input_tensors,
    map_tensors,
    model_input,
    outputs,
    run,
    take,
    to_device,
)
from rankopt.model.inputs import check_batches
from rankopt.model.objective import Divergence

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


CALIBRATION_BYTES = 2**31
"""The most bytes of inputs that are held in memory: of large images fewer than `CALIBRATION_EXAMPLES` are taken."""


SAVED_BYTES = 2**30
"""The most bytes that a forward saves for its backward, unless a single example takes more."""


BLOCK_BYTES = 2**30
"""The most bytes of statistics that are summed at once, unless a single layer has more: the layers are taken in blocks,
each with its own runs over the calibration data."""


class WithinMemory:
    """Calibration batches up to `CALIBRATION_BYTES`, and at least one.

    Args:
        batches: A task's calibration batches.

    Attributes:
        cut: Whether the last iteration left batches out.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        check_batches(batches)
        self.batches, self.cut = batches, False

    def __iter__(self) -> Iterator[Any]:
        total, self.cut = 0, False
        for batch in self.batches:
            size = sum(t.numel() * t.element_size() for t in input_tensors(model_input(batch)))
            total += size
            if total > CALIBRATION_BYTES and total > size:
                self.cut = True
                return
            yield batch


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
        (groups, 1 + l, patch), as `decompositions.types.Target` has it. Layers that no input reached are missing.

    Raises:
        TaskError: The model does not run on a batch, or the input of a layer is not finite.
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
    reached = [name for name in by_name if counts[name]]  # an idle expert is not
    seen = {name: round(counts[name] * samples[name].seen_by_drawn) for name in reached}
    if rows is not None:
        rows.update(seen)
    return {
        name: sketches.pop(name).moment()
        if name in sketches
        else _finished(by_name[name], sums.pop(name), counts[name], seen[name])
        for name in reached
    }


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
        all_of_them = 2 * drawn > size
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


def output_metrics(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], on_batch: Any = None
) -> dict[str, Tensor]:
    """Measure the output metric of each layer, H = E[g gᵀ] with g = d(vᵀ z)/d(output).

    z are all floating-point outputs of the model, and v seeded random directions, mean-free over classes, as a softmax
    ignores the mean.
    This is a Gauss-Newton metric in output space (Martens 2020, section 6). Unlike the Fisher matrix it does not
    vanish where the model is confident.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        on_batch: Called after every batch.

    Returns:
        By layer name, H as `shrunk` leaves it, float64 (groups, T, T) with trace T. Layers that no gradient reached are
        missing.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = defaultdict(int)
    generator = torch.Generator().manual_seed(0)

    def collect(layer: Layer, gradient: Tensor) -> None:
        axis = 1 - len(layer.own_shape)  # before those of the kernel
        channels = gradient.detach().movedim(axis, 0).reshape(layer.groups, layer.out_channels, -1)
        if layer.name not in sums:
            sums[layer.name] = channels.new_zeros(layer.groups, *2 * (layer.out_channels,), dtype=torch.float64)
        add_gram(sums[layer.name], channels)
        rows[layer.name] += channels.shape[-1]

    def watch(name: str, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a part of the forward under no_grad: no gradient reaches it
            return output
        if not output.requires_grad:  # a frozen model; the clone may be changed in place
            output = output.detach().requires_grad_().clone()
        # A hook on the tensor sees the gradient of this output even if a later layer changes it in place.
        output.register_hook(lambda gradient: None if gradient is None else collect(by_name[name], gradient))
        return output

    by_name = {layer.name: layer for layer in layers}
    pieces = _Pieces(model, batches)
    try:
        with (
            _parameters_apart(model, by_name),
            inference(model),
            hooked(model, by_name, on_output=watch),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False),
        ):
            for batch in batches:
                for piece in pieces(batch):
                    x = map_tensors(to_device(piece, model), _with_gradient)
                    directions = _directions(outputs(run(model, x)), generator)
                    if directions is not None:
                        directions.backward()
                if on_batch:
                    on_batch()
    except RuntimeError as error:  # a forward that takes gradients itself, or only runs without them
        log.warning("no gradients of the model's outputs can be taken (%s: %s)", type(error).__name__, error)
        sums.clear()
    used = [name for name, h in sums.items() if torch.isfinite(h).all() and h.abs().max() > 0]
    return {name: _unit_trace(shrunk(sums.pop(name) / rows[name], rows[name])) for name in used}


class _Pieces:
    """Cuts batches so that what a backward needs of a forward takes up to `SAVED_BYTES`, if that changes no gradient.

    Args:
        model: The model.
        batches: The batches.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.most = max(map(batch_size, batches), default=1)
        if self.most > 1 and (saved := _saved_bytes(model, take(batches[0], slice(1)))) * self.most > SAVED_BYTES:
            first = Divergence(model, batches[:1])
            if examples_are_apart(first, model):
                self.most = max(1, SAVED_BYTES // saved)

    def __call__(self, batch: Any) -> Iterator[Any]:
        n = batch_size(batch)
        yield from [batch] if n <= self.most else (take(batch, slice(i, i + self.most)) for i in range(0, n, self.most))


def _saved_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes of the tensors that a forward saves for its backward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (place := t.untyped_storage().data_ptr()) not in own:
            found[place] = t.untyped_storage().nbytes()
        return t

    try:
        with inference(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = run(model, map_tensors(to_device(batch, model), _with_gradient))
    except RuntimeError:  # it will be met again, and said
        return 0
    del kept
    return sum(found.values())


@contextmanager
def _parameters_apart(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Context: layers' weights take no gradient, which would be a third of the backward; others' are thrown away."""
    gradients = [(p, p.grad) for p in model.parameters() if p.is_leaf]
    weights = [p for p in (model.get_submodule(name).weight for name in layers) if p.is_leaf and p.requires_grad]
    try:
        for p in weights:
            p.requires_grad = False
        for p, _ in gradients:
            p.grad = None
        yield
    finally:
        for p in weights:
            p.requires_grad = True
        for p, gradient in gradients:
            p.grad = gradient


def _with_gradient(t: Tensor) -> Tensor:
    """A floating-point input that takes a gradient: reentrant checkpoints record nothing without one."""
    return t.detach().requires_grad_().clone() if t.is_floating_point() else t


def _directions(found: Mapping[str, Tensor], generator: torch.Generator) -> Tensor | None:
    """vᵀ z, over all outputs with a gradient; of several, each relative to its own size. None without one."""
    parts = []
    for z in found.values():
        if not z.requires_grad:
            continue
        v = torch.randn(z.shape, generator=generator).to(z)
        if (axis := class_axis(z)) is not None:
            v = v - v.mean(axis, keepdim=True)
        size = z.detach().float().std(correction=0).item() if len(found) > 1 else 1.0
        if size > 0:
            parts.append((z * v).sum() / size)
    return torch.stack(parts).sum() if parts else None


def _unit_trace(h: Tensor) -> Tensor:
    return h.div_(h.diagonal(dim1=-2, dim2=-1).mean())


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    progress: Progress,
    rows: dict[str, int] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Measure input moments and output metrics.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        progress: Progress callback.
        rows: As of `moments`.

    Returns:
        Input moments S by layer name, and output metrics H by layer name, float64 on the CPU. See `moments` and
        `output_metrics`.

    Raises:
        RankoptError: There is less memory than the statistics take.
    """
    s: dict[str, Tensor] = {}
    h: dict[str, Tensor] = {}
    for _, moment, metric in calibrate_blocks(model, blocks(layers), batches, progress, {} if rows is None else rows):
        s.update((name, t.double()) for name, t in moment.items())
        h.update((name, t.double()) for name, t in metric.items())
    return s, h


def calibrate_blocks(
    model: nn.Module,
    parts: Sequence[Sequence[Layer]],
    batches: Sequence[Any],
    progress: Progress,
    rows: dict[str, int],
) -> Iterator[tuple[Sequence[Layer], dict[str, Tensor], dict[str, Tensor]]]:
    """As `calibrate`, one block of layers after the other, so that only the statistics of one are held at a time.

    Args:
        model: The model.
        parts: Blocks of its layers.
        batches: Inputs of the model.
        progress: Progress callback.
        rows: As of `moments`.

    Yields:
        A block with its S and H.

    Raises:
        RankoptError: There is less memory than the statistics of a block take.
    """
    if not parts:
        return
    most = max(map(block_bytes, parts))
    _check_memory(model, max(parts, key=block_bytes), most)
    log.info(
        "calibration takes up to %s of memory beside the model, %d runs over the data", gigabytes(most), len(parts)
    )
    total = 2 * len(batches) * len(parts)
    steps = iter(progress(range(total), "calibrating", total))
    for part in parts:
        s = _as_stored(moments(model, part, batches, lambda: next(steps), rows))
        h = _as_stored(output_metrics(model, part, batches, lambda: next(steps)))
        yield part, s, h
    next(steps, None)


def _measure_away(
    shared: tuple[nn.Module, Sequence[Any]], block: int, part: Sequence[Layer], gradients: bool
) -> tuple[int, dict[str, Tensor]]:
    """In another process: the number of a block, and its output metrics or input moments as they are stored."""
    model, batches = shared
    if gradients:
        return block, _metric_entries(_as_stored(output_metrics(model, part, batches)))
    rows: dict[str, int] = {}
    return block, _moment_entries(_as_stored(moments(model, part, batches, rows=rows)), rows)


def _moment_entries(s: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Input moments as they are stored, each with the number of vectors that it is the mean of."""
    return {f"moment.{n}": t for n, t in s.items()} | {f"rows.{n}": torch.tensor([rows[n]]) for n in s}


def _metric_entries(h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output metrics as they are stored."""
    return {f"metric.{n}": t for n, t in h.items()}


def shares(layers: Sequence[Layer], n: int = 3) -> list[list[Layer]]:
    """Divide layers into shares whose input moments take about equally long, in the order of the layers.

    Args:
        layers: The layers.
        n: The most shares.
    """
    found: list[list[Layer]] = [[] for _ in range(n)]
    work = [0.0] * n
    for layer in sorted(layers, key=_moment_work, reverse=True):
        least = work.index(min(work))
        found[least].append(layer)
        work[least] += _moment_work(layer)
    return [sorted(share, key=layers.index) for share in found if share]


def _moment_work(layer: Layer) -> float:
    """Products that the input moment takes for one example; as many vectors as the layer has outputs by channel."""
    return layer.macs / layer.out_channels * layer.patch


def _as_stored(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics in float32 on the CPU; they are taken out of the dictionary one by one."""
    return {name: found.pop(name).float().cpu() for name in list(found)}


def blocks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Divide layers into blocks whose statistics take up to `BLOCK_BYTES` while they are summed.

    Args:
        layers: The layers, in the model's order.
    """
    found: list[list[Layer]] = []
    room = 0
    for layer in layers:
        size = 2 * statistics_bytes(layer)
        if not found or size > room:
            found.append([])
            room = BLOCK_BYTES
        found[-1].append(layer)
        room -= size
    return found


def block_bytes(layers: Sequence[Layer]) -> int:
    """The most bytes that measuring the statistics of some layers takes: float64 sums, a batch's, and their products.

    Args:
        layers: The layers.
    """
    sizes = [2 * statistics_bytes(x) for x in layers]
    return sum(sizes) + 2 * max(sizes, default=0)


def statistics_bytes(layer: Layer) -> int:
    """The most bytes of a layer's input moment and output metric, as they are stored: in float32.

    Args:
        layer: The layer.
    """
    rows = 1 if layer.kind == "Embedding" else 1 + sketch_rows(layer) if is_wide(layer) else layer.patch
    moment = rows * layer.patch
    return 4 * layer.groups * (moment + layer.out_channels**2)


def _check_memory(model: nn.Module, layers: Sequence[Layer], needed: int) -> None:
    """Raise RankoptError if the statistics of a block do not fit into the memory that is free."""
    sizes = {x.name: 2 * statistics_bytes(x) for x in layers}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    weight = next(model.parameters(), torch.empty(0))
    free = available_memory()
    where = "memory"
    if weight.is_cuda:
        unused = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        on_gpu = torch.cuda.mem_get_info(weight.device)[0] + unused
        free, where = (on_gpu, "GPU memory") if free is None or on_gpu < free else (free, where)
    if free is not None and needed > free:
        raise RankoptError(
            f"the calibration statistics of {len(sizes)} layers take {gigabytes(needed)}, and {gigabytes(free)} of "
            f"{where} are free: keep the widest layers dense (keep_dense in a search space; "
            f"{', '.join(map(repr, largest))} take {gigabytes(sum(map(sizes.__getitem__, largest)))}), or use a larger "
            "machine"
        )


def wide_layers(statistics: Statistics) -> list[str]:
    """Warn of layers whose inputs' moment is a sketch that is not exact.

    Args:
        statistics: The statistics of the layers that may be factorised.
    """
    names = [x.name for x in statistics.layers if is_wide(x) and statistics.rows(x.name) > sketch_rows(x)]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        f"{', '.join(map(repr, names[:3]))}{more}: more than {WIDEST:,} inputs, of whose correlations only the "
        "strongest directions are kept to save memory"
    ]


def without_metric(statistics: Statistics) -> list[str]:
    """Warn of layers that no gradient reaches, if there are any.

    Args:
        statistics: The statistics of all layers.
    """
    blind = [x.name for x in statistics.layers if statistics.rows(x.name) and not statistics.has_metric(x.name)]
    if not blind:
        return []
    return [
        f"no gradient of the model's outputs reaches {len(blind)} of {len(statistics.layers)} layers (the first: "
        f"{blind[0]!r}; a part under no_grad, for example), so all outputs of these count the same in their fits"
    ]


def few_examples(statistics: Statistics) -> list[str]:
    """Warn of layers whose statistics are of fewer vectors than they have directions.

    Args:
        statistics: The statistics of all layers.
    """
    short = [(x.name, statistics.rows(x.name), x.patch) for x in statistics.layers if x.kind != "Embedding"]
    short = [(name, rows, size) for name, rows, size in short if 0 < rows < size]
    if not short:
        return []
    name, rows, size = min(short, key=lambda x: x[1] / x[2])
    return [
        f"{len(short)} of {len(statistics.layers)} layers see fewer vectors than they have inputs (the most extreme, "
        f"{name!r}: {rows:,} for {size:,}), so what they lose on other data is uncertain: give more calibration data"
    ]


def _in_float64(found: Mapping[str, Tensor]) -> tuple[Any, Any]:
    s, h = (found[kind].double() if kind in found else None for kind in ("moment", "metric"))
    return s, h


class StoredStatistics:
    """What `Statistics` gives, where it lies in the cache already; it can be sent to processes that share the cache.

    Args:
        cache: The cache.
        entries: The key of the entry of each layer, by layer name.
    """

    def __init__(self, cache: Cache, entries: Mapping[str, str]) -> None:
        self.cache, self.entries = cache, entries

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        found = self.read(name, "moment", "metric")
        if found is None:
            raise self.cache.lost()
        return _in_float64(found)

    def read(self, name: str, *kinds: str) -> dict[str, Tensor] | None:
        """Some of a layer's tensors, by kind, as far as they are there; None if the entry is missing or damaged.

        Args:
            name: The layer's name.
            kinds: "moment", "metric" or "rows".
        """
        wanted = {f"{kind}.{name}": kind for kind in kinds}
        found = self.cache.read_tensors(self.entries[name], wanted)
        return None if found is None else {wanted[key]: t for key, t in found.items()}


class Statistics(Mapping[str, tuple[Any, Any]]):
    """Calibration statistics by layer name: (input moment S, output metric H), each None where there is none.

    They are kept in the cache, a file for each of `blocks`, and measured when first needed. Each access reads one
    layer's, so that memory holds no more than these.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        key: Content hash of model, layers and batches, under which results are cached.
        cache: The cache.
        progress: Progress callback.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        batches: Sequence[Any],
        key: str,
        cache: Cache,
        progress: Progress,
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.key, self.cache, self.progress = key, cache, progress
        self._blocks = blocks(layers)
        self._block_of = {layer.name: i for i, block in enumerate(self._blocks) for layer in block}
        self.stored = StoredStatistics(cache, {name: self._file(i) for name, i in self._block_of.items()})
        self._sound: set[str] = set()

    def ensure_cached(self, pool: Pool | None = None) -> None:
        """Measure the statistics that are not in the cache; leave reading the others until they are needed.

        Args:
            pool: Processes that measure, with the same results; None for this one.
        """
        self._measure(
            [i for i in range(len(self._blocks)) if not self.cache.path(self._file(i), "safetensors").is_file()], pool
        )

    def _file(self, block: int) -> str:
        return f"statistics-{self.key}-{block}"

    def _measure(self, wanted: Sequence[int], pool: Pool | None = None) -> None:
        """Measure blocks and write them to the cache."""
        if not wanted:
            return
        self.cache.check_writable()
        if pool is not None:
            try:
                self._measure_on(pool, wanted)
            except NotSentError as error:
                log.info("statistics are measured in this process: %s", error)
            else:
                return
        rows: dict[str, int] = {}
        parts = [self._blocks[i] for i in wanted]
        measured = calibrate_blocks(self.model, parts, self.batches, self.progress, rows)
        for i, (_, s, h) in zip(wanted, measured, strict=True):
            self.cache.write_tensors(self._file(i), _moment_entries(s, rows) | _metric_entries(h))

    def _measure_on(self, pool: Pool, wanted: Sequence[int]) -> None:
        """Measure blocks in other processes: of each the metrics, and the moments in shares of its layers.

        Each share takes runs of its own, which cost far less than the moments, and its sums are those of all at once.
        """
        calls = []
        for i in wanted:
            calls += [(i, self._blocks[i], True), *((i, share, False) for share in shares(self._blocks[i]))]
        missing = Counter(block for block, _, _ in calls)
        found: dict[int, dict[str, Tensor]] = defaultdict(dict)
        memory = WORKER_BYTES + max(block_bytes(part) for _, part, _ in calls)
        measured = pool(_measure_away, calls, memory, (self.model, self.batches))
        for i, entries in self.progress(measured, "calibrating", len(calls)):
            found[i] |= entries
            missing[i] -= 1
            if not missing[i]:
                self.cache.write_tensors(self._file(i), found.pop(i))

    def _read(self, name: str, *kinds: str) -> dict[str, Tensor]:
        """Some of a layer's entries, by kind; those that there are."""
        found = self.stored.read(name, *kinds)
        if found is None:  # not there yet, or damaged
            self._measure([self._block_of[name]])
            found = self.stored.read(name, *kinds)
        if found is None:
            raise self.cache.lost()
        return found

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        found = self._read(name, "moment", "metric")
        self._sound.add(name)
        return _in_float64(found)

    def ensure_sound(self, name: str) -> None:
        """Measure a layer's statistics again if they are damaged; they are looked at once.

        Args:
            name: The layer's name.
        """
        if name not in self._sound:
            self._read(name, "moment", "metric")
            self._sound.add(name)

    def shapes(self, name: str) -> dict[str, list[int]]:
        """The shapes of what there is of a layer: "moment" and "metric".

        Args:
            name: The layer's name.
        """
        wanted = {f"{kind}.{name}": kind for kind in ("moment", "metric")}
        found = self.cache.read_shapes(self._file(self._block_of[name]), wanted)
        return {wanted[key]: shape for key, shape in found.items()}

    def rows(self, name: str) -> int:
        """How many vectors a layer's input moment is the mean of; 0 if no input reached it.

        Args:
            name: The layer's name.
        """
        return int(self._read(name, "rows").get("rows", 0))

    def has_metric(self, name: str) -> bool:
        """Whether there is an output metric of a layer.

        Args:
            name: The layer's name.
        """
        return "metric" in self._read(name, "metric")

    def __iter__(self) -> Iterator[str]:
        return iter(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)
