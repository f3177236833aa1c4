"""Study: the sentence encoder MiniLM with its Linear layers at 50 and 30 % of their weights, without training.

    .venv/bin/python studies/language.py --minutes 30    # again and again, until all rows are there

Writes studies/results/language.{json,md} after every row; what was fitted is in the cache. Every method has the same
count: the weights of the 36 Linear maps (queries, keys and values each by itself) times 0.5 or 0.3; biases and norms
are kept, and so is the table of words, which the encoder reads. Fidelity is measured on the test text alone: texts of
licences that neither the calibration nor the validation has (studies/tasks/minilm.py), each row once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import runpy
import time
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

from rankopt.candidates.cache import FactorStore
from rankopt.candidates.effort import THOROUGH
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.files import write_beside
from rankopt.core.records import Candidate
from rankopt.decompositions.plan import apply
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.counting import count
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "language.json"
MINILM = runpy.run_path(str(HERE / "tasks" / "minilm.py"))
FRACTIONS = (0.5, 0.3)
SVD, INPUTS, OUTPUTS = "uniform SVD", "uniform SVD, inputs whitened", "uniform SVD, output metric"
BASELINES = {SVD: (False, False), INPUTS: (True, False), OUTPUTS: (True, True)}  # statistics used: S, H
SPACES = {
    "rankopt, svd_out": SearchSpace("svd_out", families=("svd_out",), points=8),
    "rankopt, svd_out + svd_grouped": SearchSpace(
        "svd", families=("svd_out", "svd_grouped"), points=8, steps=100, effort=THOROUGH
    ),
    "rankopt, default space": load_space("default").adjusted(effort=THOROUGH),
}
console = Console(stderr=True)


class OutOfTimeError(Exception):
    """The minutes are over."""


class Deadline:
    """A progress display that stops the work between two steps."""

    def __init__(self, minutes: float) -> None:
        self.end, self.said = time.monotonic() + 60 * minutes, 0.0

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        for i, item in enumerate(items):
            self.check()
            if time.monotonic() > self.said + 30:
                self.said = time.monotonic()
                console.print(f"{what}: {i} of {total}", highlight=False)
            yield item

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise OutOfTimeError


# --- fidelity --------------------------------------------------------------------------------------------


@torch.inference_mode()
def embeddings(encoder: nn.Module, embed: nn.Module, texts: list[str]) -> Tensor:
    """Unit vectors (n, 384), float64."""
    parts = [MINILM["batch"](texts[i : i + 64]) for i in range(0, len(texts), 64)]
    return torch.cat([encoder(embed(b["ids"]), b["mask"]) for b in parts]).double()


def fidelity(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Of embeddings (n, d) to the dense model's: the mean cosine with its 95 % half-width over texts, the least cosine,
    and Spearman's rank correlation of the n (n - 1) / 2 pairwise similarities."""
    cosines = (found * wanted).sum(1)
    upper = torch.triu_indices(len(found), len(found), 1)
    pairs = [(e @ e.T)[upper[0], upper[1]].numpy() for e in (found, wanted)]
    return {
        "cosine": cosines.mean().item(),
        "cosine_half_width": 1.96 * cosines.std().item() / math.sqrt(len(cosines)),
        "cosine_least": cosines.min().item(),
        "spearman": float(spearmanr(*pairs).statistic),
    }


# --- models ----------------------------------------------------------------------------------------------


def budget(prepared: Prepared, fraction: float) -> int:
    """Parameters of the encoder with its Linear maps at this fraction of their weights."""
    return prepared.dense.params - math.ceil((1 - fraction) * sum(layer.weights for layer in prepared.free))


def uniform(prepared: Prepared, fraction: float, moments: bool, metrics: bool) -> nn.Module:
    """Every layer as an SVD of the largest rank with at most this fraction of its weights."""
    svd, store, chosen = DECOMPOSITIONS["svd_out"], FactorStore(prepared.factors.cache), []
    for layer in prepared.free:
        s, h = prepared.statistics[layer.name]
        weight: Tensor = prepared.model.get_submodule(layer.name).weight.detach()  # type: ignore[operator]
        ranks = svd.ranks(layer, [fraction])
        (fit,) = svd.fit(layer, weight, ranks, s if moments else None, h if metrics else None)
        store.kept[layer.name] = fit.factors
        chosen.append(Candidate(svd.name, fit.rank, svd.cost(layer, fit.rank), fit.error, key=layer.name))
    return apply(prepared.task.model, prepared.free, chosen, store)


