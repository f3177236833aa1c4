"""What the numbers of a search depend on, kept with them: a search that is resumed must not mix old and new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rankopt.core.files import digest
from rankopt.model.forward import input_tensors

if TYPE_CHECKING:
    from rankopt.candidates.prepare import Prepared

TOLERANCES = {"data": 1e-5, "dense objective": 1e-3, "dense score": 1e-3}
"""Relative differences that another number of threads or another device may make; the other entries are exact."""


HASHES = ("weights", "data", "space", "candidates")
"""Entries of a study that say nothing to a reader."""


def identity(prepared: Prepared) -> dict[str, Any]:
    """Describe the model, the data, the task's functions and the search space as JSON content.

    An objective or a score is code, which cannot be compared: its value for the dense model stands for it. Names and
    paths do not count: projects may move.

    Args:
        prepared: The task with its candidates.
    """
    task, space = prepared.task, dataclasses.replace(prepared.space, name="", description="")
    return {
        "weights": digest(*task.model.state_dict().values()),
        "data": _described(prepared.statistics.batches),
        "dense objective": "default" if task.objective is None else prepared.dense_objective,
        "dense score": prepared.dense_score,
        "space": digest(space.settings()),
    }


def _described(batches: Iterable[Any]) -> list[Any]:
    """For each tensor of a batch: its number of elements in all batches, and means over them.

    Not a hash: data that are computed differ in their last digits between machines. The order does not count either.
    """
    counts: list[int] = []
    sums: list[list[float]] = []
    for batch in batches:
        tensors = input_tensors(batch)
        counts += [0] * (len(tensors) - len(counts))
        sums += [[0.0] * 3 for _ in range(len(tensors) - len(sums))]
        for i, tensor in enumerate(tensors):
            x = (tensor.abs() if tensor.is_complex() else tensor).double()
            parts = x.clamp(min=0).sum(), x.clamp(max=0).sum(), x.square().sum()
            counts[i] += x.numel()
            sums[i] = [total + part.item() for total, part in zip(sums[i], parts, strict=True)]
    return [[n, [s / max(n, 1) for s in total]] for n, total in zip(counts, sums, strict=True)]
