"""The latent channels of a compressed model: how strong they are, what drives them, what they do, where they lead."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankopt.core.progress import Progress, silent
from rankopt.core.records import Layer, Rank
from rankopt.core.result_record import CorrelationEntry
from rankopt.core.statistics import correlation
from rankopt.decompositions.channels import channel_count, components, factors_of, output_directions, rotation
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.model.forward import batch_size, input_tensors
from rankopt.model.quantization import dequantize_all
from rankopt.report.bond_effects import ABLATED, PATCHED, Directions, Effects, Examples, losses, measure, predict

CHANNELS, ROTATED, RANDOM = "channels", "rotated", "random"
"""The directions of a bond: its channels, and as controls a random rotation of them and random output directions."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        examples: Calibration examples.
        measured: Channels of each bond whose effects are measured, evenly spread over the order of the predicted ones;
            None: all.
        controls: Whether as many rotated and random directions are measured, too.
        seed: Of everything random.
    """

    examples: int = 128
    measured: int | None = 8
    controls: bool = True
    seed: int = 0


@dataclass
class LatentBond:
    """A bond of a factorised layer and its channels.

    Attributes:
        layer: Name of the layer.
        method: Its decomposition.
        bond: The bond's modes, as "inner | outer".
        number: The bond's number in its layer, from 0.
        shares: Energy of what each channel adds to the output, over the sum of all channels'; (channels,).
        effects: What the channels do.
        measured: Numbers of the channels whose effects were measured.
        controls: The same of as many rotated and random directions, by name; they are only ablated.
    """

    layer: str
    method: str
    bond: str
    number: int
    shares: Tensor
    effects: Effects
    measured: tuple[int, ...] = ()
    controls: dict[str, Effects] = field(default_factory=dict)


@dataclass
class Latents:
    """The latent channels of a model.

    Attributes:
        bonds: The bonds, layer by layer from the input on.
        batches: The examples, in chunks.
        labels: For each example the class that the dense model predicts; None if its output is no vector of classes.
        classes: Names of the classes.
        objective: The compressed model's divergence from the dense one on the examples.
        decode: Token id -> text.
    """

    bonds: list[LatentBond]
    batches: list[Any]
    labels: Tensor | None
    classes: list[str]
    objective: float
    decode: Callable[[int], str] = str


class Step(NamedTuple):
    """A channel followed to a later layer.

    Attributes:
        layer: The layer.
        bond: Number of the bond.
        channel: The bond's channel whose responses correlate most with those of the channel that is followed.
        correlation: Pearson's r over the examples; the sign of a channel is arbitrary.
        chance: The largest |r| that responses to other examples give there.
    """

    layer: str
    bond: int
    channel: int
    correlation: float
    chance: float


def analyse(
    dense: nn.Module,
    small: nn.Module,
    layers: Sequence[Layer],
    replaced: Mapping[str, tuple[str, Rank]],
    statistics: Mapping[str, tuple[Tensor | None, Tensor | None]],
    batches: Sequence[Any],
    effort: Effort,
    progress: Progress = silent,
) -> Latents:
    """Analyse the latent channels of all factorised layers.

    Args:
        dense: The dense model, its composite modules expanded.
        small: The compressed model.
        layers: All layers of the inventory.
        replaced: Name -> (method, rank) of the layers to analyse.
        statistics: Input moment and output metric of these layers.
        batches: Inputs.
        effort: How much is measured.
        progress: Shows the measurements.
    """
    small = copy.deepcopy(small)
    dequantize_all(small)
    found = [x for x in layers if x.name in replaced]
    examples = Examples(dense, batches, found)
    bonds = [b for layer in found for b in _bonds_of(layer, *replaced[layer.name], dense, small, effort)]
    wanted: dict[str, list[Directions]] = {}
    for bond in bonds:
        wanted.setdefault(bond.layer.name, []).extend(bond.directions.values())
    runs = sum((1 + len(b.directions)) * b.measured for b in bonds)
    steps = iter(progress(range(total := len(examples.references) + runs), "ablating channels", total))
    effects = predict(small, wanted, examples, lambda: next(steps, None), effort.seed)
    unchanged = losses(small, examples)
    latents = []
    for bond in bonds:
        ours = [effects[bond.layer.name].pop(0) for _ in bond.directions]
        which = spread(ours[0].predicted[0], bond.measured)
        for (name, directions), effect in zip(bond.directions.items(), ours, strict=True):
            ways = (ABLATED, PATCHED) if name == CHANNELS else (ABLATED,)
            measure(small, directions, effect, which, examples, unchanged, ways, lambda: next(steps, None))
        shares = bond.shares(*statistics[bond.layer.name])
        controls = dict(zip(list(bond.directions)[1:], ours[1:], strict=True))
        latents.append(
            LatentBond(bond.layer.name, bond.method, bond.text, bond.number, shares, ours[0], tuple(which), controls)
        )
    list(steps)  # effects that cannot be measured count as done
    labels = torch.cat(examples.labels) if examples.labels is not None else None
    return Latents(
        latents, examples.divergence.batches, labels, [str(i) for i in range(examples.classes)], unchanged.objective
    )


def spread(values: Tensor, count: int) -> list[int]:
    """Numbers of some values, evenly spread over their order: the largest and the smallest are among them.

    Args:
        values: The values.
        count: How many are chosen.
    """
    order = values.argsort(descending=True).tolist()
    at = torch.linspace(0, len(order) - 1, count).round().int().tolist()
    return sorted({order[i] for i in at})


@dataclass(frozen=True)
class _Bond:
    """A bond of a layer as it is analysed."""

    layer: Layer
    method: str
    text: str
    number: int
    directions: dict[str, Directions]
    measured: int

    def shares(self, moment: Tensor | None, metric: Tensor | None) -> Tensor:
        """The energy of what each channel adds to the output, over the sum of these energies."""
        found = self.directions[CHANNELS].components()
        energies = torch.tensor([full_target(self.layer, w.cpu(), moment, metric).norm for w in found]).clamp_min(0)
        return energies / energies.sum().clamp_min(1e-300)


def _bonds_of(
    layer: Layer, method: str, rank: Rank, dense: nn.Module, small: nn.Module, effort: Effort
) -> Iterator[_Bond]:
    """The bonds of a layer with their channels, and the directions that serve as controls."""
    module, replacement = dense.get_submodule(layer.name), small.get_submodule(layer.name)
    family, factors = DECOMPOSITIONS[method], factors_of(replacement)
    weight = family.weight(layer, factors)
    names = family.tensor(layer, weight)[0] if family.bonds(layer, rank) else ()
    for number, bond in enumerate(family.latent_bonds(layer, rank)):
        seed = zlib.crc32(f"{effort.seed} {layer.name} {number}".encode())  # layers have directions of their own
        generator = torch.Generator().manual_seed(seed)
        n = channel_count(factors, bond)
        make = functools.partial(components, layer, method, factors, bond)
        sets = {CHANNELS: torch.eye(n, dtype=torch.float64)}
        if effort.controls:
            sets[ROTATED] = rotation(layer, method, rank, n, generator)
        directions = {name: Directions(layer, module, n, functools.partial(make, q)) for name, q in sets.items()}
        if effort.controls:
            directions[RANDOM] = Directions(layer, module, n, functools.partial(_random, layer, weight, n, seed))
        outside = " ".join(x for x in names if x not in bond.inside) or "other indices"
        text = f"{' '.join(bond.inside)} | {outside}"
        measured = n if effort.measured is None else min(n, effort.measured)
        yield _Bond(layer, method, text, number, directions, measured)


def _random(layer: Layer, weight: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    return output_directions(layer, weight, count, torch.Generator().manual_seed(seed))


# --- what drives channels ----------------------------------------------------------------------------


def class_means(latents: Latents, bond: LatentBond) -> Tensor | None:
    """The mean response of each channel to each class, (channels, classes); None without classes.

    Args:
        latents: The latents.
        bond: One of their bonds.
    """
    responses = bond.effects.responses
    if latents.labels is None or responses is None:
        return None
    count = len(latents.classes)
    sums = torch.zeros(count, responses.shape[1], dtype=torch.float64)
    sums.index_add_(0, latents.labels, responses.double())
    return (sums / torch.bincount(latents.labels, minlength=count)[:, None]).T


def selectivity(latents: Latents, bond: LatentBond) -> Tensor | None:
    """The share of each channel's variance over the examples that lies between classes (η²), 0 to 1; (channels,).

    Args:
        latents: The latents.
        bond: One of their bonds.
    """
    means, responses = class_means(latents, bond), bond.effects.responses
    if means is None or latents.labels is None or responses is None:
        return None
    x = responses.double() - responses.double().mean(0)
    between = (means.T[latents.labels] - responses.double().mean(0)).square().sum(0)
    return (between / x.square().sum(0).clamp_min(1e-300)).clamp(0, 1)


def token_at(latents: Latents, example: int, place: int) -> str | None:
    """The token at a position of an example; None for inputs that are no tokens.

    Args:
        latents: The latents.
        example: Number of the example.
        place: The position.
    """
    for x in latents.batches:
        n = batch_size(x)
        if example < n:
            ids = next((t for t in input_tensors(x) if t.ndim == 2 and not t.is_floating_point()), None)
            if ids is None or place >= ids.shape[1]:
                return None
            return latents.decode(int(ids[example, place]))
        example -= n
    return None


# --- from layer to layer -----------------------------------------------------------------------------


def follow(latents: Latents, bond: LatentBond, channel: int) -> Iterator[Step]:
    """Follow a channel through all later bonds: which channels respond to the same examples.

    Args:
        latents: The latents.
        bond: The bond that the channel is in.
        channel: Its number.

    Yields:
        One step for each bond of a later layer that has responses.
    """
    at = next(i for i, b in enumerate(latents.bonds) if b is bond)
    own = bond.effects.responses
    if own is None:
        return
    x = _standardised(own[:, [channel]])
    for later in latents.bonds[at + 1 :]:
        if later.effects.responses is None or later.layer == bond.layer:
            continue
        y = _standardised(later.effects.responses)
        r = (x.T @ y)[0]
        chance = (x.roll(max(1, len(x) // 2), 0).T @ y)[0].abs().max().item()
        best = int(r.abs().argmax())
        yield Step(later.layer, later.number, best, r[best].item(), chance)


def _standardised(responses: Tensor) -> Tensor:
    x = responses.double() - responses.double().mean(0)
    return x / x.norm(dim=0).clamp_min(1e-300)


# --- prediction against measurement ------------------------------------------------------------------


def compared(latents: Latents, of: str = CHANNELS, way: int = ABLATED) -> list[tuple[Tensor, Tensor]]:
    """For each bond the predicted rises of the measured channels, and what was measured.

    Args:
        latents: The latents.
        of: CHANNELS; or a control, whose measured rises then stand beside what is predicted of the channels.
        way: ABLATED or PATCHED.
    """
    found = []
    for bond in latents.bonds:
        other = bond.effects if of == CHANNELS else bond.controls.get(of)
        if other is None:
            continue
        pair = torch.stack([bond.effects.predicted[way], other.measured[way]])
        pair = pair[:, pair.isfinite().all(0)]  # what was not measured is NaN
        if pair.shape[1]:
            found.append((pair[0], pair[1]))
    return found


def agreement(latents: Latents, of: str = CHANNELS, way: int = ABLATED, within: bool = False) -> CorrelationEntry:
    """Spearman's correlation of predicted and measured rises, over the measured channels of all bonds.

    Args:
        latents: The latents.
        of: As of `compared`. A control shows what remains if the prediction is not of the channel that is ablated.
        way: ABLATED or PATCHED.
        within: Whether to compare ranks within each bond only, of three measured channels or more: layers differ in
            how much they matter, which alone makes a correlation.
    """
    pairs = compared(latents, of, way)
    if within:
        pairs = [(_ranks(a), _ranks(b)) for a, b in pairs if len(a) >= 3]
    predicted, measured = ([x for pair in pairs for x in pair[i].tolist()] for i in (0, 1))
    return correlation(predicted, measured)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from -0.5 to 0.5."""
    return values.argsort().argsort().double() / (len(values) - 1) - 0.5
