"""Refinement of a compressed model: its layers are refitted one after the other to the dense model's outputs.

Candidates are fitted on a layer's inputs x in the dense model, but in the compressed model its inputs are x̂. The best
full-rank weight there is W' = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹, and (He et al. 2017, asymmetric reconstruction)

    E‖W x − Ŵ x̂‖² = tr((W' − Ŵ) E[x̂ x̂ᵀ] (W' − Ŵ)ᵀ) + constant.

Fitting the same decomposition at the same rank to W' therefore compensates for the errors of earlier layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.candidates.input_moments import WIDEST, columns, outer
from rankopt.candidates.quantize import quantize_candidate
from rankopt.core.records import DENSE, SAME, Candidate, Layer
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.forward import hooked, inference, run, to_device
from rankopt.model.layer_kinds import as_matrix, in_own_shape
from rankopt.model.quantization import quantize_

SHRINK = 1e-3  # regularisation of W' towards W, relative to the mean diagonal of E[x̂ x̂ᵀ]


class _Reached(Exception):  # noqa: N818
    """Raised in a hook once the layer was reached, to skip the rest of the forward pass."""


def refine(
    dense: nn.Module,
    small: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Candidate],
    statistics: Mapping[str, tuple[Tensor | None, Tensor | None]],
    batches: Sequence[Any],
    steps: int,
    progress: Any,
) -> None:
    """Refit the factorised layers of a compressed model in place, in the model's order.

    Quantized layers are refitted, then quantized again. Dense layers, Embeddings and layers of more than `WIDEST`
    inputs are left as they are.

    Args:
        dense: The dense model.
        small: The compressed model.
        layers: The layers of the plan, in the model's order.
        candidates: The candidate of each layer.
        statistics: (input moment S, output metric H) by layer name; only H is used.
        batches: Inputs.
        steps: Optimisation steps per fit.
        progress: Progress callback.
    """
    # The indices that an Embedding reads are the same in both models, so refitting would change nothing. The moment of
    # a wide layer's inputs is too large.
    todo = [
        (x, c)
        for x, c in zip(layers, candidates, strict=True)
        if c.method != DENSE and x.kind != "Embedding" and x.patch <= WIDEST
    ]
    for layer, candidate in progress(todo, "refining layer after layer", len(todo)):
        weight, moment = seen_weight(dense, small, layer, batches)
        family = DECOMPOSITIONS[candidate.method]
        output_metric = statistics[layer.name][1]
        (fit,) = family.fit(layer, weight, [candidate.rank], moment, output_metric, steps)
        module = small.get_submodule(layer.name)
        if candidate.precision == SAME:
            load_factors(module, fit.factors)
        else:
            encoded, _ = quantize_candidate(layer, candidate, weight, fit.factors, moment, output_metric)
            quantize_(module, candidate.precision, encoded)


def seen_weight(dense: nn.Module, small: nn.Module, layer: Layer, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Compute the best full-rank weight of a layer for its inputs in the compressed model.

    Args:
        dense: The dense model.
        small: The compressed model.
        layer: The layer.
        batches: Inputs.

    Returns:
        W' in the shape and dtype of the layer's weight, and E[x̂ x̂ᵀ] as float64 (groups, patch, patch).
    """
    module = dense.get_submodule(layer.name)
    moment: Any = 0.0
    cross: Any = 0.0
    rows = 0
    for batch in batches:
        for x, seen in zip(_inputs(dense, layer, batch), _inputs(small, layer, batch), strict=True):
            for a, b in zip(columns(layer, module, x), columns(layer, module, seen), strict=True):
                moment, cross, rows = moment + outer(b, b), cross + outer(a, b), rows + b.shape[-1]
    moment, cross = moment / max(rows, 1), cross / max(rows, 1)
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    flat = as_matrix(layer, weight.double())
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)[:, None, None]
    shrink = SHRINK * mean * torch.eye(layer.patch, dtype=moment.dtype, device=moment.device)
    best = torch.linalg.solve(moment + shrink, (flat @ (cross + shrink)).mT).mT
    return in_own_shape(layer, best).to(weight.dtype), moment


def _inputs(model: nn.Module, layer: Layer, batch: Any) -> list[Tensor]:
    """A layer's inputs on a batch, one per call."""
    found: list[Tensor] = []

    def note(_: str, args: tuple[Any, ...]) -> None:
        found.append(args[0].clone())
        if len(found) == len(layer.calls):
            raise _Reached

    with suppress(_Reached), inference(model), hooked(model, [layer.name], on_input=note):
        run(model, to_device(batch, model))
    return found
