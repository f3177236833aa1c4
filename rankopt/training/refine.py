"""Refinement of a chosen plan: its layers one after the other, against the dense model's outputs.

The candidates of a layer were fitted on the inputs it has in the dense model. In the compressed model it sees x̂
instead of x. Its best weight there, at full rank, is W' = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹, and

    E‖W x − Ŵ x̂‖² = ‖W' − Ŵ‖² in the metric of E[x̂ x̂ᵀ] + a constant (He et al. 2017, asymmetric reconstruction)

so refitting the same family at the same rank to W' makes up for what the layers before it lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.candidates.calibration import columns, outer
from rankopt.candidates.quantize import quantize_candidate
from rankopt.core.records import DENSE, SAME, Candidate, Layer
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.forward import inference, run, to_device
from rankopt.model.layer_kinds import as_matrix, in_own_shape
from rankopt.model.quantization import quantize_

SHRINK = 1e-3  # towards the layer's own weight, relative to the mean diagonal of E[x̂ x̂ᵀ]


class _Reached(Exception):  # noqa: N818
    """The layer was reached: the rest of the forward pass is not needed."""


def refine(
    dense: nn.Module,
    small: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Candidate],
    metrics: Any,
    batches: Sequence[Any],
    steps: int,
    progress: Any,
) -> None:
    """Refit every factorised layer of `small` in place, in the model's order. metrics: name -> (S, H).

    What is stored in fewer bits is refitted, then rounded; a dense layer is left as it is, rounded or not.
    """
    # An Embedding reads indices, which are the same in either model: its fit is what refitting would give.
    todo = [(x, c) for x, c in zip(layers, candidates, strict=True) if c.method != DENSE and x.kind != "Embedding"]
    for layer, candidate in progress(todo, "refining layer after layer", len(todo)):
        weight, moment = _seen_weight(dense, small, layer, batches)
        family = DECOMPOSITIONS[candidate.method]
        statistics = moment, metrics[layer.name][1]
        (fit,) = family.fit(layer, weight, [candidate.rank], *statistics, steps)
        module = small.get_submodule(layer.name)
        if candidate.precision == SAME:
            load_factors(module, fit.factors)
        else:
            quantize_(
                module, candidate.precision, quantize_candidate(layer, candidate, weight, fit.factors, *statistics)[0]
            )


def _seen_weight(dense: nn.Module, small: nn.Module, layer: Layer, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """W' in the layer's shape, float64, and E[x̂ x̂ᵀ]."""
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
    """The layer's inputs on a batch, one per call."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].clone())
        if len(found) == len(layer.calls):
            raise _Reached

    handle = model.get_submodule(layer.name).register_forward_pre_hook(note)
    try:
        with inference(model):
            run(model, to_device(batch, model))
    except _Reached:
        pass
    finally:
        handle.remove()
    return found
