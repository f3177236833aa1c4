"""What is sent to Ray's workers, and the code that runs there."""

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
    """Limits of one trial.

    Attributes:
        seconds: Time after which its worker is killed.
        memory: Bytes that it may take beyond model and data; on Linux only.

    Raises:
        RankoptError: If a limit is not above 0.
    """

    seconds: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is not None and self.seconds <= 0) or (self.memory is not None and self.memory <= 0):
            raise RankoptError("a trial's limits of time and memory must be above 0")


def pack(evaluate: Evaluate) -> bytes:
    """Pickle an evaluation for the workers. Task files travel by value.

    It is pickled here and not by Ray, so that each worker has tensors and arrays of its own: Ray would leave arrays in
    shared memory, into which torch.from_numpy writes.

    Args:
        evaluate: Evaluates plans.

    Raises:
        TaskError: If something in it cannot be pickled.
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
    """Replace the cache's path by an absolute one; include the factors if the cluster has other machines."""
    import ray

    factors = FactorStore(Cache(evaluator.factors.cache.folder.resolve()))
    if any(node["Alive"] and node["NodeManagerHostname"] != socket.gethostname() for node in ray.nodes()):
        factors.keep(c.key for frontier in evaluator.problem.frontiers for c in frontier if c.key)
    return dataclasses.replace(evaluator, factors=factors)


class Worker:
    """Becomes a `ray.tune.Trainable`: evaluates one plan after the other, one fidelity per step."""

    def setup(
        self, config: dict[str, Any], payload: bytes, paths: list[str], threads: int, cuda: bool, limits: Limits
    ) -> None:
        """Prepare the worker process.

        Args:
            config: The first plan, as {"proposal": ...}.
            payload: The pickled evaluation.
            paths: Entries of sys.path, since a task file may import its neighbours.
            threads: Threads of torch.
            cuda: Whether the model goes to the GPU.
            limits: Limits of one trial.
        """
        torch.set_num_threads(threads)
        sys.path.extend(path for path in paths if path not in sys.path)
        self.payload, self.cuda, self.limits = payload, cuda, limits
        self.evaluate: Evaluate | None = None
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Begin with another plan.

        Args:
            config: The plan, as {"proposal": ...}.
        """
        self.going: Iterator[Outcome] = stages(self._Lazy(self), tuple(config["proposal"]))
        self.spent = 0.0
        return True

    def step(self) -> dict[str, Any]:
        """Measure the next fidelity."""
        start = time.monotonic()
        if self.limits.seconds:  # from C: works while a hung call holds the GIL, and prints where it hung
            faulthandler.dump_traceback_later(max(self.limits.seconds - self.spent, 0.001), exit=True)
        try:
            outcome = next(self.going)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.spent += time.monotonic() - start
        # As a tuple: Tune fails on metrics that are NaN or missing.
        shown = {} if outcome.objective is None else {"objective": outcome.objective, "score": outcome.score}
        shown |= {f"rung{i}": value for i, value in enumerate(outcome.rungs)}
        return {"outcome": tuple(outcome), "done": outcome.finished, **shown}

    class _Lazy:
        """The evaluation, unpickled on first use, so that an error there is a trial's outcome."""

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
        """The evaluation, unpickled and moved to its device once."""
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
    """Let allocations fail when this process's writable memory has grown by `beyond` bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return
    import resource

    now = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * now + beyond, resource.RLIM_INFINITY))
