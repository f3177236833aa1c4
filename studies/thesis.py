"""Study: the thesis's networks with one family and one share of the parameters for every layer.

    .venv/bin/python studies/thesis.py    # its parameter columns (Tables 7.2-7.13, A.1-A.6): seconds, no training

Writes studies/results/thesis_parameters.{csv,md}: every row's printed count beside ours. Ours is the dense model's
with the factorised layers' from rankopt's cost model, at the ranks that the thesis's library chooses (tensorly's rule
for a share, the same share in every layer), plus what that library stores beside the factors. No printed number is
used for it.
"""

from __future__ import annotations

import csv
import math
import runpy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankopt.candidates.prepare import mark_dense
from rankopt.candidates.search_space import load_space
from rankopt.core.records import Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.counting import count
from rankopt.model.inventory import inventory

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "thesis_parameters.csv"
MODELS = runpy.run_path(str(HERE / "tasks" / "thesis_models.py"))
FAMILIES = {"CP": "cp", "Tucker": "tucker2", "TT": "tt"}
FRACTIONS = (0.1, 0.2, 0.5, 0.8)
UNEXPLAINED = "unexplained"
COLUMNS = ("table", "model", "method", "fraction", "printed", "ours", "difference", "remark")


# --- what is printed ---------------------------------------------------------------------------------

UNCOMPRESSED = {
    "ResNet-18": 11_173_962,
    "ResNet-34": 21_282_122,
    "ResNet-50": 23_520_842,
    "VGG-11": 9_231_114,
    "VGG-16": 14_728_266,
    "VGG-19": 20_040_522,
}
EVERYWHERE = {  # the same in all three tables of a model
    ("ResNet-18", "CP"): (1_288_468, 2_389_079, 5_687_499, 8_987_725),
    ("ResNet-34", "CP"): (2_307_890, 4_421_281, 10_751_273, 17_088_005),
    ("ResNet-50", "CP"): (9_486_467, 11_050_056, 15_732_335, 20_409_706),
    ("VGG-11", "CP"): (937_456, 1_860_182, 4_627_272, 7_394_881),
    ("VGG-16", "CP"): (1_491_744, 2_964_470, 7_380_522, 11_797_740),
    ("VGG-19", "CP"): (2_026_948, 4_031_038, 10_040_663, 16_051_973),
    ("ResNet-18", "Tucker"): (1_288_513, 2_387_722, 5_690_166, 8_983_194),
    ("ResNet-34", "Tucker"): (2_304_279, 4_423_928, 10_756_892, 17_068_610),
    ("ResNet-50", "Tucker"): (9_488_912, 11_046_237, 15_737_527, 20_410_051),
    ("VGG-11", "Tucker"): (938_922, 1_858_301, 4_631_515, 7_395_593),
    ("VGG-16", "Tucker"): (1_493_972, 2_962_034, 7_388_040, 11_800_251),
    ("VGG-19", "Tucker"): (2_029_861, 4_028_238, 10_052_199, 16_056_695),
}


class Table(NamedTuple):
    model: str
    pretrained: bool
    tt: tuple[int, int, int, int]


_SHORT = {  # the TT columns that two or three tables share
    "ResNet-18": (723_529, 1_252_568, 1_592_209, 1_728_997),
    "ResNet-34": (1_270_025, 2_329_272, 3_009_193, 3_293_677),
    "ResNet-50": (8_699_744, 9_453_069, 10_627_659, 11_643_420),
    "VGG-11": (452_943, 883_615, 1_137_418, 1_231_198),
    "VGG-16": (745_616, 1_459_699, 1_868_502, 2_019_774),
}
_VGG19 = (2_029_550, 4_022_440, 10_052_593, 16_015_504)
TABLES = {
    "7.2": Table("ResNet-18", False, (1_288_398, 2_384_384, 5_691_839, 8_965_400)),
    "7.3": Table("ResNet-50", False, (2_308_938, 11_040_926, 15_735_579, 20_391_852)),
    "7.4": Table("VGG-11", False, (938_326, 1_856_280, 4_630_781, 7_376_404)),
    "7.5": Table("VGG-19", False, _VGG19),
    "7.6": Table("ResNet-18", True, _SHORT["ResNet-18"]),
    "7.7": Table("ResNet-50", True, _SHORT["ResNet-50"]),
    "7.8": Table("VGG-11", True, _SHORT["VGG-11"]),
    "7.9": Table("VGG-19", True, (1_027_433, 2_013_630, 2_564_808, 2_767_236)),
    "7.10": Table("ResNet-18", True, _SHORT["ResNet-18"]),
    "7.11": Table("ResNet-50", True, _SHORT["ResNet-50"]),
    "7.12": Table("VGG-11", True, _SHORT["VGG-11"]),
    "7.13": Table("VGG-19", True, _VGG19),
    "A.1": Table("ResNet-34", False, _SHORT["ResNet-34"]),
    "A.2": Table("ResNet-34", True, _SHORT["ResNet-34"]),
    "A.3": Table("ResNet-34", True, _SHORT["ResNet-34"]),
    "A.4": Table("VGG-16", False, _SHORT["VGG-16"]),
    "A.5": Table("VGG-16", True, _SHORT["VGG-16"]),
    "A.6": Table("VGG-16", True, _SHORT["VGG-16"]),
}


