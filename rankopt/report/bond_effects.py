"""What the channels of bonds do: how the objective and the loss of each class change when a channel is switched off.

A channel r of a bond adds the component W_r to its layer's weight (`rankopt.decompositions.channels`), and W_r x to the
output at an input x. It is *ablated* by taking W_r x away, and *patched* by putting there what it adds for another
example. Either changes the layer's output y by some δ_r. What follows is measured by running the model, and predicted
for all channels from a few backward passes of the data, without running the model for each:

*Vectors of classes.* The network is linearised, δz = (∂z/∂y) δ_r for the logits z of the most likely classes, a
backward pass each; objective and losses are then computed of z + δz exactly, as a confident prediction that is
overturned costs far more than its curvature says.

*Other outputs*, and layers that do not keep examples apart, by the second-order expansion

    ΔD ≈ E[⟨∂D/∂y, δ_r⟩] + ½ E[δzᵀ F δz]

with F = diag(p) − p pᵀ of predictions p (Martens 2020, section 6; of outputs without classes F is a multiple of the
identity). The first term takes one backward pass. The second is the mean of ⟨∂(vᵀz)/∂y, δ_r⟩² over random v with
covariance F, a backward pass each.

Unlike tr(H W_r S W_rᵀ), both count that the positions of an example act together.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rankopt.core.errors import RankoptError
from rankopt.core.records import Layer
from rankopt.model.forward import batch_size, hooked, inference, outputs, run, take, to_device
from rankopt.model.layer_kinds import as_matrix
from rankopt.model.objective import Divergence, Part, differences

ABLATED, PATCHED = 0, 1
"""Index of the two ways to change a channel."""


CLASSES = 10
"""The most likely classes of each example, whose logits are linearised; the other logits count as unchanged."""


PROBES = 8
"""Random directions of other outputs, for each example."""


CHUNK_BYTES = 2**29
"""The most bytes of gradients that are held at once."""


@dataclass(frozen=True)
class Directions:
    """Channels of a bond, or other directions: what each adds to its layer.

    Attributes:
        layer: The layer.
        module: The dense layer, which applies a component to the layer's input.
        count: How many there are.
        components: Makes their components, in the layer's own shape.
    """

    layer: Layer
    module: nn.Module
    count: int
    components: Callable[[], Iterator[Tensor]]

    def apply(self, component: Tensor, x: Tensor) -> Tensor:
        """What a component adds to the layer's output.

        Args:
            component: A weight.
            x: The layer's input.
        """
        given = {"weight": component.to(self.module.weight)}  # type: ignore[arg-type]
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            given["bias"] = torch.zeros_like(bias)
        with torch.no_grad():
            return functional_call(self.module, given, (x,))


@dataclass
class Effects:
    """How the objective and classes change, in the order of the directions.

    Attributes:
        predicted: Predicted rise of the objective, (2, n): ablated, patched.
        measured: Measured rise, (2, n); NaN where it was not measured.
        class_predicted: Predicted rise of each class's loss when a direction is ablated, (n, classes).
        class_measured: Measured rise, (n, classes).
        responses: What drives them: for each example the component's strongest output, along its main direction and
            with its sign, (examples, n). None where a layer's input has no row for each example.
        places: At which position of the output, (examples, n).
    """

    predicted: Tensor
    measured: Tensor
    class_predicted: Tensor
    class_measured: Tensor
    responses: Tensor | None = None
    places: Tensor | None = None

    @property
    def count(self) -> int:
        """How many directions there are."""
        return self.predicted.shape[1]


# --- the examples ------------------------------------------------------------------------------------


class Examples:
    """The examples on which channels are changed, and what the dense model says of them.

    Args:
        dense: The dense model.
        batches: Inputs.
        layers: The layers whose gradients are to fit into memory.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[Any], layers: Sequence[Layer]) -> None:
        size = _chunk(layers)
        chunks = [take(x, slice(i, i + size)) for x in batches for i in range(0, batch_size(x), size)]
        self.divergence = Divergence(dense, chunks)
        self.references = list(self.divergence.references())
        self.labels: list[Tensor] | None = None
        self.classes = _classes(self.divergence)
        if self.classes:
            self.labels = [zs[0].argmax(1) for zs in self.references]

    def __iter__(self) -> Iterator[tuple[int, Any, list[Tensor]]]:
        """Number, input and the dense model's outputs of each chunk."""
        pairs = zip(self.divergence.batches, self.references, strict=True)
        return ((i, x, zs) for i, (x, zs) in enumerate(pairs))

    @property
    def count(self) -> int:
        """The number of examples."""
        return self.divergence.examples

    @property
    def class_sizes(self) -> Tensor:
        """How many examples the dense model assigns to each class."""
        labels = torch.cat(self.labels) if self.labels is not None else torch.zeros(0, dtype=torch.long)
        return torch.bincount(labels, minlength=self.classes)

    def by_class(self, chunk: int, values: Tensor) -> Tensor:
        """Sum values of a chunk's examples over the examples of each class.

        Args:
            chunk: Number of the chunk.
            values: (..., examples).
        """
        if self.labels is None:
            return values.new_zeros(*values.shape[:-1], 0)
        sums = values.new_zeros(*values.shape[:-1], self.classes)
        return sums.index_add(-1, self.labels[chunk].to(values.device), values)


