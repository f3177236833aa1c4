"""A search to be killed; 0 workers: without Ray.

`python -m tests.helpers.search_to_kill OUT SEED TRIALS WORKERS LOG [STORAGE]`
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from rankopt.candidates.prepare import prepare
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import run_search
from rankopt.search.loop import search
from rankopt.search.settings import SearchSettings
from tests.helpers.spaces import QUICK

SECONDS = 0.15


class Slowly:
    """An evaluation that takes its time and notes its start, its end and its process in a log."""

    def __init__(self, evaluate, log):
        self.evaluate, self.log = evaluate, log

    def __call__(self, proposal):
        self.note("start", proposal)
        time.sleep(SECONDS)
        found = self.evaluate(proposal)
        self.note("end", proposal)
        return found

    def note(self, what, proposal):
        with open(self.log, "a") as file:  # noqa: PTH123
            file.write(f"{what} {os.getpid()} {proposal}\n")


def run(out: Path, seed: int, trials: int, workers: int, log: Path, storage: str | None = None) -> None:
    torch.set_num_threads(1)
    prepared = prepare(load_task("digits"), QUICK, workers=1)
    settings = SearchSettings("optuna", trials, seed, resume=True, storage=storage)
    runner = search
    if workers:
        from rankopt.search.ray.runner import RaySearch

        runner = RaySearch(workers)
    out.mkdir(exist_ok=True)
    problem = prepared.problem({"params": 0.3})
    run_search(prepared, problem, settings, out, lambda study, evaluate: runner(study, Slowly(evaluate, log)))


if __name__ == "__main__":
    run(Path(sys.argv[1]), *map(int, sys.argv[2:5]), Path(sys.argv[5]), *sys.argv[6:])
