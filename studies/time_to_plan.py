"""Seconds from a model to a plan, cold cache, and its peak memory, over networks of 10⁵ to 10⁸ weights.

    python studies/time_to_plan.py                                   # all networks, on the CPU: hours
    python studies/time_to_plan.py --only resnet20,resnet56 --device cuda --limit-minutes 3
    python studies/time_to_plan.py --memory                          # VGG-16 at 224 x 224: below 8 GB, or exit code 1
    python studies/time_to_plan.py --efforts                         # ResNet-20: the efforts at six budgets
    python studies/time_to_plan.py --efforts --only minilm,resnet56  # and of others

Every network is a process of its own with an empty cache. Measured: seconds by stage up to the first plan, those of a
further budget, forward passes of the sensitivities, peak memory (of the process, of its largest worker, of the GPU),
and the KL divergence of the plan. Beside it in the same run, at the same number of parameters: a plain whitened SVD
with the same share of weights in each layer, and, where tltorch is installed, its CP and Tucker at fixed rank.

Networks at 224 x 224 have random weights, and random images: the time does not depend on them, the KL says nothing.

Written: studies/results/time_to_plan/{device}.json, .md and .png. Networks that were not run keep their rows.
Of efforts efforts_{device}.json and .md, in CPU seconds of the process and its workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankopt
from rankopt.candidates.effort import EFFORTS, NORMAL, THOROUGH
from rankopt.candidates.input_moments import ROWS, ROWS_EACH, moments
from rankopt.candidates.pool import release_workers
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.environment import processor
from rankopt.core.records import Layer
from rankopt.decompositions.parameter_search import MAX_FLOPS
from rankopt.decompositions.targets import full_target
from rankopt.model.forward import batch_size
from rankopt.model.layer_kinds import in_own_shape
from rankopt.search.compress import run_search
from rankopt.search.progress import show_progress
from rankopt.search.settings import SearchSettings
from rankopt.strategies.allocation import allocate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULTS = Path(__file__).parent / "results" / "time_to_plan"
FIRST, FURTHER = 0.3, 0.4  # budgets: shares of the parameters
BUDGETS = (0.6, 0.5, 0.4, 0.3, 0.2, 0.15)  # at which efforts are compared
SEEDS = (0, 1, 2)  # of the contenders: by chance the best of twelve is some per cent better or worse
LIMIT_BYTES = 8 * 10**9  # of VGG-16
STEP = 4e7  # multiply-accumulates in the time that a step of a fit takes besides products
TRANSFORMERS = {"ViT-L shapes": (24, 1024), "1.3 G weights": (40, 1664)}  # depth, width: counted only


# --- networks ------------------------------------------------------------------------------------------


def _cifar(name: str) -> Callable[[], rankopt.Task]:
    def task() -> rankopt.Task:
        from studies.tasks import cifar10

        return getattr(cifar10, name)()

    return task


def _minilm() -> rankopt.Task:
    from studies.tasks import minilm

    return minilm.minilm()


def _timm(name: str, examples: int) -> Callable[[], rankopt.Task]:
    def task() -> rankopt.Task:
        from studies.tasks.zoo import without_torchvision

        with without_torchvision():
            import timm

            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False).eval()
        images = torch.randn(examples, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        return rankopt.Task(model, images[:1], calibration=images.split(32))

    return task


NETWORKS: dict[str, Callable[[], rankopt.Task]] = {
    "resnet20": _cifar("resnet20"),
    "resnet56": _cifar("resnet56"),
    "resnet18": _timm("resnet18", 512),
    "minilm": _minilm,
    "resnet50": _timm("resnet50", 512),
    "vit_b16": _timm("vit_base_patch16_224", 128),
    "vgg16": _timm("vgg16", 64),
}


# --- one network, in a process of its own --------------------------------------------------------------


def measure(name: str, device: str, effort: str) -> dict[str, Any]:
    """Everything that is measured of one network."""
    task = NETWORKS[name]()
    task = dataclasses.replace(task, model=task.model.to(device), score=None, test=None)
    space = load_space("default").adjusted(effort=effort)
    row: dict[str, Any] = {"network": name, "device": _described(device), "cores": len(os.sched_getaffinity(0))}
    row["effort"] = effort
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        prepared = prepare(task, space, cache, show_progress)
        first = _plan(prepared, FIRST)
        row["seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        _plan(prepared, FURTHER)
        row["further"] = time.perf_counter() - start
    row["memory"] = _peaks(device)
    batches = prepared.statistics.batches
    row |= {
        "stages": dict(prepared.clock),
        "passes": prepared.passes,
        "weights": prepared.dense.params,
        "operations": operations(prepared.free, sum(map(batch_size, batches))),
        "kl": first.info["objective"]["best"],
        "params": first.info["cost"]["compressed"]["params"],
    }
    row["opponents"] = opponents(prepared, row["params"])
    return row


def _plan(prepared: Any, share: float) -> Any:
    return run_search(prepared, prepared.problem({"params": share}), SearchSettings(), progress=show_progress)


def _peaks(device: str) -> dict[str, int]:
    """Peak bytes of this process, of its largest worker, and of the GPU."""
    release_workers()  # a worker counts once it has ended
    found = {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    return found | ({"gpu": torch.cuda.max_memory_allocated()} if device.startswith("cuda") else {})


def _described(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else processor()


# --- counted operations --------------------------------------------------------------------------------


def operations(layers: Sequence[Layer], examples: int) -> float:
    """Multiply-accumulates of a preparation by `normal`, up to a factor of two or so, which is measured.

    Args:
        layers: The layers.
        examples: Calibration examples.
    """
    shapes = ((x.weights, x.patch, x.out_channels, x.groups, x.positions, x.patch == x.in_channels) for x in layers)
    return math.fsum(_operations(*shape, examples) for shape in shapes)


def _operations(
    weights: int, inputs: int, outputs: int, groups: int, positions: float, linear: bool, examples: int
) -> float:
    """Of one layer: runs over the data, moments and metrics, sensitivities, fits."""
    macs, seen = weights * positions, examples * positions
    data = examples * (4 + EFFORTS[NORMAL].passes / 2) * macs + seen * groups * outputs**2
    moment = 0.6 * groups * min(seen, max(ROWS, ROWS_EACH * inputs)) * inputs**2
    step = STEP + weights * inputs / 3  # at a quarter of the weights
    most = MAX_FLOPS / 2
    families = 3 if linear else 7  # besides svd_out
    begun = 2 * (10 * groups * outputs**3 + 4 * weights * inputs) + 8 * min(10 * step, most)
    return data + moment + families * begun + 3 * min(300 * step, most)


def transformer(depth: int, width: int, tokens: int = 197, examples: int = 128) -> tuple[float, float]:
    """Weights and operations of a ViT's Linears, counted."""
    shapes = depth * [(width, width)] * 4 + depth * [(4 * width, width), (width, 4 * width)]
    counted = math.fsum(_operations(t * n, n, t, 1, tokens, True, examples) for t, n in shapes)
    return float(sum(t * n for t, n in shapes)), counted


