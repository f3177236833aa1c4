"""Fitting decompositions to layers, each once; results are kept in the cache."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from rankopt.candidates.cache import VERSION, Cache
from rankopt.candidates.calibration import Statistics, StoredStatistics, free_on_gpu, statistics_bytes
from rankopt.candidates.jobs import (
    STACK_BYTES,
    STACK_BYTES_CPU,
    STACK_COPIES,
    Job,
    Request,
    Stack,
    for_cores,
    for_gpu,
    seconds_on_a_core,
    stacks,
    takes_a_step,
)
from rankopt.candidates.pool import WORKER_BYTES, Pool, are_started, local_pool
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError
from rankopt.core.files import available_cores, available_memory, digest
from rankopt.core.progress import Work
from rankopt.core.records import Candidate, Layer, Rank
from rankopt.core.timing import threads
from rankopt.decompositions.conformance import checked_fits, code_of, named
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Fit, Nested, Original
from rankopt.model.forward import device_of

START_UP = 2.0
"""Seconds of short fits before worker processes are started, which takes about as long: small models need none."""


IDLE = 0.1
"""The same where processes wait for work: sending it to them takes as long."""


_Noted = tuple[Rank, float, float | None, bool]
"""What is kept of a fit besides its factors: rank, error, start, ended."""


_Made = list[Fit] | Nested
"""What a job has made."""


class Fitted(NamedTuple):
    """A fit in the cache.

    Attributes:
        rank: Its rank.
        error: Its relative error.
        key: Where its factors are; None where they were not kept.
        start: The error that its search started from; None where that is not known.
        ended: Whether more steps would change nothing; False where that is not known.
    """

    rank: Rank
    error: float
    key: str | None
    start: float | None = None
    ended: bool = False


def whole_grid(layers: Sequence[Layer], space: SearchSpace) -> list[Request]:
    """List the fits of all that a search space allows.

    Left out are families whose fits take so long on a very wide layer that they would take no step, if the layer has
    others.

    Args:
        layers: The layers to fit.
        space: Families, ranks and number of optimisation steps.
    """
    found = [(request, takes_a_step(request)) for request in _all_requests(layers, space)]
    names = {request.layer.name for request, feasible in found if feasible}
    return [request for request, feasible in found if feasible or request.layer.name not in names]


def left_out(grid: Sequence[Request], layers: Sequence[Layer], space: SearchSpace) -> list[str]:
    """Warn of families that `whole_grid` leaves out.

    Args:
        grid: What it lists.
        layers: The layers.
        space: The search space.
    """
    tried = {(request.layer.name, request.family) for request in grid}
    families: dict[str, list[str]] = {}
    for request in _all_requests(layers, space):
        if (request.layer.name, request.family) not in tried:
            families.setdefault(request.layer.name, []).append(request.family)
    return [
        f"{', '.join(names)} are not tried on {name!r}, so wide that a single step of their fits would take minutes"
        for name, names in families.items()
    ]


def _all_requests(layers: Sequence[Layer], space: SearchSpace) -> list[Request]:
    pairs = [(layer, family) for layer in layers for family in space.families_of(layer)]
    found = [Request(x, family, tuple(space.ranks(family, x)), space.steps) for x, family in pairs]
    return [request for request in found if request.ranks]


def fit(
    statistics: Statistics, requests: Sequence[Request], workers: int | Pool | None = None, until: float = math.inf
) -> tuple[list[list[Fitted]], dict[str, float]]:
    """Make the fits that the cache does not hold.

    A job is one layer and one family. Jobs of layers of equal shape, of ranks that are alike, are run at once, as a
    stack. Stacks run in worker processes of one thread each; short ones, and all of a model that takes no longer than
    to start processes, in this process. Where the model is on a GPU, it and the processes share them (`jobs.for_gpu`).

    Args:
        statistics: Calibration statistics of the layers to fit.
        requests: The fits.
        workers: Number of processes, or a pool on other machines. Default: one process per available core.
        until: Value of `time.monotonic()` from which no further job starts.

    Returns:
        For each request its fits, in the order of its ranks, without those that no time was left for; and seconds of
        fitting by family.

    Raises:
        RankoptError: A fit failed, or its result could not be read back from the cache.
    """
    cache = statistics.cache
    asked = [Job(*request, _key(statistics, request)) for request in requests]
    known = {job.key: _read(cache, job) for job in asked}
    jobs = [job for job in asked if known[job.key] is None]
    if jobs:
        cache.check_writable()
    seconds: dict[str, float] = {}
    ended = _run(statistics, jobs, workers, until)
    work = Work(ended, lambda end: jobs[end[0]].seconds(), sum(job.seconds() for job in jobs))
    for number, spent in statistics.progress(work, "fitting layers", len(jobs)):
        job = jobs[number]
        known[job.key] = _read(cache, job)
        if known[job.key] is None:
            raise cache.lost()
        seconds[job.family] = seconds.get(job.family, 0.0) + spent
    return [known[job.key] or [] for job in asked], seconds


def _key(statistics: Statistics, request: Request) -> str:
    """The key of a request's fits in the cache. They are made at once, and depend on each other by their rounding."""
    layer, family = request.layer, request.family
    steps = math.ceil(request.steps * DECOMPOSITIONS[family].effort)
    what = () if request.factors else ("errors",)
    return digest(VERSION, statistics.key, layer.name, family, steps, *code_of(family), request.ranks, *what)


