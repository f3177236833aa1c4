"""What the channels of a compressed network's bonds do: predicted against measured ablation, with controls.

    python studies/bonds.py                         # ResNet-20 at 40 % of the parameters, planted features
    python studies/bonds.py --device cuda --measured 64 --examples 512    # more of both, on a GPU

The network is compressed by `rankopt.compress` and analysed by `rankopt.bonds`. Every measured channel is ablated and
patched on the same images, and so are as many directions of a randomly rotated bond and random directions of the
layer's output. "Within bonds" compares ranks inside each bond only: it leaves out that layers differ in how much they
matter. Planted features: a network of known latent features, of which some are present in each example; how well the
responses of channels tell which (the best channel's AUC for each feature), with the same controls.
Written: studies/results/bonds.{json,md}, and the page studies/results/bonds.html with --page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import rankopt
from rankopt.core.environment import processor
from rankopt.experiments.tasks import load_task

RESULTS = Path(__file__).parent / "results"


# --- ResNet-20 ---------------------------------------------------------------------------------------


def compressed(seed: int, folder: Path | None) -> rankopt.Result:
    """ResNet-20 at 40 % of the parameters; read from a run folder if it is there, and written to it if it is not."""
    task = load_task(f"{Path(__file__).parent / 'tasks' / 'cifar10.py'}:resnet20")
    if folder and (folder / "result.json").is_file():
        result = rankopt.load_run(task.model, folder)
        result.dense, result.inputs = task.model, list(task.calibration)
        return result
    task = dataclasses.replace(task, score=None, test=None)  # only the channels are of interest here
    families = ["cp_merged", "svd_out", "tucker2"]
    result = rankopt.compress(task, budget={"params": 0.4}, families=families, effort="quick", seed=seed, progress=True)
    if folder:
        result.save(folder)
    return result


def resnet20(measured: int, examples: int, seed: int, device: str, page: bool, folder: Path | None) -> dict[str, Any]:
    result = compressed(seed, folder)
    result.model.to(device)
    assert result.dense is not None
    result.dense.to(device)
    start = time.process_time()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    found = rankopt.bonds(result, measured=measured, examples=examples, classes=names, seed=seed, progress=True)
    found.title = "ResNet-20 at 40 % of the parameters"
    seconds = time.process_time() - start
    if page:
        found.report(RESULTS / "bonds.html")
    kinds = [("channels", "ablated"), ("channels", "patched"), ("rotated", "ablated"), ("random", "ablated")]
    return {
        "params": result.info["budget"]["params"]["achieved"] / result.info["budget"]["params"]["dense"],
        "channels": sum(b.effects.count for b in found.latents.bonds),
        "bonds": len(found.latents.bonds),
        "layers": len({b.layer for b in found.latents.bonds}),
        "seconds": seconds,
        "correlations": [
            {"of": of, "way": way, "all": found.agreement(of, way), "within": found.agreement(of, way, within=True)}
            for of, way in kinds
        ],
        "classes": class_agreement(found),
        "energy": energy_agreement(found),
    }


def class_agreement(found: rankopt.Bonds) -> dict[str, Any]:
    """Predicted against measured change of each class's loss, over the measured channels and all classes."""
    from rankopt.core.statistics import correlation

    pairs = [
        (b.effects.class_predicted[list(b.measured)].flatten(), b.effects.class_measured[list(b.measured)].flatten())
        for b in found.latents.bonds
    ]
    predicted, measured = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    known = predicted.isfinite() & measured.isfinite()
    return dict(correlation(predicted[known].tolist(), measured[known].tolist()))


def energy_agreement(found: rankopt.Bonds) -> dict[str, Any]:
    """The channel's energy, tr(H W_r S W_rᵀ), against the measured rise, within bonds: a simpler predictor."""
    from scipy.stats import spearmanr

    rs = []
    for b in found.latents.bonds:
        at = list(b.measured)
        if len(at) >= 3:
            rs.append(float(spearmanr(b.shares[at], b.effects.measured[0, at]).statistic))
    return {"mean": sum(rs) / len(rs), "bonds": len(rs)}


# --- planted features --------------------------------------------------------------------------------


FEATURES = 8


