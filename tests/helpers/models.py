"""Models that several test files compress."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rankopt.candidates.cache import FactorStore
from rankopt.candidates.input_moments import moments
from rankopt.core.records import Candidate, Choice, Plan
from rankopt.decompositions.plan import apply
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.composites import expand_composites, parts
from rankopt.model.counting import count
from rankopt.model.inventory import inventory


class Odd(nn.Module):
    """A model of everything that tools stumble over."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.twice
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tied_a = nn.Linear(8, 8)
        self.tied_b = nn.Linear(8, 8)
        self.tied_b.weight = self.tied_a.weight
        self.normed = weight_norm(nn.Linear(8, 8))
        self.unused = nn.Linear(8, 8)
        self.custom = type("Custom", (nn.Linear,), {})(8, 8)
        self.one_d = nn.Conv1d(8, 8, 3)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda m, a, out: out)
        self.free = nn.Parameter(torch.ones(4, 4))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.alias(self.twice(self.norm(self.conv(x))))[:, :, ::2, ::2]
        x = x.flatten(2).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        x = self.hooked(self.custom(self.normed(self.tied_b(self.tied_a(x)))))
        return self.head(x.mean(1)) * self.free.mean()


def whole(module: nn.Module) -> nn.Module:
    """A copy with everything unfolded that can be."""
    return expand_composites(copy.deepcopy(module), [p for name, m in module.named_modules() for p in parts(m, name)])


class Block(nn.Module):
    def __init__(self, name="qkv", bias=True):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(16, 48, bias))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = getattr(self, self.name)(x).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 1)
        self.block = Block("qkv")
        self.gru = nn.GRU(32, 16, batch_first=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        y = self.body(y, src_key_padding_mask=torch.arange(x.shape[1]) >= lengths[:, None])
        return self.block(self.gru(y)[0])


def compressed(model, batches, family, form, fraction, steps, least=0):
    """The model with layers of more than `least` weights in the family's form, at a fraction of these; and its plan."""
    decomposition, store = DECOMPOSITIONS[family], FactorStore(None)
    layers = [x for x in inventory(model, batches[0]) if x.weights > least and decomposition.ranks(x, [fraction])]
    statistics = moments(model, layers, batches)
    chosen = []
    for layer in layers:
        weight, rank = model.get_submodule(layer.name).weight, decomposition.ranks(layer, [fraction])[0]
        (fit,) = decomposition.fit(layer, weight, [rank], statistics[layer.name], None, steps)
        store.kept[layer.name] = fit.factors
        cost = decomposition.cost(layer, rank, form)
        chosen.append(Candidate(family, rank, cost, fit.error, key=layer.name, form=form))
    small = apply(model, layers, chosen, store)
    choices = [
        Choice(x.name, x.kind, x.shape, family, c.rank, c.cost.params, c.cost.macs, c.error, "", form)
        for x, c in zip(layers, chosen, strict=True)
    ]
    return small, Plan(tuple(choices), count(small, batches[0]), count(model, batches[0]))
