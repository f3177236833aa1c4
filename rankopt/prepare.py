"""What every budget shares, from a task: layers, candidates, sensitivities, with a cache behind them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankopt.allocation import check_feasible
from rankopt.budget import Limit, Problem, limited, parse_budget
from rankopt.calibration import find_output, moments, output_metrics
from rankopt.candidates import VERSION, Cache, FactorStore, digest, fit_candidates, in_each_form
from rankopt.core import METRICS, SAME, Candidate, Cost, Layer, Proposal, Task, TaskError
from rankopt.evaluate import Divergence, call
from rankopt.footprint import Footprint, measured
from rankopt.frontier import dense_candidate, frontier
from rankopt.hardware import Conditions
from rankopt.inventory import (
    batch_size,
    count,
    inference,
    inventory,
    map_tensors,
    model_input,
    run,
    to_device,
    unfolded,
)
from rankopt.latency import Latencies, measure_latencies
from rankopt.plan import apply
from rankopt.rounding import add_precisions, in_each_precision
from rankopt.sensitivity import Curve, measure, with_losses
from rankopt.space import SearchSpace, load_space

log = logging.getLogger(__name__)

CALIBRATION_EXAMPLES = 2048  # at most so many are taken from a task's calibration batches

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows progress: (items, what is being done, how many) -> the items."""


def silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """No progress display."""
    return items


class Clock(dict[str, float]):
    """Seconds by stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start


# --- preparing: what every budget shares -------------------------------------------------------------


@dataclass
class Prepared:
    """A task with its candidates and sensitivities: everything that does not depend on the budget."""

    task: Task
    model: nn.Module  # the task's, its composite modules unfolded: where the layers' names lead
    space: SearchSpace
    layers: tuple[Layer, ...]  # all of the inventory; reason set where it stays dense
    dense: Cost
    candidates: dict[str, list[Candidate]]
    factors: FactorStore
    statistics: Statistics
    objective: Callable[[nn.Module], float]
    clock: Clock
    family_seconds: dict[str, float] = field(default_factory=dict)
    latencies: Latencies | None = None  # where the budget limits latency

    @property
    def free(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.reason is None)

    def problem(self, budget: Mapping[str, Any] | Sequence[str]) -> Problem:
        """The numbers that strategies see under a budget. Raises BudgetError if it cannot be met.

        With a limit on latency no candidate is slower than its dense layer.
        """
        limits = parse_budget(budget, self.dense)
        metrics = [limit.metric for limit in limits]
        offers = {x.name: self.candidates[x.name] for x in self.free}
        if "latency" in metrics:
            offers = {x.name: [c for c in offers[x.name] if c.cost.latency <= x.cost.latency] for x in self.free}
        frontiers = tuple(frontier(layer, offers[layer.name], metrics) for layer in self.free)
        problem = Problem(self.free, frontiers, self.dense, limits)
        check_feasible(problem)
        return problem

    def apply(self, problem: Problem, proposal: Proposal) -> nn.Module:
        """The compressed model: a copy with the proposal's factors."""
        return apply(self.task.model, problem.layers, problem.candidates(proposal), self.factors)


def check_batches(calibration: Any) -> None:
    """Raise TaskError for what is no iterable of batches."""
    if isinstance(calibration, torch.Tensor) or not isinstance(calibration, Iterable):
        raise TaskError(f"calibration is a {type(calibration).__name__}: give batches, for example x.split(64)")


def collect_batches(calibration: Iterable[Any], limit: int) -> list[Any]:
    """The first `limit` examples of an iterable of batches, held in memory. Raises TaskError if there is none."""
    check_batches(calibration)
    batches: list[Any] = []
    examples = 0
    for batch in calibration:
        x = model_input(batch)
        n = batch_size(x)
        if n == 0:
            continue
        if examples + n > limit:
            keep = limit - examples
            x = map_tensors(x, lambda t, n=n, keep=keep: t[:keep] if t.ndim and len(t) == n else t)
        batches.append(x)
        examples += min(n, limit - examples)
        if examples >= limit:
            break
    if not batches:
        raise TaskError("the calibration set is empty: give at least one batch of inputs")
    return batches


