"""What every budget shares, from a task: layers, candidates, sensitivities, with a cache behind them."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.candidates.cache import VERSION, Cache, FactorStore
from rankopt.candidates.calibration import Statistics
from rankopt.candidates.fit import fit_candidates, in_each_form
from rankopt.candidates.latency import Latencies, measure_latencies
from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.memory import MemoryCosts, measured
from rankopt.candidates.pareto import dense_candidate, frontier
from rankopt.candidates.quantize import add_precisions, in_each_precision
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.candidates.sensitivity import Curve, measure, with_losses
from rankopt.core.budget import Limit, limited_metrics, parse_budget
from rankopt.core.errors import TaskError
from rankopt.core.files import digest
from rankopt.core.problem import Problem, check_feasible
from rankopt.core.progress import Clock, Progress, silent
from rankopt.core.records import METRICS, SAME, Candidate, Cost, Layer, Proposal, Task
from rankopt.decompositions.plan import apply
from rankopt.model.counting import count
from rankopt.model.forward import (
    CALIBRATION_EXAMPLES,
    collect_batches,
    find_output,
    inference,
    map_tensors,
    run,
    to_device,
)
from rankopt.model.inventory import inventory, unfolded
from rankopt.model.objective import Divergence, call

log = logging.getLogger(__name__)


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


def prepare(
    task: Task,
    space: SearchSpace | str = "default",
    cache: str | Path | None = None,
    progress: Progress = silent,
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
    if "latency" in limited_metrics(budget):
        with clock.stage("timing"):
            where = latency_on or Conditions()
            latencies = measure_latencies(task.model, model, free, space, task.example_input, where, kept, progress)
        layers = tuple(x if x.reason else latencies.with_layer(x) for x in layers)
        free = [layer for layer in layers if layer.reason is None]
        dense = dataclasses.replace(dense, latency=latencies.dense)
    footprint = None
    if limited_metrics(budget) & {"memory", "disk"}:
        dense = dataclasses.replace(dense, **measured(task.model, task.example_input))
        footprint = MemoryCosts.of(task.model, model, free, task.example_input, dense)
        layers = tuple(x if x.reason else footprint.with_layer(x) for x in layers)
        free = [layer for layer in layers if layer.reason is None]
    if budget is not None:
        _refuse_infeasible(free, space, parse_budget(budget, dense), dense, latencies, footprint)
    statistics = Statistics(model, free, batches, key, kept, progress)
    with clock.stage("calibration"):
        if not kept.path(statistics.key, "safetensors").is_file():
            statistics.load()
    with clock.stage("fitting"):
        candidates, family_seconds = fit_candidates(model, free, space, statistics, key, kept, progress, workers)
    factors = FactorStore(kept)
    with clock.stage("rounding"):
        candidates = add_precisions(model, free, candidates, space.precisions, factors, statistics, key, kept, progress)
    with clock.stage("sensitivity"):
        objective = task.objective or Divergence(task.model, batches)
        curves = _curves(task, objective, free, candidates, factors, key, kept, progress)
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
    footprint: MemoryCosts | None,
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
    progress: Any,
    out: Path | None = None,
) -> tuple[list[Layer], Latencies]:
    """A task's free layers and their latencies, for a table: nothing is calibrated or fitted."""
    model = unfolded(task.model, task.example_input, space.split_qkv)
    layers = [x for x in mark_dense(inventory(model, task.example_input), space) if x.reason is None]
    if not layers:
        raise TaskError("the model has no layer that can be factorised: rankopt inspect says why")
    found = measure_latencies(
        task.model, model, layers, space, task.example_input, conditions, Cache(cache), progress, out
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


def _curves(
    task: Task,
    objective: Callable[[nn.Module], float],
    layers: Sequence[Layer],
    candidates: dict[str, list[Candidate]],
    factors: FactorStore,
    key: str,
    cache: Cache,
    progress: Progress,
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

    curves = measure(names, candidates, rise, progress)
    if task.objective is None:
        cache.write_json(key, curves)
    return curves
