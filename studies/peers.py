"""Study: the tools that install from PyPI, run beside rankopt in one process, on ResNet-20 without any training.

    .venv/bin/pip install --no-deps tensorly-torch opt_einsum    # the one peer of these that still installs: `tltorch`
    .venv/bin/python studies/peers.py                            # minutes; run again, it goes on where it stopped

Writes studies/results/peers.{json,md,png}. Budgets are of the whole model. tltorch has no budget of its own: it gets
the largest share of the weights, the same in every convolution but the first, whose model is within the budget. MUSCO,
torchprune and LC do not install beside a current numpy or Python; their figures are those measured before on the same
weights and images (../shared/reference/peers.json, copied into the results with their source).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.files import write_beside
from rankopt.core.records import Task
from rankopt.experiments.tasks import load_task
from rankopt.model.counting import count
from rankopt.model.objective import call
from rankopt.report import pictures
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
MEASURED = HERE.parents[1] / "shared" / "reference" / "peers.json"
SOURCE = "peers.json: measured earlier on the same weights and test images"
BUDGETS = (0.4, 0.25)
NEAR = 0.03  # a figure measured earlier is shown at a budget if its number of parameters is within this share
PEERS: dict[str, dict[str, Any]] = {
    "tltorch cp": {"factorization": "cp"},
    "tltorch tucker, spatial modes kept": {"factorization": "tucker", "fixed_rank_modes": "spatial"},
    "tltorch tt": {"factorization": "tt"},
}
console = Console(stderr=True)


def convolutions(model: nn.Module) -> list[str]:
    """All but the first."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]


def replaced(model: nn.Module, fraction: float, settings: dict[str, Any]) -> nn.Module:
    """A copy with every convolution but the first as tltorch decomposes it, at this fraction of its weights."""
    from tltorch.factorized_layers import FactorizedConv

    changed = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks that TT-SVD cuts
        for name in convolutions(model):
            made = FactorizedConv.from_conv(changed.get_submodule(name), rank=fraction, **settings)
            changed.set_submodule(name, made)
    return changed.eval()


def within(model: nn.Module, most: int, settings: dict[str, Any]) -> nn.Module:
    """At the largest fraction, to a hundredth of a percent, whose model stays within the number of parameters."""
    # TT-SVD cuts ranks, so what it costs is seen when it is done; the others take no time undecomposed.
    quick = {**settings, "decompose_weights": settings["factorization"] == "tt"}
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        params = sum(p.numel() for p in replaced(model, middle, quick).parameters())
        low, high = (middle, high) if params <= most else (low, middle)
    return replaced(model, low, settings)


def ours(task: Task, fraction: float) -> nn.Module:
    prepared = prepare(task, load_space("default").adjusted(effort=THOROUGH), workers=1)
    return run_search(prepared, prepared.problem({"params": fraction}), SearchSettings("knapsack")).model


def measure(cells: dict[str, Any], end: float) -> None:
    """Fill in the missing rows."""
    task = load_task(f"{HERE}/tasks/cifar10.py:resnet20")
    test, task.test = task.test, None  # read here, once a row
    dense = count(task.model, task.example_input)
    makers: dict[str, Callable[[float], nn.Module]] = {"rankopt knapsack": lambda f: ours(task, f)}
    for name, settings in PEERS.items():
        makers[name] = lambda f, s=settings: within(task.model, math.floor(f * dense.params), s)  # type: ignore[misc]
    for fraction in BUDGETS:
        for name, make in makers.items():
            if f"{name} {fraction}" in cells or time.monotonic() > end:
                continue
            start = time.monotonic()
            torch.manual_seed(0)
            model = make(fraction)
            seconds = time.monotonic() - start
            cost = count(model, task.example_input)
            cells[f"{name} {fraction}"] = {
                "tool": name,
                "budget": fraction,
                "params": cost.params / dense.params,
                "macs": cost.macs / dense.macs,
                "top1": call("the test score", test, model),
                "source": f"live, {date.today().isoformat()}, {platform.machine()}, torch {torch.__version__}",
                "seconds": round(seconds, 1),
            }
            write(cells)
            console.print(cells[f"{name} {fraction}"], highlight=False)


