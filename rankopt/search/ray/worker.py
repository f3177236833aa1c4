"""What is sent to Ray's workers, and the code that runs there."""

from __future__ import annotations

import dataclasses
import faulthandler
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from rankopt.candidates.cache import Cache, FactorStore
from rankopt.candidates.pool import unpack
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.core.task_file import Parcel
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import ETA, Evaluate, Outcome, stages
from rankopt.search.ray.session import line, other_machines
from rankopt.search.ray.tune_options import TIME, VALUE


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


class Payload(Parcel):
    """An evaluation on its way to the workers; an `Evaluator` without its problem, so that searches may share it."""

    def unpack(self, problem: Problem | None, scratch: Path) -> Evaluate:
        """Run the task files and unpickle the evaluation.

        Args:
            problem: The problem of an `Evaluator`.
            scratch: Folder for task files that are not on this machine.
        """
        evaluate = unpack(self, scratch)
        if isinstance(evaluate, Evaluator):
            assert problem is not None
            evaluate.problem = problem
        return cast(Evaluate, evaluate)


def pack(evaluate: Evaluate) -> tuple[Payload, Problem | None]:
    """Pickle an evaluation for the workers. Task files travel as files; only what lies in `__main__` goes by value.

    It is pickled here and not by Ray, so that each worker has tensors and arrays of its own: Ray would leave arrays in
    shared memory, into which torch.from_numpy writes.

    Args:
        evaluate: Evaluates plans.

    Returns:
        The evaluation, and the problem if it is an `Evaluator`.

    Raises:
        TaskError: If something in it cannot be pickled.
    """
    elsewhere = other_machines()
    try:
        if not isinstance(evaluate, Evaluator):
            return Payload.pack((DECOMPOSITIONS.registered, evaluate), elsewhere), None
        content = DECOMPOSITIONS.registered, _portable(evaluate, elsewhere)
        return Payload.pack(content, elsewhere), evaluate.problem
    except RankoptError:
        raise
    except Exception as error:
        raise TaskError(f"the task cannot be sent to Ray's workers ({line(error)}): search without workers") from error


def _portable(evaluator: Evaluator, elsewhere: bool) -> Evaluator:
    """Leave out the problem; make the cache's path absolute; include the factors if there are other machines."""
    factors = FactorStore(Cache(evaluator.factors.cache.folder.resolve()))
    if elsewhere:
        factors.keep(c.key for frontier in evaluator.problem.frontiers for c in frontier if c.key)
    return dataclasses.replace(evaluator, factors=factors, problem=cast(Any, None))


class WorkerError(RuntimeError):
    """Raised in a worker that must not evaluate another plan. Ray Tune then replaces its process."""


class Worker:
    """Becomes a `ray.tune.Trainable`: evaluates one plan after the other, one fidelity per step."""

    logdir: str

    def setup(
        self,
        config: dict[str, Any],
        payload: Payload,
        problem: Problem | None,
        paths: list[str],
        threads: int,
        cuda: bool,
        limits: Limits,
    ) -> None:
        """Prepare the worker process.

        Args:
            config: The first plan, as {"proposal": ...}.
            payload: The evaluation.
            problem: Its problem, if it is an `Evaluator`.
            paths: Entries of sys.path, since a task file may import its neighbours.
            threads: Threads of torch.
            cuda: Whether the model goes to the GPU.
            limits: Limits of one trial.
        """
        torch.set_num_threads(threads)
        sys.path.extend(path for path in paths if path not in sys.path)
        self.payload, self.problem, self.cuda, self.limits = payload, problem, cuda, limits
        self.evaluate: Evaluate | None = None
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Begin with another plan.

        Args:
            config: The plan, as {"proposal": ...}.
        """
        self.proposal: Proposal = tuple(config["proposal"])
        self.going: Iterator[Outcome] | None = None
        self.spent = 0.0
        return True

    def step(self) -> dict[str, Any]:
        """Measure the next fidelity.

        Raises:
            WorkerError: If the evaluation cannot be set up, or the GPU failed.
        """
        start = time.monotonic()
        if self.limits.seconds:  # from C: works while a hung call holds the GIL, and prints where it hung
            faulthandler.dump_traceback_later(max(self.limits.seconds - self.spent, 0.001), exit=True)
        try:
            if self.going is None:
                self.going = stages(self._loaded(), self.proposal)
            outcome = next(self.going)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self.cuda and outcome.transient:  # after a CUDA error nothing in this process can be trusted
            raise WorkerError(outcome.error)
        self.spent += time.monotonic() - start
        # As a tuple: Tune fails on metrics that are NaN or missing.
        shown = {} if outcome.objective is None else {"objective": outcome.objective, "score": outcome.score}
        shown |= {f"rung{i}": value for i, value in enumerate(outcome.rungs)}
        values = [*outcome.rungs, *([] if outcome.objective is None else [outcome.objective])]
        shown |= {TIME: ETA ** max(len(values) - 1, 0), VALUE: values[-1]} if values else {}
        return {"outcome": tuple(outcome), "done": outcome.finished, **shown}

    def _loaded(self) -> Evaluate:
        """The evaluation, unpickled and on its device. It is kept only once all of that has succeeded."""
        if self.evaluate is None:
            try:
                evaluate = self.payload.unpack(self.problem, Path(self.logdir))  # which Ray removes
                if isinstance(evaluate, Evaluator):
                    evaluate.to("cuda" if self.cuda else "cpu")
                if self.limits.memory:
                    _limit_memory(self.limits.memory)
            except Exception as error:  # noqa: BLE001  # of a user's code, too
                traceback.print_exc()  # into the worker's log; not chained, since it may not be picklable
                raise WorkerError(line(error)) from None
            self.evaluate, self.payload = evaluate, Payload([], b"")
        return self.evaluate


def _limit_memory(beyond: int) -> None:
    """Let allocations fail when this process's writable memory has grown by `beyond` bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return
    import resource

    now = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * now + beyond, resource.RLIM_INFINITY))
