"""Initialization of a factorised model that is trained from scratch.

Factors are drawn so that the weight they make has the variance of a dense layer's initial weight, 2 / inputs (He
2015). The entries of a weight that is contracted from independent factors F_k over bonds of ranks R_j have the
variance (Pan et al. 2022, A unified weight initialization paradigm for tensorial convolutional neural networks)

    Var(Ŵ) = Π_j R_j · Π_k Var(F_k)

All factors get the same variance. Instead of this expectation, the variance of the weight that was actually drawn is
brought to the target. That also covers families that share cores or have activations between them, and ranks so small
that a single draw is far from its expectation.
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
from rankopt.model.forward import random_numbers
from rankopt.model.layer_kinds import describe, is_kind
from rankopt.model.quantization import dequantize_all, quantize_

ROUNDS, TOLERANCE = 40, 1e-4  # of rescaling factors; a single round is exact if there is no activation between them


def from_scratch(model: nn.Module, plan: Plan, seed: int = 0) -> nn.Module:
    """Make an untrained model with a plan's factorised layers.

    Args:
        model: The dense model; it is not changed.
        plan: Method and rank of each layer.
        seed: Seed of all weights.

    Raises:
        TaskError: A module holds parameters and has no reset_parameters().
    """
    with random_numbers(seed):
        dense = untrained(model)
        # Composite modules that the plan changes are expanded, to get at the weight of each of their layers.
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
    """Copy a model and reset its parameters.

    Weights of convolutions and Linears are drawn from a normal distribution of variance 2 / inputs (He 2015), their
    biases are zero. Other modules use their own reset_parameters().

    Args:
        model: The model; it is not changed.

    Raises:
        TaskError: A module holds parameters and has no reset_parameters().
    """
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in module.parameters(recurse=False)) and not is_kind(type(module)):
            raise TaskError(
                f"module {name!r} ({type(module).__name__}) holds parameters and has no reset_parameters(), so it "
                "cannot start from scratch: give it one"
            )
        if is_kind(type(module)) and not isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=(2 / describe(module).patch) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def draw(family: Decomposition, layer: Layer, rank: Rank, variance: float) -> Factors:
    """Draw normal factors of a common variance from torch's global generator.

    Args:
        family: The decomposition.
        layer: The layer.
        rank: Its rank.
        variance: Mean square of the entries of the weight that the factors make.

    Returns:
        The factors.
    """
    factors: Factors = tuple(torch.randn(shape) for shape in family.shapes(layer, rank))
    for _ in range(ROUNDS):
        ratio = (variance / family.weight(layer, factors).square().mean()).sqrt()
        if (ratio - 1).abs() < TOLERANCE:
            break
        factors = tuple(f * ratio ** (1 / len(factors)) for f in factors)
    return factors
