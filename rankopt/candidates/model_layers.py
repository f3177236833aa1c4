"""A model together with the layers that candidates are chosen for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankopt.core.records import Layer


@dataclass(frozen=True)
class ModelLayers:
    """A model, its factorisable layers, and an input to run it on.

    Attributes:
        model: The user's model.
        unfolded: The model with its composite modules (attention, recurrent cells) expanded into single layers;
            layer names refer to its submodules. The model itself if it has no composite module.
        layers: The factorisable layers, in the model's order.
        example_input: An input that the model accepts, with the batch dimension first.
    """

    model: nn.Module
    unfolded: nn.Module
    layers: Sequence[Layer]
    example_input: Any
