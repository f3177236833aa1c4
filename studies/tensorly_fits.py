"""Plain fits, without calibration: rankopt's beside those of tensorly's algorithms, at the same ranks.

    python studies/tensorly_fits.py

Writes studies/results/tensorly_fits.md. Seconds are of one thread's CPU time, so that a busy machine does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import tensorly
import torch
from tensorly.decomposition import partial_tucker, tensor_ring, tensor_train, tucker
from torch import Tensor

import rankopt
from rankopt.core.environment import processor
from rankopt.core.records import Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.experiments.digits import digits

RESULT = Path(__file__).parent / "results" / "tensorly_fits.md"

FRACTIONS = (0.1, 0.2, 0.4, 0.6)
"""Shares of a layer's weights at which ranks are compared."""


def of_tucker2(weight: Tensor, rank: Rank) -> Tensor:
    """Tucker-2 by higher-order orthogonal iteration."""
    (core, factors), _ = partial_tucker(weight, rank=list(rank)[::-1], modes=[0, 1], tol=1e-8)
    return tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])


def of_tucker(weight: Tensor, rank: Rank) -> Tensor:
    """Tucker over all modes by higher-order orthogonal iteration."""
    r_in, r_h, r_w, r_out = rank
    return tensorly.tucker_to_tensor(tucker(weight, rank=[r_out, r_in, r_h, r_w], tol=1e-8))


def of_train(weight: Tensor, rank: Rank) -> Tensor:
    """A tensor train over C, kh, kw, T by TT-SVD."""
    return tensorly.tt_to_tensor(tensor_train(weight.permute(1, 2, 3, 0), [1, *rank, 1])).permute(3, 0, 1, 2)


def of_ring(weight: Tensor, rank: Rank) -> Tensor:
    """A tensor ring over C, kh, kw, T by TR-SVD."""
    return tensorly.tr_to_tensor(tensor_ring(weight.permute(1, 2, 3, 0), [*rank, rank[0]])).permute(3, 0, 1, 2)


ALGORITHMS: dict[str, Callable[[Tensor, Rank], Tensor]] = {
    "tucker2": of_tucker2,
    "tucker": of_tucker,
    "tt": of_train,
    "tr": of_ring,
}


def error(weight: Tensor, approximation: Tensor) -> float:
    """The relative error of an approximation."""
    return float(((weight - approximation).norm() / weight.norm()).square())


def compare(family: str, layer: Layer, weight: Tensor) -> list[tuple[float, float, float, float]]:
    """Errors and seconds of both at each rank: (ours, tensorly's, our seconds, tensorly's)."""
    decomposition = DECOMPOSITIONS[family]
    ranks = decomposition.ranks(layer, FRACTIONS)
    start = time.process_time()
    fits = list(decomposition.fit(layer, weight, ranks))
    each = (time.process_time() - start) / max(len(ranks), 1)
    ours = {fit.rank: error(weight, decomposition.weight(layer, fit.factors)) for fit in fits}
    rows = []
    for rank in ranks:
        start = time.process_time()
        try:
            theirs = error(weight, ALGORITHMS[family](weight, rank))
        except ValueError:  # TR-SVD takes no rank R0 R1 above the first mode
            theirs = math.nan
        rows.append((ours[rank], theirs, each, time.process_time() - start))
    return rows


def weights() -> list[tuple[Layer, Tensor]]:
    """Convolutions of the digits network, and random ones whose spectra decay."""
    found: list[tuple[Layer, Tensor]] = []
    model: Any = digits().model
    model = torch.nn.Sequential(model.conv2, model.conv3, torch.nn.Conv2d(48, 64, 3), torch.nn.Conv2d(64, 128, 3))
    for i in (2, 3):
        w = model[i].weight
        with torch.no_grad():
            for mode in range(2):
                scale = torch.arange(1, w.shape[mode] + 1) ** -0.5
                w.mul_(scale.view([-1 if m == mode else 1 for m in range(4)]))
    for layer in rankopt.inventory(model, torch.zeros(1, 16, 16, 16)):
        found.append((layer, model.get_submodule(layer.name).weight.detach()))
    return found


def main() -> None:
    """Compare, and write the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    lines = [
        "# Plain fits: ours beside tensorly's",
        "",
        f"`python studies/tensorly_fits.py`, seed 0, {date.today().isoformat()}, one thread of {processor()}, PyTorch "
        f"{torch.__version__}, tensorly {tensorly.__version__}. Two convolutions of the digits network and two random "
        "ones whose spectra decay, at 10 to 60 % of their weights. Errors: tensorly's relative squared error over "
        "ours, above 1 where ours is less.",
        "",
        "| family | fits | error ratio, least | median | most | our CPU ms a fit | tensorly's |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = weights()
    for family in ALGORITHMS:
        rows = [row for layer, weight in cases for row in compare(family, layer, weight)]
        found = sorted(b / a for a, b, _, _ in rows if a > 0 and not math.isnan(b))
        ours, theirs = (1000 * sum(row[i] for row in rows) / len(rows) for i in (2, 3))
        lines.append(
            f"| `{family}` | {len(found)} | {found[0]:.4f} | {found[len(found) // 2]:.4f} | {found[-1]:.4f} | "
            f"{ours:.0f} | {theirs:.0f} |"
        )
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
