"""What is sent to Ray's workers, and what runs there."""

from __future__ import annotations

import dataclasses
import faulthandler
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankopt.candidates.cache import Cache, FactorStore
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.records import Proposal
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Evaluate, Outcome, stages
from rankopt.search.ray.session import line


@dataclass(frozen=True)
class Limits:
    """Of one trial. seconds: until its worker is killed. memory: bytes beyond what model and data take (on Linux)."""

    seconds: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is not None and self.seconds <= 0) or (self.memory is not None and self.memory <= 0):
            raise RankoptError("a trial's limits of time and memory must be above 0")


def pack(evaluate: Evaluate) -> bytes:
    """Pickled here, not by Ray: each worker unpickles tensors and arrays of its own.

    Ray leaves arrays in memory that all share, and torch.from_numpy writes there. Task files travel by value.
    """
    from ray import cloudpickle

    modules = [module for name, module in sys.modules.items() if name.startswith("rankopt_task_")]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(_portable(evaluate) if isinstance(evaluate, Evaluator) else evaluate))
    except RankoptError:
        raise
    except Exception as error:
        raise TaskError(f"the task cannot be sent to Ray's workers ({line(error)}): search without workers") from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _portable(evaluator: Evaluator) -> Evaluator:
    """With the cache's absolute path; with the factors themselves where there are other machines."""
    import ray

    factors = FactorStore(Cache(evaluator.factors.cache.folder.resolve()))
    if any(node["Alive"] and node["NodeManagerHostname"] != socket.gethostname() for node in ray.nodes()):
        factors.keep(c.key for frontier in evaluator.problem.frontiers for c in frontier if c.key)
    return dataclasses.replace(evaluator, factors=factors)


class Worker:
    """Becomes a ray.tune.Trainable: evaluates one proposal after the other, a fidelity a step."""

    def setup(
        self, config: dict[str, Any], payload: bytes, paths: list[str], threads: int, cuda: bool, limits: Limits
    ) -> None:
        torch.set_num_threads(threads)
        sys.path.extend(path for path in paths if path not in sys.path)  # a task file may import its neighbours
        self.payload, self.cuda, self.limits = payload, cuda, limits
        self.evaluate: Evaluate | None = None
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        self.going: Iterator[Outcome] = stages(self._Lazy(self), tuple(config["proposal"]))
        self.spent = 0.0
        return True

    def step(self) -> dict[str, Any]:
        start = time.monotonic()
        if self.limits.seconds:  # from C: also where a hung call holds Python's lock; says where it hung
            faulthandler.dump_traceback_later(max(self.limits.seconds - self.spent, 0.001), exit=True)
        try:
            outcome = next(self.going)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.spent += time.monotonic() - start
        # A tuple, for Tune stumbles over a NaN, or over a metric that is not there.
        shown = {} if outcome.objective is None else {"objective": outcome.objective, "score": outcome.score}
        shown |= {f"rung{i}": value for i, value in enumerate(outcome.rungs)}
        return {"outcome": tuple(outcome), "done": outcome.finished, **shown}

    class _Lazy:
        """The evaluation, unpickled on first use: what goes wrong there is a trial's outcome."""

        def __init__(self, worker: Worker) -> None:
            self.worker = worker

        def stages(self, proposal: Proposal) -> Iterator[Any]:
            evaluate = self.worker.loaded()
            if hasattr(evaluate, "stages"):
                yield from evaluate.stages(proposal)
            else:
                yield evaluate(proposal)

        def __call__(self, proposal: Proposal) -> tuple[float, float | None]:
            return self.worker.loaded()(proposal)

    def loaded(self) -> Evaluate:
        if self.evaluate is None:
            from ray import cloudpickle

            self.evaluate, self.payload = cloudpickle.loads(self.payload), b""
            if isinstance(self.evaluate, Evaluator):
                self.evaluate.model.to("cuda" if self.cuda else "cpu")
            if self.limits.memory:
                _limit_memory(self.limits.memory)
        assert self.evaluate is not None
        return self.evaluate


def _limit_memory(beyond: int) -> None:
    """Allocations fail, as on a full machine, when this process's writable memory has grown by so many bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return
    import resource

    now = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * now + beyond, resource.RLIM_INFINITY))
