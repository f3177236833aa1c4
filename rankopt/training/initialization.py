"""A plan's network before any training, its factors drawn so that their weights vary as dense ones do at the start.

Pan et al. 2022 (A unified weight initialization paradigm for tensorial convolutional neural networks): entries of a
weight that is contracted from independent factors F_k over bonds of ranks R_j have the variance

    Var(Ŵ) = Π_j R_j · Π_k Var(F_k)

so all factors get the one variance with which this is the dense layer's, 2 / inputs (He 2015). What the ranks make of
the factors is measured on those that were drawn, not expected: so it also holds for families that share cores or have
activations between them, and for ranks so small that one draw is far from its expectation.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from rankopt.core.errors import TaskError
from rankopt.core.records import DENSE, Layer, Plan, Rank
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.plan import rebuild
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Factors
from rankopt.model.composites import expand_composites
from rankopt.model.layer_kinds import KINDS, describe
from rankopt.model.quantization import dequantize_all, quantize_

ROUNDS, TOLERANCE = 40, 1e-4  # of bringing factors to a variance; one is enough where there is no activation


def from_scratch(model: nn.Module, plan: Plan, seed: int = 0) -> nn.Module:
    """An untrained network of the model's architecture, in the plan's form. The model is unchanged.

    Raises TaskError for a module that holds parameters and has no reset_parameters().
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense = untrained(model)
        # Of modules that hold several maps, those that the plan changes are unfolded: to see the weights of each.
        parts = expand_composites(copy.deepcopy(dense), [c.name for c in plan.choices if c.method != DENSE])
        small = rebuild(dense, plan)
        for choice in plan.choices:
            if choice.method == DENSE:
                continue
            old, new = parts.get_submodule(choice.name), small.get_submodule(choice.name)
            variance = old.weight.detach().square().mean().item()  # type: ignore[operator]
            factors = draw(DECOMPOSITIONS[choice.method], describe(old, choice.name), choice.rank, variance)
            dequantize_all(new)
            load_factors(new, factors)
            quantize_(new, choice.precision)
            bias = getattr(new, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
    return small


def untrained(model: nn.Module) -> nn.Module:
    """A copy with all parameters drawn anew: convolutions and Linears as He 2015, others by their own rule."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise TaskError(
                f"module {name!r} ({type(module).__name__}) holds parameters and has no reset_parameters(), so it "
                "cannot start from scratch: give it one"
            )
        if type(module) in KINDS and not isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=(2 / describe(module).patch) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def draw(family: Decomposition, layer: Layer, rank: Rank, variance: float) -> Factors:
    """Normal factors of one variance whose weight has this mean square, from torch's global generator."""
    factors: Factors = tuple(torch.randn(shape) for shape in family.shapes(layer, rank))
    for _ in range(ROUNDS):
        ratio = (variance / family.weight(layer, factors).square().mean()).sqrt()
        if (ratio - 1).abs() < TOLERANCE:
            break
        factors = tuple(f * ratio ** (1 / len(factors)) for f in factors)
    return factors
