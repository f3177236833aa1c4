"""nn.MultiheadAttention and fused query-key-value Linears, rebuilt from separate Linears: the same function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.core.errors import not_scriptable
from rankopt.model.layer_kinds import as_matrix, copy_geometry, describe, in_own_shape
from rankopt.model.lazy_weight import lazy


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with copies of a weight and a bias, with their requires_grad.

    Args:
        weight: (out, in).
        bias: (out,), or None.
    """
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = copied(weight)
    if bias is not None:
        new.bias = copied(bias)
    return new


def copied(tensor: Tensor) -> nn.Parameter:
    """A copy of a parameter, with its requires_grad.

    Args:
        tensor: The parameter, or a part of it.
    """
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), tensor.requires_grad)


def thirds(weight: Tensor, bias: Tensor | None) -> list[nn.Linear]:
    """Split a weight with the rows of three maps into three Linears.

    Args:
        weight: (3 out, in).
        bias: (3 out,), or None.
    """
    biases: Any = [None] * 3 if bias is None else bias.chunk(3)
    return [linear(w, b) for w, b in zip(weight.chunk(3), biases, strict=True)]


class FusedLinear(nn.Module):
    """A Linear of 3 n outputs, as three Linears q, k and v of n outputs each, which are concatenated.

    `weight` and `bias` are those of the whole map, rebuilt if a part is factorised.

    Args:
        module: The Linear, or transformers' Conv1D.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        copy_geometry(self, module)
        self.layer = describe(module)
        self.q, self.k, self.v = thirds(as_matrix(self.layer, module.weight)[0], module.bias)  # type: ignore[arg-type]
        self.train(module.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(..., in_features) -> (..., out_features)."""
        return torch.cat([self.q(input), self.k(input), self.v(input)], -1)

    @property
    def weight(self) -> Tensor:
        """The weight of the whole map in the original's own shape; it is built when its values are used."""
        return lazy(
            self.layer.own_shape,
            self.q.weight,
            lambda: in_own_shape(self.layer, torch.cat([self.q.weight, self.k.weight, self.v.weight])),
        )

    @property
    def bias(self) -> Tensor | None:
        """(out_features,), or None."""
        return None if self.q.bias is None else torch.cat([self.q.bias, self.k.bias, self.v.bias])


class Attention(nn.Module):
    """An nn.MultiheadAttention whose maps are the Linears q_proj, k_proj, v_proj and out_proj.

    It takes the same arguments and computes the same outputs, with the operations of
    F.multi_head_attention_forward; there is no fused path.

    Args:
        module: The attention that it replaces.
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
            setattr(self, name, getattr(module, name))
        self._qkv_same_embed_dim = module._qkv_same_embed_dim
        bias = module.in_proj_bias
        if module._qkv_same_embed_dim:
            self.q_proj, self.k_proj, self.v_proj = thirds(module.in_proj_weight, bias)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            biases: Any = [None] * 3 if bias is None else bias.chunk(3)
            self.q_proj, self.k_proj, self.v_proj = (linear(*pair) for pair in zip(weights, biases, strict=True))
        self.out_proj = linear(module.out_proj.weight, module.out_proj.bias)
        for name in ("bias_k", "bias_v"):
            tensor = getattr(module, name)
            self.register_parameter(name, None if tensor is None else copied(tensor))
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        if name in ("in_proj_weight", "in_proj_bias"):
            parts = [getattr(p, name[8:]) for p in (self.q_proj, self.k_proj, self.v_proj)]
            absent = parts[0] is None or (name == "in_proj_weight" and not self._qkv_same_embed_dim)
            return None if absent else torch.cat(parts)
        if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return None if self._qkv_same_embed_dim else getattr(self, name[:6]).weight
        return super().__getattr__(name)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse torch.jit.script."""
        raise not_scriptable("an attention with factorised or quantized parts")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention, but nested tensors, and is_causal without a mask, raise a ValueError."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("a factorised attention takes no nested tensors: pad them and give key_padding_mask")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint on attn_mask: give the mask too, as to nn.MultiheadAttention")
        batched = query.ndim == 3

        def first(x: Tensor) -> Tensor:
            """In any layout -> (batch, length, features)."""
            return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)

        q, k, v = self.q_proj(first(query)), self.k_proj(first(key)), self.v_proj(first(value))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[1])
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            hint = is_causal and key_padding_mask is None  # then the kernel makes the mask
            heads = F.scaled_dot_product_attention(q, k, v, None if hint else mask, dropout, hint)
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append to keys or values (batch, length, features) what add_bias_kv and add_zero_attn ask for."""
        more = [] if bias is None else [bias.expand(x.shape[0], 1, -1)]
        if self.add_zero_attn:
            more.append(torch.zeros_like(x[:, :1]))
        return torch.cat([x, *more], 1) if more else x

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, length: int) -> Tensor | None:
        """Both masks as one that is added to the scores: (batch or 1, heads or 1, L or 1, S + appended keys)."""
        parts = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q)
            parts.append(mask.unflatten(0, (-1, self.num_heads)) if mask.ndim == 3 else mask[None, None])
        if padding is not None:
            parts.append(_additive(padding, q).view(-1, 1, 1, length))
        if not parts:
            return None
        appended = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(sum(parts[1:], parts[0]), (0, appended))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add to scores: 0 and -inf for one of booleans (True: not to be attended to); others as they are."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
