"""The loop on Ray Tune: trials in worker processes, here or on a cluster. The only file that imports ray."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rankopt.candidates import Cache, FactorStore, available_cores
from rankopt.core import Proposal, RankoptError, StudyError, TaskError, Trial
from rankopt.job import Evaluator
from rankopt.search import Evaluate, Outcome, Study, attempt

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no tables
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a task may read files by relative paths
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV and JSON per trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's own ends the run as if it were complete: Ctrl-C must reach the caller
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
LONGEST = 24  # of the temporary folder's path: Ray makes sockets below it, whose paths end at 107 bytes


class RaySearch:
    """A runner for `run_search`: up to `workers` trials at a time, each a trial of Ray Tune.

    Uses the Ray that runs in this process already, else the cluster at the address, else starts one here.
    """

    def __init__(self, workers: int, address: str | None = None, gpus_per_trial: float = 0.0) -> None:
        if address is None and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
            # Ray listens on all interfaces and runs what it is sent: a token of our own, which it reads when imported
            # (and would else write into the home folder).
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        try:
            import ray.tune  # noqa: F401  (bare ray lacks what its tune imports)
        except ImportError as error:
            need = "pip install 'rankopt[ray]', or search without workers"
            raise RankoptError(f"Ray Tune is not installed ({error}): {need}") from error
        if workers < 1:
            raise RankoptError(f"workers is {workers}: give 1 or more")
        if gpus_per_trial < 0 or (gpus_per_trial > 1 and gpus_per_trial % 1):
            raise RankoptError(f"gpus_per_trial is {gpus_per_trial}: give a fraction up to 1, or a whole number")
        if address and address.startswith("ray://"):  # Tune would pickle the study and move it to the cluster's head
            raise RankoptError(f"{address} is a Ray Client address: give the cluster's own (HOST:6379), or auto")
        self.workers, self.address, self.gpus = workers, address, gpus_per_trial

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        """Evaluate until the limit or the strategy's end. Returns all trials."""
        asker = _Asker(study)
        if asker.waiting is None:
            return study.trials
        with _surroundings() as folder, self._ray(folder):
            self._check_resources()
            try:
                self._tune(asker, _pack(evaluate), folder)
            except Exception as error:
                if asker.error is None and not isinstance(error, RankoptError):
                    raise StudyError(f"Ray ended the search ({_line(error)}): go on with --resume") from error
                raise asker.error or error from None
            asker.settle()
        return study.trials

    @contextmanager
    def _ray(self, folder: str) -> Iterator[None]:
        """Ray, initialised; shut down afterwards if it was not before."""
        import ray

        if ray.is_initialized():
            yield
            return
        options: dict[str, Any] = {"address": self.address}
        if self.address:
            _reach(self.address)
        else:  # "local": RAY_ADDRESS is not followed
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray was imported without a token
            options = {"address": "local", "num_cpus": self.workers, "include_dashboard": False, "_temp_dir": folder}
        try:
            try:
                ray.init(**options, log_to_driver=False, logging_level="ERROR")
            except (Exception, SystemExit) as error:  # Ray exits the process where something else answers
                where = f"cannot be reached at {self.address}" if self.address else "does not start"
                raise RankoptError(f"Ray {where}: {_line(error)}") from error
            yield
        finally:
            ray.shutdown()

    def _check_resources(self) -> None:
        """Raise RankoptError where no machine has room for a trial: Ray would wait for ever."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            raise RankoptError("no machine of the Ray cluster offers a CPU: start it with --num-cpus 1 or more")
        most = max(node.get("GPU", 0) for node in nodes)
        if most < self.gpus:
            raise RankoptError(
                f"a trial asks for {self.gpus:g} GPUs, Ray sees {most:g} on a machine: lower gpus_per_trial "
                "(--gpus-per-trial), or give the address of a cluster with GPUs"
            )

    def _tune(self, asker: _Asker, payload: bytes, folder: str) -> None:
        from ray import tune
        from ray.tune.schedulers import FIFOScheduler
        from ray.tune.search import Searcher

        # Ray's classes get their base here: this file is read without ray, too.
        searcher, worker = type("Searcher", (_Searcher, Searcher), {}), type("Worker", (_Worker, tune.Trainable), {})
        scheduler = type("Scheduler", (FIFOScheduler,), {"on_trial_error": lambda _, __, trial: asker.note(trial)})
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        worker = tune.with_parameters(  # into the object store, once
            worker,
            payload=payload,
            paths=[str(Path(p).resolve()) for p in sys.path],
            threads=max(1, available_cores() // self.workers),
            cuda=self.gpus > 0,
        )
        tune.Tuner(
            tune.with_resources(worker, {"cpu": 1, "gpu": self.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher(asker),
                scheduler=scheduler(),
                num_samples=-1,
                max_concurrent_trials=self.workers,
                reuse_actors=True,  # twenty trivial trials: 8 s, else 50
            ),
            run_config=tune.RunConfig(
                name="rankopt",
                storage_path=folder,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the default asks workers for one
            ),
        ).fit()


# --- in this process: what Tune asks and tells -------------------------------------------------------


class _Asker:
    """The study, for Tune's searcher. Errors are kept here: Tune swallows most that are raised in a tell."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.waiting = study.next()  # asked before Ray is started, perhaps for nothing
        self.running: dict[str, Proposal] = {}
        self.reasons: dict[str, str] = {}  # trial -> why Ray lost it
        self.error: Exception | None = None
        self.complete = False
        self.dry_at = -1

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for restarts that are not used; a study does not pickle

    def ask(self, trial_id: str) -> Proposal | None:
        """The next proposal; None: not now, or (complete) never again. Raises what a tell or the study raised."""
        if self.error:
            raise self.error
        proposal, self.waiting = self.waiting or self._next(), None
        if proposal is None:
            self.complete = not self.running
        else:
            self.running[trial_id] = proposal
        return proposal

    def _next(self) -> Proposal | None:
        if self.dry_at == len(self.study.trials):
            return None  # Tune asks ten times a second; a strategy run dry knows more after the next result only
        try:
            proposal = self.study.next()
        except Exception as error:
            self.error = error
            raise
        self.dry_at = len(self.study.trials) if proposal is None else -1
        return proposal

    def note(self, trial: Any) -> None:
        """Why Tune calls a trial failed: the last line of what it wrote; told just before the searcher is."""
        with suppress(OSError, IndexError):
            line = Path(trial.error_file).read_text().strip().splitlines()[-1]
            self.reasons[trial.trial_id] = f"worker died: {line.partition(' Some common causes')[0]}"

    def tell(self, trial_id: str, outcome: Outcome | None) -> None:
        proposal = self.running.pop(trial_id, None)
        if proposal is None or self.error:  # Tune tells some failures twice
            return
        try:
            self.study.finish(proposal, outcome or Outcome(error=self.reasons.get(trial_id, "worker died or was lost")))
        except Exception as error:
            self.error = error

    def settle(self) -> None:
        """After the run: what Ray lost without a word is a failed trial. Raises what a tell raised."""
        for trial_id in list(self.running):
            self.tell(trial_id, None)
        if self.error:
            raise self.error
        if not self.complete:  # a nearly full disk ends Tune without an error
            raise StudyError("Ray ended the search too early, without a reason: go on with --resume")


