"""Fitting decompositions to layers, each once; results are kept in the cache."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rankopt.candidates.cache import VERSION, Cache
from rankopt.candidates.calibration import Statistics, is_wide, sketch_rows, statistics_bytes
from rankopt.candidates.pool import WORKER_BYTES, Pool, local_pool
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError
from rankopt.core.files import available_cores, available_memory, digest
from rankopt.core.progress import Work
from rankopt.core.records import Candidate, Layer, Rank
from rankopt.core.timing import threads
from rankopt.decompositions.conformance import checked_fits, code_of, named
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Fit, Nested
from rankopt.decompositions.variable_projection import affordable_steps

START_UP = 2.0
"""Seconds of short fits before worker processes are started, which takes about as long: small models need none."""


STACK_BYTES = 2**31
"""Bytes of statistics of layers that are fitted at once on a GPU."""


class Request(NamedTuple):
    """Fits of one family to one layer, which share work.

    Attributes:
        layer: The layer.
        family: Name of the decomposition.
        ranks: The ranks to fit.
        steps: Optimisation steps of each, before the family's own factor.
        factors: Whether the factors are kept; otherwise only errors are estimated, which takes less.
    """

    layer: Layer
    family: str
    ranks: tuple[Rank, ...]
    steps: int
    factors: bool = True


_Noted = tuple[Rank, float, float | None, bool]
"""What is kept of a fit besides its factors: rank, error, start, ended."""


_Made = list[Fit] | Nested
"""What a job has made."""


GPU_INPUTS = 1024
"""Inputs of a patch from which on layers of a model on a GPU are fitted there; for smaller ones it waits for launches.