def fit_candidates(
    statistics: Statistics, grid: Sequence[Request], workers: int | Pool | None = None
) -> tuple[dict[str, list[Candidate]], dict[str, float]]:
    """Fit all candidates.

    Args:
        statistics: Calibration statistics of the layers to fit.
        grid: All fits, as `whole_grid` lists them.
        workers: As of `fit`.

    Returns:
        Candidates by layer name, sorted by family and rank, and seconds of fitting by family.

    Raises:
        RankoptError: As of `fit`.
    """
    fits, seconds = fit(statistics, grid, workers)
    found: dict[str, list[Candidate]] = {layer.name: [] for layer in statistics.layers}
    for request, fitted in zip(grid, fits, strict=True):
        found[request.layer.name] += as_candidates(request.layer, request.family, fitted)
    return {name: in_order(candidates) for name, candidates in found.items()}, seconds


def in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort candidates, so that results do not depend on the order in which they were fitted.

    Args:
        candidates: Candidates of one layer.
    """
    return sorted(candidates, key=lambda x: (x.method, x.rank))


def as_candidates(layer: Layer, family: str, fitted: Sequence[Fitted]) -> list[Candidate]:
    """Make the candidates of some fits, in each form worth offering.

    Args:
        layer: The layer.
        family: Name of the decomposition.
        fitted: The fits.
    """
    return [c for one in fitted for c in in_each_form(layer, family, one.rank, one.error, one.key)]


def _run(
    statistics: Statistics, jobs: Sequence[Job], workers: int | Pool | None, until: float
) -> Iterator[tuple[int, float]]:
    """Run jobs in any order; yield each one's index and seconds as it ends. None starts after `until`."""
    workers = workers if callable(workers) else worker_count(statistics.layers, workers)
    cores = available_cores() if callable(workers) else workers
    start_up = 0.0 if workers == 1 else IDLE if are_started() else START_UP
    kind, here, held = partial(_kind, statistics), [], _Held(statistics)
    if is_on_gpu(statistics):
        most = min(STACK_BYTES, free_on_gpu(device_of(statistics.model)) // STACK_COPIES)
        here = for_gpu(jobs, stacks(jobs, kind, most), cores, start_up)
    taken = {i for stack in here for i in stack}
    left = for_cores(jobs, stacks(jobs, kind, STACK_BYTES_CPU, taken), cores)

    until_started = time.perf_counter() + (0.0 if here else start_up)
    while left and time.perf_counter() + seconds_on_a_core([jobs[i] for i in left[-1]]) < until_started:
        with threads(1):  # the shortest first
            ended = _fit_here(statistics, *_call(statistics, jobs, left.pop()))
        yield from ended
    if not callable(workers) and not here and (len(left) == 1 or not are_started()):
        workers = min(workers, max(1, len(left)))  # those that there are stay: starting them again takes seconds
    elsewhere = _on_workers(statistics, jobs, left, workers, until) if left else ()
    for stack in _in_time(here, until):  # meanwhile
        own = [jobs[i] for i in stack]
        yield from _fit_stack(statistics.cache, stack, own, held.of([job.layer for job in own]))
    yield from itertools.chain.from_iterable(elsewhere)


def _call(statistics: Statistics, jobs: Sequence[Job], stack: Stack) -> tuple[Stack, list[Job], list[Tensor]]:
    """What fits a stack: its numbers, its jobs and their weights."""
    own = [jobs[i] for i in stack]
    return stack, own, [_weight(statistics, job.layer).detach().cpu() for job in own]


def _in_time(found: Sequence[Stack], until: float) -> Iterator[Stack]:
    return itertools.takewhile(lambda _: time.monotonic() < until, found)


def is_on_gpu(statistics: Statistics) -> bool:
    """Whether a model is on a GPU.

    Args:
        statistics: The statistics of its layers.
    """
    return any(_weight(statistics, layer).is_cuda for layer in statistics.layers)


class _Held:
    """Weights and statistics of the layers that are fitted at the moment, on the device of the model.

    Args:
        statistics: Calibration statistics of all layers.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.found: dict[str, Original] = {}

    def of(self, layers: Sequence[Layer]) -> list[Original]:
        """The weight and the norm of each of some layers; what is held of others is let go.

        Args:
            layers: The layers.
        """
        names = [layer.name for layer in layers]
        self.found = {name: self.found[name] for name in names if name in self.found}
        for layer in layers:
            if layer.name not in self.found:
                weight = _weight(self.statistics, layer).detach()
                given = (None if t is None else t.to(weight.device) for t in self.statistics[layer.name])
                self.found[layer.name] = Original(layer, weight, *given)
        return [self.found[name] for name in names]


def _kind(statistics: Statistics, layer: Layer) -> str:
    """What layers that are fitted at once have in common: shapes of weight and statistics, type and device."""
    weight = _weight(statistics, layer)
    kind = (layer.kind, layer.shape, layer.kernel, layer.groups, weight.shape, weight.dtype, weight.device)
    return repr((kind, statistics.shapes(layer.name)))


def _on_workers(
    statistics: Statistics, jobs: Sequence[Job], left: Sequence[Stack], workers: int | Pool, until: float
) -> Iterator[list[tuple[int, float]]]:
    """Begin to run stacks in other processes, or with a single worker in this one; of each, what `_run` yields."""
    memory = _memory(statistics.layers)
    calls = map(partial(_call, statistics, jobs), _in_time(left, until))
    if workers == 1:
        return itertools.starmap(partial(_fit_here, statistics), calls)
    if not callable(workers):
        for i in itertools.chain.from_iterable(left):  # not as calls are sent: another thread may do that
            statistics.ensure_sound(jobs[i].layer.name)
        return local_pool(workers)(_fit_here, calls, memory, statistics.stored)

    def keep(ended: list[tuple[int, float]], made: list[_Made]) -> list[tuple[int, float]]:
        for (number, _), fits in zip(ended, made, strict=True):
            _keep(statistics.cache, jobs[number], fits)
        return ended

    whole = ((stack, own, _originals(statistics, own, weights)) for stack, own, weights in calls)
    return itertools.starmap(keep, workers(_fit_away, whole, memory))


def worker_count(layers: Sequence[Layer], workers: int | None = None) -> int:
    """How many worker processes fit layers: each holds a layer's statistics several times.

    Args:
        layers: The layers.
        workers: The most. Default: one per available core.

    Returns:
        As many as the free memory is enough for, at least one.
    """
    most, free = workers or available_cores(), available_memory()
    return most if free is None else min(most, max(1, free // _memory(layers)))


def _memory(layers: Sequence[Layer]) -> int:
    """Bytes that a worker takes: it holds the statistics of a stack of layers several times."""
    sizes = [statistics_bytes(layer) for layer in layers]
    return WORKER_BYTES + 12 * max(min(STACK_BYTES_CPU, sum(sizes)), max(sizes, default=0))


def _weight(statistics: Statistics, layer: Layer) -> Tensor:
    weight: Tensor = statistics.model.get_submodule(layer.name).weight  # type: ignore[assignment]
    return weight


def _originals(
    statistics: Statistics | StoredStatistics, jobs: Sequence[Job], weights: Sequence[Tensor]
) -> list[Original]:
    return [Original(job.layer, w, *statistics[job.layer.name]) for job, w in zip(jobs, weights, strict=True)]


def _fit_away(
    _: None, stack: Stack, jobs: Sequence[Job], originals: Sequence[Original]
) -> tuple[list[tuple[int, float]], list[_Made]]:
    """On another machine, which may not have this cache: what `_run` yields, and the fits."""
    start = time.perf_counter()
    made = _fits(jobs, originals)
    return _ended(stack, start), made


def _fit_here(
    statistics: Statistics | StoredStatistics, stack: Stack, jobs: Sequence[Job], weights: Sequence[Tensor]
) -> list[tuple[int, float]]:
    return _fit_stack(statistics.cache, stack, jobs, _originals(statistics, jobs, weights))


def _fit_stack(
    cache: Cache, stack: Stack, jobs: Sequence[Job], originals: Sequence[Original]
) -> list[tuple[int, float]]:
    """Fit several jobs of one family whose layers have equal shapes and ranks that are alike; write to the cache."""
    start = time.perf_counter()
    for job, fits in zip(jobs, _fits(jobs, originals), strict=True):
        _keep(cache, job, fits)
    return _ended(stack, start)


def _ended(stack: Stack, start: float) -> list[tuple[int, float]]:
    """The number of each job of a stack, with its share of the seconds."""
    return [(number, (time.perf_counter() - start) / len(stack)) for number in stack]


def _fits(jobs: Sequence[Job], originals: Sequence[Original]) -> list[_Made]:
    """The checked fits of each job, or its nested factors."""
    _, family, _, steps, factors, _ = jobs[0]
    names = ", ".join(repr(job.layer.name) for job in jobs)
    decomposition = DECOMPOSITIONS[family]
    try:
        if not factors:
            return [*decomposition.errors(originals, [job.ranks for job in jobs], steps)]
        if decomposition.closed_form and DECOMPOSITIONS.is_own(family):
            nested = [decomposition.nested(*one) for one in originals]
            return [one for one in nested if one is not None]
        stack = decomposition.fit_stack(originals, [job.ranks for job in jobs], steps)
    except RankoptError:
        raise
    except Exception as error:  # torch's, also those of linear algebra and out of memory, and other packages'
        raise RankoptError(f"fitting {family} to layer {names} failed: {error}") from error
    given = zip(jobs, originals, stack, strict=True)
    return [checked_fits(family, original, job.ranks, fits) for job, original, fits in given]


def _keep(cache: Cache, job: Job, made: _Made) -> None:
    """Write a job's fits to the cache."""
    if isinstance(made, Nested):
        shapes = [DECOMPOSITIONS[job.family].shapes(job.layer, rank) for rank in job.ranks]
        errors = made.errors.tolist()
        fits: list[_Noted] = [(rank, errors[rank[0]], None, True) for rank in job.ranks]
        cache.write_nested(job.key, made, shapes, {"fits": json.dumps(fits)})
        return
    tensors = {f"{i}.{j}": t.cpu() for i, fit in enumerate(made) for j, t in enumerate(fit.factors)}
    noted: list[_Noted] = [(fit.rank, fit.error, fit.start, fit.ended) for fit in made]
    cache.write_tensors(job.key, tensors, {"fits": json.dumps(noted)})


def _read(cache: Cache, job: Job) -> list[Fitted] | None:
    """The fits of an entry of the cache; None if it is not there or damaged."""
    fits = cache.read_metadata(job.key, "fits", list[_Noted])
    if fits is None:
        return None
    keys = [f"{job.key}/{i}" if job.factors else None for i in range(len(fits))]
    return [Fitted(rank, error, key, *others) for key, (rank, error, *others) in zip(keys, fits, strict=True)]


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
