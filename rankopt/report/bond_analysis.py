"""The bonds of a whole compressed model, from a run folder or from a task and a search space.

A bond is where two factors of a layer meet; `rankopt.report.bond_spectra` defines it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankopt.candidates.calibration import WithinMemory, calibrate
from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.progress import Progress, silent
from rankopt.core.records import DENSE, SAME, Layer, Rank, Task
from rankopt.decompositions.plan import apply, load, read_plan
from rankopt.model.composites import expand_composites
from rankopt.model.inputs import collect_batches, first_examples
from rankopt.model.inventory import inventory
from rankopt.report.bond_channels import Channel, Watch, as_images, channel_shares, find_channels, first_channels
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
        note: Why it has no bond, or no pictures of channels.
    """

    name: str
    method: str
    rank: Rank
    spectra: tuple[BondSpectrum, ...] = ()
    channels: tuple[Channel, ...] = ()
    note: str = ""


def bonds_of_run(folder: Path, task: Task, progress: Progress = silent) -> list[LayerBonds]:
    """Analyse the layers of a run's model.

    Args:
        folder: The run folder.
        task: The task that was compressed.
        progress: Shows the calibration.

    Raises:
        PlanError: If the folder holds no model, or that of another task.
    """
    plan, _ = read_plan(folder)
    small = load(task.model, folder)
    replaced = {c.name: (c.method, c.rank) for c in plan.choices if c.method != DENSE}
    dense = expand_composites(copy.deepcopy(task.model), [c.name for c in plan.choices])
    batches = collect_batches(task.model, WithinMemory(task.calibration), EXAMPLES)
    layers = inventory(dense, task.example_input)
    s, h = calibrate(dense, [x for x in layers if x.name in replaced], batches, progress)
    statistics = {name: (s.get(name), h.get(name)) for name in replaced}
    return inspect_bonds(dense, small, layers, replaced, statistics, batches)


def bonds_of_space(
    task: Task, space: SearchSpace, cache: str | Path | None = None, progress: Progress = silent
) -> list[LayerBonds]:
    """Analyse each layer as the most accurate candidate of a search space.

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
    return inspect_bonds(prepared.model, small, prepared.layers, replaced, prepared.statistics, batches)


def inspect_bonds(
    dense: nn.Module,
    small: nn.Module,
    layers: Sequence[Layer],
    replaced: Mapping[str, tuple[str, Rank]],
    statistics: LayerStatistics,
    batches: Sequence[Any],
) -> list[LayerBonds]:
    """Analyse every layer of a compressed model.

    Args:
        dense: The dense model, its composite modules expanded.
        small: The compressed model.
        layers: All layers of the inventory.
        replaced: Name -> (method, rank) of the factorised layers.
        statistics: Input moment and output metric of these layers.
        batches: Calibration batches; pictures need images.

    Returns:
        One row for each layer, in their order; one without spectra says why in its note.
    """
    found: list[LayerBonds] = []
    watches: dict[str, Watch] = {}
    for layer in layers:
        method, rank = replaced.get(layer.name, (DENSE, ()))
        row = LayerBonds(layer.name, method, rank)
        found.append(row)
        if method == DENSE:
            row.note = layer.reason or "the plan keeps it dense"
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
            row.note = "no pictures: it does not start with a 1 x 1 convolution"
    images = as_images(batches)
    channels = find_channels(small, watches, images) if images is not None else {}
    for row in found:
        row.channels = channels.get(row.name, ())
        if row.name in watches and not row.channels:
            what = "the model's inputs are not images of one size with 1 or 3 channels"
            row.note = f"no pictures: {what if images is None else 'it does not see one map per image'}"
    return found