Twenty steps of `cp_merged` took a core of an H200's machine 0.42, 8.6, 9.0, 12.8 s with 576, 1,152, 2,304, 4,608
inputs, and the GPU 0.48, 7.7, 3.8, 0.5 s. All fits of ResNet-20 (at most 576 inputs) took an H100 45 s with 20
steps, and the 16 cores beside it 61 s with up to 500."""


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


BESIDE = 3
"""How many steps starts, exact solutions and stored errors take as long as."""


PER_WORK = 4
"""Multiply-accumulates of a step for each unit of `work_of`: 2 to 8 in convolutions and wide Linears."""


class _Job(NamedTuple):
    """A request that the cache does not hold, and the key under which it will."""

    layer: Layer
    family: str
    ranks: tuple[Rank, ...]
    steps: int
    factors: bool
    key: str

    @property
    def work(self) -> int:
        """A rough measure of how long the fits take, to order jobs by."""
        return work_of(self.layer, self.family, self.ranks)

    def seconds(self) -> float:
        """Estimate how long the fits take on one core of a server of 2024, where time goes to products and overhead."""
        layer = self.layer
        width = min(layer.patch, 2 + 2 * sketch_rows(layer)) if is_wide(layer) else layer.patch  # products with S
        if DECOMPOSITIONS[self.family].closed_form:  # in float64
            outputs = layer.out_channels
            return 1e-3 + layer.groups * 5e-11 * outputs * (layer.patch * width + 10 * outputs**2)
        work = self.work * width // layer.patch
        steps = math.ceil(self.steps * DECOMPOSITIONS[self.family].effort)
        steps = affordable_steps(steps, max(1, PER_WORK * work // len(self.ranks)))
        return (steps + BESIDE) * (1e-3 * len(self.ranks) + 1.5e-10 * work)


def rough_seconds(request: Request) -> float:
    """A rough measure of how dear fits are, several times their seconds on one core; products count most.

    Args:
        request: The fits.
    """
    if DECOMPOSITIONS[request.family].closed_form:  # one eigendecomposition for all ranks
        outputs, inputs = request.layer.out_channels, request.layer.patch
        return 1e-3 + request.layer.groups * 4e-10 * outputs * (inputs**2 + 10 * outputs**2 + 2 * outputs * inputs)
    work = work_of(request.layer, request.family, request.ranks)
    return (request.steps + 1) * (0.5e-3 * len(request.ranks) + 4e-9 * work)


def work_of(layer: Layer, family: str, ranks: Sequence[Rank]) -> int:
    """A rough measure of what a step of fits takes.

    Args:
        layer: The layer.
        family: Name of the decomposition.
        ranks: The ranks.
    """
    return sum(DECOMPOSITIONS[family].weights(layer, r) for r in ranks) * layer.patch


def whole_grid(layers: Sequence[Layer], space: SearchSpace) -> list[Request]:
    """List the fits of all that a search space allows.

    Args:
        layers: The layers to fit.
        space: Families, ranks and number of optimisation steps.
    """
    pairs = [(layer, family) for layer in layers for family in space.families_of(layer)]
    found = [Request(x, family, tuple(space.ranks(family, x)), space.steps) for x, family in pairs]
    return [request for request in found if request.ranks]


def fit(
    statistics: Statistics, requests: Sequence[Request], workers: int | Pool | None = None, until: float = math.inf
) -> tuple[list[list[Fitted]], dict[str, float]]:
    """Make the fits that the cache does not hold.

    A job is one layer and one family. Jobs run in worker processes of one thread each; those of a model on a GPU run on
    that GPU, layers of equal shape and ranks at once. Short ones, and all of a model that takes no longer than to start
    processes, run in this process.

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
    asked = [_Job(*request, _key(statistics, request)) for request in requests]
    known = {job.key: _read(cache, job) for job in asked}
    jobs = [job for job in asked if known[job.key] is None]
    if jobs:
        cache.check_writable()
    jobs.sort(key=lambda job: -job.work)  # longest first, so that workers finish together
    seconds: dict[str, float] = {}
    ended = _run(statistics, jobs, workers, until)
    work = Work(ended, lambda end: jobs[end[0]].seconds(), sum(job.seconds() for job in jobs))
    for number, spent in statistics.progress(work, "fitting layers", len(jobs)):
        job = jobs[number]
        known[job.key] = _read(cache, job)
        if known[job.key] is None:
            raise RankoptError(f"the cache {cache.folder} lost what was just written: is its disk sound?")
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
    statistics: Statistics, jobs: Sequence[_Job], workers: int | Pool | None, until: float
) -> Iterator[tuple[int, float]]:
    """Run jobs in any order; yield each one's index and seconds as it ends. None starts after `until`."""

    on_gpu = {i for i, job in enumerate(jobs) if _is_for_gpu(statistics, job.layer)}

    def arguments(number: int) -> tuple[Any, ...]:
        layer = jobs[number].layer
        weight = _weight(statistics, layer).detach()
        return (number, jobs[number], weight if number in on_gpu else weight.cpu(), *statistics[layer.name])

    def in_time(items: Iterable[Any]) -> Iterator[Any]:
        return itertools.takewhile(lambda _: time.monotonic() < until, items)

    cache = statistics.cache
    for stack in in_time(_stacks(statistics, jobs, sorted(on_gpu))):
        yield from _fit_stack(cache, *zip(*map(arguments, stack), strict=True))
    left = sorted(set(range(len(jobs))) - on_gpu)
    if not callable(workers):
        workers = min(workers or available_cores(), max(len(left), 1), _affordable(statistics.layers))
    if workers == 1:
        yield from (_fit_one(cache, *arguments(number)) for number in in_time(left))
        return
    start_up = time.perf_counter() + START_UP
    while left and time.perf_counter() + jobs[left[-1]].seconds() < start_up:  # the shortest first
        with threads(1):
            ended = _fit_one(cache, *arguments(left.pop()))
        yield ended
    if not left:
        return
    calls, memory = (arguments(number) for number in in_time(left)), _memory(statistics.layers)
    if callable(workers):
        for ended, fits in workers(_fit_away, calls, memory):
            _keep(cache, jobs[ended[0]], fits)
            yield ended
    else:
        yield from local_pool(workers)(_fit_one, calls, memory, cache)


