"""What the page of bonds shows of latent channels: for the whole model, and for each bond."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from markupsafe import Markup
from torch import Tensor

from rankopt.core.result_record import CorrelationEntry
from rankopt.model.forward import batch_size
from rankopt.report.bond_effects import ABLATED, PATCHED
from rankopt.report.bond_latents import (
    CHANNELS,
    RANDOM,
    ROTATED,
    LatentBond,
    Latents,
    Step,
    agreement,
    class_means,
    follow,
    selectivity,
    token_at,
)
from rankopt.report.bond_pictures import agreement as agreement_picture
from rankopt.report.bond_pictures import class_effects, effects, flow, has_classes, strongest
from rankopt.report.pictures import draw

TOKENS = 6
"""Tokens that are shown of a channel."""


FOLLOWED = 14
"""Later bonds that a channel is followed to in the picture; those beyond are left out."""


@dataclass(frozen=True)
class WholeModel:
    """What the page says of all channels together.

    Attributes:
        objective: The compressed model's divergence from the dense one.
        examples: How many examples channels were changed on.
        channels: How many channels there are.
        agreement: Measured against predicted rises, a picture.
        correlations: What is compared -> the correlation over all bonds, and within bonds.
        flow: The followed channel's layer and number, and the picture; None if there is nothing to follow.
    """

    objective: float
    examples: int
    channels: int
    agreement: Markup | None
    correlations: Mapping[str, tuple[CorrelationEntry, CorrelationEntry]]
    flow: tuple[str, int, Markup] | None


@dataclass(frozen=True)
class ChannelLine:
    """What the page says of one channel in its table.

    Attributes:
        number: Its number.
        share: Its share of the energy.
        predicted: Predicted rise of the objective when it is ablated.
        measured: Measured rise; NaN where it was not measured.
        top: The class with the highest mean response, or the tokens that it responds to; empty if neither is known.
        selectivity: Share of the responses' variance between classes; None without classes.
        leads_to: The channel of the next layer that responds to the same examples; None in the last layer.
    """

    number: int
    share: float
    predicted: float
    measured: float
    top: str
    selectivity: float | None
    leads_to: Step | None


@dataclass(frozen=True)
class BondSection:
    """What the page says of one bond.

    Attributes:
        bond: The bond.
        lines: Its strongest channels.
        effects: What they do, a picture.
        classes: What they do to classes, a picture; None without classes.
    """

    bond: LatentBond
    lines: tuple[ChannelLine, ...]
    effects: Markup
    classes: Markup | None


def whole_model(latents: Latents) -> WholeModel:
    """Sum up all channels.

    Args:
        latents: The latents.
    """
    names = {
        "channels, ablated": (CHANNELS, ABLATED),
        "channels, patched": (CHANNELS, PATCHED),
        "control: rotated bonds": (ROTATED, ABLATED),
        "control: random directions": (RANDOM, ABLATED),
    }
    found = {
        name: (agreement(latents, of, way), agreement(latents, of, way, within=True))
        for name, (of, way) in names.items()
    }
    return WholeModel(
        latents.objective,
        sum(map(batch_size, latents.batches)),
        sum(b.effects.count for b in latents.bonds),
        Markup(draw(agreement_picture, latents, height=3.4, name="agreement")) if latents.bonds else None,
        found,
        _flow(latents),
    )


def _flow(latents: Latents) -> tuple[str, int, Markup] | None:
    """The strongest channel of the first bond, followed."""
    if not latents.bonds:
        return None
    bond = latents.bonds[0]
    channel = strongest(bond)[0]
    steps = list(islice(follow(latents, bond, channel), FOLLOWED))
    if not steps:
        return None
    return bond.layer, channel, Markup(draw(flow, steps, height=1.3 + 0.22 * len(steps), name="flow"))


def by_layer(latents: Latents | None) -> dict[str, list[BondSection]]:
    """The sections of each layer's bonds.

    Args:
        latents: The latents; None: there are none.
    """
    found: dict[str, list[BondSection]] = {}
    for i, bond in enumerate(latents.bonds if latents else ()):
        assert latents
        shown = strongest(bond)
        height = 1.0 + 0.24 * len(shown)
        classes = (
            Markup(draw(class_effects, bond, latents.classes, height=height, name=f"classes{i}"))
            if has_classes(bond)
            else None
        )
        picture = Markup(draw(effects, bond, height=height, name=f"effects{i}"))
        means, selective = class_means(latents, bond), selectivity(latents, bond)
        lines = tuple(_line(latents, bond, r, means, selective) for r in shown)
        found.setdefault(bond.layer, []).append(BondSection(bond, lines, picture, classes))
    return found


def _line(
    latents: Latents, bond: LatentBond, channel: int, means: Tensor | None, selective: Tensor | None
) -> ChannelLine:
    return ChannelLine(
        channel,
        bond.shares[channel].item(),
        bond.effects.predicted[ABLATED, channel].item(),
        bond.effects.measured[ABLATED, channel].item(),
        driver(latents, bond, channel, means),
        None if selective is None else selective[channel].item(),
        next(follow(latents, bond, channel), None),
    )


def driver(latents: Latents, bond: LatentBond, channel: int, means: Tensor | None) -> str:
    """What drives a channel, in a few words: the class of its highest mean response, or tokens.

    Args:
        latents: The latents.
        bond: The bond.
        channel: Number of the channel.
        means: The bond's `class_means`.
    """
    responses, places = bond.effects.responses, bond.effects.places
    if responses is None or places is None:
        return ""
    order = responses[:, channel].abs().argsort(descending=True)[: 2 * TOKENS].tolist()
    tokens = [token_at(latents, i, int(places[i, channel])) for i in order]
    if found := list(dict.fromkeys(t.strip() for t in tokens if t is not None))[:TOKENS]:
        return ", ".join(found)
    return latents.classes[int(means[channel].nan_to_num(-float("inf")).argmax())] if means is not None else ""
