"""Study: does a policy that was trained on one network start better on another than an untrained one?

    .venv/bin/python studies/transfer.py                                          # ResNet-20 to ResNet-56
    .venv/bin/python studies/transfer.py --source digits --target studies/tasks/cifar10.py:resnet20 --effort quick

Writes studies/results/transfer.{json,md}, the JSON after every evaluation: run again, it goes on where it stopped.
Compared are the first plans of strategy `rl` on the target: with the policy of the source as it comes (`carried`), with
an untrained one (`untrained`), and with one that was trained on the target's own predicted losses (`at home`); beside
them `random`. All take the same number of measured objectives.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import load_space
from rankopt.core.files import write_beside
from rankopt.core.problem import Problem
from rankopt.core.progress import silent
from rankopt.experiments.tasks import load_task
from rankopt.search.comparison import paired
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Evaluate, Study, search
from rankopt.strategies.registry import make_strategy
from rankopt.strategies.rl import Agent

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "transfer.json"
console = Console(stderr=True)


def variants(policy: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The strategies that are compared, with their options."""
    return {
        "carried": ("rl", {"policy": str(policy)}),
        "untrained": ("rl", {"walks": 0}),
        "at home": ("rl", {}),
        "random": ("random", {}),
    }


def first_objectives(
    problem: Problem, evaluate: Evaluate, name: str, options: dict[str, Any], seed: int, trials: int
) -> list[float]:
    """The objectives of a strategy's first plans."""
    found = search(Study(problem, make_strategy(name, problem, seed, options), trials), evaluate)
    return [t.objective for t in found if t.objective is not None]


def prepared_task(task: str, budget: str, effort: str) -> Prepared:
    return prepare(load_task(task), load_space("default").adjusted(effort=effort), None, silent, budget=[budget])


def table(result: dict[str, Any]) -> str:
    """The comparison as markdown."""
    asked, rows = result["asked"], result["objectives"]
    lines = [
        "# Transfer of a policy to another network",
        "",
        f"Made by `{result['command']}`, {date.today().isoformat()}:",
        f"from {asked['source']} to {asked['target']}, {asked['budget']}, seeds 0 to {asked['seeds'] - 1}.",
        f"Objective of the first plan, and the best of the first {asked['trials']}: means over seeds. p: Wilcoxon's",
        "signed-rank test of the best against `untrained`.",
        "",
        "| policy | first plan | best | better in | p |",
        "|---|---|---|---|---|",
    ]
    best = {name: [min(x) for x in of_seeds.values()] for name, of_seeds in rows.items()}
    for name, of_seeds in rows.items():
        cells = [f"{fmean(x[0] for x in of_seeds.values()):.4g}", f"{fmean(best[name]):.4g}"]
        if name != "untrained" and len(best[name]) == len(best.get("untrained", [])):
            compared = paired(best[name], best["untrained"])
            cells += [f"{compared.better} of {len(best[name])}", f"{compared.p:.2g}"]
        lines.append(f"| {name} | " + " | ".join([*cells, "–", "–"][:4]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=f"{HERE}/tasks/cifar10.py:resnet20")
    parser.add_argument("--target", default=f"{HERE}/tasks/cifar10.py:resnet56")
    parser.add_argument("--budget", default="params=0.3")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=5, help="measured plans of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    asked = {k: v for k, v in vars(given).items() if k not in ("out", "seeds")}
    asked |= {k: Path(v).name for k, v in asked.items() if k in ("source", "target")}
    result = json.loads(given.out.read_text()) if given.out.is_file() else {"asked": asked, "objectives": {}}
    typed = {k: v for k, v in vars(given).items() if k != "out" and v != parser.get_default(k)}
    result["command"] = " ".join(["python studies/transfer.py", *(f"--{k} {v}" for k, v in typed.items())])
    if {k: v for k, v in result["asked"].items() if k != "seeds"} != asked:
        raise SystemExit(f"{given.out} is of {result['asked']}: give another --out")
    result["asked"] = {**asked, "seeds": given.seeds}

    policy = given.out.with_suffix(".safetensors")
    if not policy.is_file():
        source = prepared_task(given.source, given.budget, given.effort).problem([given.budget])
        console.print(f"returns on {given.source}: ", Agent(source, 0, save=str(policy)).train()[-1])
    prepared = prepared_task(given.target, given.budget, given.effort)
    problem = prepared.problem([given.budget])
    evaluate = Evaluator.of(prepared, problem)
    evaluate.score = None  # only the objective is compared
    for seed in range(given.seeds):
        for label, (name, options) in variants(policy).items():
            rows = result["objectives"].setdefault(label, {})
            if str(seed) not in rows:
                rows[str(seed)] = first_objectives(problem, evaluate, name, options, seed, given.trials)
                console.print(f"{label} seed {seed}: {rows[str(seed)]}")
                write_beside(given.out, lambda p: p.write_text(json.dumps(result, indent=1)))
    given.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
