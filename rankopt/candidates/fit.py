"""Every (decomposition, rank) that a search space allows, fitted once and kept on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from joblib import Parallel, delayed
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankopt.candidates.cache import VERSION, Cache
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError
from rankopt.core.files import available_cores, digest
from rankopt.core.records import Candidate, Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Fit

GPU_PATCH = 1024  # inputs of one output from which fits run on the model's GPU; a guess: tests/test_cuda.py measures


def fit_candidates(
    model: nn.Module,
    layers: Sequence[Layer],
    space: SearchSpace,
    statistics: Mapping[str, tuple[Tensor | None, Tensor | None]],
    statistics_key: str,
    cache: Cache,
    progress: Any,
    workers: int | None = None,
) -> tuple[dict[str, list[Candidate]], dict[str, float]]:
    """Fit what the cache does not hold. Returns name -> candidates, and seconds of work per family.

    statistics: name -> (moment S, output metric H), None where there is none. One job is a layer and family;
    jobs run in worker processes of one thread each; wide layers of a model on a GPU run there.
    """
    found: dict[str, list[Candidate]] = {layer.name: [] for layer in layers}
    jobs: list[tuple[str, Layer, str, list[Rank]]] = []
    for layer in layers:
        weight = model.get_submodule(layer.name).weight
        for family in space.families:
            ranks = space.ranks(family, layer)
            if not ranks:
                continue
            steps = math.ceil(space.steps * DECOMPOSITIONS[family].effort)
            key = digest(VERSION, statistics_key, layer.name, weight, layer.groups, family, ranks, steps)
            fits = _read(cache, key, layer, family)
            if fits is None:
                jobs.append((key, layer, family, ranks))
            else:
                found[layer.name] += fits
    # The dearest first, so that the last to end is a short one.
    jobs.sort(key=lambda j: -sum(DECOMPOSITIONS[j[2]].weights(j[1], r) for r in j[3]) * j[1].patch)
    seconds: dict[str, float] = {}
    by_key = {job[0]: job for job in jobs}
    for key, spent in progress(_run(model, jobs, space.steps, statistics, cache, workers), "fitting layers", len(jobs)):
        _, layer, family, _ = by_key[key]
        fits = _read(cache, key, layer, family)
        if fits is None:
            raise RankoptError(f"the cache {cache.folder} lost what was just written: is its disk sound?")
        found[layer.name] += fits
        seconds[family] = seconds.get(family, 0.0) + spent
    # In one order, whichever job ended first: what follows must not depend on that.
    return {name: sorted(c, key=lambda x: (x.method, x.rank)) for name, c in found.items()}, seconds


def _run(
    model: nn.Module,
    jobs: Sequence[tuple[str, Layer, str, list[Rank]]],
    steps: int,
    statistics: Any,
    cache: Cache,
    workers: int | None,
) -> Iterator[tuple[str, float]]:
    def arguments(job: tuple[str, Layer, str, list[Rank]]) -> tuple[Any, ...]:
        key, layer, family, ranks = job
        weight: Tensor = model.get_submodule(layer.name).weight.detach()  # type: ignore[operator]
        weight = weight if _on_gpu(model, layer) else weight.cpu()
        return (cache, key, layer, family, weight, ranks, *statistics[layer.name], steps)

    workers = min(workers or available_cores(), max(len(jobs), 1))
    here = [job for job in jobs if workers == 1 or _on_gpu(model, job[1])]
    yield from (_fit_one(*arguments(job)) for job in here)
    pool = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="2*n_jobs")
    yield from pool(delayed(_fit_alone)(*arguments(job)) for job in jobs if job not in here)


def release_workers() -> None:
    """End the idle processes that fitted: they hold memory for minutes, and die of Ctrl-C, with much noise."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown()


def _on_gpu(model: nn.Module, layer: Layer) -> bool:
    """Whether a layer's fits run on its GPU; small ones are faster on the cores."""
    return bool(model.get_submodule(layer.name).weight.is_cuda) and layer.patch >= GPU_PATCH


def _fit_alone(*arguments: Any) -> tuple[str, float]:
    torch.set_num_threads(1)
    return _fit_one(*arguments)


def _fit_one(
    cache: Cache,
    key: str,
    layer: Layer,
    family: str,
    weight: Tensor,
    ranks: list[Rank],
    moment: Any,
    metric: Any,
    steps: int,
) -> tuple[str, float]:
    start = time.perf_counter()
    try:
        fits: list[Fit] = list(DECOMPOSITIONS[family].fit(layer, weight, ranks, moment, metric, steps))
    except RuntimeError as error:  # what torch raises, linear algebra and memory included
        raise RankoptError(f"fitting {family} to layer {layer.name!r} failed: {error}") from error
    tensors = {f"{i}.{j}": t.cpu() for i, fit in enumerate(fits) for j, t in enumerate(fit.factors)}
    cache.write_tensors(key, tensors, {"fits": json.dumps([(fit.rank, fit.error) for fit in fits])})
    return key, time.perf_counter() - start


def _read(cache: Cache, key: str, layer: Layer, family: str) -> list[Candidate] | None:
    """The candidates of one layer and family from the cache; None if they are not there or damaged."""
    try:
        with safe_open(cache.path(key, "safetensors"), "pt") as file:
            fits = json.loads(file.metadata()["fits"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    return [c for i, (rank, e) in enumerate(fits) for c in in_each_form(layer, family, tuple(rank), e, f"{key}/{i}")]


def in_each_form(layer: Layer, family: str, rank: Rank, error: float, key: str | None = None) -> list[Candidate]:
    """The candidates that one fit gives: the same factors in each form that is of use."""
    decomposition = DECOMPOSITIONS[family]
    forms = decomposition.forms_of_use(layer, rank)
    return [Candidate(family, rank, decomposition.cost(layer, rank, f), error, key=key, form=f) for f in forms]
