"""Random models of the kinds that people bring: images, sequences and tokens, with what makes layers awkward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Residual(nn.Module):
    """A module around which its input is added."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class First(nn.Module):
    """A recurrent layer or an attention, of which only the first output is used."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)[0]


class Along(nn.Module):
    """A Conv1d over the tokens of (batch, length, features)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class Heads(nn.Module):
    """A body, then one or two outputs of its mean over space, as a tensor, a tuple or a dict."""

    def __init__(self, body: nn.Sequential, space: Sequence[int], width: int, draw: Random) -> None:
        super().__init__()
        self.body, self.space = body, tuple(space)
        self.heads = nn.ModuleList(nn.Linear(width, draw.choice((3, 10))) for _ in range(draw.choice((1, 1, 2))))
        self.form = draw.choice(("tensor", "tuple", "dict")) if len(self.heads) == 1 else draw.choice(("tuple", "dict"))

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).mean(self.space)
        found = [head(features) for head in self.heads]
        if self.form == "dict":
            return {"logits": found[0], **{f"head_{i}": z for i, z in enumerate(found[1:])}}
        return tuple(found) if self.form == "tuple" else found[0]


def random_model(seed: int) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and a batch for it, the same for the same seed.

    Args:
        seed: Of its structure, weights and inputs.
    """
    draw = Random(seed)
    torch.manual_seed(seed)
    while True:
        model, batch = draw.choice((_images, _sequences, _tokens))(draw)
        with suppress(RuntimeError), torch.no_grad():  # a padding larger than what it pads: another model
            model.eval()(batch)
            return model, batch


def _images(draw: Random) -> tuple[nn.Module, Tensor]:
    """Convolutions of 1 to 3 dimensions."""
    d = draw.choice((1, 2, 2, 2, 3))
    width = channels = draw.choice((3, 4))
    body = nn.Sequential()
    for _ in range(draw.randint(2, 4)):
        out = draw.choice((8, 12, 16, 24))
        body.append(_convolution(draw, d, channels, out)).append(draw.choice((nn.ReLU, nn.GELU, nn.Identity))())
        if draw.random() < 0.5:
            body.append((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d - 1](out))
        channels = out
        if draw.random() < 0.4:
            groups = draw.choice((1, 1, 2, channels))
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
            again = Residual(kind(channels, channels, 3, padding=1, groups=groups, bias=draw.random() < 0.5))
            body.append(again)
            if draw.random() < 0.3:
                body.append(again)  # one layer, called twice
    return Heads(body, range(2, 2 + d), channels, draw), torch.randn(16, width, *[8] * d)


def _convolution(draw: Random, d: int, inside: int, outside: int) -> nn.Module:
    bias = draw.random() < 0.5
    if draw.random() < 0.2:
        kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1]
        return kind(inside, outside, draw.choice((2, 3)), stride=draw.choice((1, 2)), bias=bias)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    size = draw.choice((1, 3, 3, 5))
    groups = draw.choice([g for g in (1, 1, 2, 4) if inside % g == outside % g == 0])
    mode = "zeros" if d == 3 else draw.choice(("zeros", "zeros", "reflect", "circular"))
    return kind(
        inside,
        outside,
        size,
        stride=draw.choice((1, 1, 2)),
        padding=size // 2,
        groups=groups,
        bias=bias,
        padding_mode=mode,
    )


def _sequences(draw: Random) -> tuple[nn.Module, Tensor]:
    """Vectors of features along a sequence."""
    width = draw.choice((8, 16))
    body, out = _sequence(draw, width)
    return Heads(body, (1,), out, draw), torch.randn(16, 6, width)


def _tokens(draw: Random) -> tuple[nn.Module, Tensor]:
    """An Embedding first."""
    width = draw.choice((8, 16))
    body, out = _sequence(draw, width)
    words = draw.choice((20, 50))
    embedded = nn.Sequential(nn.Embedding(words, width, padding_idx=draw.choice((None, 0))), *body)
    return Heads(embedded, (1,), out, draw), torch.randint(0, words, (16, 6))


def _sequence(draw: Random, width: int) -> tuple[nn.Sequential, int]:
    body = nn.Sequential()
    for _ in range(draw.randint(1, 3)):
        what = draw.choice(("linear", "mlp", "recurrent", "attention", "encoder", "conv"))
        bias = draw.random() < 0.7
        if what == "linear":
            out = draw.choice((8, 16, 24))
            body.append(nn.Linear(width, out, bias)).append(nn.Tanh())
            width = out
        elif what == "mlp":
            body.append(Residual(nn.Sequential(nn.Linear(width, 32, bias), nn.ReLU(), nn.Linear(32, width, bias))))
        elif what == "recurrent":
            kind, both = draw.choice((nn.LSTM, nn.GRU, nn.RNN)), draw.random() < 0.3
            body.append(First(kind(width, 8, draw.choice((1, 2)), bias=bias, batch_first=True, bidirectional=both)))
            width = 16 if both else 8
        elif what == "attention":
            body.append(Residual(First(nn.MultiheadAttention(width, 2, bias=bias, batch_first=True))))
        elif what == "encoder":
            first = draw.random() < 0.5
            body.append(nn.TransformerEncoderLayer(width, 2, 24, batch_first=True, norm_first=first))
        else:
            body.append(Along(nn.Conv1d(width, 16, 3, padding=1, bias=bias))).append(nn.ReLU())
            width = 16
    return body, width


# --- an independent count --------------------------------------------------------------------------


class MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of products, attention and convolutions by their definition, operation by operation."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        product = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}
        if (places := product.get(func.overloadpacket)) is not None:
            a, b = (args[i] for i in places)
            self.total += a.numel() * b.shape[-1]
        elif func.overloadpacket is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            points = x if transposed else out  # each point meets one filter of every channel
            self.total += points.numel() * math.prod(weight.shape[1:])
        elif func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
            q, k, v = args[:3]  # every score is a product over the head, every output one over the keys
            self.total += q.numel() * k.shape[-2] + math.prod(q.shape[:-1]) * k.shape[-2] * v.shape[-1]
        return out


class Alive(TorchDispatchMode):
    """Adds up the storages that are alive after each operation.

    Args:
        tensors: What is alive already.
    """

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.look(tensors)

    def look(self, tensors: Any) -> None:
        """Add tensors, drop what was freed, and note the sum."""
        self.sizes = {key: entry for key, entry in self.sizes.items() if not entry[0].expired()}
        for t in tree_leaves(tensors):
            if isinstance(t, Tensor):
                reference = StorageWeakRef(t.untyped_storage())
                self.sizes[reference.cdata] = reference, t.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.sizes.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.look(out)
        return out


@contextmanager
def _ordinary_path() -> Iterator[None]:
    """Context: no gradients, and torch's fused attention off, in which operations would hide."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count_params(model: nn.Module) -> int:
    """Numbers in a model's distinct parameters.

    Args:
        model: Any module.
    """
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def count_macs(model: nn.Module, one: Any) -> int:
    """Multiply-adds of one forward pass.

    Args:
        model: A module in eval mode.
        one: Its input, one example.
    """
    mkldnn = torch.backends.mkldnn
    off = mkldnn.flags(False, mkldnn.deterministic, mkldnn.allow_tf32)
    with _ordinary_path(), off, MultiplyAdds() as counter:
        model(one)
    return counter.total


def count_bytes(model: nn.Module) -> int:
    """Bytes of a model's distinct parameters and buffers.

    Args:
        model: Any module.
    """
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def count_memory(model: nn.Module, one: Any) -> int:
    """The most bytes that are alive at once in one forward pass.

    Args:
        model: A module.
        one: Its input, one example.
    """
    x = one.clone()
    with _ordinary_path(), Alive([x, *model.parameters(), *model.buffers()]) as alive:
        model.eval()
        model(x)
    return alive.peak


def count_disk(model: nn.Module, folder: Path) -> int:
    """The size of a model's file.

    Args:
        model: Any module.
        folder: Where to write it.
    """
    save_model(model, str(folder / "counted.safetensors"))
    return (folder / "counted.safetensors").stat().st_size
