"""Pictures of latent channels: painters for `rankopt.report.pictures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rankopt.core.names import labels
from rankopt.report.bond_effects import ABLATED, PATCHED
from rankopt.report.bond_latents import CHANNELS, RANDOM, ROTATED, LatentBond, Latents, Step, compared
from rankopt.report.pictures import ACCENT, FAINT, POINT, rows_axis

STRONGEST = 10
"""Channels of a bond that are drawn, those with the largest predicted effects."""


MOST_CLASSES = 20
"""Classes that are drawn, those that the drawn channels change most."""


RISE = "rise of the objective"


SUPERSCRIPTS = dict(zip("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True))


def strongest(bond: LatentBond) -> list[int]:
    """The channels that matter most when they are ablated, the first one most.

    Args:
        bond: The bond.
    """
    order = bond.effects.predicted[ABLATED].argsort(descending=True)[:STRONGEST]
    return [int(i) for i in order]


def agreement(ax: Any, latents: Latents) -> None:
    """Draw measured against predicted rises of the objective; of the controls, the measured ones.

    Args:
        ax: Matplotlib axes.
        latents: The latents.
    """
    looks = {
        RANDOM: ("random directions", {"color": FAINT, "marker": "x", "s": 14, "lw": 0.8, "alpha": 0.7}),
        ROTATED: ("rotated bonds", {"edgecolor": ACCENT, "facecolor": "none", "s": 14, "lw": 0.8, "alpha": 0.7}),
        CHANNELS: ("channels", {"color": POINT, "s": 16, "lw": 0}),
    }
    found = {of: compared(latents, of) for of in looks}
    sizes = torch.cat([torch.cat(pair).abs() for pairs in found.values() for pair in pairs] or [torch.ones(1)])
    bend = max(float(sizes.quantile(0.05)), 1e-12)
    for of, (name, look) in looks.items():
        if pairs := found[of]:
            ax.scatter(*(torch.cat([pair[i] for pair in pairs]).numpy() for i in (0, 1)), label=name, **look)
    ax.set_xscale("symlog", linthresh=bend)
    ax.set_yscale("symlog", linthresh=bend)
    top = float(sizes.max())
    equal = [0, *np.geomspace(bend, max(top, 2 * bend), 50)]
    ax.plot(equal, equal, color=FAINT, lw=0.8)
    ticks = _decades(bend, top)
    names = ["0", *(f"10{''.join(SUPERSCRIPTS[c] for c in str(round(np.log10(t))))}" for t in ticks[1:])]
    ax.set(xlabel=f"predicted {RISE}", ylabel=f"measured {RISE}")
    ax.set_xticks(ticks, names)
    ax.set_yticks(ticks, names)
    ax.minorticks_off()
    if handles := ax.get_legend_handles_labels()[0]:
        ax.legend(handles[::-1], [h.get_label() for h in handles[::-1]], loc="upper left", fontsize=9)


def _decades(low: float, high: float) -> list[float]:
    """Zero and at most four powers of ten."""
    first, last = int(np.ceil(np.log10(low))), int(np.floor(np.log10(max(high, low))))
    step = max(1, -(-(last - first + 1) // 4))
    return [0.0, *(10.0**k for k in range(last, first - 1, -step))]


def effects(ax: Any, bond: LatentBond) -> None:
    """Draw a bar for each of the strongest channels: the predicted rise; a dot: the measured one.

    Args:
        ax: Matplotlib axes.
        bond: The bond.
    """
    shown = strongest(bond)
    for i, r in enumerate(shown):
        for way, colour, at in ((ABLATED, POINT, i - 0.18), (PATCHED, ACCENT, i + 0.18)):
            ax.barh(at, bond.effects.predicted[way, r].item(), 0.34, color=colour, alpha=0.35, lw=0)
            ax.plot(bond.effects.measured[way, r].item(), at, "o", color=colour, ms=4)
    rows_axis(ax, [str(r) for r in shown])
    ax.set(xlabel=RISE, ylabel="channel")
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    ax.locator_params(axis="x", nbins=5)
    handles = [ax.scatter([], [], color=c, s=18) for c in (POINT, ACCENT)]
    ax.legend(handles, ["ablated", "patched"], loc="lower right", fontsize=9)


def has_classes(bond: LatentBond) -> bool:
    """Whether effects on classes are known.

    Args:
        bond: The bond.
    """
    found = bond.effects.class_predicted
    return found.shape[1] > 0 and not bool(found.isnan().all())


def class_effects(ax: Any, bond: LatentBond, names: Sequence[str]) -> None:
    """Draw the rise of each class's loss when a channel is ablated: a row a channel, a column a class.

    Args:
        ax: Matplotlib axes.
        bond: The bond.
        names: Names of the classes.
    """
    shown = strongest(bond)
    rows = bond.effects.class_predicted[shown].nan_to_num(0)
    which = rows.abs().amax(0).argsort(descending=True)[:MOST_CLASSES].sort().values.tolist()
    # Channels differ by orders of magnitude: each row is drawn relative to its largest change.
    values = (rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-300))[:, which].numpy()
    ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    long = max((len(names[c]) for c in which), default=1) > 2
    ax.set_xticks(range(len(which)), [names[c][:12] for c in which], rotation=60 if long else 0,
                  ha="right" if long else "center")  # fmt: skip
    ax.set_yticks(range(len(shown)), [str(r) for r in shown])
    ax.set(xlabel="class", ylabel="channel")
    ax.tick_params(length=0)
    ax.grid(visible=False)


def shares(ax: Any, bonds: Sequence[LatentBond]) -> None:
    """Draw the energy shares of a layer's channels, in descending order, a line a bond.

    Args:
        ax: Matplotlib axes.
        bonds: The bonds of the layer.
    """
    for bond in bonds:
        values = bond.shares.sort(descending=True).values.clamp_min(1e-6).numpy()
        ax.plot(np.arange(1, len(values) + 1), values, marker="o", ms=3, label=bond.bond.replace(" | ", " │ "))
    ax.set_yscale("log")
    ax.set(xlabel="channel, strongest first", ylabel="share of energy")
    ax.legend(fontsize=9)


def flow(ax: Any, steps: Sequence[Step]) -> None:
    """Draw the correlation of a followed channel at each later bond, and what chance gives there.

    Args:
        ax: Matplotlib axes.
        steps: The steps.
    """
    y = range(len(steps))
    ax.barh(y, [abs(s.correlation) for s in steps], 0.6, color=POINT, lw=0, label="best channel")
    ax.plot([s.chance for s in steps], y, "|", color=ACCENT, ms=9, mew=1.5, label="chance")
    names = labels([s.layer for s in steps])
    rows_axis(ax, [f"{name} · {s.channel}" for name, s in zip(names, steps, strict=True)], fontsize=9)
    ax.set(xlim=(0, 1), xlabel="|correlation| of responses", ylabel="later channel")
    ax.legend(loc="lower right", fontsize=9)
