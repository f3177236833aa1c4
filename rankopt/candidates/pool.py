"""Pools of processes that prepare a task: here, or on the machines of a cluster."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
from joblib import Parallel, delayed, parallel_config

from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.task_file import Parcel
from rankopt.core.timing import threads
from rankopt.decompositions.registry import DECOMPOSITIONS

WORKER_BYTES = 300_000_000
"""Memory of a worker process beside what it works on."""


class Pool(Protocol):
    """Makes calls in other processes, each on one core."""

    def __call__(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], memory: int, shared: Any = None
    ) -> Iterator[Any]:
        """Begin to make calls, which go on while the caller does something else.

        Args:
            function: What is called, by its name in a module: `function(shared, *arguments)`.
            calls: The arguments of each call.
            memory: Bytes that a call takes.
            shared: What all calls are given first. It is sent once.

        Returns:
            What the calls return, in any order. It raises what a call raised.
        """
        ...


class NotSentError(TaskError):
    """What calls share cannot be pickled."""


def pack(shared: Any, other_machines: bool) -> Parcel:
    """Pickle what calls share, with the decompositions that this process registered.

    Args:
        shared: What calls share.
        other_machines: Whether they may run on other machines.

    Raises:
        NotSentError: Something in it cannot be pickled.
        RankoptError: A registered decomposition cannot.
    """
    try:
        return Parcel.pack((DECOMPOSITIONS.registered, shared), other_machines)
    except RankoptError as error:
        raise NotSentError(str(error)) from error
    except Exception as error:  # whatever a user's object raises when it is pickled
        raise _unpicklable(error) from error


def _unpicklable(error: Exception) -> RankoptError:
    why = f"{type(error).__name__}: {error}"
    try:
        cloudpickle.dumps(DECOMPOSITIONS.registered)
    except Exception:  # noqa: BLE001  # as above
        names = ", ".join(DECOMPOSITIONS.registered)
        return RankoptError(
            f"the decompositions {names} cannot be sent to the processes that fit ({why}): keep what cannot be pickled "
            "out of them"
        )
    return NotSentError(f"the task cannot be sent to other processes ({why}): search without workers")


def unpack(parcel: Parcel, scratch: Path) -> Any:
    """Run the task files, register the decompositions that were sent, and unpickle what came with them.

    Args:
        parcel: A pickle of (registered decompositions, content).
        scratch: Folder for task files that are not on this machine.
    """
    registered, content = parcel.open(scratch)
    DECOMPOSITIONS.registered.update(registered)
    return content


_opened: tuple[str, Any] = "", None  # in a worker: the digest of the parcel that was opened last, and its content
_scratch: tempfile.TemporaryDirectory[str] | None = None


def work(parcel: Parcel, function: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker: make a call. What is shared is unpickled once for calls that follow each other.

    Args:
        parcel: What `pack` made.
        function: What is called.
        arguments: Its arguments after what is shared.
    """
    global _opened, _scratch  # noqa: PLW0603  # the worker's
    if _opened[0] != (key := parcel.digest):
        if any(file.neighbours for file in parcel.files):  # this machine may lack them
            _scratch = _scratch or tempfile.TemporaryDirectory(prefix="rankopt-task-", ignore_cleanup_errors=True)
        _opened = key, unpack(parcel, Path(_scratch.name if _scratch else ""))
    with threads(1):
        return function(_opened[1], *arguments)


# --- processes on this machine -------------------------------------------------------------------------


_started = False


def local_pool(workers: int) -> Pool:
    """Make a pool of processes on this machine.

    Args:
        workers: How many.
    """

    def run(
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        memory: int,  # noqa: ARG001  # who chose the number of workers has seen to it
        shared: Any = None,
    ) -> Iterator[Any]:
        global _started  # noqa: PLW0603  # as the processes are this process's
        _started = True
        # joblib replaces a worker that has grown by 100 MB, as on wide layers; nothing is lost
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given to the executor", UserWarning)
        with parallel_config("loky", initializer=_end_with, initargs=(os.getpid(),)):
            pool = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="2*n_jobs")
        parcel = pickle.dumps(pack(shared, other_machines=False))
        folder = tempfile.TemporaryDirectory(prefix="rankopt-shared-")
        path = Path(folder.name) / "parcel"
        path.write_bytes(parcel)
        found = pool(delayed(_work_on_file)(path, function, arguments) for arguments in calls)  # the calls begin here

        def results() -> Iterator[Any]:
            with folder:
                yield from found

        return results()

    return run


_file: tuple[Path, Any] = Path(), None  # in a worker: the file that was read last, and what it holds


def _work_on_file(path: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    global _file  # noqa: PLW0603  # the worker's
    if _file[0] != path:
        _file = path, pickle.loads(path.read_bytes())  # what this worker's parent process wrote
    return work(_file[1], function, *arguments)


def start_workers(workers: int) -> None:
    """Start the processes of a `local_pool`, which takes seconds, while this one does something else.

    Args:
        workers: How many.
    """
    threading.Thread(
        target=lambda: list(local_pool(workers)(_ready, [()], 0)), name="rankopt-start", daemon=True
    ).start()


def _ready(_: None) -> None:
    """In a worker: it has imported what it works with."""


def are_started() -> bool:
    """Whether there are worker processes, or soon will be."""
    return _started


def release_workers() -> None:
    """Shut down idle worker processes.

    They would hold memory for minutes, and print tracebacks on Ctrl-C.
    """
    global _started  # noqa: PLW0603  # as the processes are this process's
    _started = False
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown()


def _end_with(parent: int) -> None:
    """In a worker: end when the process that started it has gone, even by kill -9. It would wait for more work."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="rankopt-parent", daemon=True).start()
