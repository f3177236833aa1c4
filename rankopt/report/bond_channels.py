"""What the channels of a layer's first bond respond to: which images, and where in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.core.records import Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Bond, Factors
from rankopt.model.forward import hooked, inference, run, to_device
from rankopt.report.bond_spectra import inner_moment

CHANNELS = 4
"""Channels shown for each layer, the strongest ones."""


IMAGES = 4
"""Images shown for each channel with its highest responses, and with its lowest."""


ENERGY = 0.8
"""Share of the response's gradient that lies within an image's box, along either axis."""


@dataclass(frozen=True)
class Channel:
    """A channel of a layer's first bond.

    Attributes:
        number: Its index in the bond.
        share: Energy of the output that comes through this channel alone, over the sum of all channels' energies.
        images: (n, c, h, w) in [0, 1]: those with the highest responses, then those with the lowest, IMAGES of each.
        boxes: For each image (top, bottom, left, right), inclusive, where most of the response's gradient lies.
        responses: The response to each image.
    """

    number: int
    share: float
    images: Tensor
    boxes: tuple[tuple[int, int, int, int], ...]
    responses: tuple[float, ...]


def as_images(batches: Sequence[Any]) -> Tensor | None:
    """All inputs as one batch of images.

    Args:
        batches: Batches of inputs.

    Returns:
        (n, c, h, w) with 1 or 3 channels; None if the inputs are not images of one size.
    """
    if not all(isinstance(b, Tensor) and b.ndim == 4 and b.shape[1] in (1, 3) for b in batches):
        return None
    return torch.cat([b.cpu() for b in batches]) if len({b.shape[1:] for b in batches}) == 1 else None


def first_channels(layer: Layer, method: str, rank: Rank) -> bool:
    """Whether a layer starts with a 1 x 1 convolution, whose output channels are its first bond.

    Args:
        layer: The layer.
        method: Its decomposition.
        rank: Its rank.
    """
    stages = DECOMPOSITIONS[method].stages(layer, rank)
    return layer.kind.endswith("2d") and len(stages) > 1 and stages[0].kernel == (1, 1)


def channel_shares(layer: Layer, method: str, factors: Factors, moment: Any, metric: Any) -> Tensor:
    """The energy of the output that comes through each channel of the first bond alone, over the sum of them.

    Channels overlap and may cancel: the sum is not the energy of the whole output, of which a single channel may carry
    more than there is.

    Args:
        layer: The layer, with g groups.
        method: Its decomposition.
        factors: Its factors.
        moment: Input moment S; None for the identity.
        metric: Output metric H; None for the identity.

    Returns:
        Shares (g, R) of the R channels of each group.
    """
    g, family = layer.groups, DECOMPOSITIONS[method]
    first = factors[0].double().cpu().reshape(g, -1, layer.in_channels)
    size = first.shape[1]
    # The weight from the bond on: that of the same factors after an identity.
    eye = torch.eye(size, dtype=torch.float64).repeat(g, 1).reshape(g * size, size, 1, 1)
    behind = Layer("", "", (layer.shape[0], size, *layer.kernel), g)
    rest = family.weight(behind, (eye, *(f.double().cpu() for f in factors[1:])))
    rest = rest.reshape(g, layer.out_channels, size, -1)
    s, h = inner_moment(layer, Bond(size, ("C",)), moment), metric
    s = torch.diag_embed(s) if s is not None and s.ndim == 2 else s
    s, h = (torch.eye(n) if m is None else m for m, n in ((s, layer.in_channels), (h, layer.out_channels)))
    s, h = (m.double().cpu().expand(g, -1, -1) for m in (s, h))
    seen = first @ s @ first.mT
    felt = torch.einsum("gtrk,gtu,guqk->grq", rest, h, rest)
    alone = seen.diagonal(dim1=-2, dim2=-1) * felt.diagonal(dim1=-2, dim2=-1)
    return alone / alone.sum().clamp_min(1e-300)


class Watch:
    """Computes the responses of a layer's strongest channels from the layer's input in the compressed model.

    Args:
        layer: The layer.
        first: The factor before the first bond, (g * R, C, 1, 1).
        shares: Shares (g, R), from `channel_shares`.
    """

    def __init__(self, layer: Layer, first: Tensor, shares: Tensor) -> None:
        self.shares, size = shares.flatten(), shares.shape[1]
        self.rows = self.shares.argsort(descending=True)[:CHANNELS].tolist()
        self.filters = [(row // size * layer.in_channels, first[row].flatten()) for row in self.rows]

    def __call__(self, x: Tensor) -> Tensor:
        """Responses (b, CHANNELS, h, w) to an input (b, g * C, h, w)."""
        return torch.stack([torch.einsum("nchw,c->nhw", x[:, at : at + len(f)], f) for at, f in self.filters], 1)


def find_channels(model: nn.Module, watches: Mapping[str, Watch], images: Tensor) -> dict[str, tuple[Channel, ...]]:
    """Find the images that each watched channel responds to most, in one pass for all layers.

    Args:
        model: The compressed model.
        watches: The watched channels, by layer.
        images: Images (n, c, h, w).

    Returns:
        The channels by layer; a layer whose input is not one map per image is left out.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in watches}
    for part in images.split(128):
        for name, maps in _responses(model, part, watches).items():
            seen[name].append(torch.stack([maps.amax(2), maps.amin(2), maps.argmax(2), maps.argmin(2)]))
    shown = _visible(images)
    found = {}
    for name, parts in seen.items():
        if not parts:
            continue
        top, bottom, at_top, at_bottom = torch.cat(parts, 1)  # (n, CHANNELS) each
        first, last = top.argsort(0, descending=True)[:IMAGES], bottom.argsort(0)[:IMAGES]
        picked = torch.cat([first, last])  # (2 IMAGES, CHANNELS)
        places = torch.cat([at_top.gather(0, first), at_bottom.gather(0, last)]).long()
        responses = torch.cat([top.gather(0, first), bottom.gather(0, last)])
        watch, boxes = watches[name], _boxes(model, name, watches[name], images, picked, places)
        found[name] = tuple(
            Channel(row, watch.shares[row].item(), shown[picked[:, k]], boxes[k], tuple(responses[:, k].tolist()))
            for k, row in enumerate(watch.rows)
        )
    return found


