"""Work beside trials, on Ray: calls that do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

AHEAD = 2
"""Calls that are sent for each CPU of the cluster."""


def in_any_order(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], memory: int = 0) -> Iterator[Any]:
    """Run calls as tasks of the Ray that this process is connected to.

    A call takes one CPU. Arguments are made and sent only as tasks end, so that large ones are not in the object store
    all at once. A call whose worker or machine dies is made again elsewhere, up to three times.

    Args:
        function: What is called; workers import it.
        calls: Its arguments, call by call.
        memory: Bytes that a call takes; of a machine with less, all that it has.

    Yields:
        What the calls return, as they end.

    Raises:
        Exception: What a call raised.
    """
    import ray

    memory = min([memory, *(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])])
    task = ray.remote(num_cpus=1, memory=memory or None, max_retries=3)(function)
    waiting = iter(calls)
    running: list[Any] = []
    while True:
        room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))  # machines may join and leave
        running += [task.remote(*arguments) for arguments in islice(waiting, max(0, room - len(running)))]
        if not running:
            return
        (ended,), running = ray.wait(running, num_returns=1)
        try:
            result = ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # without the worker's traceback in its message
        yield result
