"""Ray Tune with a trainable of your own: rankopt proposes plans within a budget, Tune runs them where and how you say.

Needs `pip install 'rankopt[ray]'`. Run: python examples/ray_tune.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

import rankopt
from rankopt.experiments.digits import digits
from rankopt.ray import PlanBuilder, RankSearch


def trainable(config: Mapping[str, Any], build: PlanBuilder) -> None:
    """One trial, in a process of its own: fine-tune the model here, score it as you like, report what you like."""
    model = build(config["plan"])
    score = digits().score
    assert score is not None
    tune.report({"accuracy": score(model), "parameters": sum(p.numel() for p in model.parameters())})


def main() -> None:
    prepared = rankopt.prepare(digits(), families=["svd_out", "tucker2"])
    search = RankSearch(prepared, {"params": 0.3}, trials=4, metric="accuracy", mode="max")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    results = tune.Tuner(
        tune.with_parameters(trainable, build=search.builder),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, max_concurrent_trials=2),
        run_config=tune.RunConfig(name="ranks", storage_path=str(Path("runs").resolve()), verbose=0),
    ).fit()
    best = results.get_best_result("accuracy", "max")
    assert best.config is not None and best.metrics is not None
    for layer, choice in best.config["plan"].items():
        print(f"{layer:10} {choice}")
    print(f"best of {len(results)}: {best.metrics['accuracy']:.1%} with {best.metrics['parameters']:,} parameters")
    model = search.builder(best.config["plan"])
    assert sum(p.numel() for p in model.parameters()) == best.metrics["parameters"]


if __name__ == "__main__":
    main()
