"""Quantized candidates for inputs of every kind, also for channels that are always zero."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from rankopt.candidates.quantize import quantize_candidate
from rankopt.core.records import INT8, Candidate, Cost
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.model.inventory import inventory


def moments(groups, n):
    """Second moments: inputs that are all zero, zero in one group, a single direction, and ordinary."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, n, 3 * n, generator=generator, dtype=torch.float64)
    full = x @ x.mT / (3 * n)
    one_dead, line = full.clone(), x[..., :1] @ x[..., :1].mT
    one_dead[0] = 0
    return {"zero": torch.zeros_like(full), "one group zero": one_dead, "one direction": line, "full": full}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["svd_out", "tucker2", "cp"])
@pytest.mark.parametrize("inputs", ["zero", "one group zero", "one direction", "full"])
def test_int8_takes_inputs_of_every_kind(method, groups, inputs):
    torch.manual_seed(0)
    module = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    (layer,) = inventory(module, torch.zeros(1, 8, 5, 5))
    family = DECOMPOSITIONS[method]
    rank = family.valid(layer, tuple(max(1, r // 2) for r in family.full_rank(layer)))
    moment = moments(groups, layer.patch)[inputs]
    factors = tuple(torch.randn(shape) for shape in family.shapes(layer, rank))
    weight = family.weight(layer, tuple(f.double() for f in factors)).float()  # the factors have no error themselves
    candidate = dataclasses.replace(Candidate(method, rank, Cost(0, 0, 0), 0.0), precision=INT8)
    encoded, error = quantize_candidate(layer, candidate, weight, factors, moment, None)
    assert error is not None and math.isfinite(error) and error < 1e-2
    assert (full_target(layer, weight, moment, None).norm == 0) == (
        inputs == "zero" or (groups, inputs) == (1, "one group zero")
    )
    assert all(t.isfinite().all() for t in encoded)
