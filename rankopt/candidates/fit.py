"""Fitting every (decomposition, rank) that a search space allows, once; results are kept in the cache."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from joblib import Parallel, delayed, parallel_config
from torch import Tensor

from rankopt.candidates.cache import VERSION, Cache
from rankopt.candidates.calibration import Statistics, statistics_bytes
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError
from rankopt.core.files import available_cores, available_memory, digest
from rankopt.core.records import Candidate, Layer, Rank
from rankopt.core.timing import threads
from rankopt.decompositions.conformance import checked_fits, code_of, named
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Fit

START_UP = 2.0
"""Seconds of short fits before worker processes are started, which takes about as long: small models need none."""


STACK_BYTES = 2**31
"""Bytes of statistics of layers that are fitted at once on a GPU."""


WORKER_BYTES = 300_000_000
"""Memory of a worker process beside the layer that it fits."""


class _Job(NamedTuple):
    """The fits of one family to one layer, which share work and a file of the cache."""

    key: str  # of the file
    layer: Layer
    family: str
    ranks: list[Rank]

    @property
    def work(self) -> int:
        """A rough measure of how long the fits take, to order jobs by."""
        return sum(DECOMPOSITIONS[self.family].weights(self.layer, r) for r in self.ranks) * self.layer.patch

    def seconds(self, steps: int) -> float:
        """A rough estimate of how long the fits take on one core of a server of 2024; closed forms take less.

        Args:
            steps: Optimisation steps of each.
        """
        return (steps + 1) * (0.5e-3 * len(self.ranks) + 4e-9 * self.work)


def fit_candidates(
    statistics: Statistics, space: SearchSpace, workers: int | None = None
) -> tuple[dict[str, list[Candidate]], dict[str, float]]:
    """Fit the candidates that the cache does not hold.

    A job is one layer and one family. Jobs run in worker processes of one thread each; those of a model on a GPU run on
    that GPU, layers of equal shape and ranks at once.

    Args:
        statistics: Calibration statistics of the layers to fit.
        space: Families, ranks and number of optimisation steps.
        workers: Number of processes. Default: one per available core.

    Returns:
        Candidates by layer name, sorted by family and rank, and seconds of fitting by family.

    Raises:
        RankoptError: A fit failed, or its result could not be read back from the cache.
    """
    model, cache = statistics.model, statistics.cache
    found: dict[str, list[Candidate]] = {layer.name: [] for layer in statistics.layers}
    jobs: list[_Job] = []
    for layer in statistics.layers:
        weight = model.get_submodule(layer.name).weight
        for family in space.families_of(layer):
            ranks = space.ranks(family, layer)
            if not ranks:
                continue
            steps = math.ceil(space.steps * DECOMPOSITIONS[family].effort)
            code = code_of(family)
            key = digest(VERSION, statistics.key, layer.name, weight, layer.groups, family, ranks, steps, *code)
            fits = _read(cache, key, layer, family)
            if fits is None:
                jobs.append(_Job(key, layer, family, ranks))
            else:
                found[layer.name] += fits
    if jobs:
        cache.check_writable()
    jobs.sort(key=lambda job: -job.work)  # longest first, so that workers finish together
    seconds: dict[str, float] = {}
    by_key = {job.key: job for job in jobs}
    ended = _run(statistics, jobs, space.steps, workers)
    for key, spent in statistics.progress(ended, "fitting layers", len(jobs)):
        job = by_key[key]
        fits = _read(cache, key, job.layer, job.family)
        if fits is None:
            raise RankoptError(f"the cache {cache.folder} lost what was just written: is its disk sound?")
        found[job.layer.name] += fits
        seconds[job.family] = seconds.get(job.family, 0.0) + spent
    # Jobs end in any order; results must not depend on it.
    return {name: sorted(c, key=lambda x: (x.method, x.rank)) for name, c in found.items()}, seconds


def _run(statistics: Statistics, jobs: Sequence[_Job], steps: int, workers: int | None) -> Iterator[tuple[str, float]]:
    """Run jobs in any order; yield each one's key and seconds as it ends."""

    def arguments(job: _Job) -> tuple[Any, ...]:
        return (statistics.cache, job, _weight(statistics, job.layer).detach(), *statistics[job.layer.name], steps)

    for stack in _stacks(statistics, [job for job in jobs if _weight(statistics, job.layer).is_cuda]):
        yield from _fit_stack(*zip(*map(arguments, stack), strict=True))
    left = [job for job in jobs if not _weight(statistics, job.layer).is_cuda]
    workers = min(workers or available_cores(), max(len(left), 1), _affordable(statistics.layers))
    if workers == 1:
        yield from (_fit_one(*arguments(job)) for job in left)
        return
    until = time.perf_counter() + START_UP
    while left and time.perf_counter() + left[-1].seconds(steps) < until:  # the shortest first
        with threads(1):
            ended = _fit_one(*arguments(left.pop()))
        yield ended
    if left:
        with parallel_config("loky", initializer=_end_with, initargs=(os.getpid(),)):
            pool = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="2*n_jobs")
        yield from pool(delayed(_fit_alone)(*arguments(job)) for job in left)