def prepare(
    task: Task,
    space: SearchSpace | str = "default",
    cache: str | Path | None = None,
    track: Track = silent,
    workers: int | None = None,
    budget: Mapping[str, Any] | Sequence[str] | None = None,
    latency_on: Conditions | None = None,
) -> Prepared:
    """Inventory, calibration, candidates and sensitivities, from the cache where it holds them.

    budget: if given, one that cannot be met is refused before anything is calibrated or fitted. One on latency has
    the candidates timed first. latency_on: under which conditions.
    """
    clock = Clock()
    space = load_space(space) if isinstance(space, str) else space
    kept = Cache(cache)
    with clock.stage("inventory"):
        batches = collect_batches(task.calibration, CALIBRATION_EXAMPLES)
        _check_copy(task.model)
        model = unfolded(task.model, task.example_input, space.split_qkv)
        layers = inventory(model, task.example_input)
        dense = count(task.model, task.example_input)
        layers = mark_dense(layers, space)
    free = [layer for layer in layers if layer.reason is None]
    if not free:
        reasons = "; ".join(f"{x.name or 'model'}: {x.reason}" for x in layers[:5]) or "it has no layer with a weight"
        raise TaskError(f"the model has no layer that can be factorised ({reasons})")
    key = digest(VERSION, *_state(model, batches[0]), *_tensors(batches), [_identity(x) for x in free])
    latencies = None
    if "latency" in limited(budget):
        with clock.stage("timing"):
            where = latency_on or Conditions()
            latencies = measure_latencies(task.model, model, free, space, task.example_input, where, kept, track)
        layers = tuple(x if x.reason else latencies.with_layer(x) for x in layers)
        free = [layer for layer in layers if layer.reason is None]
        dense = dataclasses.replace(dense, latency=latencies.dense)
    footprint = None
    if limited(budget) & {"memory", "disk"}:
        dense = dataclasses.replace(dense, **measured(task.model, task.example_input))
        footprint = Footprint.of(task.model, model, free, task.example_input, dense)
        layers = tuple(x if x.reason else footprint.with_layer(x) for x in layers)
        free = [layer for layer in layers if layer.reason is None]
    if budget is not None:
        _refuse_infeasible(free, space, parse_budget(budget, dense), dense, latencies, footprint)
    statistics = Statistics(model, free, batches, key, kept, track)
    with clock.stage("calibration"):
        if not kept.path(statistics.key, "safetensors").is_file():
            statistics.load()
    with clock.stage("fitting"):
        candidates, family_seconds = fit_candidates(model, free, space, statistics, key, kept, track, workers)
    factors = FactorStore(kept)
    with clock.stage("rounding"):
        candidates = add_precisions(model, free, candidates, space.precisions, factors, statistics, key, kept, track)
    with clock.stage("sensitivity"):
        objective = task.objective or Divergence(task.model, batches)
        curves = _curves(task, objective, free, candidates, factors, key, kept, track)
        candidates = {name: with_losses(candidates[name], curves[name]) for name in candidates}
        if latencies:
            candidates = {x.name: latencies.with_candidates(x, candidates[x.name]) for x in free}
        if footprint:
            candidates = {x.name: footprint.with_candidates(x, candidates[x.name]) for x in free}
    return Prepared(
        task, model, space, layers, dense, candidates, factors, statistics, objective, clock, family_seconds, latencies
    )


def _identity(layer: Layer) -> tuple[Any, ...]:
    """What a layer is for calibration: all but its latency, which machines differ in."""
    found = dataclasses.asdict(layer) | {"cost": tuple(layer.cost[m] for m in METRICS)}
    return tuple(found[f.name] for f in dataclasses.fields(layer))


def _refuse_infeasible(
    free: Sequence[Layer],
    space: SearchSpace,
    limits: tuple[Limit, ...],
    dense: Cost,
    latencies: Latencies | None,
    footprint: Footprint | None,
) -> None:
    """Costs are closed forms or measured already: whether a budget can be met is known before anything is fitted."""
    menus = []
    for x in free:
        found = [c for f in space.families for r in space.ranks(f, x) for c in in_each_form(x, f, r, 0.0)]
        found += [c for one in (dense_candidate(x), *found) for c in in_each_precision(x, one, space.precisions)]
        found = latencies.with_candidates(x, found) if latencies else found
        found = footprint.with_candidates(x, found) if footprint else found
        menus.append((dense_candidate(x), *found))
    check_feasible(Problem(tuple(free), tuple(menus), dense, limits))


def _check_copy(model: nn.Module) -> None:
    try:
        copy.deepcopy(model)
    except Exception as error:
        raise TaskError(
            f"the model cannot be copied ({type(error).__name__}: {error}): make copy.deepcopy work"
        ) from error


def mark_dense(layers: Sequence[Layer], space: SearchSpace) -> tuple[Layer, ...]:
    """Set the reason of layers that the space keeps dense or has nothing for."""
    free = [layer for layer in layers if layer.reason is None]
    marked = []
    for layer in layers:
        reason = layer.reason
        if reason is None:
            reason = space.dense_reason(layer, free)
        rounds = in_each_precision(layer, dense_candidate(layer), space.precisions)
        if reason is None and not rounds and not any(space.ranks(family, layer) for family in space.families):
            depthwise = ", which has but its kernel: it is depthwise" if layer.groups == layer.shape[0] > 1 else ""
            reason = f"no family of search space {space.name!r} makes it smaller{depthwise}"
        marked.append(dataclasses.replace(layer, reason=reason))
    return tuple(marked)