def class_count(model: nn.Module, batch: Any) -> int:
    """The number of classes, where a model's main output is a vector of classes for each example; 0 elsewhere.

    Args:
        model: The model.
        batch: A batch of inputs.
    """
    return _classes(Divergence(model, [take(batch, slice(2))]))


def _classes(divergence: Divergence) -> int:
    z = next(divergence.references())[0]
    return z.shape[1] if divergence.parts[0].axis == 1 and z.ndim == 2 else 0


def _chunk(layers: Sequence[Layer]) -> int:
    """How many examples are taken at once: two at least, so that one can be patched into the other."""
    numbers = sum(x.shape[0] * sum(c.maps * math.prod(c.size_out) for c in x.calls) for x in layers)
    return max(2, CHUNK_BYTES // max(1, 4 * max(PROBES + 1, CLASSES) * numbers))


# --- predicted ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its input, and gradients of several scalars with respect to its output, stacked."""

    x: Tensor
    gradients: Tensor


def predict(
    model: nn.Module,
    wanted: Mapping[str, Sequence[Directions]],
    examples: Examples,
    on_chunk: Callable[[], Any] = lambda: None,
    seed: int = 0,
) -> dict[str, list[Effects]]:
    """Predict what ablating and patching does, of all directions of all layers from the same backward passes.

    Args:
        model: The compressed model.
        wanted: By layer name, sets of directions.
        examples: The examples.
        on_chunk: Called after every chunk of examples.
        seed: Of the random directions of the outputs.

    Returns:
        The effects by layer name, in the order of the sets; nothing is measured yet.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {name: [_Sums(d, examples) for d in sets] for name, sets in wanted.items()}
    for number, x, reference in examples:
        expand = functools.partial(_expand, reference, examples, number, generator)
        calls, rises = _gradients(model, wanted, x, expand)
        for name, totals in sums.items():
            for total in totals:
                total.add(number, batch_size(x), calls.get(name, []), rises)
        on_chunk()
    return {name: [total.effects() for total in totals] for name, totals in sums.items()}


Rises = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Changes of scalars (scalars, 2, examples) -> rises of the objective and of the examples' losses, (2, examples)."""


def _gradients(
    model: nn.Module,
    names: Mapping[str, Any],
    batch: Any,
    expand: Callable[[list[Tensor], bool], tuple[list[Tensor], Rises]],
) -> tuple[dict[str, list[_Call]], Rises]:
    """Run a batch and differentiate scalars of the model's outputs with respect to the outputs of layers."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def watch(name: str, args: tuple[Any, ...], _kwargs: Any, output: Tensor) -> Tensor:
        y = output if output.requires_grad else output.detach().requires_grad_()
        seen[name].append((args[0].detach().clone(), y))
        return y.clone()  # which a later layer may change in place

    try:
        with (
            inference(model),
            hooked(model, names, on_output=watch),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False),
        ):
            zs = list(outputs(run(model, to_device(batch, model))).values())
            xs, ys = ([pair[i] for pairs in seen.values() for pair in pairs] for i in (0, 1))
            values, rises = expand(zs, all(_by_example(x, batch_size(batch)) for x in xs))
            rows = [torch.autograd.grad(v, ys, retain_graph=True, allow_unused=True) for v in values if ys]
    except RuntimeError as error:
        raise RankoptError(
            f"no gradients of the model's outputs can be taken, which predictions need: {type(error).__name__}: {error}"
        ) from error
    columns = iter(zip(*rows, strict=True))
    return {name: [_Call(x, _stacked(next(columns), y)) for x, y in pairs] for name, pairs in seen.items()}, rises


def _by_example(x: Tensor, examples: int) -> bool:
    """Whether a layer's input has a row for each example."""
    return x.ndim > 0 and len(x) == examples


def _stacked(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(like) if g is None else g for g in gradients]).detach()


