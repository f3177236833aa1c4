"""Models that cannot be compressed as they are: refused before anything runs, with what to do."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rankopt.core.errors import TaskError

SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")
"""Names of classes that wrap a model and keep parts of its weights; DTensors are such parts, too."""


def check_model(model: nn.Module) -> None:
    """Check that a model is made of modules that have weights.

    Args:
        model: Any module.

    Raises:
        TaskError: It is a TorchScript program, or its weights are sharded, on the meta device or not made yet.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TaskError(
            "the model is a TorchScript program, whose layers cannot be replaced: give the nn.Module it was made from"
        )
    if type(model).__name__ in SHARDED or any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        raise TaskError("the model's weights are spread over processes (FSDP, DeepSpeed): give it with whole weights")
    for name, module in model.named_modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        tensors = [t for t in held if t is not None]
        where = f"layer {name!r} ({type(module).__name__})"
        if any(isinstance(t, (UninitializedParameter, UninitializedBuffer)) for t in tensors):
            raise TaskError(f"{where} has no weights yet: run the model once on an example, as its size depends on it")
        if any(t.is_meta for t in tensors):
            raise TaskError(f"{where} is on the meta device, without weights: build the model on the CPU and load them")


def with_trainable_weights(model: nn.Module) -> nn.Module:
    """A model whose weights gradients can pass.

    Args:
        model: Any module.

    Returns:
        The model; a copy if some of its weights were made in inference mode.
    """
    inferred = any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    with torch.inference_mode(mode=False):
        return copy.deepcopy(model) if inferred else model


def parametrisation(module: nn.Module) -> str | None:
    """Why a layer's weight is not its own to replace.

    Args:
        module: A layer.

    Returns:
        What computes the weight, and the call that makes it an ordinary one; None if nothing does.
    """
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        by = type(module.parametrizations[name][0]).__name__.lstrip("_")  # type: ignore[index]
        call = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        return f"its {name} is parametrised ({by}): {call} makes it an ordinary one"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            return "its weight is parametrised (weight_norm): torch.nn.utils.remove_weight_norm(layer) ends that"
        if isinstance(hook, SpectralNorm):
            return "its weight is parametrised (spectral_norm): torch.nn.utils.remove_spectral_norm(layer) ends that"
        if isinstance(hook, prune.BasePruningMethod):
            call = f"torch.nn.utils.prune.remove(layer, {hook._tensor_name!r})"
            return f"its {hook._tensor_name} is masked by pruning: {call} makes the zeros permanent"
    return None
