"""Study: pretrained CIFAR-10 ResNets under parameter and MAC budgets, without any training.

    .venv/bin/python studies/no_training.py            # all cells, about 25 minutes on two cores
    .venv/bin/python studies/no_training.py resnet20   # those of one model
    .venv/bin/python studies/no_training.py --space all  # ResNet-20 with every family; fitting takes longer

Writes studies/results/no_training.{json,md,png}, or no_training_SPACE.{json,md}. Each cell is one `knapsack` plan; its
test accuracy is read once. Cells already in the JSON are kept: delete the file to measure anew. Peers' figures come
from ../shared/reference/peers.json where it exists.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track as bar

from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import load_space
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "no_training.json"
PEERS = HERE.parents[1] / "shared" / "reference" / "peers.json"
FRACTIONS = (0.6, 0.5, 0.4, 0.3, 0.2, 0.15)  # of parameters and of MACs, in a search space that is not the default
REFINED = {"resnet20": (0.15, 0.2)}  # of the parameters; with `--refine`
CELLS = {
    "resnet20": {"params": (0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15), "macs": (0.5, 0.3)},
    "resnet56": {"params": (0.5,)},
}
console = Console(stderr=True)


def wanted(model: str) -> dict[str, tuple[str, float, bool]]:
    """Key -> (metric, fraction, refined) of a model's cells."""
    plain = {f"{model} {m}={f}": (m, f, False) for m, fractions in CELLS[model].items() for f in fractions}
    return plain | {f"{model} params={f} refined": ("params", f, True) for f in REFINED.get(model, ())}


def in_space() -> dict[str, tuple[str, float, bool]]:
    """The cells of ResNet-20 in another search space."""
    cells = [("params", False), ("params", True), ("macs", False)]
    return {f"resnet20 {m}={f}{' refined' * refined}": (m, f, refined) for m, refined in cells for f in FRACTIONS}


def measure(
    model: str, cells: dict[str, Any], wants: dict[str, tuple[str, float, bool]], space: str, path: Path
) -> None:
    """Fill in the missing cells of one model."""
    todo = {key: cell for key, cell in wants.items() if key not in cells}
    if not todo:
        return
    prepared = prepare(
        load_task(f"{HERE}/tasks/cifar10.py:{model}"),
        load_space(space).adjusted(effort=THOROUGH),
        progress=lambda x, what, n: bar(x, what, n, console=console),
    )
    shared = {k: round(v, 1) for k, v in prepared.clock.items()}
    families = {k: round(v, 1) for k, v in prepared.family_seconds.items()}
    console.print(f"{model}: shared by all budgets, seconds {shared}; of fitting per family {families}")
    for key, (metric, fraction, refined) in todo.items():
        prepared.clock.clear()
        start = time.perf_counter()
        result = run_search(prepared, prepared.problem({metric: fraction}), SearchSettings("knapsack", refine=refined))
        info, seconds = result.info, time.perf_counter() - start
        cells[key] = {
            "model": model,
            "metric": metric,
            "fraction": fraction,
            "params": info["cost"]["compressed"]["params"] / info["cost"]["dense"]["params"],
            "macs": info["cost"]["compressed"]["macs"] / info["cost"]["dense"]["macs"],
            "dense_top1": info["score"]["dense"]["test"],
            "top1": info["score"]["compressed"]["test"],
            "kl_plan": info["objective"]["best"],
            "kl": prepared.objective(result.model),
            "refined": refined,
            "seconds": round(seconds - prepared.clock["test"], 1),
            "seconds_test": round(prepared.clock["test"], 1),
            "families": {
                f: sum(x["method"] == f for x in info["layers"]) for f in {x["method"] for x in info["layers"]}
            },
            "shared_seconds": shared,
            "family_seconds": families,
            "seed": 0,
            "date": date.today().isoformat(),
            "machine": f"{torch.get_num_threads()} cores, {platform.machine()}, torch {torch.__version__}",
        }
        path.write_text(json.dumps(cells, indent=1))
        console.print(f"{key}: {100 * info['score']['compressed']['test']:.2f} %, {seconds:.0f} s")


def peers() -> dict[str, dict[float, float]]:
    """Method -> parameter percentage -> top-1 %, for ResNet-20 without training."""
    found: dict[str, dict[float, float]] = {}
    if PEERS.is_file():
        for row in json.loads(PEERS.read_text())["rows"]:
            if row.get("model") == "resnet20" and row.get("acc") and "budget" in row and not row.get("after"):
                found.setdefault(f"{row['peer']} {row['method']}", {})[float(row["budget"])] = row["acc"]
    return {name: cells for name, cells in found.items() if len(cells) >= 4}