# --- other ways to a compressed model ------------------------------------------------------------------


def opponents(prepared: Any, params: int) -> dict[str, Any]:
    """Seconds and KL of other tools at the same number of parameters."""
    batches = prepared.statistics.batches
    divergence = prepared.objective
    dense = {x.name: prepared.model.get_submodule(x.name).weight.detach().clone() for x in prepared.free}
    share = (params - (prepared.dense.params - sum(w.numel() for w in dense.values()))) / sum(
        w.numel() for w in dense.values()
    )
    found: dict[str, Any] = {}
    ways: dict[str, Callable[[], None]] = {"whitened SVD": lambda: whitened_svd(prepared, share, batches)}
    try:
        import tltorch  # noqa: F401
    except ImportError as error:
        print(f"skipped: tltorch does not import ({error})")
    else:
        ways |= {f"tltorch {kind}": lambda kind=kind: tltorch_fits(prepared, share, kind) for kind in ("cp", "tucker")}
    for name, way in ways.items():
        start = time.perf_counter()
        try:
            way()
            found[name] = {"seconds": time.perf_counter() - start, "kl": divergence(prepared.model)}
        except Exception as error:  # noqa: BLE001  # whatever another tool raises
            print(f"skipped: {name}: {type(error).__name__}: {error}")
        with torch.no_grad():
            for layer, weight in dense.items():
                prepared.model.get_submodule(layer).weight.copy_(weight)
    return found


def whitened_svd(prepared: Any, share: float, batches: Sequence[Any]) -> None:
    """Every layer by the SVD of W S^½ at the same share of its weights; the weights are overwritten by the product."""
    s = moments(prepared.model, prepared.free, batches)
    for layer in prepared.free:
        module = prepared.model.get_submodule(layer.name)
        target = full_target(layer, module.weight, s.get(layer.name), None)
        weight = target.weight
        vectors = torch.linalg.eigh(target.times_moment(weight) @ weight.mT)[1]
        rank = max(1, int(share * layer.weights / (layer.groups * (layer.patch + layer.out_channels))))
        vectors = vectors[..., -rank:]
        with torch.no_grad():
            module.weight.copy_(in_own_shape(layer, vectors @ (vectors.mT @ weight)))


