"""Study: how well and how fast each family is fitted, beside tensorly at the same ranks in the same run.

    .venv/bin/python studies/families.py                       # every layer below: about an hour on one core
    .venv/bin/python studies/families.py --only resnet20       # or wide, minilm; --minutes 10 stops after these

Writes studies/results/families.{json,md}, the JSON after every cell: run again, it goes on where it stopped.
Layers: all of ResNet-20, calibrated on 2,000 augmented training images; a 512 x 512 x 3 x 3 convolution of seeded
random weights whose unfoldings over channels have singular values about i^-0.7, without data (input moment:
identity); and the 384 x 1536 Linear layers of MiniLM, calibrated on text. Error: E‖y − ŷ‖² / E‖y‖² of the layer's
output, which for identity is that of the weight. rankopt fits that error (no output metric here), tensorly the
weight's, which is all it offers. At each fraction of the layer's weights both get the same ranks, so the same number
of parameters; a family that names several ranks for a fraction counts with its best, and with the seconds of all.
`time at equal error`: the least of 0, 1, 5, 20, 80, 320 steps at which rankopt's error is at most tensorly's, in
seconds over tensorly's seconds. A search stops each of its hundreds of fits at 1e11 operations; here it is 1e12, which
only the wide layer comes to.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import tensorly
import torch
from rich.console import Console
from tensorly import decomposition
from torch import Tensor, nn

from rankopt.candidates.input_moments import moments
from rankopt.core.files import write_beside
from rankopt.core.records import Layer, Rank
from rankopt.decompositions import parameter_search as fitting
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.decompositions.types import Target
from rankopt.experiments.tasks import load_task
from rankopt.model.inputs import CALIBRATION_EXAMPLES, collect_batches
from rankopt.model.inventory import inventory

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "families.json"
FRACTIONS, LADDER, STEPS, SEED = (0.5, 0.25, 0.1, 0.01), (0, 1, 5, 20, 80, 320), 500, 0
TASKS = {"resnet20": "cifar10.py:resnet20", "minilm": "minilm.py:minilm"}
console = Console(stderr=True)


class Case(NamedTuple):
    """A layer with its weight and input moment (None: identity)."""

    source: str
    layer: Layer
    weight: Tensor
    moment: Tensor | None


# --- layers --------------------------------------------------------------------------------------


def cases(source: str) -> Iterator[Case]:
    if source == "wide":
        yield wide()
        return
    task = load_task(f"{HERE}/tasks/{TASKS[source]}")
    layers = [x for x in inventory(task.model, task.example_input) if x.reason is None]
    if source == "minilm":
        layers = [x for x in layers if sorted(x.shape) == [384, 1536]]
    found = moments(task.model, layers, collect_batches(task.model, task.calibration, CALIBRATION_EXAMPLES))
    for layer in layers:
        yield Case(source, layer, task.model.get_submodule(layer.name).weight.detach(), found[layer.name])


def wide(channels: int = 512) -> Case:
    """Random weights with singular values about i^-0.7 over either channel mode."""
    generator = torch.Generator().manual_seed(SEED)
    decay = torch.arange(1, channels + 1) ** -0.7
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    core = torch.randn(conv.weight.shape, generator=generator) * decay.view(-1, 1, 1, 1) * decay.view(1, -1, 1, 1)
    left, right = (torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0] for _ in range(2))
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("to,oihw,ic->tchw", left, core, right))
    (layer,) = inventory(conv, torch.zeros(1, channels, 7, 7))
    return Case("wide", layer, conv.weight.detach(), None)


# --- tensorly's ----------------------------------------------------------------------------------


def tensorly_fit(family: str, layer: Layer, weight: np.ndarray, rank: Rank) -> np.ndarray:
    """The weight that tensorly's decomposition stands for, in the layer's shape; all settings its defaults."""
    if family == "cp":
        return tensorly.cp_to_tensor(decomposition.parafac(weight, rank[0], random_state=SEED))
    if family == "tucker2":
        (core, factors), _ = decomposition.partial_tucker(weight, rank[::-1], modes=[0, 1])
        return tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    if family == "tucker":
        r_in, r_h, r_w, r_out = rank
        return tensorly.tucker_to_tensor(decomposition.tucker(weight, (r_out, r_in, r_h, r_w)))
    modes = DECOMPOSITIONS[family].modes(layer)  # type: ignore[attr-defined]  # in the order of the chain
    conv = len(layer.shape) == 4
    tensor = weight.transpose(1, 2, 3, 0) if conv else weight.T.reshape(modes)
    if family == "tt":
        whole = tensorly.tt_to_tensor(decomposition.tensor_train(tensor, (1, *rank, 1)))
    else:
        whole = tensorly.tr_to_tensor(decomposition.tensor_ring(tensor, (*rank, rank[0])))
    return whole.transpose(3, 0, 1, 2) if conv else whole.reshape(weight.shape[::-1]).T


PEERS = ("cp", "tucker2", "tucker", "tt", "tr")


# --- measuring -----------------------------------------------------------------------------------


def measure(case: Case, family: str, fraction: float) -> dict[str, Any] | None:
    """One cell; None if no rank of the family fits."""
    decomposition_ = DECOMPOSITIONS[family]
    if decomposition_.full_rank(case.layer) is None:
        return None
    most = fraction * case.layer.weights
    ranks = [r for r in decomposition_.ranks(case.layer, [fraction]) if decomposition_.weights(case.layer, r) <= most]
    if not ranks:
        return None
    target = full_target(case.layer, case.weight, case.moment, None)
    theirs, their_seconds = _theirs(case, family, ranks, target)
    ours, seconds = _ours(case, family, ranks, STEPS)
    equal = next((s for e, s in (_ours(case, family, ranks, n) for n in LADDER) if e <= theirs), None)
    about = {"source": case.source, "layer": case.layer.name, "family": family, "fraction": fraction}
    numbers = {"error": ours, "seconds": seconds, "tensorly": theirs, "tensorly_seconds": their_seconds, "equal": equal}
    return {**about, "ranks": ranks, **numbers}


def _ours(case: Case, family: str, ranks: list[Rank], steps: int) -> tuple[float, float]:
    effort = DECOMPOSITIONS[family].effort if steps == STEPS else 1.0
    start = time.perf_counter()
    fits = DECOMPOSITIONS[family].fit(case.layer, case.weight, ranks, case.moment, None, round(steps * effort))
    return min(fit.error for fit in fits), time.perf_counter() - start


def _theirs(case: Case, family: str, ranks: list[Rank], target: Target) -> tuple[float, float]:
    errors, seconds = [], 0.0
    for rank in ranks:
        start = time.perf_counter()
        whole = tensorly_fit(family, case.layer, case.weight.double().numpy(), rank)
        seconds += time.perf_counter() - start
        errors.append(target.error(torch.from_numpy(np.ascontiguousarray(whole)).reshape(target.weight.shape)))
    return min(errors), seconds


# --- what comes out ------------------------------------------------------------------------------


def table(cells: list[dict[str, Any]]) -> str:
    """Medians over a source's layers as markdown."""
    lines = [
        "# Fits beside tensorly's, at the same ranks",
        "",
        f"Made by `python studies/families.py`, seed {SEED}, one thread, {date.today().isoformat()}, tensorly "
        f"{tensorly.__version__}.",
        "Relative output error, medians over the layers; ratio: rankopt's error over tensorly's, its median and its",
        "worst; time at equal error: rankopt's seconds until it is as good, over tensorly's seconds, median and worst",
        "(– never reached). One fit may take 1e12 operations (in a search 1e11, which `wide` alone comes to).",
        "",
        "| layers | family | weights | n | rankopt | tensorly | ratio | worst | seconds | tensorly's | time at equal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((c["source"], c["family"], c["fraction"]) for c in cells):
        own = [c for c in cells if (c["source"], c["family"], c["fraction"]) == key]
        ratios = [c["error"] / max(c["tensorly"], 1e-12) for c in own]
        times = [float("inf") if c["equal"] is None else c["equal"] / c["tensorly_seconds"] for c in own]
        shown = [f"{median(c[k] for c in own):.3g}" for k in ("error", "tensorly")]
        shown += [f"{median(ratios):.2f}", f"{max(ratios):.2f}"]
        shown += [f"{median(c[k] for c in own):.2f}" for k in ("seconds", "tensorly_seconds")]
        equal = " to ".join("–" if t == float("inf") else f"{t:.2f}" for t in (median(times), max(times)))
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:.0%} | {len(own)} | " + " | ".join([*shown, equal]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["resnet20", "wide", "minilm"], help="sources")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="minutes after which to stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fitting.MAX_FLOPS = 1e12
    end = time.monotonic() + 60 * given.minutes
    cells: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    done = {(c["source"], c["layer"], c["family"], c["fraction"]) for c in cells}
    for case in (c for source in given.only for c in cases(source)):
        for fraction, family in ((x, f) for x in FRACTIONS[::-1] for f in PEERS):
            if (case.source, case.layer.name, family, fraction) in done or time.monotonic() > end:
                continue
            if cell := measure(case, family, fraction):
                cells.append(cell)
                write_beside(RESULTS, lambda p: p.write_text(json.dumps(cells, indent=1)))
                console.print(
                    f"{case.layer.name} {family} {fraction}: {cell['error']:.4g}, tensorly {cell['tensorly']:.4g}"
                )
    RESULTS.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