# --- ranks, as tensorly chooses them for a share f of a layer's n weights ------------------------------


def cp_rank(layer: Layer, fraction: float) -> Rank:
    """R = round(f n / (C + T + kh + kw))."""
    return (max(1, round(fraction * layer.weights / DECOMPOSITIONS["cp"].weights(layer, (1,)))),)


def tucker_rank(layer: Layer, fraction: float) -> Rank:
    """(x C, x T) rounded, with n x² + (C² + T² + kh² + kw²) x = f n: spatial modes keep their full rank."""
    c, t, n = layer.in_channels, layer.out_channels, layer.weights
    x = _root(n, c * c + t * t + sum(k * k for k in layer.kernel), fraction * n)
    return max(1, round(x * c)), max(1, round(x * t))


def tt_rank(layer: Layer, fraction: float) -> Rank:
    """Of the train (C, kh, kw, T): each bond x times the mean of the two modes beside it, rounded.

    Nothing keeps a bond below what the unfolding there can have, or below what its neighbour lets through.
    """
    a, b, c, d = modes = (layer.in_channels, *layer.kernel, layer.out_channels)
    means = [(i + j) / 2 for i, j in pairwise(modes)]
    inner = means[0] * b * means[1] + means[1] * c * means[2]
    x = _root(inner, a * means[0] + d * means[2], fraction * layer.weights)
    return tuple(max(1, round(x * m)) for m in means)


def tt_svd_rank(layer: Layer, fraction: float) -> Rank:
    """What TT-SVD, from left to right, leaves of it: a bond is at most the rows and columns of its matrix."""
    modes = (layer.in_channels, *layer.kernel, layer.out_channels)
    found: list[int] = []
    for i, r in enumerate(tt_rank(layer, fraction)):
        found.append(min(r, (found[-1] if found else 1) * modes[i], math.prod(modes[i + 1 :])))
    return tuple(found)


def _root(a: float, b: float, c: float) -> float:
    """The positive root of a x² + b x = c."""
    return (math.sqrt(b * b + 4 * a * c) - b) / (2 * a)


def rank(method: str, layer: Layer, fraction: float, pretrained: bool) -> Rank:
    """A trained kernel is decomposed: TT-SVD cuts the bonds. From scratch, factors of any rank are drawn."""
    tt = tt_svd_rank if pretrained else tt_rank
    return {"CP": cp_rank, "Tucker": tucker_rank, "TT": tt}[method](layer, fraction)


def stored_besides(method: str, layer: Layer, rank: Rank) -> int:
    """Numbers that tensorly-torch keeps and rankopt does not need: a weight per CP component; of Tucker the factors of
    the spatial modes, square matrices at full rank, which rankopt multiplies into the core."""
    return {"CP": sum(rank), "Tucker": sum(k * k for k in layer.kernel), "TT": 0}[method]


# --- counting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A model's dense count and the layers that are factorised."""

    name: str
    dense: int
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, name: str) -> Network:
        """All convolutions but the first, and but shortcuts, which the thesis does not count as layers either."""
        model, example = MODELS["build"](name), torch.zeros(1, 3, 32, 32)
        space = load_space("thesis-cp")
        every = replace(space, families=("svd_out", *space.families), keep_dense=(*space.keep_dense, "*shortcut*"))
        layers = mark_dense(inventory(model, example), every)
        return cls(name, count(model, example).params, tuple(x for x in layers if x.reason is None))

    def some_blocks(self) -> Network:
        """Without what lies behind the first two blocks of the first three stages."""
        kept = [x for x in self.layers if x.name.startswith("stages.3") or int(x.name.split(".")[2]) < 2]
        return replace(self, layers=tuple(kept))

    def count(self, method: str, fraction: float, pretrained: bool) -> tuple[int, int]:
        """Parameters of the whole model as tensorly-torch stores it, and those of them that rankopt does not need."""
        total = beside = 0
        for layer in self.layers:
            r = rank(method, layer, fraction, pretrained)
            total += DECOMPOSITIONS[FAMILIES[method]].cost(layer, r).params - layer.cost.params
            beside += stored_besides(method, layer, r)
        return self.dense + total + beside, beside


def rows() -> list[dict[str, Any]]:
    """All rows of all tables."""
    networks = {name: Network.of(name) for name in UNCOMPRESSED}
    found = []
    for number, table in TABLES.items():
        network = networks[table.model]
        found.append(_row(number, table.model, "Uncompressed", 1.0, UNCOMPRESSED[table.model], network.dense, ""))
        for method in FAMILIES:
            column = table.tt if method == "TT" else EVERYWHERE[table.model, method]
            for fraction, printed in zip(FRACTIONS, column, strict=True):
                ours, beside = network.count(method, fraction, table.pretrained)
                remark = ""
                if ours != printed:
                    remark = explanation(networks, table, method, fraction, printed)
                elif beside:
                    remark = f"{beside:,} of these tensorly-torch alone stores"
                found.append(_row(number, table.model, method, fraction, printed, ours, remark))
    return found