def tltorch_fits(prepared: Any, share: float, kind: str) -> None:
    """Every convolution by tltorch's decomposition at a fixed share of its weights; others by nothing."""
    from tltorch import FactorizedConv

    for layer in prepared.free:
        module = prepared.model.get_submodule(layer.name)
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            new = FactorizedConv.from_conv(module, rank=share, decompose_weights=True, factorization=kind)
            with torch.no_grad():
                module.weight.copy_(new.weight.to_tensor().reshape(module.weight.shape))


# --- efforts -------------------------------------------------------------------------------------------


def compare_efforts(
    name: str, device: str, space: SearchSpace | None = None, efforts: Sequence[str] = (*EFFORTS, THOROUGH)
) -> list[dict[str, Any]]:
    """CPU seconds and KL of every effort at six budgets, each effort with an empty cache.

    CPU seconds are those of the first seed, to whom the fits count; the KL is the mean over the seeds.

    Args:
        name: The network.
        device: Where it runs.
        space: The search space. Default: `default`.
        efforts: The efforts.
    """
    task = NETWORKS[name]()
    task = dataclasses.replace(task, model=task.model.to(device), score=None, test=None)
    rows = []
    for effort in efforts:
        with tempfile.TemporaryDirectory() as cache:
            start = _cpu_seconds()
            own = dataclasses.replace(space or load_space("default"), effort=effort)
            prepared = prepare(task, own, cache, show_progress)
            row: dict[str, Any] = {"network": name, "effort": effort, "device": _described(device), "budgets": {}}
            row["preparation"] = _cpu_seconds() - start
            row["stages"] = dict(prepared.clock)
            for share in BUDGETS:
                start = _cpu_seconds()
                problem = prepared.problem({"params": share})
                fitting = problem.fitting
                found = [_objective(prepared, problem, SEEDS[0])]
                seconds = _cpu_seconds() - start
                found += [_objective(prepared, problem, seed) for seed in SEEDS[1:]]
                row["budgets"][str(share)] = {
                    "seconds": seconds,
                    "kl": sum(found) / len(found),
                    "kl by seed": found,
                    "predicted": allocate(problem).loss,
                    "fits": fitting["final"] if fitting else None,  # None: all
                    "settled": fitting["settled"] if fitting else True,
                }
        rows.append(row)
        print(efforts_table(rows), flush=True)
    return rows


def _objective(prepared: Any, problem: Any, seed: int) -> float:
    found = run_search(prepared, problem, SearchSettings(seed=seed), progress=show_progress)
    return found.info["objective"]["best"]


def _cpu_seconds() -> float:
    """CPU seconds of this process and its workers, which count once they have ended."""
    release_workers()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


