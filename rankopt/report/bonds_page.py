"""The bonds of a compressed model: a table for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.table import Table
from torch.nn.functional import adaptive_avg_pool2d

from rankopt.core.files import write_beside
from rankopt.core.names import labels
from rankopt.report.bond_analysis import LayerBonds
from rankopt.report.bond_channels import ENERGY, IMAGES, Channel
from rankopt.report.bond_latents import Latents
from rankopt.report.bond_sections import by_layer, whole_model
from rankopt.report.bond_spectra import BondSpectrum, effective_rank
from rankopt.report.html import environment
from rankopt.report.pictures import ACCENT, FAINT, INK, POINT, draw
from rankopt.search.summary import counted, percent, render

FILE, TEMPLATE = "bonds.html", "bonds.html.j2"


LEAST_PATCH = 10
"""Side of the smallest patch of an image that is shown, in pixels of the image."""


MOST_PATCH = 48
"""Side of the largest patch as it is drawn, in pixels; larger ones are averaged down."""


FLOOR = 1e-6
"""The least share of energy that is drawn."""


def write_bonds(path: Path, title: str, rows: Sequence[LayerBonds], latents: Latents | None = None) -> Path:
    """Write the page.

    Args:
        path: The file to write; its folder is made.
        title: Name of the run or task.
        rows: The layers.
        latents: Their latent channels.

    Returns:
        The path.
    """
    source = page(title, rows, latents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda p: p.write_text(source, encoding="utf-8", errors="replace"))
    return path


def page(title: str, rows: Sequence[LayerBonds], latents: Latents | None = None) -> str:
    """Render the page. Names and reasons come from users' files; the template escapes them.

    Args:
        title: Name of the run or task.
        rows: The layers.
        latents: Their latent channels; None leaves out what these do.

    Returns:
        The page's source.
    """
    channels = by_layer(latents)
    shown = [row for row in rows if row.spectra or row.name in channels]
    spectral = [row for row in shown if row.spectra]
    pictures = [_pictures(row, i) for i, row in enumerate(shown)]
    env = environment()
    env.filters["bond"] = lambda text: text.replace(" ", "\u00a0").replace("|", "│")
    env.filters |= {"rise": lambda x: "–" if math.isnan(x) else f"{x:.2g}", "corr": _correlation}
    metrics = {s.metric for row in shown for s in row.spectra}
    height = 0.7 + 0.17 * sum(len(r.spectra) for r in spectral)
    return env.get_template(TEMPLATE).render(
        title=title,
        verdict=verdict(rows),
        layers=list(zip(shown, pictures, strict=True)),
        others=[row for row in rows if not row.spectra and row.name not in channels],
        overview=Markup(draw(overview, spectral, height=height)) if spectral else "",
        effective=effective_rank,
        energy=ENERGY,
        images=IMAGES,
        output="output" in metrics,
        plain="plain" in metrics,
        whole=whole_model(latents) if latents else None,
        channels=channels,
        pictured=any(row.channels for row in shown),
    )


def _correlation(value: float | None) -> str:
    return "too few" if value is None else f"{value:.2f}"


def verdict(rows: Sequence[LayerBonds]) -> str:
    """All bonds in one sentence.

    Args:
        rows: The layers.
    """
    bonds = [s for row in rows for s in row.spectra]
    if not bonds:
        return "No layer has a bond that bounds its rank."
    used = statistics.median(s.used for s in bonds)
    kept = statistics.median(s.kept for s in bonds)
    layers = sum(bool(row.spectra) for row in rows)
    return (
        f"{counted(len(bonds), 'bond')} in {counted(layers, 'layer')}: half of them have an effective rank below "
        f"{percent(used, 0)} of the possible, and half keep more than {percent(kept, 1)} of the dense layer’s energy."
    )


LEGEND = (
    "eff. rank: exp of the entropy of the normalised squared singular values across the bond\n"
    "kept: 1 - the energy of the difference over the dense layer's; output: as fitted, plain: of the weight"
)


def table(rows: Sequence[LayerBonds]) -> str:
    """The bonds as text, at most 100 columns wide.

    Args:
        rows: The layers.
    """
    found = Table(title="bonds", title_justify="left")
    for name in ("layer", "method", "bond"):
        found.add_column(name, overflow="fold")
    for name in ("size", "eff. rank", "(dense)", "kept"):
        found.add_column(name, justify="right")
    found.add_column("metric")
    for row in rows:
        for i, s in enumerate(row.spectra):
            names = ("", "") if i else (row.name or "(the model)", row.method)
            ranks = f"{s.effective:.1f}", f"({effective_rank(s.dense):.1f})"
            found.add_row(*names, s.bond, str(s.size), *ranks, percent(s.kept, 1), s.metric)
    notes = [f"{row.name or '(the model)'}: {row.note}" for row in rows if not row.spectra]
    return render(found, LEGEND, verdict(rows), *(["no bonds in", *notes] if notes else []))


# --- painters ----------------------------------------------------------------------------------------


def _pictures(row: LayerBonds, number: int) -> dict[str, Markup]:
    drawn = {}
    if row.spectra:
        lines = -(-len(row.spectra) // 3)
        drawn["spectra"] = draw(spectra, row.spectra, height=1.75 * lines, name=f"spectra{number}")
    if row.channels:
        drawn["channels"] = draw(channels, row.channels, height=2.05, name=f"channels{number}")
    return {name: Markup(svg) for name, svg in drawn.items()}


def overview(ax: Any, rows: Sequence[LayerBonds]) -> None:
    """Draw a bar per bond: its size (light), its effective rank (solid) and that of the dense layer (line).

    Args:
        ax: Matplotlib axes.
        rows: The layers that have bonds.
    """
    y, ticks = 0.0, list[float]()
    for row in rows:
        ticks.append(y + (len(row.spectra) - 1) / 2)
        for s in row.spectra:
            ax.barh(y, s.size, 0.8, color=POINT, alpha=0.22, lw=0)
            ax.barh(y, s.effective, 0.8, color=POINT, lw=0)
            ax.plot([effective_rank(s.dense)] * 2, [y - 0.4, y + 0.4], color=ACCENT, lw=1.5)
            y += 1
        y += 0.6
    ax.set_yticks(ticks, labels([row.name for row in rows]), fontsize=9)
    ax.set(ylim=(y - 0.6, -1), xlabel="channels of the bond")
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def spectra(ax: Any, bonds: Sequence[BondSpectrum]) -> None:
    """Draw a panel per bond: the energy of each singular direction, dense (grey) and compressed.

    Args:
        ax: Matplotlib axes, which the panels replace.
        bonds: The bonds of one layer.
    """
    figure, columns = ax.figure, min(3, len(bonds))
    ax.remove()
    panels = figure.subplots(-(-len(bonds) // columns), columns, sharey=True, squeeze=False).flat
    for panel, s in zip(panels, bonds, strict=False):
        total = max(*(sum(v * v for v in values) for values in (s.dense, s.small)), 1e-300)  # no share is above 1
        dense, small = (np.array([v * v / total for v in values]) for values in (s.dense, s.small))
        panel.fill_between(np.arange(1, len(dense) + 1), FLOOR, np.maximum(dense, FLOOR), color=FAINT, alpha=0.3, lw=0)
        panel.plot(np.arange(1, len(small) + 1), np.maximum(small, FLOOR), color=POINT, lw=1.6)
        if s.size < len(dense):
            panel.axvline(s.size, color=ACCENT, lw=1, ls="--")
        panel.set_yscale("log")
        panel.set_title(s.bond.replace(" | ", " │ "), fontsize=10)
        panel.set(ylim=(FLOOR, 1.5), xlim=(1, max(2, len(dense))), yticks=[1e-6, 1e-4, 1e-2, 1])
        panel.minorticks_off()
        panel.set_yticklabels(["10⁻⁶", "10⁻⁴", "1 %", "all"])
        panel.set_xticks([1, len(dense)] if len(dense) > 2 else [1, 2])
    for panel in list(panels):
        panel.remove()


def channels(ax: Any, found: Sequence[Channel]) -> None:
    """Draw a line per channel: patches of the images with its highest and lowest responses, and boxes where it looks.

    Args:
        ax: Matplotlib axes.
        found: The channels of one layer.
    """
    side = _patch(found)
    shown = min(side, MOST_PATCH)  # of a large image fewer pixels
    step, middle = shown + max(1, shown // 16), shown // 4  # from patch to patch, and between highest and lowest
    whole = np.zeros((len(found) * step, 2 * IMAGES * step + middle, 4))  # transparent where no patch is
    for i, channel in enumerate(found):
        for j, (image, box) in enumerate(zip(channel.images, channel.boxes, strict=True)):
            x, y = j * step + (middle if j >= IMAGES else 0), i * step
            top, left = (
                _start(a, b, side, size) for a, b, size in zip(box[::2], box[1::2], image.shape[1:], strict=True)
            )
            patch = adaptive_avg_pool2d(image[:, top : top + side, left : left + side], shown).expand(3, -1, -1)
            whole[y : y + shown, x : x + shown] = np.dstack([*patch.numpy(), np.ones((shown, shown))])
            if (box[1] - box[0] + 1) * (box[3] - box[2] + 1) < 0.8 * side**2:
                a, b = (x + (edge - left) * shown / side for edge in (box[2], box[3] + 1))
                c, d = (y + (edge - top) * shown / side for edge in (box[0], box[1] + 1))
                for colour, lw in (("white", 2.2), (ACCENT, 1.2)):
                    ax.plot([a, b, b, a, a], [c, c, d, d, c], color=colour, lw=lw)
    height, width = whole.shape[:2]
    ax.imshow(whole, extent=(0, width, height, 0), interpolation="none")
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    ax.set_yticks(
        [i * step + shown / 2 for i in range(len(found))], [f"{c.number} · {percent(c.share, 0)}" for c in found]
    )
    ax.set_xticks([IMAGES * step / 2, width - IMAGES * step / 2], ["highest", "lowest"])
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelcolor=INK)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _patch(found: Sequence[Channel]) -> int:
    """Side of a layer's patches in pixels of the images: the boxes with some room around them."""
    sides = [max(b[1] - b[0], b[3] - b[2]) + 1 for c in found for b in c.boxes]
    return min(max(LEAST_PATCH, round(2.5 * statistics.median(sides))), *found[0].images.shape[2:])


def _start(first: int, last: int, side: int, size: int) -> int:
    """Where a patch starts that has the box first..last in its middle, and lies inside an image of this size."""
    return min(max(0, (first + last + 1 - side) // 2), size - side)