def _row(table: str, model: str, method: str, fraction: float, printed: int, ours: int, remark: str) -> dict[str, Any]:
    return dict(zip(COLUMNS, (table, model, method, fraction, printed, ours, ours - printed, remark), strict=True))


def explanation(networks: dict[str, Network], table: Table, method: str, fraction: float, printed: int) -> str:
    """What other reading of the text gives the printed count."""
    network, start = networks[table.model], table.pretrained
    if network.count(method, fraction, not start)[0] == printed:
        meant = "from scratch (bonds as drawn)" if start else "from pretrained (bonds cut by TT-SVD)"
        return f"printed is the count {meant}: exact for that"
    if table.model == "ResNet-50":
        some = network.some_blocks()
        if some.count(method, fraction, start)[0] == printed:
            return (
                f"exact with {len(some.layers)} layers factorised (two blocks of stages 1 to 3, all of stage 4) "
                f"instead of the {len(network.layers)} that the text names"
            )
    for other, elsewhere in networks.items():
        if other != table.model and elsewhere.count(method, fraction, start)[0] == printed:
            return f"misprint: this is the count of {other}"
    return UNEXPLAINED


# --- output --------------------------------------------------------------------------------------------


def text(found: list[dict[str, Any]]) -> str:
    """The results as markdown."""
    exact, unexplained = (sum(condition) for condition in _judged(found))
    explained = len(found) - exact - unexplained
    lines = [
        "# The thesis's parameter columns",
        "",
        "Made by `python studies/thesis.py`; all rows are in thesis_parameters.csv. *Ours* comes from rankopt's cost",
        "model; the printed numbers are used for nothing but the comparison.",
        "",
        f"{exact} of {len(found)} rows are exact, {explained} explained below, {unexplained} unexplained.",
        "",
        "| method | rank of a layer of n = C T kh kw weights at a share f | parameters of a layer |",
        "|---|---|---|",
        "| CP | R = round(f n / (C + T + kh + kw)) | R (C + T + kh + kw), and R weights of the components |",
        "| Tucker | (x C, x T) rounded, n x² + (C² + T² + kh² + kw²) x = f n"
        " | C R₁ + R₁ R₂ kh kw + R₂ T, and kh² + kw² |",
        "| TT | x times the mean of the two modes beside a bond, rounded, so that it holds f n weights"
        " | C R₁ + R₁ kh R₂ + R₂ kw R₃ + R₃ T |",
        "",
        "These are the rules of tensorly, which the thesis used through tensorly-torch. The last terms of CP and",
        "Tucker are numbers that tensorly-torch stores and rankopt does not need: weights that the factors can take up",
        "(the thesis's eq. 6.13 omits them, too), and the two spatial factors, square and of full rank. Shortcuts,",
        "first convolution and classifier stay dense. What differs:",
        "",
        "- **TT from pretrained models** has fewer parameters than from scratch: TT-SVD cuts each bond to what its",
        "  matrix can have, while from scratch factors of any size are drawn. Most of these cannot add to what the",
        "  layer can express: beside a spatial mode of 3 a bond is of use up to three times the next one. Cut, a share",
        "  of 80 % is 13 to 16 % of the parameters of ResNet-18, ResNet-34 and the VGGs. Tables A.1 and A.4 (from",
        "  scratch) print the counts from pretrained, Table 7.13 (fine-tuned from pretrained) those from scratch.",
        "- **ResNet-50**: Table 7.1 says that 48 convolutions are factorised. The counts are exact, in all rows but",
        "  one, with 27: two blocks of each of the stages 1 to 3, the first among them, and all three of stage 4. Ours",
        "  is for the 48.",
        "- **ResNet-50, TT, 10 %, from scratch** (Table 7.3) is a misprint: it is ResNet-34's count, and so is the",
        "  compression ratio of 10.186 that the text makes much of.",
        "",
        "| tables | model | method | % | printed | ours | difference | remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tables: dict[tuple[Any, ...], list[str]] = {}
    for r in found:
        if r["difference"]:
            tables.setdefault(tuple(r[c] for c in COLUMNS[1:]), []).append(r["table"])
    for (model, method, fraction, printed, ours, difference, remark), where in tables.items():
        cells = (", ".join(where), model, method, f"{fraction:.0%}", f"{printed:,}", f"{ours:,}", f"{difference:+,}")
        lines.append(f"| {' | '.join(cells)} | {remark} |")
    return "\n".join(lines) + "\n"


def _judged(found: list[dict[str, Any]]) -> tuple[list[bool], list[bool]]:
    """Of every row whether it is exact, and whether it is not explained."""
    return [r["difference"] == 0 for r in found], [r["remark"] == UNEXPLAINED for r in found]


def main() -> None:
    found = rows()
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    RESULTS.with_suffix(".md").write_text(text(found))
    print(text(found))


if __name__ == "__main__":
    main()
