"""Preparation of a task: its layers, their candidates and sensitivities, read from a cache where possible."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rankopt.candidates.cache import VERSION, Cache, FactorStore
from rankopt.candidates.calibration import (
    CALIBRATION_BYTES,
    Statistics,
    WithinMemory,
    few_examples,
    wide_layers,
    without_input,
    without_metric,
)
from rankopt.candidates.effort import NORMAL
from rankopt.candidates.fit import fit_candidates, in_each_form, is_on_gpu, left_out, whole_grid, worker_count
from rankopt.candidates.input_moments import WIDEST
from rankopt.candidates.instruments import INSTRUMENTS
from rankopt.candidates.jobs import Request
from rankopt.candidates.latency import MeasuredCosts, measure_costs
from rankopt.candidates.latency_table import Conditions
from rankopt.candidates.lazy import Fits, LazyFits, Menus, is_small, lazy_effort, with_gain
from rankopt.candidates.memory import MemoryCosts, measured
from rankopt.candidates.model_layers import ModelLayers
from rankopt.candidates.pareto import considered, dense_candidate, frontier
from rankopt.candidates.pool import Pool, start_workers
from rankopt.candidates.probing import Prober
from rankopt.candidates.quantize import add_precisions, in_each_precision
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.candidates.sensitivity import PASSES, Curve, measure, possible_probes, with_losses
from rankopt.core.allocator import keep_freed_memory
from rankopt.core.budget import Limit, limited_metrics, parse_budget
from rankopt.core.errors import BudgetError, TaskError
from rankopt.core.files import digest, gigabytes
from rankopt.core.problem import Problem, cheapest, check_feasible
from rankopt.core.progress import Clock, Progress, silent
from rankopt.core.records import MEASURED, METRICS, SAME, Candidate, Cost, Layer, Proposal, Task
from rankopt.core.result_record import FittingEntry, Metric
from rankopt.decompositions.conformance import check_modules
from rankopt.decompositions.plan import apply, apply_to_measure, replacement, to_measure
from rankopt.model.checks import check_model, with_trainable_weights
from rankopt.model.counting import count
from rankopt.model.forward import (
    ONE_THREAD,
    Undivided,
    batch_size,
    device_of,
    find_output,
    inference,
    input_tensors,
    run,
    take,
    to_device,
)
from rankopt.model.inputs import CALIBRATION_EXAMPLES, UNDIVIDED, Calibration, one_example, read_calibration
from rankopt.model.inventory import inventory, unfolded
from rankopt.model.objective import Divergence, call
from rankopt.model.stand_in import check_copy, draws_random_numbers, irreplaceable

log = logging.getLogger(__name__)


TRIED = 16
"""Examples that copies of the model and stand-ins of its layers are tried on."""


RANDOM = "the model's forward draws random numbers in eval mode: every evaluation here draws the same ones"


LARGE = f"more would take above {gigabytes(CALIBRATION_BYTES)} of memory"


Budget = Mapping[str, Any] | Sequence[str]
"""A budget as `parse_budget` reads it: {"params": 0.5} or ["params=0.5"]."""


@dataclass
class Prepared:
    """A task with its candidates and their predicted losses: everything that does not depend on the budget's limits.

    Attributes:
        task: The task that was prepared, its model a copy that nobody else runs or changes.
        model: The task's model with its composite modules expanded; layer names refer to its submodules.
        space: The search space that the candidates come from.
        layers: All layers of the inventory; `reason` is set on those that stay dense.
        dense: Costs of the whole dense model.
        candidates: Candidates by layer name, with error, predicted loss and costs. Dense is not among them. Where fits
            are made as they are asked for, those of the first, short ones: `fitted_for` adds those of budgets.
        factors: Factors of the candidates.
        statistics: Calibration statistics of the factorisable layers.
        objective: Maps a model to a number to minimise.
        clock: Seconds spent in each stage of the preparation.
        family_seconds: Seconds of fitting by family, without fits that were read from the cache.
        measured: Latencies and energies by metric, those that the budget limits.
        lazy: Makes the fits that a budget asks for; None if all are made, and among the candidates.
        network: A trained network, which the only plan of its problem stands for; None where plans are built from
            factors.
        offers: All candidates that a budget may ask for, by layer name, with their costs; empty if all are made.
        memory: Memory and disk of candidates and plans, if the budget limits one of them.
        curves: Layer name -> measured (relative error, rise of the objective).
        passes: Forward passes of all calibration examples that measuring the curves took; 0 if they were in the cache.
        warnings: What to know of the model and the data before trusting a result.
    """

    task: Task
    model: nn.Module
    space: SearchSpace
    layers: tuple[Layer, ...]
    dense: Cost
    candidates: dict[str, list[Candidate]]
    factors: FactorStore
    statistics: Statistics
    objective: Callable[[nn.Module], float]
    clock: Clock
    family_seconds: dict[str, float] = field(default_factory=dict)
    measured: Mapping[Metric, MeasuredCosts] = field(default_factory=dict)
    memory: MemoryCosts | None = None
    warnings: Sequence[str] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    passes: float = 0.0
    lazy: LazyFits | None = None
    offers: Menus = field(default_factory=dict)
    network: nn.Module | None = None

    @cached_property
    def dense_objective(self) -> float:
        """The objective of the dense model; the default one is its divergence from itself."""
        if self.task.objective is None:
            return 0.0
        value = call("the objective", self.objective, self.task.model)
        assert value is not None
        return value

    @cached_property
    def dense_score(self) -> float | None:
        """The validation score of the dense model; None if the task has no score."""
        return call("the score", self.task.score, self.task.model)

    @property
    def latencies(self) -> MeasuredCosts | None:
        """Measured latencies, if the budget limits latency."""
        return self.measured.get("latency")

    @property
    def free(self) -> tuple[Layer, ...]:
        """The layers that may be factorised."""
        return _free(self.layers)

    def problem(self, budget: Budget) -> Problem:
        """State the optimisation problem that strategies solve.

        Candidates that the budget asks for are fitted, unless that was done before. Under a limit on latency or energy,
        candidates that take more of it than their dense layer are left out.

        Args:
            budget: Limits, as `parse_budget` reads them.

        Returns:
            Each layer's Pareto frontier over the budget's metrics, with the limits in absolute numbers.

        Raises:
            BudgetError: The budget cannot be parsed, or not even the cheapest plan meets it.
        """
        limits = parse_budget(budget, self.dense)
        if self.lazy is None:
            problem = self._state(limits, self.candidates)
        else:
            check_feasible(self._state(limits, self.offers))
            fits, entry = self._fits_for(limits)
            problem = self._state(limits, self._menus(fits))
            problem = dataclasses.replace(problem, fitting=with_gain(entry, problem))
        check_feasible(problem)
        return problem

    def fitted_for(self, budgets: Sequence[Budget]) -> Prepared:
        """Fit the candidates that some budgets ask for; budgets that cannot be met are passed over.

        Args:
            budgets: The budgets.

        Returns:
            The same with these candidates added, with which the problems of all budgets have the same candidates.
        """
        if self.lazy is None:
            return self
        together: Fits = defaultdict(dict)
        for budget in budgets:
            limits = parse_budget(budget, self.dense)
            with suppress(BudgetError):
                check_feasible(self._state(limits, self.offers))
                for pair, fits in self._fits_for(limits)[0].items():
                    together[pair].update(fits)
        return dataclasses.replace(self, candidates=self._menus(together), lazy=None, offers={})

    def all_of(self, name: str) -> Prepared:
        """Fit all candidates of one layer.

        Args:
            name: The layer's name.

        Returns:
            The same with these candidates added.
        """
        if self.lazy is None:
            return self
        with ONE_THREAD, self.clock.stage("fitting"):
            fits = self.lazy.all_of(name)
        return dataclasses.replace(self, candidates=self._menus(fits), lazy=None, offers={})

    def _state(self, limits: tuple[Limit, ...], candidates: Mapping[str, Sequence[Candidate]]) -> Problem:
        """The problem of some candidates."""
        return _stated(limits, self.layers, self.model, self.dense, candidates, self.memory)

    def _fits_for(self, limits: tuple[Limit, ...]) -> tuple[Fits, FittingEntry]:
        """The fits that a budget asks for, and what was decided on which evidence."""
        assert self.lazy is not None

        def state(candidates: Menus) -> Problem:
            losses = {n: with_losses(found, self.curves[n]) for n, found in candidates.items()}
            return self._state(limits, losses)

        with ONE_THREAD, self.clock.stage("fitting"):
            return self.lazy.for_limits(self.offers, state)

    def _menus(self, fits: Fits) -> Menus:
        """All candidates of the first fits and of these, in each precision, with losses and costs."""
        assert self.lazy is not None
        menus = self.lazy.menus(fits)
        with ONE_THREAD, self.clock.stage("rounding"):
            needed = _cheapest(self.free, self.offers, [*METRICS, *self.measured])
            menus = add_precisions(self.statistics, menus, self.space.precisions, self.factors, needed)
        prices = _prices(self.measured, self.memory)
        return {
            x.name: _price_candidates(x, with_losses(menus[x.name], self.curves[x.name]), prices) for x in self.free
        }

    def apply(self, problem: Problem, proposal: Proposal) -> nn.Module:
        """Build a compressed model.

        Args:
            problem: The problem that the proposal belongs to.
            proposal: One frontier index per layer.

        Returns:
            A copy of the task's model with the proposal's factors in place; or a copy of the trained network.
        """
        if self.network is not None:
            return copy.deepcopy(self.network)
        return apply(self.task.model, problem.layers, problem.candidates(proposal), self.factors)

    def to_measure(self, problem: Problem, proposal: Proposal) -> nn.Module:
        """Build a model with the outputs of a compressed one, in the form in which it is measured soonest.

        A task's own objective may look at more than outputs, and gets the compressed model itself.

        Args:
            problem: The problem that the proposal belongs to.
            proposal: One frontier index per layer.
        """
        if self.network is not None or not isinstance(self.objective, Divergence):
            return self.apply(problem, proposal)
        return apply_to_measure(self.task.model, problem.layers, problem.candidates(proposal), self.factors)


def prepare(
    task: Task,
    space: SearchSpace | str = "default",
    cache: str | Path | None = None,
    progress: Progress = silent,
    workers: int | Pool | None = None,
    budget: Budget | None = None,
    latency_on: Conditions | None = None,
) -> Prepared:
    """List a task's layers, fit their candidates and predict what each costs the objective.

    Results of earlier calls are read from the cache. Everything works on a copy of the task's model, and threads take
    turns (`model.forward.ONE_THREAD`).

    Args:
        task: Model, calibration data and objective.
        space: Search space, or the name or path of one; with effort "normal" if it says none.
        cache: Folder for statistics, fits and sensitivities. Default: see `Cache`.
        progress: Progress callback.
        workers: Processes that fit, or a pool that fits, calibrates and measures sensitivities, as other machines do.
            Default: one process per available core.
        budget: Checked before anything is calibrated or fitted, as costs are known in advance. It decides which
            costs are measured: latency, energy, or memory and disk, only if it limits them.
        latency_on: Conditions under which latency and energy are measured.

    Returns:
        Everything that a search under this budget needs.

    Raises:
        TaskError: `check_model` refuses the model, or it cannot be copied, does not run on the data, or has no layer
            that can be factorised.
        BudgetError: The budget cannot be met.
        RankoptError: The search space does not exist, or a latency table does not fit.
    """
    with ONE_THREAD:
        return _prepare(task, space, cache, progress, workers, budget, latency_on)


def _prepare(
    task: Task,
    space: SearchSpace | str,
    cache: str | Path | None,
    progress: Progress,
    workers: int | Pool | None,
    budget: Budget | None,
    latency_on: Conditions | None,
) -> Prepared:
    clock, store, start = Clock(), Cache(cache), time.monotonic()
    space = (load_space(space) if isinstance(space, str) else space).with_effort(NORMAL)
    check_model(task.model)
    task = dataclasses.replace(task, model=with_trainable_weights(task.model))
    with clock.stage("inventory"):
        within = WithinMemory(task.calibration)
        calibration = read_calibration(task.model, within, CALIBRATION_EXAMPLES)
        batches = calibration.batches
        few = [take(x, slice(TRIED)) for x in batches[:2]]
        task = _with_one_example(dataclasses.replace(task, model=check_copy(task.model, few)))
        model_layers, layers = _take_inventory(task, space, few[0])
        warnings = [*space.warnings(layers), *_input_warnings(task, calibration, few[0], within.cut)]
        dense = count(task.model, task.example_input)
    key = _fingerprint(model_layers, batches)

    metrics = limited_metrics(budget)
    limited: list[Metric] = [m for m in MEASURED if m in metrics]
    costs = _measure_costs(model_layers, space, limited, latency_on or Conditions(), store, progress, clock)
    for metric, found in costs.items():
        dense = dense.with_metric(metric, found.dense)
    memory = None
    if metrics & {"memory", "disk"}:
        dense = dataclasses.replace(dense, **measured(task.model, task.example_input))
        memory = MemoryCosts.of(model_layers, dense)
    prices = _prices(costs, memory)
    layers = tuple(x if x.reason else _price_layer(x, prices) for x in layers)
    grid = whole_grid(free := _free(layers), space)
    offers = _offers(free, grid, space.precisions, prices)
    if budget is not None:  # costs need no fit, so whether it can be met is known before fitting
        limits = parse_budget(budget, dense)
        check_feasible(_stated(limits, layers, model_layers.unfolded, dense, offers, memory))
    _check_families(model_layers.unfolded, grid)
    effort = lazy_effort(space.effort, grid)

    # Of a model on a GPU everything stays on that GPU.
    pool = workers if callable(workers) and device_of(task.model).type == "cpu" else None
    statistics = Statistics(model_layers.unfolded, free, batches, key, store, progress)
    factors = FactorStore(store)
    with clock.stage("calibration"):
        _calibrate(statistics, grid, workers, pool)
    lazy = LazyFits(statistics, grid, effort, workers) if effort else None
    with clock.stage("fitting"):
        priced = [*METRICS, *sorted(metrics - {*METRICS})]
        candidates, family_seconds = (
            lazy.start(offers, priced, start, space.minutes) if lazy else fit_candidates(statistics, grid, workers)
        )
    with clock.stage("rounding"):  # the stage's name in result.json
        needed = _cheapest(free, offers, priced)
        candidates = add_precisions(statistics, candidates, space.precisions, factors, needed)
    with clock.stage("sensitivity"), keep_freed_memory():
        objective = task.objective or Divergence(task.model, batches)
        curves, passes = _measure_curves(
            task, objective, statistics, candidates, factors, pool, effort.passes if effort else PASSES
        )
        candidates = {name: with_losses(candidates[name], curves[name]) for name in candidates}
        candidates = {x.name: _price_candidates(x, candidates[x.name], prices) for x in free}
    if lazy:
        lazy.after_first(candidates, time.monotonic() - start)
    return Prepared(
        task,
        model_layers.unfolded,
        space,
        layers,
        dense,
        candidates,
        factors,
        statistics,
        objective,
        clock,
        family_seconds,
        costs,
        memory,
        [
            *warnings,
            *without_input(statistics),
            *few_examples(statistics),
            *wide_layers(statistics),
            *left_out(grid, free, space),
            *without_metric(statistics),
        ],
        curves,
        passes,
        lazy,
        offers if lazy else {},
    )


def _calibrate(statistics: Statistics, grid: Sequence[Request], workers: int | Pool | None, pool: Pool | None) -> None:
    """Measure the statistics. A GPU leaves the cores idle, so the processes that will fit are started meanwhile."""
    if is_on_gpu(statistics) and not callable(workers) and not is_small(grid):
        start_workers(worker_count(statistics.layers, workers))
    with keep_freed_memory():
        statistics.ensure_cached(pool)


def _check_families(model: nn.Module, grid: Sequence[Request]) -> None:
    """Check the modules that the families of other packages make."""
    for x in grid:
        check_modules(x.family, model.get_submodule(x.layer.name), x.layer, x.ranks)


def _with_one_example(task: Task) -> Task:
    return dataclasses.replace(task, example_input=one_example(task.model, task.example_input))


def _input_warnings(task: Task, calibration: Calibration, batch: Any, cut: bool) -> list[str]:
    """What to know of the inputs, and of what the model does with them."""
    unused = ", ".join(map(repr, calibration.unused))
    said = {
        RANDOM: draws_random_numbers(task.model, batch),
        UNDIVIDED: isinstance(task.example_input, Undivided),
        f"the model's forward does not take the batches' {unused}, which are dropped": bool(unused),
        f"only the first {sum(map(batch_size, calibration.batches)):,} calibration examples are used: {LARGE}": cut,
    }
    return [text for text, holds in said.items() if holds]


# --- layers ------------------------------------------------------------------------------------------


def _free(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    return tuple(layer for layer in layers if layer.reason is None)


def _kept(layers: Sequence[Layer], model: nn.Module) -> tuple[Layer, ...]:
    """The layers that stay dense, a weight that several share counted once, and with memory and disk."""
    seen: set[int] = set()
    found = []
    for layer in layers:
        if layer.reason is None:
            continue
        module = model.get_submodule(layer.name)
        inside = module.parameters(recurse=is_parametrized(module))  # a parametrised weight lies in a submodule
        own = [p for p in inside if id(p) not in seen]
        seen.update(map(id, own))
        size = sum(p.numel() * p.element_size() for p in own)
        cost = Cost(sum(p.numel() for p in own), layer.cost.macs, size, memory=size, disk=size)
        found.append(dataclasses.replace(layer, cost=cost))
    return tuple(found)


def _take_inventory(task: Task, space: SearchSpace, batch: Any) -> tuple[ModelLayers, tuple[Layer, ...]]:
    """The model with its factorisable layers, and all of its layers."""
    model = unfolded(task.model, task.example_input, space.split_qkv)
    layers = mark_dense(inventory(model, task.example_input), space)
    kept = irreplaceable(model, _free(layers), batch)
    layers = tuple(dataclasses.replace(x, reason=kept.get(x.name, x.reason)) for x in layers)
    if not (free := _free(layers)):
        names: dict[str, list[str]] = defaultdict(list)
        for x in layers:
            names[str(x.reason)].append(x.name or "model")
        reasons = "; ".join(f"{', '.join(found[:5])}: {reason}" for reason, found in list(names.items())[:5])
        raise TaskError(f"the model has no layer that can be factorised ({reasons or 'it has no layer with a weight'})")
    return ModelLayers(task.model, model, free, task.example_input), layers


def mark_dense(layers: Sequence[Layer], space: SearchSpace) -> tuple[Layer, ...]:
    """Mark the layers that a search space keeps dense, or has no candidate for.

    Args:
        layers: All layers of the inventory, in the model's order.
        space: The search space.

    Returns:
        The same layers, with `reason` set on those that stay dense.
    """
    space.check_layers(layers)
    free = _free(layers)
    marked = []
    for layer in layers:
        reason = layer.reason
        if reason is None:
            reason = space.dense_reason(layer, free)
        if reason is None and layer.out_channels > WIDEST:
            reason = f"its {layer.out_channels:,} outputs are more than {WIDEST:,}, for which fits would take hours"
        quantized = in_each_precision(layer, dense_candidate(layer), space.precisions)
        if reason is None and not quantized and not any(space.ranks(f, layer) for f in space.families_of(layer)):
            depthwise = ", which has only its kernel: it is depthwise" if layer.groups == layer.shape[0] > 1 else ""
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
    metrics: Sequence[Metric] = MEASURED[:1],
) -> tuple[list[Layer], list[MeasuredCosts]]:
    """Measure a table of latencies for a task, and of energies, without calibrating or fitting anything.

    Args:
        task: The task whose layers are timed.
        space: Search space with the candidates to time.
        conditions: Device, runtime and batch size to time under.
        cache: Folder of the cache.
        progress: Progress callback.
        out: File of the table. Default: one in the cache.
        metrics: What is measured.

    Returns:
        The factorisable layers with their costs, and all measured costs, by metric.

    Raises:
        TaskError: The model has no layer that can be factorised.
    """
    task = _with_one_example(task)
    task = dataclasses.replace(task, model=check_copy(task.model, [task.example_input]))
    model = unfolded(task.model, task.example_input, space.split_qkv)
    layers = _free(mark_dense(inventory(model, task.example_input), space))
    if not layers:
        raise TaskError("the model has no layer that can be factorised: rankopt inspect says why")
    model_layers = ModelLayers(task.model, model, layers, task.example_input)
    store = Cache(cache)
    found = [measure_costs(model_layers, space, conditions, store, progress, out, INSTRUMENTS[m]) for m in metrics]
    return [_price_layer(x, found) for x in layers], found


def _stated(  # the parts of a `Prepared`, before there is one
    limits: tuple[Limit, ...],
    layers: Sequence[Layer],
    model: nn.Module,
    dense: Cost,
    menus: Mapping[str, Sequence[Candidate]],
    memory: MemoryCosts | None,
) -> Problem:
    """The problem of some limits, given each layer's candidates without dense."""
    metrics, free = [limit.metric for limit in limits], _free(layers)
    frontiers = tuple(frontier(layer, menus[layer.name], metrics) for layer in free)
    return Problem(free, frontiers, dense, limits, _kept(layers, model), memory.count if memory else None)


