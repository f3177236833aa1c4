"""Layers of every geometry that the inventory lets through, with inputs and statistics."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankopt.candidates.input_moments import moments
from rankopt.core.records import Layer
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.inventory import inventory
from rankopt.model.layer_kinds import describe

MODULES = {
    "conv3x3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided 3x5 valid dilated": lambda: nn.Conv2d(8, 12, (3, 5), stride=2, padding="valid", dilation=(1, 2)),
    "grouped same reflect": lambda: nn.Conv2d(8, 12, 3, padding="same", groups=2, padding_mode="reflect", bias=False),
    "depthwise uneven stride": lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1, stride=(2, 1)),
    "1x1 strided and padded": lambda: nn.Conv2d(12, 8, 1, stride=2, padding=1),
    "1x3 circular": lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="circular"),
    "even kernel same": lambda: nn.Conv2d(5, 7, 4, padding="same", dilation=2),
    "uneven padding replicate": lambda: nn.Conv2d(6, 4, (5, 3), padding=(2, 0), padding_mode="replicate"),
    "1d strided": lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2),
    "1d grouped dilated reflect": lambda: nn.Conv1d(
        6, 8, 3, dilation=2, padding="same", groups=2, padding_mode="reflect"
    ),
    "3d": lambda: nn.Conv3d(4, 4, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1), padding_mode="circular"),
    "3d grouped, depth 1": lambda: nn.Conv3d(4, 6, (1, 3, 3), groups=2, dilation=(1, 1, 2), bias=False),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, (3, 4), stride=2, padding=1, output_padding=(1, 0)),
    "transposed grouped dilated": lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), dilation=(1, 2), groups=2),
    "transposed 1x1": lambda: nn.ConvTranspose2d(8, 6, 1, stride=2, output_padding=1),
    "transposed 3d": lambda: nn.ConvTranspose3d(4, 4, (2, 3, 2), stride=2, padding=(0, 1, 0)),
    "embedding": lambda: nn.Embedding(40, 12, padding_idx=0),
    "linear": lambda: nn.Linear(12, 20),
    "linear, primes, no bias": lambda: nn.Linear(11, 8, bias=False),
    "linear, stored input first": lambda: Conv1D(nf=20, nx=12),
}


def inputs(module: nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Eight batches of four correlated examples; of an Embedding, of tokens that fall in frequency."""
    if isinstance(module, nn.Embedding):
        return [torch.randn(4, 5).square().mul(5).long().clamp_max(module.num_embeddings - 1) for _ in range(8)]
    if isinstance(module, (nn.Linear, Conv1D)):
        shape: tuple[int, ...] = (describe(module).in_channels,)
    else:
        shape = (module.in_channels, *{1: (29,), 2: (11, 13), 3: (5, 6, 7)}[len(module.kernel_size)])
    return [torch.randn(4, *shape, dtype=dtype).cumsum(-1) for _ in range(8)]


@dataclass
class Case:
    module: nn.Module
    layer: Layer
    x: Tensor
    moment: Tensor
    metric: Tensor


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """A module in float64 with a correlated input moment and output metric, and the same random state after every call.

    Args:
        name: One of MODULES.
        dtype: Of the module and its inputs.
    """
    case, state = _made(name, dtype)
    torch.set_rng_state(state)
    return copy.deepcopy(case)


@functools.cache
def _made(name: str, dtype: torch.dtype) -> tuple[Case, Tensor]:
    torch.manual_seed(0)
    module = MODULES[name]().to(dtype)
    batches = inputs(module, dtype)
    (layer,) = inventory(module, batches[0])
    moment = moments(module, [layer], batches)[layer.name]
    root = torch.randn(layer.groups, layer.out_channels, layer.out_channels, dtype=torch.float64)
    metric = root @ root.mT + torch.eye(layer.out_channels)
    return Case(module, layer, batches[0], moment, metric), torch.get_rng_state()


def build(family: str, case: Case, rank: tuple[int, ...], *, calibrated: bool = True, steps: int = 30):
    """(module, fit) of one family at one rank, in its usual form."""
    modules, fit = build_forms(family, case, rank, calibrated=calibrated, steps=steps)
    return modules[0], fit


def build_forms(family: str, case: Case, rank: tuple[int, ...], *, calibrated: bool = True, steps: int = 30):
    """(a module of each form, the one fit)."""
    statistics = (case.moment, case.metric) if calibrated else (None, None)
    decomposition = DECOMPOSITIONS[family]
    (fit,) = decomposition.fit(case.layer, case.module.weight, [rank], *statistics, steps)
    modules = [decomposition.build(case.module, case.layer, rank, form) for form in decomposition.forms]
    for module in modules:
        load_factors(module, fit.factors)
    return modules, fit


LAYERS = {name: make(name).layer for name in MODULES}
PAIRS = [(f, name) for f in DECOMPOSITIONS for name in MODULES if DECOMPOSITIONS[f].full_rank(LAYERS[name]) is not None]


def sampled(pairs, one_in=3):
    """The pairs of family and layer as pytest parameters, most of them marked as slow.

    What is left runs with `make test`: every family on one in three of its layers, on others than the family before
    it, and every layer with one family at least.
    """
    by_family: dict[str, list[str]] = {}
    for family, name in pairs:
        by_family.setdefault(family, []).append(name)
    kept = {
        (family, name)
        for number, (family, names) in enumerate(by_family.items())
        for name in names[number % min(one_in, len(names)) :: one_in]
    }
    kept |= {next(p for p in pairs if p[1] == name) for _, name in pairs if name not in {n for _, n in kept}}
    return [pytest.param(*pair, marks=() if pair in kept else pytest.mark.slow) for pair in pairs]


SAMPLED = sampled(PAIRS)
FORMED = [(family, form) for family in DECOMPOSITIONS for form in DECOMPOSITIONS[family].forms]
ONE_EACH = [(family, "conv3x3" if (family, "conv3x3") in PAIRS else "linear") for family in DECOMPOSITIONS]