def measure(cells: dict[str, Any], deadline: Deadline) -> None:
    """Fill in the missing rows, the cheap ones first."""
    task = dataclasses.replace(MINILM["minilm"](), test=None)
    embed, texts = MINILM["pretrained"]().embeddings, MINILM["texts"]("test")
    wanted = embeddings(task.model, embed, texts)
    ready: dict[str, Prepared] = {}  # by search space: the task's own objective is measured anew for each
    for method in (*BASELINES, *SPACES):
        todo = [f for f in FRACTIONS if f"{method} {f}" not in cells]
        if not todo:
            continue
        start = time.monotonic()
        space = SPACES.get(method, SPACES["rankopt, svd_out"])
        prepared = ready[space.name] = ready.get(space.name) or prepare(task, space, None, deadline, workers=1)
        shared = time.monotonic() - start
        for fraction in todo:
            deadline.check()
            start = time.monotonic()
            most, families = budget(prepared, fraction), {"svd_out": len(prepared.free)}
            if method in BASELINES:
                model = uniform(prepared, fraction, *BASELINES[method])
            else:
                result = run_search(
                    prepared, prepared.problem({"params": most}), SearchSettings("knapsack"), progress=deadline
                )
                model, rows = result.model, [x for x in result.info["layers"] if x["kind"] == "Linear"]
                families = {m: sum(x["method"] == m for x in rows) for m in sorted({x["method"] for x in rows})}
            seconds = time.monotonic() - start
            params = count(model, task.example_input).params
            assert params <= most, f"{method}: {params} parameters, allowed are {most}"
            linear = sum(layer.weights for layer in prepared.free)
            cells[f"{method} {fraction}"] = {
                "method": method,
                "fraction": fraction,
                "params": params,
                "linear_share": 1 - (prepared.dense.params - params) / linear,
                **fidelity(embeddings(model, embed, texts), wanted),
                "families": families,
                "seconds": round(seconds, 1),
                "seconds_shared": round(shared, 1),
                "texts": len(texts),
                "seed": 0,
                "date": date.today().isoformat(),
                "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}",
            }
            write_beside(RESULTS, lambda p: p.write_text(json.dumps(cells, indent=1)))
            write_beside(RESULTS.with_suffix(".md"), lambda p: p.write_text(table(cells)))
            console.print(f"{method} at {fraction:.0%}: {cells[f'{method} {fraction}']}", highlight=False)


def table(cells: dict[str, Any]) -> str:
    """The results as markdown."""
    some = next(iter(cells.values()))
    lines = [
        "# MiniLM's Linear layers, without training",
        "",
        f"Made by `python studies/language.py`, seed 0, {some['machine']}, {some['date']}. Fidelity of the",
        f"embeddings of {some['texts']} texts (MPL-2.0, Apache-2.0, Artistic) to the dense model's, calibrated",
        "on others (GPL, LGPL). Cosine: the mean over texts and its 95 % interval. Spearman: rank correlation of all",
        "pairwise similarities. Weights: of the 36 Linear maps; the table of words stays dense. *Inputs whitened*: the",
        "SVD that is best for each layer's outputs on the calibration text; *output metric*: weighted by what the",
        "model feels of them, too.",
        "",
        "| weights kept | method | cosine | least | Spearman | weights, exactly | layers by family |",
        "|---|---|---|---|---|---|---|",
    ]
    for fraction in FRACTIONS:
        here = [c for c in cells.values() if c["fraction"] == fraction]
        best = max((c["cosine"] for c in here), default=0)
        for c in here:
            mark = "**" if c["cosine"] == best else ""
            families = ", ".join(f"{n} {f}" for f, n in c["families"].items())
            lines.append(
                f"| {fraction:.0%} | {c['method']} | {mark}{c['cosine']:.4f}{mark} ± {c['cosine_half_width']:.4f} "
                f"| {c['cosine_least']:.3f} | {mark}{c['spearman']:.4f}{mark} | {c['linear_share']:.2%} | {families} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this many; run again to go on")
    given = parser.parse_args()
    cells = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    try:
        measure(cells, Deadline(given.minutes))
    except OutOfTimeError:
        console.print("the minutes are over: run again to go on")
    if cells:
        print(table(cells))


if __name__ == "__main__":
    main()
