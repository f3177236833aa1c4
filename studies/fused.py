"""What each way of `rankopt.fuse` does to the time of an inference: before and after, in one run.

    python studies/fused.py                 # about three minutes on a calm core
    python studies/fused.py --seconds 0.5   # shorter

Batch 1, one thread, CPU. The variants of a row are called in turn; a ratio is the median over rounds of a variant's
time over that of the row's first in the same round, with its quartiles. Times are CPU time of the thread: that others
use the machine, too, stretches them little. Weights are random: they do not matter here.
Written: studies/results/fused.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt import DECOMPOSITIONS, count, fuse, inventory
from rankopt.core.environment import processor
from rankopt.core.timing import by_clock, in_turn
from rankopt.export.fuse import dense_twin, merge_depthwise

RESULTS = Path(__file__).parent / "results"
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and size of ResNet's at 224 x 224
KEPT = 0.4  # of a layer's parameters, where a row does not say


# --- models ------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.shortcut = nn.Identity() if c_in == c_out and stride == 1 else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 224 x 224 (He 2016), with random weights and batch norm statistics."""
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for c_in, c_out, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(c_in, c_out, stride), Block(c_out, c_out, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model.eval()


def factorised(model: nn.Module, x: Tensor, family: str, kept: float) -> nn.Module:
    """A copy with the family's largest layers at this share of their parameters, where it has a place; not fitted."""
    model = nn.Sequential(copy.deepcopy(model))
    found = DECOMPOSITIONS[family]
    for layer in inventory(model, x):
        ranks = found.ranks(layer, [kept]) if layer.reason is None else []
        if ranks:
            new = found.build(model.get_submodule(layer.name), layer, ranks[-1])
            for p in new.parameters():
                nn.init.normal_(p, 0, p[0].numel() ** -0.5)
            model.set_submodule(layer.name, new)
    return model.eval()


def convolution(channels: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride, 1).eval()


def channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


# --- measuring ---------------------------------------------------------------------------------------


def row(name: str, variants: dict[str, tuple[nn.Module, Tensor]], seconds: float) -> dict[str, Any]:
    """Milliseconds of each variant, and its time over the first one's with quartiles."""
    calls: list[Callable[[], Any]] = [lambda m=m, x=x: m(x) for m, x in variants.values()]
    with torch.no_grad():
        spent = in_turn(calls, 11, seconds, sample=partial(by_clock, clock=time.thread_time_ns))
    found: dict[str, Any] = {"name": name, "rounds": len(spent[0]), "variants": {}}
    for (label, (model, x)), times in zip(variants.items(), spent, strict=True):
        ratios = [a / b for a, b in zip(times, spent[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        macs = None if "compile" in label else count(model, x).macs
        times_ms = statistics.median(times) / 1e6
        found["variants"][label] = {"ms": times_ms, "ratio": middle, "low": low, "high": high, "macs": macs}
    print(name, {k: (round(v["ms"], 3), round(v["ratio"], 3)) for k, v in found["variants"].items()}, flush=True)
    return found


def memory_formats(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for channels, size in STAGES:
        x = torch.randn(1, channels, size, size)
        dense, small = (
            convolution(channels),
            factorised(convolution(channels), torch.randn(1, channels, 9, 9), "tucker2", KEPT),
        )
        last = x.contiguous(memory_format=torch.channels_last)
        variants = {
            "tucker2, contiguous": (small, x),
            "tucker2, channels_last": (channels_last(small), last),
            "dense, contiguous": (dense, x),
            "dense, channels_last": (channels_last(dense), last),
        }
        rows.append(row(f"{channels} channels at {size}²", variants, seconds))
    return rows


def depthwise_pair(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for channels, size, kernel in [(c, s, 3) for c, s in STAGES] + [(128, 28, 5), (128, 28, 7)]:
        x = torch.randn(1, channels, size, size)
        dense = nn.Conv2d(channels, channels, kernel, padding=kernel // 2).eval()
        small = factorised(dense, x, "cp", KEPT)
        first, vertical, horizontal, final = small[0]  # type: ignore[misc]
        pair = merge_depthwise(vertical, horizontal, (), largest=kernel**2)
        assert pair is not None
        merged = nn.Sequential(first, pair, final)
        torch.testing.assert_close(merged(x), small(x), rtol=1e-3, atol=1e-3)
        last = x.contiguous(memory_format=torch.channels_last)
        variants = {
            "cp": (small, x),
            "cp, merged": (merged, x),
            "cp, channels_last": (channels_last(small), last),
            "cp, merged, channels_last": (channels_last(merged), last),
            "dense": (dense, x),
        }
        rows.append(row(f"{kernel}×{kernel}, {channels} channels at {size}²", variants, seconds))
    return rows


def batch_norms(seconds: float) -> list[dict[str, Any]]:
    x, dense = torch.randn(1, 3, 224, 224), resnet18()
    small = factorised(dense, x, "tucker2", KEPT)
    rows = []
    for name, model in (("ResNet-18, dense", dense), ("ResNet-18, tucker2", small)):
        folded, last = fuse(model, x), fuse(model, x, channels_last=True)
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-3)
        variants = {"with batch norms": (model, x), "fused": (folded, x), "channels_last": (channels_last(model), x)}
        rows.append(row(name, variants | {"fused, channels_last": (last, x)}, 3 * seconds))
    both = {"dense": (dense, x), "tucker2": (small, x), "dense, fused": (fuse(dense, x), x)}
    rows.append(row("ResNet-18, dense beside tucker2", both | {"tucker2, fused": (fuse(small, x), x)}, 3 * seconds))
    return rows


def adjacent(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for channels, size in STAGES:
        pair = nn.Sequential(nn.Conv2d(channels // 4, channels, 1), nn.Conv2d(channels, channels // 4, 1)).eval()
        x = torch.randn(1, channels // 4, size, size)
        variants = {"two 1×1": (pair, x), "merged": (fuse(pair, x), x)}
        rows.append(row(f"1×1 of {channels // 4}, {channels}, {channels // 4} channels at {size}²", variants, seconds))
    linears, x = nn.Sequential(nn.Linear(384, 1536), nn.Linear(1536, 384)).eval(), torch.randn(1, 64, 384)
    rows.append(
        row("Linear 384, 1536, 384, 64 tokens", {"two": (linears, x), "merged": (fuse(linears, x), x)}, seconds)
    )
    return rows


def forms(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for family in ("tucker2", "cp_merged"):
        for (channels, size), stride in (((64, 56), 1), ((256, 14), 1), ((128, 56), 2)):
            x, dense = torch.randn(1, channels, size, size), convolution(channels, stride)
            smalls = {k: factorised(dense, x, family, k) for k in (0.3, 0.6, 0.9)}
            built = nn.Sequential(dense_twin(smalls[0.9][0]))  # type: ignore[index]
            variants = {"reconstructed": (built, x)} | {f"factors, {k:.0%}": (m, x) for k, m in smalls.items()}
            rows.append(row(f"{family}, {channels} channels at {size}², stride {stride}", variants, seconds))
    return rows


def compiled(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for family in ("tucker2", "cp_merged", "svd_out"):
        x = torch.randn(1, 128, 28, 28)
        small = nn.Sequential(factorised(convolution(128), x, family, KEPT)[0], nn.BatchNorm2d(128), nn.ReLU()).eval()
        with torch.no_grad():
            faster = torch.compile(small)
            faster(x)
        variants = {"eager": (small, x), "compiled": (faster, x), "fused, eager": (fuse(small, x), x)}
        rows.append(row(f"{family}, batch norm, ReLU, 128 channels at 28²", variants, seconds))
    return rows


PARTS: dict[str, tuple[str, Callable[[float], list[dict[str, Any]]]]] = {
    "memory format": (f"1×1, 3×3, 1×1 (tucker2, {KEPT:.0%} of the parameters), by memory format", memory_formats),
    "depthwise pair": (f"CP ({KEPT:.0%} of the parameters): its 3×1 and 1×3 as one 3×3", depthwise_pair),
    "batch norms": ("Batch norms folded, ResNet-18 at 224²", batch_norms),
    "adjacent 1x1": ("Adjacent 1×1 convolutions and Linears merged", adjacent),
    "reconstructed": ("The dense weight, built once, beside the factors at rising ranks", forms),
    "compiled": ("torch.compile", compiled),
}


def text(data: dict[str, Any]) -> str:
    lines = [
        "# Fused layers: time before and after",
        "",
        f"`{data['command']}`, {data['date']}, {data['machine']}, PyTorch {data['torch']}.",
        "Batch 1, one thread. Each cell: milliseconds of CPU time (median); from the second column on its ratio to the",
        "first column's in the same round, median and (quartiles). Below 1 is faster.",
    ]
    for title, rows in data["parts"].items():
        lines += ["", f"## {PARTS[title][0]}"]
        for r, previous in zip(rows, [None, *rows], strict=False):
            labels = list(r["variants"])
            if previous is None or labels != list(previous["variants"]):
                lines += ["", f"| | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|"]
            first, *others = r["variants"].values()
            cells = [f"{v['ms']:.3g} ms: {v['ratio']:.2f} ({v['low']:.2f}–{v['high']:.2f})" for v in others]
            lines.append(f"| {r['name']} | {first['ms']:.3g} ms | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The CPU's name, and how many of its cores are here."""
    return f"{os.cpu_count() or '?'} cores of {processor()}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row; whole models take three times as long")
    parser.add_argument("--note", default="", help="what to say of the machine, such as how busy it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = {
        "command": " ".join(["python studies/fused.py", *sys.argv[1:]]),
        "date": str(datetime.date.today()),
        "machine": machine() + (f" ({arguments.note})" if arguments.note else ""),
        "torch": torch.__version__,
        "parts": {},
    }
    for name, (_, measure) in PARTS.items():
        data["parts"][name] = measure(arguments.seconds)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "fused.json").write_text(json.dumps(data, indent=1))
    (RESULTS / "fused.md").write_text(text(data))


if __name__ == "__main__":
    main()
