"""Composites: modules that hold several linear maps, rebuilt from ordinary Linears so that each can be factorised.

An nn.LSTM named `lstm` gets the parts `lstm.ih_l0`, `lstm.hh_l0`, ...; an attention gets q_proj, k_proj, v_proj and
out_proj; a Linear that computes queries, keys and values at once gets q, k and v. The outputs stay the same. A module
is expanded only if one of its parts is to change: other modules keep their class, speed and state dict.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn

from rankopt.model.attention import Attention, FusedLinear
from rankopt.model.layer_kinds import describe, is_linear
from rankopt.model.recurrent import Recurrent, part_names

COMPOSITES = (nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)


FUSED = re.compile(r"qkv|in_proj|c_attn|query_key_value")
"""Found in the last part of the names, in lower case, of layers that compute queries, keys and values at once."""


def is_composite(module: nn.Module, name: str, split_qkv: bool = True) -> bool:
    """Whether a module is a composite: exactly of one of the classes COMPOSITES, or a fused Linear.

    Args:
        module: The module.
        name: Its name in the model. A Linear is fused if its name matches FUSED and it has three outputs per input.
        split_qkv: Count fused Linears.
    """
    if type(module) in COMPOSITES:
        return True
    return split_qkv and FUSED.search(name.rpartition(".")[2].lower()) is not None and _has_three_maps(module)


def _has_three_maps(module: nn.Module) -> bool:
    """Whether a module is a Linear with three outputs per input."""
    if not is_linear(module):
        return False
    outputs, inputs = describe(module).shape
    return outputs == 3 * inputs


def parts(module: nn.Module, name: str) -> list[str]:
    """The names of the Linears that a composite is expanded to.

    Args:
        module: A module.
        name: Its name in the model; empty for the model itself.

    Returns:
        Names in the model; none if the module is not a composite.
    """
    found: list[str] = []
    if type(module) in COMPOSITES:
        found = part_names(module) if isinstance(module, nn.RNNBase) else ["q_proj", "k_proj", "v_proj", "out_proj"]
    elif _has_three_maps(module):
        found = ["q", "k", "v"]
    return [f"{name}.{part}" if name else part for part in found]


def expand_composites(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Expand composites in place.

    Args:
        model: The model.
        names: Names of parts, as `parts` gives them. The composites that these belong to are expanded.

    Returns:
        The model; a new module if the model is itself such a composite.
    """
    wanted = set(names)
    aliases: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        aliases[module].append(name)
    for module, known_as in aliases.items():
        if wanted.isdisjoint(parts(module, known_as[0])):
            continue
        new: nn.Module
        if isinstance(module, nn.RNNBase):
            new = Recurrent(module)
        elif isinstance(module, nn.MultiheadAttention):
            new = Attention(module)
        else:
            new = FusedLinear(module)
        if module is model:
            return new
        for name in known_as:
            model.set_submodule(name, new)
    return model


class OrdinaryEncoderLayer(nn.TransformerEncoderLayer):
    """An encoder layer without the fused path, also for nested tensors: these are padded and cut again.

    torch's nn.TransformerEncoder turns padded inputs into nested tensors, and returns zeros where the padding was.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerEncoderLayer: (batch, length, features), or nested, to the same."""
        if not src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        lengths = [len(x) for x in src.unbind()]
        x = src.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        y = super().forward(x, src_mask, padding, is_causal)
        rows = [row[:n] for row, n in zip(y, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=src.layout)


def take_ordinary_path(model: nn.Module) -> nn.Module:
    """Switch off, in place, the fused path of encoder layers with replaced parts, which it could not read.

    Args:
        model: A model with any number of nn.TransformerEncoderLayers.

    Returns:
        The model.
    """
    changed = {x for x in model.modules() if isinstance(x, nn.TransformerEncoderLayer) and not _fusable(x)}
    for layer in changed:
        layer.activation_relu_or_gelu = 0  # marks, in torch, a layer that the fused path cannot compute
        if type(layer) is nn.TransformerEncoderLayer:
            layer.__class__ = OrdinaryEncoderLayer
        for part in layer.modules():
            if hasattr(part, "lazy_weight"):  # a tensor subclass would keep nn.TransformerEncoder from nested tensors
                part.lazy_weight = False  # type: ignore[assignment]
    subclasses = {x for x in changed if type(x) is not OrdinaryEncoderLayer}  # with a forward of their own
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not subclasses.isdisjoint(encoder.layers):
            encoder.use_nested_tensor = False
    return model


def _fusable(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether the parts that the fused path reads are torch's own."""
    return isinstance(layer.self_attn, nn.MultiheadAttention) and all(
        isinstance(x, nn.Linear) for x in (layer.linear1, layer.linear2)
    )
