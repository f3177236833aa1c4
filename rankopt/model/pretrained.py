"""Models with save_pretrained and from_pretrained: those of transformers, diffusers and others on the Hugging Face hub.

from_pretrained builds the dense model, draws the weights that it does not find at random and goes on. A compressed
model therefore saves an empty tensor under the name of each weight that it no longer has: from_pretrained raises an
error, as the shapes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import nn

NOTE = "compressed by rankopt, load it with rankopt.load"
"""Name of a further tensor, which from_pretrained lists as unexpected above its error."""


def holds_pretrained(model: nn.Module) -> bool:
    """Whether a model, or a part of it, has a save_pretrained.

    Args:
        model: Any module.
    """
    return any(_is_pretrained(module) for module in model.modules())


def _is_pretrained(module: nn.Module) -> bool:
    return callable(getattr(module, "save_pretrained", None))


def mark_replaced(model: nn.Module, dense: Collection[str]) -> nn.Module:
    """Make from_pretrained refuse what save_pretrained of a compressed model will write.

    Args:
        model: The compressed model, changed in place.
        dense: Names in the dense model's state dict.

    Returns:
        The model.
    """
    for name, module in model.named_modules():
        if _is_pretrained(module):
            prefix = f"{name}." if name else ""
            own = {key.removeprefix(prefix) for key in dense if key.startswith(prefix)}
            if gone := own.difference(module.state_dict()):
                module.save_pretrained = partial(_save_marked, module, module.save_pretrained, sorted(gone))
    return model


def _save_marked(
    module: nn.Module, save: Callable[..., Any], gone: Collection[str], /, *args: Any, **options: Any
) -> Any:
    """Call a model's own save_pretrained, with empty tensors under the names of the weights that are gone."""

    def mark(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state.update({prefix + name: torch.empty(0) for name in (*gone, NOTE)})

    if options.get("state_dict") is not None:  # transformers' Trainer gives it
        options["state_dict"] = dict(options["state_dict"])
        mark(module, options["state_dict"], "", None)
    handle = module.register_state_dict_post_hook(mark)
    try:
        return save(*args, **options)
    finally:
        handle.remove()
