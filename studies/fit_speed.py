"""Study: seconds and errors of the fits of a ResNet-20, on the CPU and on a GPU.

    python studies/fit_speed.py --against ../main --shapes 32     # CPU seconds here and in another checkout
    python studies/fit_speed.py --device cuda                     # 16 workers, GPU one by one, GPU in batches

Layers have the shapes of ResNet-20's, with seeded random weights and statistics whose spectra fall off as measured ones
do. Families and ranks are those of the default search space. Nothing is read from or written to a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor

from rankopt.candidates.search_space import SearchSpace
from rankopt.core.records import Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Original

SHAPES = ((16, 16, 6), (32, 16, 1), (32, 32, 5), (64, 32, 1), (64, 64, 5))
"""Outputs, inputs and number of the 3 x 3 convolutions of a ResNet-20."""

SPACE = SearchSpace()


def cases(outputs: int, inputs: int, number: int) -> list[Original]:
    """Layers of one shape."""
    found = []
    for i in range(number):
        generator = torch.Generator().manual_seed(1000 * outputs + 10 * inputs + i)
        layer = Layer(f"{outputs}x{inputs}.{i}", "Conv2d", (outputs, inputs, 3, 3))
        moment, metric = (_moment(n, generator) for n in (layer.patch, outputs))
        weight = torch.randn(layer.shape, generator=generator)
        for axis, size in ((0, outputs), (1, inputs)):
            turn = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
            turn = turn * torch.arange(1, size + 1) ** -0.7
            weight = torch.tensordot(turn, weight.movedim(axis, 0), 1).movedim(0, axis)
        found.append(Original(layer, weight.contiguous(), moment, metric))
    return found


def _moment(n: int, generator: torch.Generator) -> Tensor:
    """A positive definite matrix (1, n, n), float64, with eigenvalues from 1 to 1e-5."""
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return ((turn * torch.logspace(0, -5, n, dtype=torch.float64)) @ turn.mT)[None]


def fit(case: Original, family: str, ranks: list[Rank]) -> tuple[list[float], float]:
    """Errors of the fits of one layer, and CPU seconds."""
    torch.set_num_threads(1)
    start = time.process_time()
    found = DECOMPOSITIONS[family].fit(*case[:2], ranks, *case[2:], SPACE.steps)
    return [f.error for f in found], time.process_time() - start


def jobs(shapes: list[list[Original]]) -> list[tuple[Original, str, list[Rank]]]:
    """All layers with each family and its ranks."""
    pairs = [(case, family) for same in shapes for case in same for family in SPACE.families]
    found = [(case, family, SPACE.ranks(family, case.layer)) for case, family in pairs]
    return sorted((job for job in found if job[2]), key=lambda job: -job[0].layer.weights * (job[1][:2] == "cp"))


def on_cpu(shapes: list[list[Original]], workers: int) -> dict[str, Any]:
    """Errors and CPU seconds by layer and family."""
    found = Parallel(n_jobs=workers)(delayed(fit)(*job) for job in jobs(shapes))
    return {f"{j[0].layer.name} {j[1]}": result for j, result in zip(jobs(shapes), found, strict=True)}


def compare(name: str, errors: dict[str, Any], reference: dict[str, Any]) -> None:
    """Print how far errors are from those of a reference."""
    pairs = [p for k in errors for p in zip(errors[k][0], reference[k][0], strict=True) if min(p) > 1e-9]
    logs = [math.log(a / b) for a, b in pairs]
    above = sum(x > math.log(1.01) for x in logs)
    print(
        f"{name}: {len(logs)} fits, sum of log error {sum(logs):+.3f}, largest difference {math.expm1(max(logs)):+.2%} "
        f"and {math.expm1(min(logs)):+.2%}, {above} worse by more than 1 %"
    )


def on_gpu(shapes: list[list[Original]], device: str, reference: dict[str, Any]) -> None:
    """Print seconds on a GPU one by one (a sample) and in batches, memory, and errors beside the CPU's."""
    there = [[Original(case[0], *(t.to(device) for t in case[1:])) for case in same] for same in shapes]
    fit(there[0][0], "svd_in", [(4,)])  # starts the device's libraries
    start = time.perf_counter()
    sample = {}
    for same in there:
        ranks = SPACE.ranks("cp_merged", same[0].layer)[::5]
        errors = [fit(same[0], "cp_merged", [rank])[0][0] for rank in ranks]
        sample[f"{same[0].layer.name} cp_merged"] = (errors, 0.0)
        reference[f"{same[0].layer.name} cp_merged sample"] = (reference[f"{same[0].layer.name} cp_merged"][0][::5], 0)
    number = sum(len(errors) for errors, _ in sample.values())
    print(f"{device}, one by one, cp_merged: {(time.perf_counter() - start) / number:.2f} s a fit ({number} fits)")
    compare("one by one against CPU", {f"{k} sample": v for k, v in sample.items()}, reference)
    torch.cuda.reset_peak_memory_stats()
    start, found = time.perf_counter(), {}
    for same in there:
        for family in SPACE.families:
            if ranks := SPACE.ranks(family, same[0].layer):
                begun = time.perf_counter()
                stack = DECOMPOSITIONS[family].fit_stack(same, [ranks] * len(same), SPACE.steps)
                for case, fits in zip(same, stack, strict=True):
                    found[f"{case.layer.name} {family}"] = ([f.error for f in fits], 0.0)
                seconds = time.perf_counter() - begun
                print(f"  {same[0].layer.name} {family}: {len(same)} x {len(ranks)} fits, {seconds:.2f} s", flush=True)
    memory = torch.cuda.max_memory_allocated() / 1e9
    print(f"{device}, in batches: {time.perf_counter() - start:.1f} s, at most {memory:.2f} GB")
    compare("in batches against CPU", found, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes on the CPU; default: 16 with cuda, else 1")
    parser.add_argument("--shapes", type=int, nargs="*", default=[16, 32, 64], help="outputs of the layers to fit")
    parser.add_argument("--layers", type=int, default=6, help="the most layers of a shape")
    parser.add_argument("--against", help="another checkout, whose fits are made in the same run")
    parser.add_argument("--json", action="store_true", help="print errors and CPU seconds as JSON")
    given = parser.parse_args()
    workers = given.workers or (16 if given.device == "cuda" else 1)
    shapes = [cases(t, c, min(n, given.layers)) for t, c, n in SHAPES if t in given.shapes]
    start = time.perf_counter()
    here = on_cpu(shapes, workers)
    if given.json:
        print(json.dumps(here))
        return
    seconds = sum(s for _, s in here.values())
    print(f"CPU: {seconds:.1f} s of {workers} workers, {time.perf_counter() - start:.1f} s on the clock", flush=True)
    if given.against:
        wanted = ["--json", "--workers", str(workers), "--layers", str(given.layers)]
        wanted += ["--shapes", *map(str, given.shapes)]
        run = [sys.executable, __file__, *wanted]
        output = subprocess.check_output(run, env={**os.environ, "PYTHONPATH": given.against}, text=True)
        there = json.loads(output.splitlines()[-1])
        before = sum(s for _, s in there.values())
        print(f"CPU, {given.against}: {before:.1f} s, {before / seconds:.2f} times as long")
        for family in SPACE.families:
            own, others = ({k: v for k, v in x.items() if k.endswith(f" {family}")} for x in (here, there))
            if own:
                ratio = sum(s for _, s in others.values()) / max(1e-9, sum(s for _, s in own.values()))
                compare(f"  {family} ({ratio:.2f} times as fast)", own, others)
        compare("all", here, there)
    if given.device != "cpu":
        on_gpu(shapes, given.device, dict(here))


if __name__ == "__main__":
    main()