def _cheapest(layers: Sequence[Layer], menus: Menus, metrics: Sequence[str]) -> Menus:
    """By layer name what is cheapest in each metric: with it, the least that was stated before fitting is possible."""
    offered = {x.name: [dense_candidate(x), *considered(x, menus[x.name], metrics)] for x in layers}
    return {name: [cheapest(menu, m) for m in metrics] for name, menu in offered.items()}


# --- prices: costs that only some budgets limit ------------------------------------------------------


def _measure_costs(
    model_layers: ModelLayers,
    space: SearchSpace,
    metrics: Sequence[Metric],
    conditions: Conditions,
    store: Cache,
    progress: Progress,
    clock: Clock,
) -> dict[Metric, MeasuredCosts]:
    costs = {}
    for metric in metrics:
        with clock.stage("timing"):
            costs[metric] = measure_costs(
                model_layers, space, conditions, store, progress, instrument=INSTRUMENTS[metric]
            )
    return costs


def _prices(costs: Mapping[Metric, MeasuredCosts], memory: MemoryCosts | None) -> list[MeasuredCosts | MemoryCosts]:
    return [*costs.values(), *([memory] if memory else [])]


def _price_layer(layer: Layer, prices: Sequence[MeasuredCosts | MemoryCosts]) -> Layer:
    for price in prices:
        layer = price.with_layer(layer)
    return layer