def _expand(
    reference: list[Tensor],
    examples: Examples,
    chunk: int,
    generator: torch.Generator,
    zs: list[Tensor],
    by_example: bool,
) -> tuple[list[Tensor], Rises]:
    """The scalars whose changes are predicted to first order, and what these say of the objective."""
    if examples.labels is not None and by_example and len(zs) == 1:
        return _linearised(zs[0], reference[0], examples.labels[chunk])
    return _second_order(zs, reference, examples, generator)


def _linearised(z: Tensor, z0: Tensor, labels: Tensor) -> tuple[list[Tensor], Rises]:
    top = z.detach().topk(min(CLASSES, z.shape[1]), 1).indices
    base, log_p0 = z.detach().double().cpu(), F.log_softmax(z0.double().cpu(), 1)
    where = top.cpu().expand(2, -1, -1)

    def losses(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits, -1)
        divergence = (log_p0.exp() * (log_p0 - log_p)).sum(-1)
        return divergence, -log_p.gather(-1, labels.cpu().expand(len(logits), -1).unsqueeze(-1))[..., 0]

    def rises(changes: Tensor) -> tuple[Tensor, Tensor]:
        moved = losses(base.expand(2, -1, -1).scatter_add(2, where, changes.movedim(0, -1)))
        before = losses(base[None])
        return moved[0] - before[0], moved[1] - before[1]

    return [z.gather(1, top[:, [k]]).sum() for k in range(top.shape[1])], rises


def _second_order(
    zs: list[Tensor], reference: list[Tensor], examples: Examples, generator: torch.Generator
) -> tuple[list[Tensor], Rises]:
    parts = examples.divergence.parts
    compared = [(part, z) for part, z in zip(parts, zs, strict=True) if part.size > 0]
    found = [_divergence(zs, reference, parts)]
    for _ in range(PROBES):
        found.append(torch.stack([(z * _probe(part, z.detach(), generator)).sum() for part, z in compared]).sum())

    def rises(changes: Tensor) -> tuple[Tensor, Tensor]:
        rise = changes[0] + 0.5 * changes[1:].square().mean(0)
        return rise, torch.full_like(rise, math.nan)

    return found, rises