def table(cells: dict[str, Any], space: str = "default") -> str:
    """The results as markdown."""
    option = "" if space == "default" else f" --space {space}"
    lines = [
        "# Without any training: pretrained CIFAR-10 ResNets",
        "",
        f"Made by `python studies/no_training.py{option}`; strategy `knapsack`, search space `{space}`, seed 0.",
        "Budgets are of the whole model; top-1 on the 10,000 test images, read once a cell. KL: divergence from the",
        "dense model on 2,000 augmented training images, what the search minimises. Seconds: one further budget,",
        "test aside; `refined`: with `--refine`, which refits the plan layer after layer, its time included.",
        "",
        "| model | budget | parameters | MACs | dense | top-1 | KL | seconds | layers by family |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cells.values():
        families = ", ".join(f"{n} {f}" for f, n in sorted(c["families"].items(), key=lambda x: -x[1]))
        lines.append(
            f"| {c['model']} | {c['metric']}={c['fraction']}{', refined' if c.get('refined') else ''} "
            f"| {c['params']:.2%} | {c['macs']:.2%} "
            f"| {100 * c['dense_top1']:.2f} | **{100 * c['top1']:.2f}** | {c['kl']:.4f} | {c['seconds']} | {families} |"
        )
    shared = {c["model"]: c for c in reversed(cells.values())}  # the first cell's run fitted, later ones found it done
    lines += ["", "Shared by all budgets of a model, seconds (fitting per family summed over workers):", ""]
    for model, c in shared.items():
        lines.append(f"- {model}: {c['shared_seconds']}; {c['family_seconds']}; {c['machine']}, {c['date']}")
    others, budgets = peers(), (80, 60, 50, 40, 30, 20)
    if others:
        lines += [
            "",
            "## ResNet-20 beside existing tools, % of parameters kept",
            "",
            "| tool and method | " + " | ".join(map(str, budgets)) + " |",
            "|---" * (len(budgets) + 1) + "|",
            "| **rankopt knapsack** | " + " | ".join(f"**{ours(cells, b)}**" for b in budgets) + " |",
        ]
        for name, row in sorted(others.items(), key=lambda x: -x[1].get(50.0, 0)):
            lines.append(f"| {name} | " + " | ".join(f"{row[b]:.2f}" if b in row else "–" for b in budgets) + " |")
    return "\n".join(lines) + "\n"


def ours(cells: dict[str, Any], percent: int) -> str:
    cell = cells.get(f"resnet20 params={percent / 100}")
    return f"{100 * cell['top1']:.2f}" if cell else "–"


def update_readme(cells: dict[str, Any]) -> None:
    """Put the short table into the README, between its two marks."""
    budgets, others = (60, 50, 40, 30, 20, 15), peers()
    lines = [
        f"| ResNet-20 on CIFAR-10, top-1 %, dense 91.73; % of parameters kept: | {' | '.join(map(str, budgets))} |",
        "|---" * (len(budgets) + 1) + "|",
        f"| **rankopt**, `knapsack` | {' | '.join(f'**{ours(cells, b)}**' for b in budgets)} |",
    ]
    for name in ("tltorch cp", "torchprune ALDSNetPlus", "uniform svd_split", "musco vbmf"):
        row = others.get(name, {})
        lines.append(f"| {name} | " + " | ".join(f"{row[b]:.1f}" if b in row else "–" for b in budgets) + " |")
    readme = HERE.parent / "README.md"
    head, rest = readme.read_text().split("<!-- results -->")
    tail = rest.split("<!-- /results -->")[1]
    made = (
        "Made by `python studies/no_training.py` (seed 0, two CPU cores); all cells, budgets in MACs, dates\n"
        "and seconds are in [studies/results/no_training.md](studies/results/no_training.md)."
    )
    readme.write_text(f"{head}<!-- results -->\n" + "\n".join(lines) + f"\n\n{made}\n<!-- /results -->{tail}")


def picture(cells: dict[str, Any]) -> None:
    """Top-1 against parameters kept, with the peers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, row in sorted(peers().items(), key=lambda x: -x[1].get(50.0, 0)):
        axes.plot(sorted(row), [row[b] for b in sorted(row)], "o-", lw=1, ms=3, alpha=0.7, label=name)
    mine = sorted(
        (c["params"], c["top1"])
        for c in cells.values()
        if c["model"] == "resnet20" and c["metric"] == "params" and not c.get("refined")
    )
    axes.plot([100 * p for p, _ in mine], [100 * t for _, t in mine], "ko-", lw=2.5, ms=6, label="rankopt knapsack")
    axes.axhline(91.73, color="gray", ls=":", lw=1)
    axes.annotate("dense 91.73 %", (15, 92.6), color="gray", fontsize=9)
    axes.set(xlabel="parameters kept, % of the whole model", ylabel="top-1 on CIFAR-10 test, %", ylim=(5, 97))
    axes.set_title("ResNet-20, compressed without any training")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(CELLS))
    parser.add_argument("--space", default="default", help="another search space, for ResNet-20 alone")
    given = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    path = RESULTS if given.space == "default" else RESULTS.with_stem(f"no_training_{given.space}")
    cells = json.loads(path.read_text()) if path.is_file() else {}
    if given.space != "default":
        measure("resnet20", cells, in_space(), given.space, path)
        path.with_suffix(".md").write_text(table(cells, given.space))
        print(table(cells, given.space))
        return
    for model in given.models:
        measure(model, cells, wanted(model), "default", RESULTS)
    order = [key for model in CELLS for key in wanted(model)]
    cells = {key: cells[key] for key in order if key in cells}
    RESULTS.with_suffix(".md").write_text(table(cells))
    picture(cells)
    if peers():
        update_readme(cells)
    print(table(cells))


if __name__ == "__main__":
    main()
