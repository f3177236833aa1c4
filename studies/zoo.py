"""The zoo: architectures of timm, transformers and torch, each compressed, counted again, saved and loaded.

    python studies/zoo.py                 # all, to studies/results/zoo.md and zoo.json
    python studies/zoo.py "hf GPT-2"      # one

For every model: exact stand-ins in the place of its layers reproduce every output; a budget on parameters and one on
MACs are met, counted again by torch's own counter; the saved run loads into a fresh copy of the model with equal
outputs; what stays dense says why. Weights are random: nothing is said about accuracy.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import rankopt
from rankopt.model.forward import inference, outputs, run

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from zoo import ZOO  # studies/tasks/zoo.py

RESULTS = Path(__file__).parent / "results"
SPACE = rankopt.SearchSpace(name="zoo", families=("svd_out",), points=4, steps=0)
BUDGETS = ({"params": 0.8}, {"macs": 0.8})
console = Console(stderr=True)


def visit(name: str) -> dict[str, Any]:
    """Everything that the zoo asks of one model.

    Args:
        name: A name in `ZOO`.

    Returns:
        Its row: parameters, layers, factorised, dense by reason, and for each budget "met" or what went wrong.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"name": name}
    try:
        model, batch = ZOO[name]()
        row["params"] = sum(p.numel() for p in model.parameters())
        for budget in BUDGETS:
            row["budget " + "".join(budget)] = _compressed(name, model, batch, budget, row)
    except Exception as error:  # noqa: BLE001  # the table says what it was
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _compressed(name: str, model: Any, batch: Any, budget: dict[str, float], row: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = rankopt.compress(model, [batch], budget, space=SPACE, cache=Path(folder) / "cache")
        except rankopt.RankoptError as error:
            return f"refused: {error}".splitlines()[0][:300]
        choices = result.plan.choices
        row["layers"] = len(choices)
        row["factorised"] = max(row.get("factorised", 0), sum(c.method != "dense" for c in choices))
        never = Counter(c.reason for c in choices if c.method == "dense" and not c.reason.startswith("dense: "))
        row["dense"] = dict(never.most_common())
        (limit,) = result.limits
        counted = _count(result.model, batch, limit.metric)
        if counted > limit.target:
            return f"OVER: {counted:,} above {limit.target:,}"
        result.save(folder)
        loaded = rankopt.load(ZOO[name]()[0], folder)
        with inference(loaded), inference(result.model):
            a, b = (outputs(run(m, batch)) for m in (result.model, loaded))
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            return "LOADED DIFFERS"
        return "met"


def _count(model: Any, batch: Any, metric: str) -> int:
    """Counted without rankopt: unique parameters, or torch's flop counter over one example."""
    if metric == "params":
        return sum({id(p): p.numel() for p in model.parameters()}.values())
    backends = torch.backends.mkldnn
    one = rankopt.model.inputs.one_example(model, batch)
    slow = backends.flags(False, backends.deterministic, backends.allow_tf32)
    with inference(model), slow, FlopCounterMode(display=False) as flops:
        run(model, one)
    return flops.get_total_flops() // 2


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown.

    Args:
        rows: As `visit` gives them.
    """
    lines = ["| model | parameters | layers | factorised | params=0.8 | macs=0.8 | seconds |", "|---" * 7 + "|"]
    reasons: Counter[str] = Counter()
    for r in rows:
        ends = [r.get("error") or r.get(f"budget {m}", "–") for m in ("params", "macs")]
        cells = [
            r["name"],
            f"{r.get('params', 0):,}",
            r.get("layers", "–"),
            r.get("factorised", "–"),
            *ends,
            r["seconds"],
        ]
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
        reasons.update(r.get("dense", {}))
    lines += ["", "Why layers stay dense, and how many:", ""]
    lines += [f"- {n} × {reason}" for reason, n in reasons.most_common()]
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(ZOO)
    rows = []
    for name in names:
        rows.append(visit(name))
        ends = rows[-1].get("error") or [rows[-1].get(f"budget {m}") for m in ("params", "macs")]
        console.print(f"{name}: {ends}, {rows[-1]['seconds']} s", markup=False, soft_wrap=True)
    met = sum(r.get("budget params") == r.get("budget macs") == "met" for r in rows)
    head = [
        f"# The zoo: {met} of {len(rows)} models meet both budgets, counted again, saved and loaded",
        "",
        f"Made by `python studies/zoo.py` on {date.today().isoformat()}, {platform.machine()}, one thread, torch "
        f"{torch.__version__}; random weights from a config, seed 0.",
        "",
    ]
    text = "\n".join([*head, table(rows), ""])
    if sys.argv[1:]:
        print(text)
        return
    (RESULTS / "zoo.md").write_text(text)
    (RESULTS / "zoo.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