def planted(
    seed: int, inputs: int = 48, hidden: int = 32, classes: int = 6, examples: int = 1024
) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that reads known features, inputs, and which features each input has.

    Each example has every feature with probability 0.3. The first layer reads them, each with a strength of its own, by
    orthogonal directions; inputs have noise in all directions.
    """
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=g))[0][:FEATURES]
    present = (torch.rand(examples, FEATURES, generator=g) < 0.3).float()
    x = present @ basis + 0.15 * torch.randn(examples, inputs, generator=g)
    strength = torch.linspace(2.0, 1.0, FEATURES)
    mixing = torch.linalg.qr(torch.randn(hidden, FEATURES, generator=g))[0]
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
    with torch.no_grad():
        first.weight.copy_(mixing @ torch.diag(strength) @ basis + 0.01 * torch.randn(hidden, inputs, generator=g))
        first.bias.zero_()
        last.weight.copy_(torch.randn(classes, hidden, generator=g))
    return nn.Sequential(first, nn.Tanh(), last), x, present


def recovered(responses: Tensor, present: Tensor) -> list[float]:
    """For each feature the AUC of the channel that tells it best; the sign of a channel is arbitrary."""
    scores = [
        [roc_auc_score(present[:, f], responses[:, r]) for r in range(responses.shape[1])]
        for f in range(present.shape[1])
    ]
    return [max(max(s, 1 - s) for s in row) for row in scores]


def planted_features(seed: int) -> dict[str, Any]:
    model, x, present = planted(seed)
    result = rankopt.compress(
        model, x.split(128), {"params": 0.62}, families=["svd_out"], ranks={"0": [8]}, keep_dense=["2"], progress=False
    )
    found = rankopt.bonds(result, examples=len(x), measured=None, progress=False)
    bond = found.bond("0")
    auc = {"channels": recovered(bond.effects.responses, present)}
    for name, control in bond.controls.items():
        auc[name] = recovered(control.responses, present)
    return {name: {"least": min(v), "mean": sum(v) / len(v)} for name, v in auc.items()}


# --- the report --------------------------------------------------------------------------------------


def text(record: dict[str, Any]) -> str:
    r = record["resnet20"]
    lines = [
        "# What the channels of bonds do",
        "",
        f"`{record['command']}`, seed {record['seed']}, {record['machine']}, {record['date']}.",
        "",
        f"ResNet-20 at {r['params']:.1%} of the parameters: {r['channels']} channels of {r['bonds']} bonds in "
        f"{r['layers']} layers, {record['examples']} images, {record['measured']} channels of each bond measured; the "
        f"analysis took {r['seconds']:.0f} CPU seconds.",
        "",
        "| predicted for | measured for | Spearman, all bonds (95 %) | within bonds (95 %) | n |",
        "|---|---|---:|---:|---:|",
    ]
    for row in r["correlations"]:
        of = {"channels": f"channels, {row['way']}", "rotated": "rotated bonds", "random": "random directions"}[
            row["of"]
        ]
        lines.append(f"| channels | {of} | {_interval(row['all'])} | {_interval(row['within'])} | {row['all']['n']} |")
    lines += [
        "",
        f"Change of each class's loss, over measured channels and classes: {_interval(r['classes'])}, n = "
        f"{r['classes']['n']:,}. A channel's energy tr(H W S Wᵀ) alone, within bonds: {r['energy']['mean']:.2f} (mean "
        f"of {r['energy']['bonds']} bonds).",
        "",
        "Planted features (8 in a layer of rank 8), AUC of the best channel for each:",
        "",
        "| responses of | least | mean |",
        "|---|---:|---:|",
    ]
    lines += [f"| {name} | {v['least']:.3f} | {v['mean']:.3f} |" for name, v in record["planted"].items()]
    return "\n".join([*lines, ""])


def _interval(entry: dict[str, Any]) -> str:
    if entry["spearman"] is None:
        return str(entry["verdict"])
    return f"{entry['spearman']:.3f} ({entry['low']:.2f} to {entry['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=int, default=6)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", type=Path, help="folder that the compressed network is kept in, to analyse it again")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "bonds")
    given = parser.parse_args()
    record = {
        "command": f"python studies/bonds.py --measured {given.measured} --examples {given.examples}",
        "seed": given.seed,
        "measured": given.measured,
        "examples": given.examples,
        "machine": f"{processor()}, {platform.system()}, {given.device}, {torch.get_num_threads()} thread(s)",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "planted": planted_features(given.seed),
    }
    print(record["planted"], flush=True)
    record["resnet20"] = resnet20(given.measured, given.examples, given.seed, given.device, given.page, given.run)
    given.out.with_suffix(".json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    given.out.with_suffix(".md").write_text(text(record))
    print(text(record))


if __name__ == "__main__":
    main()
