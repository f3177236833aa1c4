"""Study: a cold preparation on a cluster of two nodes with one core each, against one core.

    python studies/cluster.py                        # ResNet-20, about ten minutes on two free cores
    python studies/cluster.py --task digits --quick  # a minute

The nodes are two raylets on this machine; what they fit comes back to this process. Both preparations are cold and must
give the same plan. Written: studies/results/cluster.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # as one process has, with which two nodes are compared

import torch

from rankopt.candidates.pool import Pool
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.environment import processor
from rankopt.experiments.tasks import load_task
from rankopt.search.ray.runner import RaySearch
from rankopt.strategies.allocation import allocate

RESULTS = Path(__file__).parent / "results"
TASK = str(Path(__file__).parent / "tasks" / "cifar10.py") + ":resnet20"
BUDGET = {"params": 0.3}


def measure(task: str, effort: str, workers: int | Pool) -> dict[str, Any]:
    """Seconds of a cold preparation by stage, and the plan that is allocated."""
    space = load_space("default").adjusted(effort=effort)
    with tempfile.TemporaryDirectory() as cache:
        prepared = prepare(load_task(task), space, cache, workers=workers, budget=BUDGET)
        problem = prepared.problem(BUDGET)  # fits what an effort below thorough left to the budget
        plan = [(c.method, list(c.rank)) for c in problem.candidates(allocate(problem).proposal)]
    stages = {name: round(spent, 1) for name, spent in prepared.clock.items()}
    return {"seconds": round(sum(stages.values()), 1), "stages": stages, "plan": plan}


def on_two_nodes(task: str, effort: str) -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        pool = RaySearch(2).task_pool()
        assert pool is not None, "this process is connected to Ray"
        return measure(task, effort, pool)
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--quick", action="store_true", help="few fits (--effort quick)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    effort = "quick" if chosen.quick else "thorough"
    one, two = measure(chosen.task, effort, 1), on_two_nodes(chosen.task, effort)
    same = one["plan"] == two["plan"]
    record: dict[str, Any] = {"date": str(date.today()), "machine": processor()}
    record |= {"task": Path(chosen.task).name, "effort": effort, "one core": one, "two nodes": two, "same plan": same}
    print(text := table(record))
    RESULTS.joinpath("cluster.json").write_text(json.dumps(record, indent=1) + "\n")
    RESULTS.joinpath("cluster.md").write_text(text)


def table(record: dict[str, Any]) -> str:
    one, two = record["one core"], record["two nodes"]
    lines = [
        "# Preparation on a cluster",
        "",
        f"`python studies/cluster.py{' --quick' * (record['effort'] == 'quick')}` on {record['date']},",
        f"{record['machine']}: {record['task']}, cold caches, effort {record['effort']}; two raylets on one machine",
        "of two cores. Seconds on the clock.",
        "",
        "| stage | one core | two nodes of one core | ratio |",
        "|---|---|---|---|",
    ]
    rows = [("all", one["seconds"], two["seconds"])]
    rows += [(name, spent, two["stages"].get(name, 0.0)) for name, spent in one["stages"].items()]
    lines += [f"| {name} | {a} | {b} | {f'{a / b:.2f}' if b else '–'} |" for name, a, b in rows]
    return "\n".join([*lines, "", f"The same plan: {'yes' if record['same plan'] else 'NO'}.", ""])


if __name__ == "__main__":
    main()
