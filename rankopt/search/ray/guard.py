"""A process beside a search that started Ray here: it ends what a killed search leaves behind, and says what happened.

Where Ray's raylet or its control service (GCS) dies, Ray ends the search's process at once, without a word. Where the
search itself is killed, some of Ray's processes would live on. This file is run by itself, with the standard library
alone:

    python guard.py FOLDER

Its standard input is a pipe from the search. Lines on it are "started", once Ray is up, and "closing", before Ray is
shut down; its end is the end of the search's process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

OWN_END = 3.0
"""Seconds that processes have to end by themselves, and again after SIGTERM."""


SERVICES = {"raylet": "its raylet", "gcs_server": "its control service (GCS)"}
"""Processes without which there is no search."""


def processes(folder: Path) -> Iterator[tuple[int, str]]:
    """Find Ray's processes that work in a folder.

    Args:
        folder: Ray's temporary folder, whose name is random.

    Yields:
        Process ids, with the names of the programs.
    """
    inside = os.fsencode(folder) + b"/"
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (entry / "cmdline").read_bytes()
            # Services are given files of the folder as options. Agents and workers have renamed themselves: of them,
            # the files count that they have open, such as logs.
            if b"=" + inside in arguments or (
                arguments.startswith(b"ray::")
                and any(os.fsencode(os.readlink(file)).startswith(inside) for file in (entry / "fd").iterdir())  # noqa: PTH115  # "pipe:[1]" is no path
            ):
                yield int(entry.name), Path(os.fsdecode(arguments.split(b"\0")[0])).name


def clean(folder: Path) -> None:
    """End the processes that work in a folder, and remove it.

    Args:
        folder: Ray's temporary folder, whose search has ended.
    """
    for how in (0, signal.SIGTERM, signal.SIGKILL):  # 0 sends nothing
        left = [pid for pid, _ in processes(folder)]
        for pid in left:
            with suppress(OSError):
                os.kill(pid, how)
        end = time.monotonic() + OWN_END
        while left and time.monotonic() < end:
            time.sleep(0.2)
            left = [pid for pid, _ in processes(folder)]
    shutil.rmtree(folder, ignore_errors=True)


def _watch(folder: Path) -> str | None:
    """Wait for the end of the search. Returns the service that ended before it, if it was not shut down."""
    services: dict[int, str] = {}
    poll, lost, closing = select.poll(), None, False
    poll.register(0, select.POLLIN)
    while True:
        ready = [number for number, _ in poll.poll()]
        said = os.read(0, 1 << 10) if 0 in ready else None
        if said == b"":
            return None if closing else lost  # what has ended just now ended with the search: the kernel sees to it
        for number in set(ready) & services.keys():
            poll.unregister(number)
            lost = lost or services[number]
        if said is None:
            continue
        closing = closing or b"closing" in said
        if b"started" in said and hasattr(os, "pidfd_open"):
            for pid, name in processes(folder):
                if name in SERVICES:
                    with suppress(OSError):
                        services[os.pidfd_open(pid)] = name
            for number in services:
                poll.register(number, select.POLLIN)


def main() -> None:
    """Watch, tell, and clean."""
    folder = Path(sys.argv[1])
    if (lost := _watch(folder)) is not None:
        with suppress(OSError):
            sys.stderr.write(
                f"error: Ray ended the search: {SERVICES[lost]} was killed or failed, which a machine that is short of "
                "memory may do. Every finished trial is kept: go on with --resume\n"
            )
            sys.stderr.flush()
    clean(folder)


if __name__ == "__main__":
    main()
