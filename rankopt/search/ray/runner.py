"""The search loop on Ray Tune: trials run in worker processes, on this machine or a cluster.

Tune drives the loop: it asks a searcher for plans, runs them in workers, and reports the results. `_StudySearch`
connects it to the study. Modules here import ray inside functions only.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rankopt.candidates import pool
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import available_cores
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal, Task, Trial
from rankopt.search.loop import WAIT, Evaluate, Outcome, Study, proposals
from rankopt.search.ray.away import Dispatcher, Job, Resources, Update
from rankopt.search.ray.session import check_resources, keep_logs, line, other_machines, quiet, started, surroundings
from rankopt.search.ray.tasks import in_any_order
from rankopt.search.ray.training import train_away
from rankopt.search.ray.tune_options import TuneOptions
from rankopt.search.ray.worker import Limits, Payload, Worker, WorkerError, pack
from rankopt.training.finetune import Trained
from rankopt.training.recipe import Recipe

NONE, PLAIN = Limits(), TuneOptions()


LOST = "worker died or was lost"


RESULTS = "ray"
"""Folder of Tune's results in a run folder, one experiment a search: ray.tune.ExperimentAnalysis opens them."""


class RaySearch:
    """A runner for `run_search` that evaluates up to `workers` plans at a time, each as a trial of Ray Tune.

    It uses the Ray that this process is connected to, otherwise the cluster at the address, otherwise it starts Ray on
    this machine.
    """

    def __init__(
        self,
        workers: int,
        address: str | None = None,
        gpus_per_trial: float = 0.0,
        limits: Limits = NONE,
        out: Path | None = None,
        tune: TuneOptions = PLAIN,
        cpus_per_trial: float = 1.0,
    ) -> None:
        """Check the settings.

        Args:
            workers: Trials at a time.
            address: HOST:PORT of a Ray cluster, or "auto"; None starts Ray here.
            gpus_per_trial: 0 evaluates on the CPU; a fraction shares a GPU.
            limits: Limits of one trial.
            out: The run folder: Tune's results go to its `ray`, the workers' standard error and TensorBoard's files to
                its `logs`. None keeps nothing.
            tune: Options of Ray Tune.
            cpus_per_trial: CPUs of a trial, as Ray counts them, and the threads of its torch. Where Ray is started
                here, its workers share the cores that are left.

        Raises:
            RankoptError: If Ray Tune is not installed or a setting makes no sense.
        """
        if address is None and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
            # Ray listens on all interfaces and runs code that it is sent. It reads a token when it is imported; without
            # one of ours it would write one into the home folder.
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
        if cpus_per_trial <= 0:
            raise RankoptError(f"cpus_per_trial is {cpus_per_trial}: give more than 0")
        if address and address.startswith("ray://"):  # Tune would pickle the study and move it to the cluster's head
            raise RankoptError(f"{address} is a Ray Client address: give the cluster's own (HOST:6379), or auto")
        self.workers, self.address, self.gpus, self.limits = workers, address, gpus_per_trial, limits
        self.out, self.tune, self.cpus = out, tune, cpus_per_trial
        self.folder: str | None = None  # Ray's temporary folder, while it is up
        self.ours = False  # whether it was started here, for the trials alone
        self.closing: ExitStack | None = None  # what ends with the session
        self.sent: dict[str, Any] = {}  # digest of what went to the workers in this session -> where Ray keeps it

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context in which several searches share a start of Ray, which the first of them makes."""
        if self.closing is not None:
            yield
            return
        self.closing = ExitStack()
        try:
            yield
        finally:
            with quiet(self.folder) if self.folder else nullcontext():
                self.closing.close()
            self.closing = self.folder = None
            self.ours = False
            self.sent.clear()

    def _start(self) -> str:
        """Start Ray or connect to it, unless that was done in this session. Returns its temporary folder."""
        assert self.closing is not None
        import ray

        if self.folder is None:
            self.ours = not self.address and not ray.is_initialized()
            folder = self.closing.enter_context(surroundings())
            with quiet(folder):
                cpus = math.ceil(self.workers * self.cpus)
                self.closing.enter_context(started(self.address, cpus, folder, self.tune.dashboard))
                check_resources(self.gpus, self.cpus)
            self.folder = folder
        return self.folder

    def task_pool(self) -> pool.Pool | None:
        """The cluster as a pool that prepares tasks; None if Ray is only this machine, whose cores need no Ray."""
        import ray

        return self._run_tasks if self.address or (ray.is_initialized() and not self.ours) else None

    def _run_tasks(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], memory: int, shared: Any = None
    ) -> Iterator[Any]:
        """Run calls as Ray tasks; a `Pool`."""
        import ray

        with self.session():
            self._start()
            parcel = ray.put(pool.pack(shared, other_machines()))
            yield from in_any_order(pool.work, ((parcel, function, *arguments) for arguments in calls), memory)

    def finetune(
        self, model: Any, task: Task, recipe: Recipe, *, folder: Path | None = None, **options: Any
    ) -> Trained:
        """Train a model with the CPUs and GPUs of a trial; as `rankopt.training.finetune.finetune`, for `train_run`.

        Args:
            model: The compressed model.
            task: The task.
            recipe: How to train.
            folder: Where checkpoints are kept, on this machine; None keeps them until the end.
            options: The others of `train_away`.

        Raises:
            RankoptError: As of `train_away`, or Ray cannot be reached.
        """
        with self.session():
            place = folder or Path(tempfile.mkdtemp(dir=self._start()))
            return train_away(self.do, model, task, recipe, folder=place, **options)

    def do(
        self, next_job: Callable[[], Job | None], stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[Job, Update]]:
        """Do jobs in workers with the CPUs and GPUs of a trial, `workers` at a time.

        Args:
            next_job: As of `Dispatcher`.
            stop: As of `Dispatcher`.

        Yields:
            News of the jobs.

        Raises:
            RankoptError: Ray cannot be reached, or no machine has what a job needs.
        """
        resources = Resources(self.cpus, self.gpus, self.threads)
        with self.session():
            dispatcher = Dispatcher(next_job, self.workers, resources, stop)
            folder = self._start()
            try:
                while True:
                    with quiet(folder):
                        news = dispatcher.step()
                    if news is None:
                        return
                    yield from news
            finally:
                dispatcher.close()
                if self.out:
                    keep_logs(Path(folder), self.out / RESULTS, self.out / "logs")

    @property
    def threads(self) -> int:
        """Threads of a worker: a share of this machine's cores if it has all workers, otherwise the CPUs of a trial."""
        share = 1 if self.address else available_cores() // self.workers
        return max(1, share, int(self.cpus))

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        """Run a study until its limit or the strategy's end.

        Args:
            study: The study.
            evaluate: Evaluates plans; it is sent to the workers.

        Returns:
            All trials of the study.

        Raises:
            RankoptError: If Ray cannot be reached or lacks resources.
            StudyError: If Ray ends the search, or all evaluations fail.
        """
        asker = _StudySearch(study, self.limits.seconds)
        if not asker.waiting:
            return study.trials
        with self.session(), quiet(folder := self._start()):
            try:
                self._tune(asker, *pack(evaluate), folder)
            except Exception as error:
                if asker.error is None and not isinstance(error, RankoptError):
                    raise StudyError(f"Ray ended the search ({line(error)}): go on with --resume") from error
                raise asker.error or error from None
            finally:
                if self.out:
                    keep_logs(Path(folder), self.out / RESULTS, self.out / "logs")
            asker.settle()
        return study.trials

    def _tune(self, asker: _StudySearch, payload: Payload, problem: Problem | None, folder: str) -> None:
        import ray
        from ray import tune
        from ray.tune.search import Searcher

        # The classes get their base classes here, so that this module can be imported without ray.
        searcher, worker = type("Searcher", (_Searcher, Searcher), {}), type("Worker", (Worker, tune.Trainable), {})
        base, options = self.tune.scheduler_class()
        ours = _Scheduler if self.tune.scheduler else _OwnScheduler
        scheduler = type("Scheduler", (ours, base), {"asker": asker})
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        if (key := payload.digest) not in self.sent:
            self.sent[key] = ray.put(payload)
        worker = tune.with_parameters(
            worker,
            payload=self.sent[key],
            problem=problem,
            paths=[str(Path(p).resolve()) for p in sys.path],
            threads=self.threads,
            cuda=self.gpus > 0,
            limits=self.limits,
        )
        storage = (self.out / RESULTS).resolve() if self.out else Path(folder)
        tune.Tuner(
            tune.with_resources(worker, {"cpu": self.cpus, "gpu": self.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher(asker),
                scheduler=scheduler(**options),
                num_samples=-1,
                max_concurrent_trials=self.workers,
                reuse_actors=True,  # twenty trivial trials: 8 s, else 50
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=f"search-{len(list(storage.glob('search-*')))}",
                storage_path=str(storage),
                verbose=0,
                callbacks=self.tune.callbacks(),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the default asks workers for one
            ),
        ).fit()


# --- Tune's side in this process ---------------------------------------------------------------------


def _name(trial: Any) -> str:
    """The name and folder of one of Tune's trials."""
    return f"plan-{trial.config['number']:04d}"


class _StudySearch:
    """The study, as Tune's searcher and scheduler use it.

    Errors are kept in `error`, since Tune swallows most that are raised in its callbacks.
    """

    number = 0  # of plans that were sent to workers

    def __init__(self, study: Study, seconds: float | None) -> None:
        self.study, self.seconds = study, seconds
        first = next(proposals(study), None)  # before Ray is started, which may not be necessary
        self.waiting = [] if first is None else [first]
        self.running: dict[str, tuple[Proposal, float]] = {}  # Tune's trial id -> plan, time of its start
        self.reasons: dict[str, str] = {}  # Tune's trial id -> why its worker died
        self.error: Exception | None = None
        self.complete = False
        self.dry = -1, 0.0  # number of trials when there was nothing to propose, and until when not to ask again

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher, but study.db is what a search goes on from. A study cannot be pickled."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a search that is complete, so that Tuner.restore opens what was found."""
        self.error, self.complete, self.running, self.waiting = None, True, {}, []

    def ask(self, trial_id: str) -> Proposal | None:
        """The next plan; None for not now, or never again if `complete`. Raises an earlier error."""
        if self.error:
            raise self.error
        if self.complete:
            return None
        proposal = self.waiting.pop() if self.waiting and not self.study.stopping else self._next()
        if proposal is None:
            self.complete = not self.running and (self.study.stopping or not self.study.awaited)
        else:
            self.running[trial_id] = proposal, time.monotonic()
        return proposal

    def _next(self) -> Proposal | None:
        if self.dry[0] == len(self.study.trials) and time.monotonic() < self.dry[1]:
            return None  # Tune asks ten times a second; an exhausted strategy can only propose after a result
        try:
            proposal = self.study.next()
        except Exception as error:
            self.error = error
            raise
        if proposal is None:
            self.dry = len(self.study.trials), time.monotonic() + WAIT if self.study.awaited else math.inf
        return proposal

    def promote(self, trial_id: str, outcome: Outcome) -> bool:
        """Whether a trial goes on to its next fidelity."""
        return self.study.promote(self.running[trial_id][0], outcome.rungs)

    def note(self, trial: Any) -> None:
        """Note why a trial failed, from the last line of its error file. Called just before `tell`."""
        with suppress(OSError, IndexError):
            line = Path(trial.error_file).read_text().strip().splitlines()[-1]
            _, raised, reason = line.partition(f"{WorkerError.__name__}: ")
            self.reasons[trial.trial_id] = (
                reason if raised else f"worker died: {line.partition(' Some common causes')[0]}"
            )

    def tell(self, trial_id: str, outcome: Outcome | None) -> None:
        """Record the end of a trial; without an outcome its worker died."""
        if trial_id not in self.running or self.error:  # Tune reports some failures twice
            return
        proposal, since = self.running.pop(trial_id)
        outcome = outcome or self._lost(trial_id, time.monotonic() - since)
        try:
            if self.study.should_retry(proposal, outcome):
                self.waiting.append(proposal)
            else:
                self.study.finish(proposal, outcome)
        except Exception as error:  # noqa: BLE001  # raised again after the run
            self.error = error

    def _lost(self, trial_id: str, seconds: float) -> Outcome:
        """The outcome of a worker that died: stopped at its time limit, otherwise perhaps by the machine."""
        if self.seconds and seconds >= self.seconds:
            return Outcome(seconds=seconds, error=f"took longer than the limit of {self.seconds:g} s")
        return Outcome(seconds=seconds, error=self.reasons.get(trial_id, LOST), transient=True)

    def settle(self) -> None:
        """Finish after the run: trials that Ray lost silently have failed. Raises an error of the run."""
        for trial_id in list(self.running):
            self.tell(trial_id, Outcome(error=self.reasons.get(trial_id, LOST)))
        if self.error:
            raise self.error
        if not self.complete:  # a nearly full disk ends Tune without an error
            raise StudyError("Ray ended the search too early, without a reason: go on with --resume")


class _Searcher:
    """Becomes a ray.tune.search.Searcher."""

    def __init__(self, asker: _StudySearch) -> None:
        super().__init__()
        self.asker = asker

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if (proposal := self.asker.ask(trial_id)) is not None:
            self.asker.number += 1
            return {"proposal": proposal, "number": self.asker.number - 1}
        return "FINISHED" if self.asker.complete else None  # with None and nothing running Tune would wait for ever

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        done = result and "outcome" in result and not error  # also called for trials stopped at a low fidelity
        self.asker.tell(trial_id, Outcome(*result["outcome"]) if result and done else None)

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file, which Tuner.restore looks for: the study is on disk already."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: what was unpickled is a search that is complete."""


class _Scheduler:
    """Becomes one of ray.tune.schedulers."""

    asker: _StudySearch

    def choose_trial_to_run(self, controller: Any) -> None:
        """Leave it to Tune, which gives a free worker to a new trial.

        Its schedulers would give it to one whose own worker is starting, and stop that: with short trials, a machine
        that joins would never get one started.
        """

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        self.asker.note(trial)
        super().on_trial_error(controller, trial)  # type: ignore[misc]


class _OwnScheduler(_Scheduler):
    """Becomes a ray.tune.schedulers.FIFOScheduler that asks the study."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return "CONTINUE" if self.asker.promote(trial.trial_id, Outcome(*result["outcome"])) else "STOP"
