"""The bonds of a whole compressed model, from a run folder or from a task and a search space.

A bond is where two factors of a layer meet; `rankopt.report.bond_spectra` defines it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from rankopt.candidates.calibration import WithinMemory, calibrate
from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.progress import Progress, silent
from rankopt.core.records import DENSE, SAME, Layer, Rank, Task
from rankopt.decompositions.plan import apply, load, replaced_layers
from rankopt.model.composites import expand_composites
from rankopt.model.forward import take
from rankopt.model.inputs import collect_batches, first_examples
from rankopt.model.inventory import inventory
from rankopt.report.bond_channels import (
    Channel,
    Watch,
    as_images,
    channel_shares,
    channels_of_responses,
    find_channels,
    first_channels,
)
from rankopt.report.bond_latents import Latents
from rankopt.report.bond_spectra import BondSpectrum, spectra

EXAMPLES = 512
"""Calibration examples that statistics and pictures are taken from."""


LayerStatistics = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""By layer, the input moment S and the output metric H of `rankopt.candidates.calibration`."""


@dataclass
class LayerBonds:
    """The bonds of one layer.

    Attributes:
        name: Name of the layer.
        method: Its decomposition, or "dense".
        rank: Its rank.
        spectra: One spectrum for each bond.
        channels: The strongest channels of the first bond, with the images that they respond to.
        note: Why it has no bond.
        no_pictures: Why its channels have no pictures.
    """

    name: str
    method: str
    rank: Rank
    spectra: tuple[BondSpectrum, ...] = ()
    channels: tuple[Channel, ...] = ()
    note: str = ""
    no_pictures: str = ""


class Subject(NamedTuple):
    """A compressed model and what an analysis of its bonds needs.

    Attributes:
        dense: The dense model, its composite modules expanded.
        small: The compressed model.
        layers: All layers of the inventory.
        replaced: Name -> (method, rank) of the factorised layers.
        statistics: Input moment and output metric of these layers.
        batches: Calibration batches, as the model takes them.
    """

    dense: nn.Module
    small: nn.Module
    layers: Sequence[Layer]
    replaced: Mapping[str, tuple[str, Rank]]
    statistics: LayerStatistics
    batches: Sequence[Any]


def subject(
    dense: nn.Module,
    small: nn.Module,
    calibration: Iterable[Any],
    example_input: Any = None,
    only: Sequence[str] = ("*",),
    examples: int = EXAMPLES,
    progress: Progress = silent,
) -> Subject:
    """Calibrate the factorised layers of a compressed model.

    Args:
        dense: The dense model.
        small: The compressed model.
        calibration: Batches of inputs.
        example_input: One input; None: the first of the batches.
        only: Names or patterns of the layers to analyse; others count as dense.
        examples: The most examples that are read.
        progress: Shows the calibration.

    Raises:
        TaskError: The dense model does not run on the data.
    """
    batches = collect_batches(dense, WithinMemory(calibration), examples)
    made = [c for c in replaced_layers(small) if c.method != DENSE]
    dense = expand_composites(copy.deepcopy(dense), [c.name for c in made])
    names = dict(dense.named_modules())
    replaced = {
        c.name: (c.method, c.rank) for c in made if c.name in names and any(fnmatchcase(c.name, p) for p in only)
    }
    layers = inventory(dense, take(batches[0], slice(1)) if example_input is None else example_input)
    s, h = calibrate(dense, [x for x in layers if x.name in replaced], batches, progress)
    return Subject(dense, small, layers, replaced, {name: (s.get(name), h.get(name)) for name in replaced}, batches)


def subject_of_run(folder: Path, task: Task, progress: Progress = silent) -> Subject:
    """A run's model and what an analysis of its bonds needs.

    Args:
        folder: The run folder.
        task: The task that was compressed.
        progress: Shows the calibration.

    Raises:
        PlanError: If the folder holds no model, or that of another task.
    """
    return subject(task.model, load(task.model, folder), task.calibration, task.example_input, progress=progress)


def subject_of_space(
    task: Task, space: SearchSpace, cache: str | Path | None = None, progress: Progress = silent
) -> Subject:
    """A task's model with the most accurate candidate of a search space for each layer.

    Args:
        task: The task.
        space: The search space.
        cache: Folder of the cache of fits; None for the default one.
        progress: Shows calibration and fitting.
    """
    prepared = prepare(task, dataclasses.replace(space, effort=THOROUGH), cache, progress)
    menus = {x: [c for c in prepared.candidates[x.name] if c.precision == SAME] for x in prepared.free}
    chosen = {x: min(menu, key=lambda c: c.error) for x, menu in menus.items() if menu}
    small = apply(task.model, [*chosen], [*chosen.values()], prepared.factors)
    replaced = {x.name: (c.method, c.rank) for x, c in chosen.items()}
    batches = first_examples(prepared.statistics.batches, EXAMPLES)
    return Subject(prepared.model, small, prepared.layers, replaced, prepared.statistics, batches)


def inspect_bonds(subject: Subject) -> list[LayerBonds]:
    """Analyse every layer of a compressed model.

    Args:
        subject: The model and what is needed; pictures need images.

    Returns:
        One row for each layer, in their order; one without spectra says why in its note.
    """
    dense, small, layers, replaced, statistics, batches = subject
    found: list[LayerBonds] = []
    watches: dict[str, Watch] = {}
    made = {c.name for c in replaced_layers(small) if c.method != DENSE}
    for layer in layers:
        method, rank = replaced.get(layer.name, (DENSE, ()))
        row = LayerBonds(layer.name, method, rank)
        found.append(row)
        if method == DENSE:
            left_out = layer.name in made
            row.note = "left out of the analysis" if left_out else layer.reason or "the plan keeps it dense"
            continue
        module, statistic = small.get_submodule(layer.name), statistics[layer.name]
        weight: Tensor = dense.get_submodule(layer.name).weight  # type: ignore[assignment]
        row.spectra = spectra(layer, method, rank, weight, module.weight, *statistic)  # type: ignore[arg-type]
        if not row.spectra:
            row.note = f"{method} generates its weight through nonlinear levels: no bond bounds a rank of it"
        elif first_channels(layer, method, rank):
            factors = tuple(f.detach() for f in module.factors)  # type: ignore[union-attr]
            watches[layer.name] = Watch(layer, factors[0], channel_shares(layer, method, factors, *statistic))
        elif len(layer.shape) == 4:
            row.no_pictures = "no pictures: it does not start with a 1 x 1 convolution"
    images = as_images(batches)
    channels = find_channels(small, watches, images) if images is not None else {}
    for row in found:
        row.channels = channels.get(row.name, ())
        if row.name in watches and not row.channels:
            what = "the model's inputs are not images of one size with 1 or 3 channels"
            row.no_pictures = f"no pictures: {what if images is None else 'it does not see one map per image'}"
    return found


def with_pictures(rows: list[LayerBonds], latents: Latents) -> list[LayerBonds]:
    """Add whole images to layers without pictures: those to which the channels of their first bond respond most.

    Args:
        rows: The layers.
        latents: Their latent channels.

    Returns:
        The rows, which are changed.
    """
    images = as_images(latents.batches)
    first = {b.layer: b for b in reversed(latents.bonds)}
    for row in rows:
        bond = first.get(row.name)
        if images is None or row.channels or bond is None or bond.effects.responses is None:
            continue
        row.channels = channels_of_responses(images, bond.effects.responses, bond.shares)
        row.no_pictures = ""
    return rows
