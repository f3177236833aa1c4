"""Modules that hold several maps in one, as modules made of ordinary Linears, so that each map can be factorised.

An nn.LSTM named `lstm` becomes the parts `lstm.ih_l0`, `lstm.hh_l0`, ...; an attention q_proj, k_proj, v_proj and
out_proj; a Linear that computes queries, keys and values at once q, k and v. The outputs stay the same. A module
is unfolded only where one of its parts is to change: what stays dense keeps its own kind, speed and state dict.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn

from rankopt.model.attention import Attention, FusedLinear
from rankopt.model.recurrent import Recurrent, part_names

COMPOSITES = (nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)


FUSED = re.compile(r"qkv|in_proj|c_attn|query_key_value")  # in the last part of a Linear's name, in lower case


def is_composite(module: nn.Module, name: str, split_qkv: bool = True) -> bool:
    """Whether a module is one to unfold: of exactly these kinds, or a Linear whose name and shape say so."""
    if type(module) is nn.Linear:
        named = FUSED.search(name.rpartition(".")[2].lower()) is not None
        return split_qkv and named and module.out_features == 3 * module.in_features
    return type(module) in COMPOSITES


def parts(module: nn.Module, name: str) -> list[str]:
    """The names of the Linears that a module named `name` unfolds to; none if it does not."""
    found: list[str] = []
    if type(module) in COMPOSITES:
        found = part_names(module) if isinstance(module, nn.RNNBase) else ["q_proj", "k_proj", "v_proj", "out_proj"]
    elif type(module) is nn.Linear and module.out_features == 3 * module.in_features:
        found = ["q", "k", "v"]
    return [f"{name}.{part}" if name else part for part in found]


def expand_composites(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Unfold, in place, the modules that have one of these names among their parts; returns the model.

    The model it returns is a new one only if it is itself such a module.
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
            assert isinstance(module, nn.Linear)
            new = FusedLinear(module)
        if module is model:
            return new
        for name in known_as:
            model.set_submodule(name, new)
    return model


class OrdinaryEncoderLayer(nn.TransformerEncoderLayer):
    """One that takes its ordinary path, also for nested tensors: they are padded for it and cut again.

    torch's nn.TransformerEncoder makes such tensors of padded inputs, and leaves zeros where the padding was.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(batch, length, features) or nested, as it was given."""
        if not src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        lengths = [len(x) for x in src.unbind()]
        x = src.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        y = super().forward(x, src_mask, padding, is_causal)
        rows = [row[:n] for row, n in zip(y, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=src.layout)


def take_ordinary_path(model: nn.Module) -> nn.Module:
    """Keep nn.TransformerEncoderLayers, in place, off their fused path once a part of theirs is not what it reads."""
    changed = {x for x in model.modules() if isinstance(x, nn.TransformerEncoderLayer) and not _fusable(x)}
    for layer in changed:
        layer.activation_relu_or_gelu = 0  # torch's own sign of a layer that its fused path cannot compute
        if type(layer) is nn.TransformerEncoderLayer:
            layer.__class__ = OrdinaryEncoderLayer
    strange = {x for x in changed if type(x) is not OrdinaryEncoderLayer}  # subclasses, whose forward is their own
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not strange.isdisjoint(encoder.layers):
            encoder.use_nested_tensor = False
    return model


def _fusable(layer: nn.TransformerEncoderLayer) -> bool:
    return isinstance(layer.self_attn, nn.MultiheadAttention) and all(
        isinstance(x, nn.Linear) for x in (layer.linear1, layer.linear2)
    )