def _price_candidates(
    layer: Layer, candidates: list[Candidate], prices: Sequence[MeasuredCosts | MemoryCosts]
) -> list[Candidate]:
    for price in prices:
        candidates = price.with_candidates(layer, candidates)
    return candidates


def _offers(
    layers: Sequence[Layer],
    grid: Sequence[Request],
    precisions: Sequence[str],
    prices: Sequence[MeasuredCosts | MemoryCosts],
) -> Menus:
    """All that could be offered, with its costs, which need no fit; errors are unknown."""
    found: Menus = {x.name: [] for x in layers}
    for request in grid:
        found[request.layer.name] += [
            c for r in request.ranks for c in in_each_form(request.layer, request.family, r, 0.0)
        ]
    for x in layers:
        own = found[x.name]
        own += [c for one in (dense_candidate(x), *own) for c in in_each_precision(x, one, precisions)]
        found[x.name] = _price_candidates(x, own, prices)
    return found


# --- the fingerprint: under what statistics and fits are cached --------------------------------------


def _fingerprint(model_layers: ModelLayers, batches: Sequence[Any]) -> str:
    """A content hash of the model, its free layers and the calibration batches."""
    tensors = [t for batch in batches for t in input_tensors(batch)]
    identities = [_identity(x) for x in model_layers.layers]
    return digest(VERSION, *_state(model_layers.unfolded, batches[0]), *tensors, identities)