def add_measured(cells: dict[str, Any], path: Path) -> None:
    """The other tools' figures without training near the budgets, where there is the file."""
    if not path.is_file():
        return
    for row in json.loads(path.read_text())["rows"]:
        trained = row["peer"] == "finetune" or row.get("after")
        if row.get("model") != "resnet20" or not row.get("acc") or trained or row["peer"] == "tltorch":
            continue
        for fraction in BUDGETS:
            if abs(row["params"] / 100 - fraction) <= NEAR:
                name = f"{row['peer']} {row['method']}"
                cells[f"{name} {fraction}"] = {
                    "tool": name,
                    "budget": fraction,
                    "params": row["params"] / 100,
                    "macs": row["macs"] / 100 if row.get("macs") else None,
                    "top1": row["acc"] / 100,
                    "source": SOURCE,
                    "seconds": row.get("secs"),
                }


def ranked(cells: dict[str, Any], fraction: float) -> list[dict[str, Any]]:
    return sorted((c for c in cells.values() if c["budget"] == fraction), key=lambda c: -c["top1"])


def table(cells: dict[str, Any]) -> str:
    """The results as markdown."""
    lines = [
        "# ResNet-20 on CIFAR-10 without training, beside other tools",
        "",
        "Made by `python studies/peers.py`; seed 0. Top-1 on the 10,000 test images, dense 91.73 %. *Live*: run in",
        "the same process as rankopt. The others were measured earlier on the same weights and images, where they had",
        "a model within 3 points of the budget.",
        "",
        "| budget | tool | parameters | MACs | top-1 | seconds | figure |",
        "|---|---|---|---|---|---|---|",
    ]
    for fraction in BUDGETS:
        for c in ranked(cells, fraction):
            mark = "**" if c["tool"].startswith("rankopt") else ""
            macs = "–" if c["macs"] is None else f"{c['macs']:.1%}"
            seconds = "–" if c["seconds"] is None else f"{c['seconds']:.1f}"
            lines.append(
                f"| {fraction:.0%} | {mark}{c['tool']}{mark} | {c['params']:.1%} | {macs} "
                f"| {mark}{100 * c['top1']:.2f}{mark} | {seconds} | {c['source'].split(',')[0].split(':')[0]} |"
            )
    return "\n".join(lines) + "\n"


def paint(figure: Any, cells: dict[str, Any]) -> None:
    """A bar per tool, one panel per budget, all bars as high."""
    most = max(len(ranked(cells, f)) for f in BUDGETS)
    figure.suptitle("blue: run beside rankopt; grey: measured earlier on the same weights and images", fontsize=9)
    for ax, fraction in zip(figure.subplots(1, len(BUDGETS), sharex=True), BUDGETS, strict=True):
        rows = ranked(cells, fraction)[::-1]
        live = [c["source"].startswith("live") for c in rows]
        first = [c["tool"].startswith("rankopt") for c in rows]
        colours = [
            pictures.ACCENT if f else pictures.POINT if x else pictures.FAINT for f, x in zip(first, live, strict=True)
        ]
        ax.barh([c["tool"] for c in rows], [100 * c["top1"] for c in rows], color=colours, height=0.7)
        for y, c in enumerate(rows):
            inside = c["top1"] > 0.8
            where = {"xytext": (-4 if inside else 3, 0), "ha": "right" if inside else "left", "va": "center"}
            text, colour = f"{100 * c['top1']:.1f}", "white" if inside else pictures.INK
            ax.annotate(text, (100 * c["top1"], y), textcoords="offset points", color=colour, **where)
        ax.set_ylim(len(rows) - 0.5 - most, len(rows) - 0.5)
        ax.axvline(91.73, color=pictures.INK, lw=1, ls=":")
        ax.set_title(f"{fraction:.0%} of the parameters", loc="left", fontsize=10)
        ax.set(xlim=(0, 108), xlabel="top-1, % (dotted: dense)")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)


def write(cells: dict[str, Any]) -> None:
    write_beside(RESULTS, lambda p: p.write_text(json.dumps(cells, indent=1)))
    write_beside(RESULTS.with_suffix(".md"), lambda p: p.write_text(table(cells)))
    rows = max(len(ranked(cells, f)) for f in BUDGETS)
    size = (11.0, 0.9 + 0.27 * rows)
    write_beside(RESULTS.with_suffix(".png"), lambda p: pictures.png(p, paint, cells, size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no row after this many; run again to go on"
    )
    parser.add_argument("--measured", type=Path, default=MEASURED, help="the file of figures measured earlier")
    given = parser.parse_args()
    cells = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    add_measured(cells, given.measured)
    measure(cells, time.monotonic() + 60 * given.minutes)
    write(cells)
    print(table(cells))


if __name__ == "__main__":
    main()