def _affordable(layers: Sequence[Layer]) -> int:
    """How many workers the free memory is enough for, at least one: each holds a layer's statistics several times."""
    free = available_memory()
    return max(1, free // _memory(layers)) if free is not None else available_cores()


def _memory(layers: Sequence[Layer]) -> int:
    """Bytes that a worker takes."""
    return WORKER_BYTES + 12 * max(map(statistics_bytes, layers), default=0)


def _is_for_gpu(statistics: Statistics, layer: Layer) -> bool:
    return _weight(statistics, layer).is_cuda and layer.patch >= GPU_INPUTS


def _weight(statistics: Statistics, layer: Layer) -> Tensor:
    weight: Tensor = statistics.model.get_submodule(layer.name).weight  # type: ignore[assignment]
    return weight


def _stacks(statistics: Statistics, jobs: Sequence[_Job], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Jobs that can be fitted at once: of one family, equal shapes, ranks and steps; a few gigabytes at most."""
    kinds: dict[str, str] = {}  # by layer: all families of one share its statistics, which are read from the cache
    found: dict[Any, list[int]] = {}
    for number in numbers:
        job = jobs[number]
        if (name := job.layer.name) not in kinds:
            kinds[name] = _kind(statistics, job.layer)
        found.setdefault((job.family, kinds[name], repr(job.ranks), job.steps, job.factors), []).append(number)
    for same in found.values():
        most = max(1, STACK_BYTES // statistics_bytes(jobs[same[0]].layer))
        yield from (same[i : i + most] for i in range(0, len(same), most))


def _kind(statistics: Statistics, layer: Layer) -> str:
    """What layers that are fitted at once have in common: shapes of weight and statistics, type and device."""
    weight = _weight(statistics, layer)
    given = [None if x is None else x.shape for x in statistics[layer.name]]
    kind = (layer.kind, layer.shape, layer.kernel, layer.groups, weight.shape, weight.dtype, weight.device)
    return repr((kind, given))


def _fit_away(
    _: None, number: int, job: _Job, weight: Tensor, moment: Tensor | None, output_metric: Tensor | None
) -> tuple[tuple[int, float], _Made]:
    """On another machine, which may not have this cache: the number and the seconds, and the fits."""
    start = time.perf_counter()
    (fits,) = _fits([job], [weight], [moment], [output_metric])
    return (number, time.perf_counter() - start), fits


def _fit_one(
    cache: Cache, number: int, job: _Job, weight: Tensor, moment: Tensor | None, output_metric: Tensor | None
) -> tuple[int, float]:
    (ended,) = _fit_stack(cache, [number], [job], [weight], [moment], [output_metric])
    return ended


def _fit_stack(
    cache: Cache, numbers: Sequence[int], jobs: Sequence[_Job], *tensors: Sequence[Any]
) -> list[tuple[int, float]]:
    """Fit several jobs of one family whose layers have equal shapes and ranks, and write to the cache."""
    start = time.perf_counter()
    for job, fits in zip(jobs, _fits(jobs, *tensors), strict=True):
        _keep(cache, job, fits)
    return [(number, (time.perf_counter() - start) / len(jobs)) for number in numbers]


def _fits(
    jobs: Sequence[_Job],
    weights: Sequence[Tensor],
    moments: Sequence[Tensor | None],
    metrics: Sequence[Tensor | None],
) -> list[_Made]:
    """The checked fits of each job, or its nested factors."""
    layers, (_, family, ranks, steps, factors, _) = [job.layer for job in jobs], jobs[0]
    names = ", ".join(repr(layer.name) for layer in layers)
    decomposition = DECOMPOSITIONS[family]
    try:
        if not factors:
            one = zip(layers, weights, moments, metrics, strict=True)
            return [decomposition.errors(layer, w, ranks, s, h, steps) for layer, w, s, h in one]
        if decomposition.closed_form and DECOMPOSITIONS.is_own(family):
            nested = [decomposition.nested(*one) for one in zip(layers, weights, moments, metrics, strict=True)]
            return [one for one in nested if one is not None]
        if len(jobs) == 1:
            stack = [list(decomposition.fit(layers[0], weights[0], ranks, moments[0], metrics[0], steps))]
        else:
            stack = decomposition.fit_stack(layers, weights, ranks, moments, metrics, steps)
    except RankoptError:
        raise
    except Exception as error:  # torch's, also those of linear algebra and out of memory, and other packages'
        raise RankoptError(f"fitting {family} to layer {names} failed: {error}") from error
    given = zip(jobs, weights, moments, metrics, stack, strict=True)
    return [checked_fits(family, job.layer, w, job.ranks, s, h, fits) for job, w, s, h, fits in given]


def _keep(cache: Cache, job: _Job, made: _Made) -> None:
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


def _read(cache: Cache, job: _Job) -> list[Fitted] | None:
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