def _identity(layer: Layer) -> tuple[Any, ...]:
    """A layer's fields without its latency, which differs between machines."""
    found = dataclasses.asdict(layer) | {"cost": tuple(layer.cost[m] for m in METRICS)}
    return tuple(found[f.name] for f in dataclasses.fields(layer))


def _state(model: nn.Module, batch: Any) -> list[Any]:
    """A model's structure, parameters and buffers, and numbers from its output: its forward is code, not data."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with inference(model):
        out = _run_batch(model, batch)
    z = find_output(out)
    z = torch.view_as_real(z) if z is not None and z.is_complex() else z
    numbers = [] if z is None else [z.double().mean(), z.double().abs().mean(), z.flatten()[0]]
    outputs = [f"{x:.2e}" for x in numbers]
    return [repr(model), *[part for named in tensors for part in named], outputs]


def _run_batch(model: nn.Module, batch: Any) -> Any:
    try:
        return run(model, to_device(batch, model))
    except Exception as error:
        raise TaskError(f"the model does not run on a calibration batch: {type(error).__name__}: {error}") from error


# --- sensitivities -----------------------------------------------------------------------------------


def _measure_curves(
    task: Task,
    objective: Callable[[nn.Module], float],
    statistics: Statistics,
    candidates: dict[str, list[Candidate]],
    factors: FactorStore,
    pool: Pool | None,
    most: int,
) -> tuple[dict[str, Curve], float]:
    """Sensitivity curves by layer name, and how many forward passes of all calibration examples they took.

    Cached for the default objective only: a task's own is code that may change without our noticing.
    """
    names = [layer.name for layer in statistics.layers]
    # Quantized candidates need no measurements of their own: they have a larger error and no fewer parameters, so
    # their errors lie within the range that the others cover.
    candidates = {n: [c for c in candidates[n] if c.precision == SAME] or candidates[n] for n in names}
    if task.objective is not None:
        return _measure_calls(task, objective, statistics, candidates, factors)
    # The forms of a fit share its key and error, and count once.
    assert isinstance(objective, Divergence)
    fits = {n: [*dict.fromkeys((c.key, c.error) for c in candidates[n])] for n in names}
    key = "sensitivity-" + digest(statistics.key, most, fits)
    kept = statistics.cache.read_json(key, dict[str, Curve])
    if kept is not None and kept.keys() == set(names):
        return kept, 0.0
    if pool is not None:  # other machines do not see the cache
        factors = FactorStore(factors.cache)
        factors.keep(c.key for n in names for c in possible_probes(candidates[n]) if c.key)
    build = partial(_replaced_module, factors)
    prober = Prober(objective, statistics.model, statistics.layers, build, statistics.progress, pool, most)
    curves = prober.curves(candidates)
    statistics.cache.write_json(key, curves)
    return curves, prober.passes


def _replaced_module(factors: FactorStore, module: nn.Module, layer: Layer, candidate: Candidate) -> nn.Module:
    return replacement(module, layer, to_measure(layer, candidate, device_of(module)), factors)


def _measure_calls(
    task: Task,
    objective: Callable[[nn.Module], float],
    statistics: Statistics,
    candidates: dict[str, list[Candidate]],
    factors: FactorStore,
) -> tuple[dict[str, Curve], float]:
    """Curves of a task's own objective, and how often it was called."""
    by_name = {layer.name: layer for layer in statistics.layers}
    zero = call("the objective", objective, task.model)
    assert zero is not None
    calls = 1

    def rise(name: str, candidate: Candidate) -> float | None:
        nonlocal calls
        calls += 1
        model = apply(task.model, [by_name[name]], [candidate], factors)
        try:
            value = call("the objective", objective, model)
        except Exception as error:  # noqa: BLE001  # a task's objective may raise anything
            log.warning("the objective of layer %r as %s %s: %s", name, candidate.method, candidate.rank, error)
            return None
        return None if value is None else value - zero

    return measure(list(by_name), candidates, rise, statistics.progress), calls