class _Searcher:
    """Becomes a ray.tune.search.Searcher."""

    def __init__(self, asker: _Asker) -> None:
        super().__init__()
        self.asker = asker

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if (proposal := self.asker.ask(trial_id)) is not None:
            return {"proposal": proposal}
        return "FINISHED" if self.asker.complete else None  # None with nothing running hangs for ever

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        done = result and "outcome" in result and not error
        self.asker.tell(trial_id, Outcome(*result["outcome"]) if result and done else None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk already."""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _reach(address: str) -> None:
    """Raise RankoptError if nothing answers: Ray tries for two minutes and then exits the process."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto": Ray knows at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise RankoptError(f"no Ray cluster answers at {address} ({error}): start it or correct the address") from error


@contextmanager
def _surroundings() -> Iterator[str]:
    """Ray's settings in the environment where the user set none, and a folder for what it writes; undone afterwards."""
    before, parent = dict(os.environ), tempfile.gettempdir()
    if len(parent) > LONGEST and os.access("/tmp", os.W_OK):
        parent = "/tmp"
    os.environ.update(ENVIRONMENT | before)
    try:
        with tempfile.TemporaryDirectory(prefix="rankopt-", dir=parent, ignore_cleanup_errors=True) as folder:
            yield folder
    finally:
        for name in {*ENVIRONMENT, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} - set(before):
            os.environ.pop(name, None)


# --- to the workers, and in them ---------------------------------------------------------------------


def _pack(evaluate: Evaluate) -> bytes:
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
        raise TaskError(f"the task cannot be sent to Ray's workers ({_line(error)}): search without workers") from error
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


class _Worker:
    """Becomes a ray.tune.Trainable: evaluates one proposal after the other."""

    def setup(self, config: dict[str, Any], payload: bytes, paths: list[str], threads: int, cuda: bool) -> None:
        torch.set_num_threads(threads)
        sys.path.extend(path for path in paths if path not in sys.path)  # a task file may import its neighbours
        self.payload, self.cuda = payload, cuda
        self.evaluate: Evaluate | None = None
        self.proposal = config["proposal"]

    def reset_config(self, config: dict[str, Any]) -> bool:
        self.proposal = config["proposal"]
        return True

    def step(self) -> dict[str, Any]:
        # A tuple, for Tune stumbles over a NaN, or over a metric that is not there.
        return {"outcome": tuple(attempt(self._evaluate, tuple(self.proposal))), "done": True}

    def _evaluate(self, proposal: Proposal) -> tuple[float, float | None]:
        if self.evaluate is None:  # here, for what goes wrong to be a trial's outcome
            from ray import cloudpickle

            self.evaluate, self.payload = cloudpickle.loads(self.payload), b""
            if self.cuda and isinstance(self.evaluate, Evaluator):
                self.evaluate.model.to("cuda")
        assert self.evaluate is not None
        return self.evaluate(proposal)