def _divergence(zs: Sequence[Tensor], reference: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """The objective, summed over the examples of a chunk."""
    compared = (x for x in zip(parts, zs, reference, strict=True) if x[0].size > 0)
    terms = (differences(z, z0, part.axis).sum() / part.size for part, z, z0 in compared)
    return sum(terms, zs[0].new_zeros((), dtype=torch.float64))


def _class_losses(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.double(), labels.to(z.device), reduction="none")


def _probe(part: Part, z: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of an output, with the covariance of the objective's second derivative."""
    drawn = torch.randn(z.shape, generator=generator).to(z)
    if part.axis is None:
        return drawn * math.sqrt(2 / part.size)
    p = F.softmax(z, part.axis)
    return (p.sqrt() * drawn - p * (p.sqrt() * drawn).sum(part.axis, keepdim=True)) / math.sqrt(part.size)


class _Sums:
    """Sums over examples, of one set of directions."""

    def __init__(self, directions: Directions, examples: Examples) -> None:
        self.directions, self.examples = directions, examples
        n = directions.count
        self.rise = torch.zeros(2, n, dtype=torch.float64)
        self.by_class = torch.zeros(n, examples.classes, dtype=torch.float64)
        self.responses: list[Tensor] = []
        self.places: list[Tensor] = []
        self.complete, self.patched = True, False

    def add(self, chunk: int, units: int, calls: Sequence[_Call], rises: Rises) -> None:
        """Add a chunk of `units` examples; a layer that they do not reach is not called."""
        if not calls:
            self.complete = False
            return
        rows = units if all(_by_example(c.x, units) for c in calls) else 1
        self.complete &= rows == units
        self.patched |= rows > 1
        responses, places = [], []
        for r, component in enumerate(self.directions.components()):
            ys = [self.directions.apply(component, c.x) for c in calls]
            changes = sum(_changes(y, c.gradients, rows) for y, c in zip(ys, calls, strict=True))
            assert isinstance(changes, Tensor)
            rise, loss = rises(changes)
            self.rise[:, r] += rise.sum(-1)
            if rows == units:
                self.by_class[r] += self.examples.by_class(chunk, loss[ABLATED])
                strongest = _strongest(self.directions.layer, component, ys, rows)
                responses.append(strongest[0])
                places.append(strongest[1])
        if responses:
            self.responses.append(torch.stack(responses, 1))
            self.places.append(torch.stack(places, 1))

    def effects(self) -> Effects:
        """The means over all examples."""
        rise = self.rise / self.examples.count
        if not self.patched:
            rise[PATCHED] = math.nan
        by_class = self.by_class / self.examples.class_sizes
        complete = self.complete and bool(self.responses)
        return Effects(
            rise,
            torch.full_like(rise, math.nan),
            by_class if complete else torch.full_like(by_class, math.nan),
            torch.full_like(by_class, math.nan),
            torch.cat(self.responses) if complete else None,
            torch.cat(self.places) if complete else None,
        )


def _changes(y: Tensor, gradients: Tensor, rows: int) -> Tensor:
    """First-order changes (scalars, 2, rows) of scalars when what a channel adds is ablated, and patched."""
    flat = y.reshape(rows, -1)
    both = torch.stack([-flat, flat.roll(1, 0) - flat])
    return torch.einsum("snk,mnk->smn", gradients.reshape(len(gradients), rows, -1), both).double().cpu()


def _strongest(layer: Layer, component: Tensor, ys: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """For each example the strongest response of all calls, along the component's main direction, and its position."""
    u = main_output(layer, component)
    axis = ys[0].ndim - 1 - max(0, len(layer.own_shape) - 2)
    maps = [torch.tensordot(y, u.to(y), ([axis], [0])).reshape(rows, -1) for y in ys]
    whole = torch.cat(maps, 1)
    at = whole.abs().argmax(1, keepdim=True)
    return whole.gather(1, at)[:, 0].cpu(), (at[:, 0] % maps[0].shape[1]).cpu()


def main_output(layer: Layer, component: Tensor) -> Tensor:
    """The output direction in which a component is strongest: its first left singular vector, by power iteration.

    Args:
        layer: The layer.
        component: A weight in the layer's own shape.

    Returns:
        float64 (outputs of all groups,).
    """
    rows = as_matrix(layer, component.double())
    rows = rows.reshape(-1, rows.shape[-1]) if layer.groups == 1 else torch.block_diag(*rows)
    u = rows @ rows[rows.square().sum(1).argmax()]
    for _ in range(20):
        u = rows @ (rows.mT @ (u / u.norm().clamp_min(1e-300)))
    return u / u.norm().clamp_min(1e-300)


# --- measured ----------------------------------------------------------------------------------------


def measure(
    model: nn.Module,
    directions: Directions,
    effects: Effects,
    chosen: Sequence[int],
    examples: Examples,
    unchanged: Losses,
    ways: Sequence[int] = (ABLATED, PATCHED),
    on_pass: Callable[[], Any] = lambda: None,
) -> None:
    """Measure what ablating and patching some directions does, by running the model; `effects` is filled in.

    Args:
        model: The compressed model.
        directions: The directions.
        effects: Their effects.
        chosen: Numbers of those to measure.
        examples: The examples.
        unchanged: The losses of the model as it is.
        ways: How they are changed.
        on_pass: Called after every run over the examples.
    """
    wanted = set(chosen)
    for r, component in enumerate(directions.components()):
        if r not in wanted:
            continue
        for way in ways:

            def change(_: str, args: tuple[Any, ...], _kwargs: Any, out: Tensor) -> Tensor:
                y = directions.apply(component, args[0])  # noqa: B023  # called within this turn of the loop
                return out + ((y.roll(1, 0) if way == PATCHED else 0) - y)  # noqa: B023

            if way == PATCHED and effects.predicted[way].isnan().any():
                continue
            with hooked(model, [directions.layer.name], on_output=change):
                changed = losses(model, examples)
            effects.measured[way, r] = changed.objective - unchanged.objective
            if way == ABLATED:
                effects.class_measured[r] = changed.by_class - unchanged.by_class
            on_pass()


class Losses(NamedTuple):
    """The objective of a model, and the mean loss of each class; NaN for one without examples."""

    objective: float
    by_class: Tensor


def losses(model: nn.Module, examples: Examples) -> Losses:
    """Measure the objective, and the loss of each class.

    Args:
        model: A model.
        examples: The examples.
    """
    total, by_class = 0.0, torch.zeros(examples.classes, dtype=torch.float64)
    for number, x, reference in examples:
        with inference(model):
            zs = list(outputs(run(model, to_device(x, model))).values())
            total += _divergence(zs, reference, examples.divergence.parts).item()
            if examples.labels is not None:
                by_class += examples.by_class(number, _class_losses(zs[0], examples.labels[number]).cpu())
    return Losses(total / examples.count, by_class / examples.class_sizes)