def efforts_table(rows: Sequence[dict[str, Any]]) -> str:
    """The efforts as Markdown: at each budget the KL (beside that of thorough), CPU seconds and fits to the end."""
    budgets = list(rows[0]["budgets"])
    head = "".join(f" {float(b):.0%} |" for b in budgets)
    lines = [f"| network, effort | preparation, CPU s |{head}", "|" + "---|" * (2 + len(budgets))]
    for r in rows:
        other = next((x for x in rows if x["network"] == r["network"] and x["effort"] == THOROUGH != r["effort"]), None)
        cells = []
        for b, found in r["budgets"].items():
            above = f" ({found['kl'] / other['budgets'][b]['kl'] - 1:+.1%})" if other else ""
            fits = "" if found["fits"] is None else f", {found['fits']:,} fits"
            cells.append(f"{found['kl']:.4g}{above}, {found['seconds']:.0f} s{fits}")
        lines.append(f"| {r['network']}, {r['effort']} | {r['preparation']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- table and plot ------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| network, effort | weights | seconds | further | stages | passes | peak | KL | others: seconds, KL |"
    lines = [head, "|" + "---|" * 9]
    for r in rows:
        if "seconds" not in r:
            lines.append(f"| {r['network']} | | {r['note']} | | | | | | |")
            continue
        stages = ", ".join(f"{k} {v:.0f}" for k, v in r["stages"].items() if v >= 0.5)
        peak = ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in r["memory"].items())
        others = "; ".join(f"{k}: {v['seconds']:.1f}, {v['kl']:.3g}" for k, v in r["opponents"].items())
        lines.append(
            f"| {r['network']}, {r['effort']} | {r['weights']:,} | {r['seconds']:.0f} | {r['further']:.1f} | {stages} "
            f"| {r['passes']:.1f} | {peak} | {r['kl']:.3g} | {others} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds against weights, with what the counted operations predict."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted((r for r in rows if "seconds" in r), key=lambda r: r["weights"])
    if not rows:
        return
    rate = math.exp(sum(math.log(r["operations"] / r["seconds"]) for r in rows) / len(rows))
    counted = sorted([(r["weights"], r["operations"]) for r in rows] + [transformer(*x) for x in TRANSFORMERS.values()])
    _, ax = plt.subplots(figsize=(6, 4))
    ax.loglog([w for w, _ in counted], [n / rate for _, n in counted], "--", label="counted operations")
    ax.loglog([r["weights"] for r in rows], [r["seconds"] for r in rows], "o", label="measured")
    for r in rows:
        ax.annotate(r["network"], (r["weights"], r["seconds"]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    ax.set(xlabel="weights", ylabel="seconds to the first plan")
    ax.legend()
    plt.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--effort", default=NORMAL, choices=(*EFFORTS, THOROUGH))
    parser.add_argument("--limit-minutes", type=float, help="of all networks together")
    parser.add_argument("--memory", action="store_true", help="VGG-16 alone, against its bound on memory")
    parser.add_argument("--efforts", action="store_true", help="compare efforts at six budgets (default: of ResNet-20)")
    parser.add_argument("--row", help="measure this network here, and print its row as JSON in the last line")
    args = parser.parse_args()
    own, imported = Path(__file__).resolve().parents[1], Path(rankopt.__file__).resolve().parents[1]
    if own != imported:
        parser.error(f"this would measure the rankopt in {imported}: set PYTHONPATH={own}")
    if args.row:
        print(json.dumps(measure(args.row, args.device, args.effort)))
        return
    if args.efforts:
        names = ["resnet20"] if args.only == parser.get_default("only") else args.only.split(",")
        for name in names:
            _write_efforts(compare_efforts(name, args.device), args.device.partition(":")[0])
        return
    names = ["vgg16"] if args.memory else args.only.split(",")
    if unknown := set(names) - NETWORKS.keys():
        parser.error(f"no network {', '.join(sorted(unknown))}: there are {', '.join(NETWORKS)}")
    end = None if args.limit_minutes is None else time.monotonic() + 60 * args.limit_minutes
    rows = {}
    for name in names:
        rows[name] = _apart(name, args.device, args.effort, end)
        print(table([rows[name]]))
        _write(rows, args.device.partition(":")[0])
    if args.memory and max(rows["vgg16"].get("memory", {"": math.inf}).values()) > LIMIT_BYTES:
        sys.exit(f"VGG-16 took more than {LIMIT_BYTES / 1e9:.0f} GB: {rows['vgg16'].get('memory', 'it did not end')}")


def _apart(name: str, device: str, effort: str, end: float | None) -> dict[str, Any]:
    """The row of one network, measured in a process of its own."""
    command = [sys.executable, __file__, "--row", name, "--device", device, "--effort", effort]
    left = None if end is None else max(end - time.monotonic(), 0.01)
    print(f"{name} ...", flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=left, check=True)
    except subprocess.TimeoutExpired:
        return {"network": name, "note": "over the time limit"}
    except subprocess.CalledProcessError as error:
        return {"network": name, "note": f"failed with exit code {error.returncode}"}
    *said, last = done.stdout.splitlines()
    print("\n".join(said))
    return json.loads(last)


def _write(rows: dict[str, dict[str, Any]], device: str) -> None:
    path = RESULTS / f"{device}.json"
    known = {row["network"] for row in _rows(path)}
    found = _kept(path, [row for name, row in rows.items() if "seconds" in row or name not in known])
    path.with_suffix(".md").write_text(table(found))
    plot(found, path.with_suffix(".png"))


def _write_efforts(rows: Sequence[dict[str, Any]], device: str) -> None:
    path = RESULTS / f"efforts_{device}.json"
    path.with_suffix(".md").write_text(efforts_table(_kept(path, rows)))


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def _kept(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a file holds once rows of some networks, with their date, have taken the place of earlier ones."""
    measured = {row["network"] for row in rows}
    now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    every = [*(row for row in _rows(path) if row["network"] not in measured), *(row | {"date": now} for row in rows)]
    found = sorted(every, key=lambda row: [*NETWORKS].index(row["network"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