def time_task(
    task: Task,
    space: SearchSpace,
    conditions: Conditions,
    cache: str | Path | None,
    track: Any,
    out: Path | None = None,
) -> tuple[list[Layer], Latencies]:
    """A task's free layers and their latencies, for a table: nothing is calibrated or fitted."""
    model = unfolded(task.model, task.example_input, space.split_qkv)
    layers = [x for x in mark_dense(inventory(model, task.example_input), space) if x.reason is None]
    if not layers:
        raise TaskError("the model has no layer that can be factorised: rankopt inspect says why")
    found = measure_latencies(
        task.model, model, layers, space, task.example_input, conditions, Cache(cache), track, out
    )
    return [found.with_layer(x) for x in layers], found


def _state(model: nn.Module, batch: Any) -> list[Any]:
    """What tells models apart: structure, parameters, all buffers, and what the forward makes of them."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with inference(model):
        out = _run_batch(model, batch)
    z = find_output(out)
    numbers = [] if z is None else [z.double().mean(), z.double().abs().mean(), z.flatten()[0]]
    outputs = [f"{x:.2e}" for x in numbers]
    return [repr(model), *[part for named in tensors for part in named], outputs]


def _run_batch(model: nn.Module, batch: Any) -> Any:
    try:
        return run(model, to_device(batch, model))
    except Exception as error:
        raise TaskError(f"the model does not run on a calibration batch: {type(error).__name__}: {error}") from error


def _tensors(batches: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for batch in batches:
        map_tensors(batch, found.append)
    return found


def calibrate(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], track: Track
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Name -> S and name -> H; a layer that nothing reached is in neither."""
    total = 2 * len(batches)
    steps = iter(track(range(total), "calibrating", total))
    s = moments(model, layers, batches, lambda: next(steps))
    h = output_metrics(model, layers, batches, lambda: next(steps))
    next(steps, None)
    return s, h


class Statistics(Mapping[str, tuple[Any, Any]]):
    """Name -> (input moment, output metric); read from the cache, or measured when the cache has none."""

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], key: str, cache: Cache, track: Track
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.key, self.cache, self.track = f"statistics-{key}", cache, track
        self.tensors: dict[str, Any] = {}

    def load(self) -> None:
        """Have the statistics in memory."""
        self.tensors = self.tensors or self.cache.read_tensors(self.key) or self._measure()

    def _measure(self) -> dict[str, Any]:
        s, h = calibrate(self.model, self.layers, self.batches, self.track)
        found = {f"moment.{n}": t.cpu() for n, t in s.items()} | {f"metric.{n}": t.cpu() for n, t in h.items()}
        self.cache.write_tensors(self.key, found)
        return found

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        self.load()
        return self.tensors.get(f"moment.{name}"), self.tensors.get(f"metric.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _curves(
    task: Task,
    objective: Callable[[nn.Module], float],
    layers: Sequence[Layer],
    candidates: dict[str, list[Candidate]],
    factors: FactorStore,
    key: str,
    cache: Cache,
    track: Track,
) -> dict[str, Curve]:
    """Sensitivities of all layers. Cached for the default objective; a task's own may change behind our back."""
    names = [layer.name for layer in layers]
    # What is rounded lies between them: rounding adds to an error, and saves no parameters.
    candidates = {n: [c for c in candidates[n] if c.precision == SAME] or candidates[n] for n in names}
    # A fit is one, in whatever forms.
    key = "sensitivity-" + digest(key, {n: [*dict.fromkeys((c.key, c.error) for c in candidates[n])] for n in names})
    if task.objective is None and (kept := cache.read_json(key)):
        return {name: tuple((e, r) for e, r in kept[name]) for name in names}
    by_name = {layer.name: layer for layer in layers}
    zero = call("the objective", objective, task.model)
    assert zero is not None

    def rise(name: str, candidate: Candidate) -> float | None:
        model = apply(task.model, [by_name[name]], [candidate], factors)
        try:
            value = call("the objective", objective, model)
        except Exception as error:
            log.warning("the objective of layer %r as %s %s: %s", name, candidate.method, candidate.rank, error)
            return None
        return None if value is None else value - zero

    curves = measure(names, candidates, rise, track)
    if task.objective is None:
        cache.write_json(key, curves)
    return curves