def _affordable(layers: Sequence[Layer]) -> int:
    """How many workers the free memory is enough for, at least one: each holds a layer's statistics several times."""
    free = available_memory()
    each = WORKER_BYTES + 6 * max(map(statistics_bytes, layers), default=0)
    return max(1, free // each) if free is not None else available_cores()


def release_workers() -> None:
    """Shut down idle worker processes.

    They would hold memory for minutes, and print tracebacks on Ctrl-C.
    """
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown()


def _end_with(parent: int) -> None:
    """In a worker: end when the process that started it has gone, even by kill -9. It would wait for more work."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="rankopt-parent", daemon=True).start()


def _weight(statistics: Statistics, layer: Layer) -> Tensor:
    weight: Tensor = statistics.model.get_submodule(layer.name).weight  # type: ignore[assignment]
    return weight


def _stacks(statistics: Statistics, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs that can be fitted at once: of one family, equal shapes and equal ranks; a few gigabytes at most."""
    found: dict[Any, list[_Job]] = {}
    for job in jobs:
        layer, weight = job.layer, _weight(statistics, job.layer)
        given = [None if x is None else x.shape for x in statistics[layer.name]]
        kind = (layer.kind, layer.shape, layer.kernel, layer.groups, weight.shape, weight.dtype, weight.device)
        found.setdefault(repr((job.family, kind, given, job.ranks)), []).append(job)
    for same in found.values():
        most = max(1, STACK_BYTES // statistics_bytes(same[0].layer))
        yield from (same[i : i + most] for i in range(0, len(same), most))


def _fit_alone(*arguments: Any) -> tuple[str, float]:
    torch.set_num_threads(1)
    return _fit_one(*arguments)


def _fit_one(
    cache: Cache, job: _Job, weight: Tensor, moment: Tensor | None, output_metric: Tensor | None, steps: int
) -> tuple[str, float]:
    """Fit, and write factors and errors to the cache; the job's key and seconds."""
    (ended,) = _fit_stack([cache], [job], [weight], [moment], [output_metric], [steps])
    return ended


def _fit_stack(
    caches: Sequence[Cache],
    jobs: Sequence[_Job],
    weights: Sequence[Tensor],
    moments: Sequence[Tensor | None],
    metrics: Sequence[Tensor | None],
    steps: Sequence[int],
) -> list[tuple[str, float]]:
    """The same for several jobs of one family whose layers have equal shapes and ranks."""
    start = time.perf_counter()
    ranks, layers, family = jobs[0].ranks, [job.layer for job in jobs], jobs[0].family
    names = ", ".join(repr(layer.name) for layer in layers)
    try:
        if len(jobs) == 1:
            stack = [list(DECOMPOSITIONS[family].fit(layers[0], weights[0], ranks, moments[0], metrics[0], steps[0]))]
        else:
            stack = DECOMPOSITIONS[family].fit_stack(layers, weights, ranks, moments, metrics, steps[0])
    except RankoptError:
        raise
    except Exception as error:  # torch's, also those of linear algebra and out of memory, and other packages'
        raise RankoptError(f"fitting {family} to layer {names} failed: {error}") from error
    for cache, job, weight, moment, metric, found in zip(caches, jobs, weights, moments, metrics, stack, strict=True):
        fits: list[Fit] = checked_fits(family, job.layer, weight, ranks, moment, metric, found)
        tensors = {f"{i}.{j}": t.cpu() for i, fit in enumerate(fits) for j, t in enumerate(fit.factors)}
        cache.write_tensors(job.key, tensors, {"fits": json.dumps([(fit.rank, fit.error) for fit in fits])})
    return [(job.key, (time.perf_counter() - start) / len(jobs)) for job in jobs]


def _read(cache: Cache, key: str, layer: Layer, family: str) -> list[Candidate] | None:
    """The candidates of one layer and family from the cache; None if they are not there or damaged."""
    fits = cache.read_metadata(key, "fits", list[tuple[Rank, float]])
    if fits is None:
        return None
    return [c for i, (rank, e) in enumerate(fits) for c in in_each_form(layer, family, rank, e, f"{key}/{i}")]


def in_each_form(layer: Layer, family: str, rank: Rank, error: float, key: str | None = None) -> list[Candidate]:
    """Make the candidates of one fit: the same factors in each form worth offering.

    Args:
        layer: The layer.
        family: Name of the decomposition.
        rank: The fit's rank.
        error: Relative error of the fit.
        key: Where the factors are stored; None if there are none yet.

    Returns:
        One candidate per form, with its costs.
    """
    decomposition = DECOMPOSITIONS[family]
    with named(family, layer, f"cost at rank {rank}"):
        forms = decomposition.forms_of_use(layer, rank)
        return [Candidate(family, rank, decomposition.cost(layer, rank, f), error, key=key, form=f) for f in forms]
