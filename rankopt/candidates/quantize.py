"""Candidates whose weights are stored in fewer bits: what they cost, and the error that they really have.

A fit's factors are rounded to nearest. CP's components cancel in part, so their rounding errors do not: in int8,
the output factor B of a family that ends in a 1 x 1 stage, Ŵ = B K, is therefore solved again for the rounded K, and
rounded a column at a time, each column's error carried to those not yet rounded by the Gram matrix G = K S Kᵀ (as
GPTQ, Frantar 2022, does over the input moment of a dense layer):

    q_r = round(b_r),    B[:, r:] ← B[:, r:] − (b_r − q_r) U[r, r:] / U[r, r],    G⁻¹ = Uᵀ U

On ResNet-20 that takes the error which int8 adds to cp and cp_merged to a quarter. The better of the two is kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankopt.candidates.cache import VERSION, Cache, FactorStore
from rankopt.candidates.pareto import frontier
from rankopt.core.files import digest
from rankopt.core.records import DENSE, INT8, SAME, Candidate, Layer
from rankopt.decompositions.core_networks import CoreNetwork
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Factors, Target
from rankopt.decompositions.variable_projection import OutputSolver, full_target
from rankopt.model.quantization import ROW, Encoded, cost_at, decode, encode, to_grid

DAMPING = 1e-8  # relative to the mean diagonal of G


def in_each_precision(layer: Layer, candidate: Candidate, precisions: Sequence[str]) -> list[Candidate]:
    """The candidate in each other precision that takes fewer bytes; its error still without rounding."""
    dense = candidate.method == DENSE
    shapes = [layer.shape] if dense else DECOMPOSITIONS[candidate.method].shapes(layer, candidate.rank)
    shapes = [(layer.shape[0], layer.patch)] if dense else shapes
    costs = {p: cost_at(layer, shapes, candidate.cost, p) for p in precisions if p != SAME}
    return [
        dataclasses.replace(candidate, precision=p, cost=cost)
        for p, cost in costs.items()
        if cost.bytes < candidate.cost.bytes
    ]


def add_precisions(
    model: nn.Module,
    layers: Sequence[Layer],
    candidates: dict[str, list[Candidate]],
    precisions: Sequence[str],
    factors: FactorStore,
    statistics: Mapping[str, tuple[Tensor | None, Tensor | None]],
    key: str,
    cache: Cache,
    progress: Any,
) -> dict[str, list[Candidate]]:
    """Name -> the candidates, and those on the frontier of parameters and MACs, dense included, in each precision.

    statistics: name -> (moment S, output metric H). key: of these. What is measured is kept in the cache.
    """
    if not set(precisions) - {SAME}:
        return candidates
    found = {}
    for layer in progress(layers, "rounding weights", len(layers)):
        weight: Tensor = model.get_submodule(layer.name).weight.detach().cpu()  # type: ignore[operator]
        kept = frontier(layer, candidates[layer.name], ("params", "macs"))
        todo = [c for one in kept for c in in_each_precision(layer, one, precisions)]
        names = [(c.method, c.rank, c.form, c.key, c.precision) for c in todo]
        file_key = "rounded-" + digest(VERSION, ROW, key, layer.name, weight, names)
        errors = _read(cache, file_key)
        if errors is None:
            errors = _measure(layer, weight, todo, factors, statistics, cache, file_key)
        made = [
            dataclasses.replace(c, error=error, key=f"{file_key}/{i}")
            for i, (c, error) in enumerate(zip(todo, errors, strict=True))
            if error is not None
        ]
        found[layer.name] = candidates[layer.name] + made
    return found


def _read(cache: Cache, key: str) -> list[float | None] | None:
    """The errors that a file names; None if it is not there or damaged."""
    try:
        with safe_open(cache.path(key, "safetensors"), "pt") as file:
            return json.loads(file.metadata()["errors"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _measure(
    layer: Layer,
    weight: Tensor,
    todo: Sequence[Candidate],
    factors: FactorStore,
    statistics: Mapping[str, tuple[Tensor | None, Tensor | None]],
    cache: Cache,
    key: str,
) -> list[float | None]:
    """Round the candidates of a layer and write them to the cache; their errors, None where one overflows."""
    moment_and_metric = statistics[layer.name]
    known: dict[tuple[str | None, str], tuple[Encoded, float | None]] = {}
    for c in todo:  # the forms of a fit share its factors
        if (c.key, c.precision) not in known:
            whole = factors[c.key] if c.key is not None else ()
            known[c.key, c.precision] = quantize_candidate(layer, c, weight, whole, *moment_and_metric)
    made = [known[c.key, c.precision] for c in todo]
    tensors = {f"{i}.{j}": t for i, (encoded, _) in enumerate(made) for j, t in enumerate(encoded)}
    errors = [error for _, error in made]
    cache.write_tensors(key, {n: t.contiguous() for n, t in tensors.items()}, {"errors": json.dumps(errors)})
    return errors


def quantize_candidate(
    layer: Layer,
    candidate: Candidate,
    weight: Tensor,
    factors: Factors,
    moment: Tensor | None,
    metric: Tensor | None,
) -> tuple[Encoded, float | None]:
    """The factors (of a dense layer its weight) in the candidate's precision, one after the other; and their error.

    weight: the layer's own; the error is None where it is not finite.
    """
    target = full_target(layer, weight, moment, metric)
    if candidate.method == DENSE:
        factors = (target.weight.flatten(0, 1).to(weight.dtype),)
    nearest = [encode(f, candidate.precision) for f in factors]
    choices = [nearest]
    if candidate.precision == INT8 and candidate.method != DENSE:
        last = _solved_last(layer, candidate, target, nearest, weight.dtype)
        choices += [[*nearest[:-1], last]] if last is not None else []
    errors = [_error(layer, candidate, target, choice, weight.dtype) for choice in choices]
    error, best = min(zip(errors, choices, strict=True), key=lambda pair: pair[0])
    return tuple(t for encoded in best for t in encoded), error if error < math.inf else None


def _error(layer: Layer, candidate: Candidate, target: Target, encoded: Sequence[Encoded], dtype: torch.dtype) -> float:
    used = tuple(decode(e, dtype).double() for e in encoded)
    whole = used[0] if candidate.method == DENSE else DECOMPOSITIONS[candidate.method].weight(layer, used)
    error = target.error(whole.reshape(target.weight.shape))
    return error if math.isfinite(error) else math.inf


def _solved_last(
    layer: Layer, candidate: Candidate, target: Target, encoded: Sequence[Encoded], dtype: torch.dtype
) -> Encoded | None:
    """The output factor in int8 for the others as they are rounded; None where there is no 1 x 1 stage at the end."""
    family = DECOMPOSITIONS[candidate.method]
    if isinstance(family, CoreNetwork) and len(layer.shape) == 2:
        return None
    stages = family.stages(layer, candidate.rank)
    if len(stages) < 2 or stages[-1].axes or stages[-1].blocks > 1:
        return None
    g, m = layer.groups, stages[-1].in_channels
    inner = dataclasses.replace(layer, shape=(g * m, *layer.shape[1:]), stored=())
    eye = torch.eye(m, dtype=target.weight.dtype).repeat(g, 1).view(g * m, m, *[1] * (len(layer.shape) - 2))
    others = (decode(e, dtype).double() for e in encoded[:-1])
    rows = family.weight(inner, (*others, eye)).reshape(g, m, -1)
    output = OutputSolver(target, None)(rows)[1]
    shape = encoded[-1][0].shape
    scale = encode(output.flatten(0, 1).view(shape), INT8)[1]
    values = _carried(output, scale.double().view(g, -1) if len(scale) > 1 else scale.double(), target, rows)
    return None if values is None else (values.view(shape), scale)


def _carried(output: Tensor, scale: Tensor, target: Target, rows: Tensor) -> Tensor | None:
    """B (g, T, m) rounded a column at a time, as int8; None where G has no inverse."""
    gram = target.times_moment(rows) @ rows.mT
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(DAMPING * mean[:, None].expand(gram.shape[:2])))
    inverse = torch.cholesky_inverse(factor)
    upper, more = torch.linalg.cholesky_ex(inverse, upper=True)
    if info.any() or more.any():
        return None
    rest, values = output.clone(), []
    for r in range(output.shape[-1]):
        column = rest[..., r : r + 1]
        values.append(to_grid(column, scale))
        lost = column - values[-1] * scale.unsqueeze(-1)
        rest[..., r:] -= lost * upper[:, r : r + 1, r:] / upper[:, r : r + 1, r : r + 1]
    return torch.cat(values, -1)