def _visible(images: Tensor) -> Tensor:
    """Images with each colour scaled to [0, 1]."""
    low, high = (f(images.flatten(2).transpose(0, 1).flatten(1), 1)[:, None, None] for f in (torch.amin, torch.amax))
    return (images - low) / (high - low).clamp_min(1e-12)


def channels_of_responses(images: Tensor, responses: Tensor, shares: Tensor) -> tuple[Channel, ...]:
    """The strongest channels of a bond with whole images.

    Args:
        images: Images (n, c, h, w).
        responses: (n, channels).
        shares: Energy shares (channels,).
    """
    whole = (0, images.shape[2] - 1, 0, images.shape[3] - 1)
    shown, found = _visible(images), []
    for k in shares.argsort(descending=True)[:CHANNELS].tolist():
        order = responses[:, k].argsort(descending=True)
        picked = torch.cat([order[:IMAGES], order.flip(0)[:IMAGES]])
        values = tuple(responses[picked, k].tolist())
        found.append(Channel(k, shares[k].item(), shown[picked], (whole,) * len(picked), values))
    return tuple(found)


def _responses(model: nn.Module, x: Tensor, watches: Mapping[str, Watch]) -> dict[str, Tensor]:
    """Maps (b, CHANNELS, positions) of the watched channels at their layer's first call."""
    found: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        seen: Tensor = args[0]
        if name not in found and seen.ndim == 4 and len(seen) == len(x):
            found[name] = watches[name](seen).flatten(2).cpu()

    with hooked(model, watches, on_input=note), inference(model), torch.set_grad_enabled(x.requires_grad):
        run(model, to_device(x, model))
    return found


def _boxes(
    model: nn.Module, name: str, watch: Watch, images: Tensor, picked: Tensor, places: Tensor
) -> list[tuple[tuple[int, int, int, int], ...]]:
    """For each channel and its picked images, the box with ENERGY of the response's gradient along either axis."""
    boxes = []
    for k, (chosen, at) in enumerate(zip(picked.T, places.T, strict=True)):
        x = images[chosen].detach().clone().requires_grad_()
        maps = _responses(model, x, {name: watch})[name]
        (gradient,) = torch.autograd.grad(maps[:, k].gather(1, at[:, None]).sum(), x)
        energy = gradient.square().sum(1)
        rows, columns = (_middle(energy.sum(axis)) for axis in (2, 1))
        boxes.append(tuple((*r, *c) for r, c in zip(rows, columns, strict=True)))
    return boxes


def _middle(energy: Tensor) -> list[tuple[int, int]]:
    """The first and last index of each row (n, size) between which the middle ENERGY of its sum lies."""
    share = energy.cumsum(1) / energy.sum(1, keepdim=True).clamp_min(1e-30)
    tail = (1 - ENERGY) / 2
    first, last = ((share < bound).sum(1).clamp_max(energy.shape[1] - 1).tolist() for bound in (tail, 1 - tail))
    return list(zip(first, last, strict=True))
