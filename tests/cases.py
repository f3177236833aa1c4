"""Layers of every geometry that the inventory lets through, with inputs and statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankopt.calibration import moments
from rankopt.core import Layer
from rankopt.decompositions import DECOMPOSITIONS
from rankopt.decompositions.base import load_factors
from rankopt.inventory import inventory

MODULES = {
    "conv3x3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided 3x5 valid dilated": lambda: nn.Conv2d(8, 12, (3, 5), stride=2, padding="valid", dilation=(1, 2)),
    "grouped same reflect": lambda: nn.Conv2d(8, 12, 3, padding="same", groups=2, padding_mode="reflect", bias=False),
    "depthwise uneven stride": lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1, stride=(2, 1)),
    "1x1 strided and padded": lambda: nn.Conv2d(12, 8, 1, stride=2, padding=1),
    "1x3 circular": lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="circular"),
    "even kernel same": lambda: nn.Conv2d(5, 7, 4, padding="same", dilation=2),
    "uneven padding replicate": lambda: nn.Conv2d(6, 4, (5, 3), padding=(2, 0), padding_mode="replicate"),
    "linear": lambda: nn.Linear(12, 20),
    "linear, primes, no bias": lambda: nn.Linear(11, 8, bias=False),
}


@dataclass
class Case:
    module: nn.Module
    layer: Layer
    x: Tensor
    moment: Tensor
    metric: Tensor


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """A module in float64 with a correlated input moment and output metric."""
    torch.manual_seed(0)
    module = MODULES[name]().to(dtype)
    shape = (12,) if name == "linear" else (11,) if name.startswith("linear") else (module.in_channels, 11, 13)
    batches = [torch.randn(4, *shape, dtype=dtype).cumsum(-1) for _ in range(8)]
    (layer,) = inventory(module, batches[0])
    moment = moments(module, [layer], batches)[layer.name]
    root = torch.randn(layer.groups, layer.out_channels, layer.out_channels, dtype=torch.float64)
    metric = root @ root.mT + torch.eye(layer.out_channels)
    return Case(module, layer, batches[0], moment, metric)


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


PAIRS = [
    (family, name)
    for family in DECOMPOSITIONS
    for name in MODULES
    if DECOMPOSITIONS[family].full_rank(make(name).layer) is not None
]
FORMED = [(family, form) for family in DECOMPOSITIONS for form in DECOMPOSITIONS[family].forms]
ONE_EACH = [(family, "conv3x3" if (family, "conv3x3") in PAIRS else "linear") for family in DECOMPOSITIONS]
