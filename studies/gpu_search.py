"""Study: a search on a GPU, in this process and with Ray workers that share it; how busy each keeps the GPU.

    python studies/gpu_search.py                               # about five minutes on a GPU with 16 cores
    python studies/gpu_search.py --quick                       # 90 seconds: fewer candidates, trials and runners
    python studies/gpu_search.py --random                      # without CIFAR-10: random weights and images
    python studies/gpu_search.py --device cpu --quick --random --trials 3   # the same code, to try it

ResNet-20 at 30 % of its MACs, strategy optuna. The candidates are prepared once; then each runner makes the same number
of trials: this process, one Ray worker with the GPU to itself, four workers of a quarter GPU each. Printed for each:
seconds in all, until the first trial ended, and of a trial; the devices that trials name; and what a process of its
own reads from NVML once a second: utilisation, memory, and which processes hold memory. At the end, plans that were
scored on the GPU are scored on the CPU; for that, TF32 is off. Without Ray only this process searches. Written to --out
as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.errors import RankoptError
from rankopt.core.files import available_cores, write_beside
from rankopt.core.problem import Problem
from rankopt.core.progress import silent
from rankopt.experiments.tasks import load_task
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Runner, Study, search
from rankopt.search.progress import show_progress
from rankopt.strategies.registry import make_strategy

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # read when CUDA starts, here and in workers; TF32 keeps 10 bits

HERE = Path(__file__).parent
CIFAR, RANDOM = "cifar10.py:resnet20", "random_networks.py:resnet20"
BUDGET = {"macs": 0.3}
SEED = 0
QUICK = SearchSpace(name="gpu-search", families=("svd_out", "svd_spatial", "tucker2"), points=5, steps=0)
CHECKED = 4  # plans that are scored on the CPU, too
AGREE = 1e-3  # relative difference of the objectives

# In a process of its own, so that it reads on while this one computes.
SAMPLER = """
import json, sys, time
import pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByUUID(sys.argv[1])
while True:
    rates, memory = pynvml.nvmlDeviceGetUtilizationRates(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
    processes = {str(p.pid): p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    sample = {"at": time.time(), "utilisation": rates.gpu, "memory": memory.used, "processes": processes}
    print(json.dumps(sample), flush=True)
    time.sleep(1)
"""


@contextmanager
def sampled(device: str) -> Iterator[Path]:
    """Context: NVML is read once a second. Yields the file that the samples go to, a JSON object a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples"
        if device == "cpu":
            path.touch()
            yield path
            return
        gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        with path.open("w") as file:
            process = subprocess.Popen([sys.executable, "-c", SAMPLER, gpu], stdout=file)
        try:
            yield path
        finally:
            process.terminate()
            process.wait()


def busy(path: Path, start: float, end: float) -> dict[str, Any]:
    """What NVML told between two times: per cent, bytes, and the most bytes of each process."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    rows = [r for r in rows if start <= r["at"] <= end]
    if not rows:
        return {}
    held: dict[str, int] = {}
    for row in rows:
        for pid, size in row["processes"].items():
            held[pid] = max(held.get(pid, 0), size or 0)  # a container may hide what a process holds
    used = [r["utilisation"] for r in rows]
    return {
        "samples": len(rows),
        "utilisation": sum(used) / len(used),
        "most": max(used),
        "memory": max(r["memory"] for r in rows),
        "processes": held,
    }


def runners(device: str, quick: bool) -> Iterator[tuple[str, Runner]]:
    """By name; those with workers only where there is Ray."""
    yield "in this process", search
    try:
        from rankopt.search.ray.runner import RaySearch

        share = max(1, available_cores() // 4)
        gpu = device != "cpu"
        if not quick:
            yield "one worker", RaySearch(1, gpus_per_trial=1.0 if gpu else 0.0)
        yield (
            "four quarter workers" if gpu else "two workers",
            RaySearch(4, gpus_per_trial=0.25, cpus_per_trial=share) if gpu else RaySearch(2),
        )
    except RankoptError as error:
        print(f"no workers here: {error}", flush=True)


def run(name: str, runner: Runner, prepared: Prepared, problem: Problem, device: str, trials: int) -> dict[str, Any]:
    """Search once, and say how long it took."""
    strategy = make_strategy("optuna", problem, SEED)
    strategy.measure(prepared, silent)
    ends: list[float] = []
    study = Study(problem, strategy, trials, report=lambda _: ends.append(time.time()))
    evaluate = Evaluator.of(prepared, problem)
    if runner is search:
        evaluate.to(device)
    start = time.time()
    try:
        found = runner(study, evaluate)
    finally:
        evaluate.to("cpu")  # also for the workers, which are sent the model
    finished = [t for t in found if t.state == "finished"]
    return {
        "runner": name,
        "start": start,
        "end": time.time(),
        "first": ends[0] - start,
        "trials": len(found),
        "failed": len(found) - len(finished),
        "trial": median(t.seconds for t in finished),
        "devices": sorted({t.device for t in finished}),
        "errors": sorted({t.error for t in found if t.error})[:3],
        "plans": [(t.proposal, t.objective) for t in finished],
    }


def differences(row: dict[str, Any], evaluate: Evaluator) -> list[float]:
    """Relative differences of a runner's objectives to those on the CPU, for the same plans."""
    evaluate.to("cpu")
    plans = row["plans"][:: max(1, len(row["plans"]) // CHECKED)][:CHECKED]
    return [abs(objective / evaluate(proposal)[0] - 1) for proposal, objective in plans]


def line(row: dict[str, Any]) -> str:
    """A runner's row of the table."""
    gpu = row["gpu"]
    text = "– | –"
    if gpu:
        held = ", ".join(f"{pid}: {size / 1e9:.1f}" for pid, size in gpu["processes"].items())
        text = f"{gpu['utilisation']:.0f} (most {gpu['most']}) | {gpu['memory'] / 1e9:.1f} ({held})"
    return (
        f"| {row['runner']} | {row['end'] - row['start']:.1f} | {row['first']:.1f} | {row['trial']:.2f} | "
        f"{row['trials']} | {row['failed']} | {', '.join(row['devices'])} | {text} | {max(row['differences']):.1e} |"
    )


HEAD = (
    "| runner | seconds | first trial after | a trial | trials | failed | devices | GPU % | GB (by process) | off |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--trials", type=int, help="of each runner; 32, or 16 with --quick")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_search.json")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    trials = given.trials or (16 if given.quick else 32)
    task = load_task(f"{HERE}/tasks/{RANDOM if given.random else CIFAR}")
    space = QUICK if given.quick else dataclasses.replace(load_space("default"), steps=20)
    with sampled(given.device) as samples:
        start = time.time()
        prepared = prepare(task, space, progress=show_progress, budget=BUDGET)
        problem = prepared.problem(BUDGET)
        gpu = "no GPU" if given.device == "cpu" else torch.cuda.get_device_name()
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in prepared.clock.items())
        data: dict[str, Any] = {
            "machine": f"{gpu}, {available_cores()} cores, torch {torch.__version__}, process {os.getpid()}",
            "prepared": {"seconds": time.time() - start, **prepared.clock, "gpu": busy(samples, start, time.time())},
            "runners": [],
        }
        print(f"{data['machine']}\nprepared in {time.time() - start:.1f} s: {stages}\n{HEAD}", flush=True)
        for name, runner in runners(given.device, given.quick):
            row = run(name, runner, prepared, problem, given.device, trials)
            row["gpu"] = busy(samples, row["start"], row["end"])
            row["differences"] = differences(row, Evaluator.of(prepared, problem))
            data["runners"].append(row)
            print(line(row), *row["errors"], sep="\n", flush=True)
            write_beside(given.out, lambda p: p.write_text(json.dumps(data, indent=1)))
    worst = max(d for row in data["runners"] for d in row["differences"])
    verdict = "ok" if worst <= AGREE else "TOO MUCH"
    print(f"objectives there and on the CPU differ by at most {worst:.1e} (column off): {verdict}")


if __name__ == "__main__":
    main()
