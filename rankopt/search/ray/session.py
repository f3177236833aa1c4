"""Starting Ray for a search or connecting to it, without output, leaving only logs behind."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from rankopt.core.errors import RankoptError
from rankopt.core.run_folder import has_ended, process_name
from rankopt.search.ray import guard

log = logging.getLogger(__name__)


ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no tables
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # avoids a warning
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a task may read files by relative paths
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # with Ray's 15, trials starve on a machine that does something else, too
    "RAY_preload_python_modules": "rankopt.search.ray.preload",
    "RAY_prestart_worker_first_driver": "0",  # workers that no trial gets, before those of the trials
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # a GCS that was killed does not come back
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV and JSON per trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's handler would end the run as if complete
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


OWNER = "owner"
"""File with the name of the process whose temporary folder it is."""


LONGEST = 16  # longest path of the temporary folder: Ray makes sockets below it, whose paths have at most 107 bytes


@contextmanager
def surroundings() -> Iterator[str]:
    """Context: Ray's settings in the environment, unless the user set them, and a temporary folder for its files.

    Yields:
        The folder.
    """
    before, parent = dict(os.environ), tempfile.gettempdir()
    if len(parent) > LONGEST and os.access("/tmp", os.W_OK):
        parent = "/tmp"
    os.environ.update(ENVIRONMENT | before)
    try:
        _sweep(Path(parent))
        with tempfile.TemporaryDirectory(
            prefix=f"rankopt-{os.getpid()}-", dir=parent, ignore_cleanup_errors=True
        ) as folder:
            (Path(folder) / OWNER).write_text(process_name())
            yield folder
    finally:
        for name in {*ENVIRONMENT, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} - set(before):
            os.environ.pop(name, None)


def _sweep(parent: Path) -> None:
    """Remove the temporary folders of searches that were killed, and end what still works in them."""
    for folder in parent.glob("rankopt-*-*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and has_ended((folder / OWNER).read_text()):
                guard.clean(folder)


@contextmanager
def guarded(folder: str) -> Iterator[Callable[[str], None]]:
    """Context: a process of `guard` watches this one.

    Args:
        folder: Ray's temporary folder.

    Yields:
        Tells it "started" or "closing".
    """
    command = [sys.executable, "-I", "-S", guard.__file__, folder]
    # In a session of its own: what is sent to a terminal's or a group's processes does not reach it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as process:

        def tell(text: str) -> None:
            with suppress(OSError):
                os.write(process.stdin.fileno(), f"{text}\n".encode())  # type: ignore[union-attr]

        yield tell


@contextmanager
def quiet(folder: str) -> Iterator[None]:
    """Context: Ray's messages on standard output go into a file, for `keep_logs`.

    Args:
        folder: Folder of the file.
    """
    with (Path(folder) / "ray.out").open("a") as file, redirect_stdout(file):
        yield


def keep_logs(folder: Path, results: Path, logs: Path) -> None:
    """Copy the workers' standard error and TensorBoard's files, one folder per trial.

    Args:
        folder: Ray's temporary folder.
        results: Folder of Tune's results.
        logs: The folder to copy to.
    """
    outputs = [folder / "ray.out", *folder.glob("session_2*/logs/worker-*.err")]
    targets = {p: logs / p.name for p in outputs if p.is_file() and _says_something(p)}
    events = sorted(results.rglob("events.out.tfevents.*"))
    targets |= {p: logs / "tensorboard" / p.parent.name / p.name for p in events}
    for source, target in targets.items():
        with suppress(OSError):  # an error on a full disk must not hide the search's own error
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _says_something(path: Path) -> bool:
    """Whether a file has more than the lines, as ":job_id:01000000", with which Ray begins one."""
    with path.open(errors="replace") as file:
        return any(line.strip() and not line.startswith(":") for line in file)


@contextmanager
def started(address: str | None, workers: int, folder: str, dashboard: bool = False) -> Iterator[None]:
    """Context: Ray is initialised; afterwards it is shut down, unless it was initialised before.

    Args:
        address: Address of a cluster; None starts Ray here.
        workers: CPUs to offer if it is started here.
        folder: Its temporary folder if it is started here.
        dashboard: Whether its dashboard is started with it; the address is printed.

    Raises:
        RankoptError: If Ray does not start or cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address}
    if address:
        reach(address)
    else:  # "local": RAY_ADDRESS is not followed
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray was imported without a token
        options = {"address": "local", "num_cpus": workers, "include_dashboard": dashboard, "_temp_dir": folder}
    with ExitStack() as stack:
        tell = (lambda _: None) if address else stack.enter_context(guarded(folder))
        stack.callback(ray.shutdown)
        stack.callback(tell, "closing")
        before = signal.getsignal(signal.SIGTERM)  # Ray's own handler exits at once, as if nothing was to be kept
        try:
            context = ray.init(**options, log_to_driver=False, logging_level="ERROR")
            if dashboard and context.dashboard_url:
                log.warning("Ray's dashboard: http://%s", context.dashboard_url)
        except (Exception, SystemExit) as error:  # Ray exits the process where something else answers
            problem = f"cannot be reached at {address}" if address else "does not start"
            token = (
                ". If the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to it" if address else ""
            )
            raise RankoptError(f"Ray {problem}: {line(error)}{token}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
        tell("started")
        yield


def check_resources(gpus: float, cpus: float) -> None:
    """Check that some machine has room for a trial; otherwise Ray would wait for ever.

    Args:
        gpus: GPUs of a trial.
        cpus: CPUs of a trial.

    Raises:
        RankoptError: If none has.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [node for node in nodes if node.get("CPU", 0) >= cpus]
    if not nodes:
        raise RankoptError(
            f"no machine of the Ray cluster offers the {cpus:g} CPUs of a trial: start it with more (--num-cpus), or "
            "lower cpus_per_trial (--cpus-per-trial)"
        )
    most = max(node.get("GPU", 0) for node in nodes)
    if most < gpus:
        raise RankoptError(
            f"a trial asks for {gpus:g} GPUs, Ray sees {most:g} on a machine: lower gpus_per_trial "
            "(--gpus-per-trial), or give the address of a cluster with GPUs"
        )


def other_machines() -> bool:
    """Whether the cluster has machines other than this one."""
    import ray

    return any(node["Alive"] and node["NodeManagerHostname"] != socket.gethostname() for node in ray.nodes())


def reach(address: str) -> None:
    """Check that something answers at an address; Ray would try for two minutes and then exit the process.

    Args:
        address: HOST:PORT, or "auto", which is not checked.

    Raises:
        RankoptError: If nothing answers.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto": Ray knows at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise RankoptError(f"no Ray cluster answers at {address} ({error}): start it or correct the address") from error


def line(error: BaseException) -> str:
    """Describe an error in one line.

    Args:
        error: The error.
    """
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
