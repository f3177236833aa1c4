"""MACs against counts by hand: attention and recurrent layers, whichever kernel computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rankopt.model.counting import count

LENGTH, WIDTH, HIDDEN = 6, 8, 5
X = torch.zeros(3, LENGTH, WIDTH)


class Attention(nn.Module):
    """Two heads of size 4 on the same queries, keys and values; or two heads of queries for one of keys."""

    def __init__(self, kernel=None, keys=2, **options):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * keys)
        self.kernel, self.options = kernel, options

    def forward(self, x):
        q, k = (z.unflatten(-1, (-1, 4)).transpose(1, 2) for z in (self.q(x), self.k(x)))
        if self.kernel is None:
            return F.scaled_dot_product_attention(q, k, k, **self.options)
        with sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(q, k, k, **self.options)


PRODUCTS = 2 * LENGTH**2 * WIDTH  # queries with keys, and weights with values, of all heads


@pytest.mark.parametrize("kernel", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"keys": 1, "enable_gqa": True}])
def test_attention_counts_both_products(kernel, options):
    keys = 4 * options.get("keys", 2)
    assert count(Attention(kernel, **options), X).macs == LENGTH * WIDTH * (WIDTH + keys) + PRODUCTS


def test_attention_with_a_mask_counts_the_same():
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert count(Attention(attn_mask=mask), X).macs == 2 * LENGTH * WIDTH**2 + PRODUCTS


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    assert count(Model(), X).macs == 4 * LENGTH * WIDTH**2 + PRODUCTS


def test_encoder_layer():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True)
    assert count(layer, X).macs == LENGTH * (4 * WIDTH**2 + 2 * WIDTH * 24) + PRODUCTS


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("both", [1, 2])
def test_recurrent_layers(kind, gates, both):
    model = kind(WIDTH, HIDDEN, 2, batch_first=True, bidirectional=both == 2)
    inputs = WIDTH + both * HIDDEN  # of the first and of the second layer
    assert count(model, X).macs == both * LENGTH * gates * HIDDEN * (inputs + 2 * HIDDEN)


def test_a_projected_lstm():
    model = nn.LSTM(WIDTH, HIDDEN, batch_first=True, proj_size=3)
    assert count(model, X).macs == LENGTH * (4 * HIDDEN * (WIDTH + 3) + HIDDEN * 3)
