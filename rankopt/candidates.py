"""Every (decomposition, rank) that a search space allows, fitted once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankopt.core import Candidate, Layer, Rank, RankoptError
from rankopt.decompositions import DECOMPOSITIONS
from rankopt.decompositions.base import Factors, Fit
from rankopt.space import SearchSpace

GPU_PATCH = 1024  # inputs of one output from which fits run on the model's GPU; a guess: tests/test_cuda.py measures
VERSION = 3  # of statistics and fits: raise it when they change, and old cache entries are left behind


def digest(*parts: Any) -> str:
    """A short content hash of tensors, bytes and whatever json can write."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            t = part.detach().cpu().contiguous()
            state.update(f"{t.dtype}{tuple(t.shape)}".encode())
            state.update(
                t.flatten().view(torch.uint8).numpy().tobytes() if t.numel() and t.ndim else repr(t.tolist()).encode()
            )
        elif isinstance(part, bytes):
            state.update(part)
        else:
            state.update(json.dumps(part, sort_keys=True, default=str).encode())
        state.update(b"|")
    return state.hexdigest()[:32]


def crc(tensor: Tensor) -> int:
    """A checksum against silent damage, far cheaper than a digest."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _sound(file: Any, name: str, tensor: Tensor) -> bool:
    """Whether a tensor is what was written; entries of earlier versions do not say."""
    return (file.metadata() or {}).get(f"crc.{name}") in (None, str(crc(tensor)))


class Cache:
    """A folder of safetensors and JSON files named by content hash. Damaged entries are made anew.

    Default: RANKOPT_CACHE, else ~/.cache/rankopt. Files are written beside and renamed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        default = os.environ.get("RANKOPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "rankopt"
        self.folder = Path(folder or default).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RankoptError(f"the cache {self.folder} cannot be made ({error}): set RANKOPT_CACHE") from error

    def path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"

    def read_json(self, key: str) -> Any:
        """The value under a key, or None."""
        try:
            kept = json.loads(self.path(key, "json").read_text())
            return kept["value"] if kept["checksum"] == digest(kept["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_json(self, key: str, value: Any) -> None:
        text = json.dumps({"value": value, "checksum": digest(value)})
        write_beside(self.path(key, "json"), lambda p: p.write_text(text))

    def read_tensors(self, key: str) -> dict[str, Tensor] | None:
        """All tensors under a key, or None."""
        try:
            with safe_open(self.path(key, "safetensors"), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return found if all(_sound(file, name, t) for name, t in found.items()) else None
        except (OSError, SafetensorError):
            return None

    def write_tensors(self, key: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        metadata = {**(metadata or {}), **{f"crc.{name}": str(crc(t)) for name, t in tensors.items()}}
        write_beside(self.path(key, "safetensors"), lambda p: save_file(tensors, p, metadata))


_UMASK = os.umask(0)
os.umask(_UMASK)


def write_beside(path: Path, write: Any) -> None:
    """Write a file beside its place and rename it: a reader never sees half a file, and a full disk spoils nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        beside.chmod(0o666 & ~_UMASK)  # safetensors writes files that only their owner may read
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise RankoptError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


class FactorStore:
    """Where candidates' factors are. A key is 'file/index'; `keep` holds some in memory, for other machines."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.kept: dict[str, Factors] = {}

    def __getitem__(self, key: str) -> Factors:
        if key in self.kept:
            return self.kept[key]
        file_key, index = key.rsplit("/", 1)
        try:
            with safe_open(self.cache.path(file_key, "safetensors"), "pt") as file:
                count = sum(n.startswith(f"{index}.") for n in file.keys())  # noqa: SIM118
                found = {name: file.get_tensor(name) for name in (f"{index}.{i}" for i in range(count))}
                damaged = [name for name, tensor in found.items() if not _sound(file, name, tensor)]
        except (OSError, SafetensorError) as error:
            raise RankoptError(f"the candidate cache lost an entry ({error}): run the search again") from error
        if damaged:
            path = self.cache.path(file_key, "safetensors")
            path.unlink(missing_ok=True)
            raise RankoptError(f"{path} is damaged, and removed now: run the search again, which makes it anew")
        return tuple(found.values())

    def keep(self, keys: Iterable[str]) -> None:
        self.kept.update({key: self[key] for key in keys})


def fit_candidates(
    model: nn.Module,
    layers: Sequence[Layer],
    space: SearchSpace,
    statistics: Mapping[str, tuple[Tensor | None, Tensor | None]],
    statistics_key: str,
    cache: Cache,
    track: Any,
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
    for key, spent in track(_run(model, jobs, space.steps, statistics, cache, workers), "fitting layers", len(jobs)):
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


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
