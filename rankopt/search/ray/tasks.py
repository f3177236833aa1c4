"""Work beside trials, on Ray: calls that do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any


def in_any_order(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], cpus: float = 1.0, gpus: float = 0.0, ahead: int = 2
) -> Iterator[Any]:
    """Run calls as tasks of the Ray that this process is connected to.

    Arguments are made and sent only as tasks end, so that large ones are not in the object store all at once. A call
    whose worker or machine dies is made again elsewhere, up to three times.

    Args:
        function: What is called; workers import it.
        calls: Its arguments, call by call.
        cpus: CPUs of a call.
        gpus: GPUs of a call.
        ahead: Calls that are sent for each that the cluster has room for.

    Yields:
        What the calls return, as they end.

    Raises:
        Exception: What a call raised.
    """
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(function)
    waiting = iter(calls)
    running: list[Any] = []
    while True:
        room = max(1, int(ray.cluster_resources().get("CPU", 1) // cpus)) * ahead  # machines may join and leave
        running += [task.remote(*arguments) for arguments in islice(waiting, max(0, room - len(running)))]
        if not running:
            return
        (ended,), running = ray.wait(running, num_returns=1)
        yield ray.get(ended)
