"""Checking a latency or energy budget on the rebuilt model.

Predictions add up layers that were measured alone. So the chosen plan's model is built and measured beside the dense
one; if it misses the budget, the limit is tightened by as much and the search repeated.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, cast

from torch import nn

from rankopt.candidates.instruments import INSTRUMENTS, LATENCY, Instrument
from rankopt.candidates.latency import MeasuredCosts, layer_inputs, ratio, sample_modules, signature
from rankopt.candidates.latency_table import Conditions, Timing, interleaved, passes
from rankopt.candidates.prepare import Prepared
from rankopt.core.budget import Limit, amount
from rankopt.core.errors import BudgetError
from rankopt.core.problem import Problem, check_feasible
from rankopt.core.progress import Progress
from rankopt.core.records import MEASURED, Candidate, Layer, Proposal, Trial
from rankopt.core.result_record import MEASURED_KEYS, Metric
from rankopt.core.statistics import interval
from rankopt.model.inputs import expanded
from rankopt.search.loop import Study

ATTEMPTS = 8  # checks, each after a search


NARROW = 0.01  # measuring ends when the interval is narrower than this share of the median


MARGIN = 0.005  # by which a limit is tightened beyond the miss


ROOM = 0.02  # share of the budget that a one-shot plan may leave unused


@dataclass(frozen=True)
class Measured:
    """Latency in nanoseconds, or energy in nanojoules, of a compressed model, measured beside the dense one.

    Where the budget is a fraction, `value`, `low` and `high` are the ratio of the two models, measured in turns, times
    that of the dense model from when the costs were measured.

    Attributes:
        dense: Median of the dense model in this measurement.
        value: Median of the compressed model.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        rounds: How often both models were measured.
    """

    dense: int
    value: int
    low: int
    high: int
    rounds: int


@dataclass(frozen=True)
class Check:
    """Whether a plan keeps a latency or energy budget.

    Attributes:
        limit: The limit as asked.
        predicted: The plan's predicted latency or energy.
        measured: What was measured of the model.
        layers: Name -> (dense, compressed) of every layer that the plan changes.
        attempts: How many plans were checked, this one included.
    """

    limit: Limit
    predicted: int
    measured: Measured
    layers: dict[str, tuple[Timing, Timing]]
    attempts: int = 0

    @property
    def room(self) -> float:
        """Unused share of the limit; negative if the limit is missed."""
        return 1 - self.measured.high / self.limit.target

    @property
    def slower(self) -> list[str]:
        """Names of compressed layers that take more than their dense ones."""
        noise = INSTRUMENTS[cast(Metric, self.limit.metric)].noise
        return [n for n, (dense, small) in self.layers.items() if small.ns > (1 + noise) * dense.ns]

    @property
    def met(self) -> bool:
        """Whether the interval's upper end is within the limit, and no layer takes more than dense."""
        return self.room >= 0 and not self.slower

    def entry(self) -> dict[str, Any]:
        """The check as JSON content, for result.json."""
        metric = self.limit.metric
        return {
            "target": self.limit.target,
            "predicted": self.predicted,
            "dense": self.measured.dense,
            metric: self.measured.value,
            "low": self.measured.low,
            "high": self.measured.high,
            "rounds": self.measured.rounds,
            "met": self.met,
            "attempts": self.attempts,
            "layers": {n: {"dense": dense.ns, metric: small.ns} for n, (dense, small) in self.layers.items()},
        }


def measured_limits(problem: Problem) -> list[Limit]:
    """Find the limits on what is measured.

    Args:
        problem: The problem with its limits.
    """
    return [x for x in problem.limits if x.metric in MEASURED]


def checkable_limits(prepared: Prepared, problem: Problem) -> list[Limit]:
    """Find the limits on latency and energy that can be measured on this machine.

    Args:
        prepared: The task, with the conditions of its costs.
        problem: The problem with its limits.

    Returns:
        The limits; none if the costs are those of another device.
    """
    here = {metric for metric, costs in prepared.measured.items() if not costs.foreign}
    return [x for x in measured_limits(problem) if x.metric in here]


def with_target(limits: Sequence[Limit], replacement: Limit) -> tuple[Limit, ...]:
    """Replace the limit of one metric.

    Args:
        limits: All limits.
        replacement: The new limit, in place of that of the same metric.
    """
    return tuple(replacement if x.metric == replacement.metric else x for x in limits)


def check(prepared: Prepared, limit: Limit, problem: Problem, proposal: Proposal) -> Check:
    """Build a plan's model and measure it.

    Args:
        prepared: The task with its candidates.
        limit: The limit as asked; the problem's own may have been tightened since.
        problem: The problem that the proposal solves.
        proposal: The plan to check.

    Returns:
        What was measured of the model and of every layer that the plan changes.
    """
    costs = prepared.measured[cast(Metric, limit.metric)]
    small = prepared.apply(problem, proposal)
    measured = measure(prepared.task.model, small, prepared.task.example_input, costs, limit)
    layers = _measure_layers(prepared, problem, problem.candidates(proposal), small, costs)
    return Check(limit, problem.cost(proposal)[limit.metric], measured, layers)


def measure(dense: nn.Module, small: nn.Module, example_input: Any, costs: MeasuredCosts, limit: Limit) -> Measured:
    """Measure both models in turns, until the median is known well enough.

    Args:
        dense: The dense model.
        small: The compressed model.
        example_input: One example.
        costs: The conditions, and what the dense model took when the costs were measured.
        limit: The limit; if it is a fraction, the ratio of both models is what counts.
    """
    reference = costs.dense if limit.requested <= 1 else None
    before, after = in_turns(
        dense, small, example_input, costs.conditions, ratios=reference is not None, instrument=costs.instrument
    )
    values = [reference * y / x for x, y in zip(before, after, strict=True)] if reference else list(map(float, after))
    low, high = interval(values)
    return Measured(round(median(before)), round(median(values)), round(low), math.ceil(high), len(values))


def in_turns(
    dense: nn.Module,
    small: nn.Module,
    example_input: Any,
    conditions: Conditions,
    ratios: bool = True,
    instrument: Instrument = LATENCY,
) -> tuple[list[int], list[int]]:
    """Measure two models in turns, until the 95 % interval of the median is narrow.

    Args:
        dense: The dense model.
        small: The compressed model.
        example_input: One example; it is expanded to the conditions' batch.
        conditions: Device, batch, threads and runtime.
        ratios: Whether the interval is that of the ratios of both models, or that of the compressed model's samples.
        instrument: What is measured.

    Returns:
        Samples of the dense and of the compressed model, one of each per round.
    """
    both = passes([dense, small], expanded(example_input, conditions.batch), conditions)
    before: list[int] = []
    after: list[int] = []
    end = time.monotonic() + instrument.seconds
    while True:
        more_before, more_after = interleaved(both, conditions, instrument.block, instrument)
        before += more_before
        after += more_after
        values = [y / x for x, y in zip(before, after, strict=True)] if ratios else list(map(float, after))
        low, high = interval(values)
        if len(values) >= instrument.fewest and (high - low < NARROW * median(values) or time.monotonic() > end):
            return before, after


def _measure_layers(
    prepared: Prepared, problem: Problem, candidates: Sequence[Candidate], small: nn.Module, costs: MeasuredCosts
) -> dict[str, tuple[Timing, Timing]]:
    """Measure each changed layer beside the dense one; equal layers are measured once."""
    conditions = costs.conditions
    changed = [(layer, c) for layer, c in zip(problem.layers, candidates, strict=True) if not c.unchanged]
    x = expanded(prepared.task.example_input, conditions.batch)
    inputs = layer_inputs(prepared.model, [layer for layer, _ in changed], x)
    timings: dict[tuple[Any, ...], tuple[Timing, Timing]] = {}
    layers = {}
    for layer, c in changed:
        dense = prepared.model.get_submodule(layer.name)
        key = (signature(dense, inputs[layer.name]), c.method, c.rank, c.form, c.precision)
        if key not in timings:
            pair = [dense, small.get_submodule(layer.name)]
            timings[key] = _pair(*sample_modules(pair, inputs[layer.name], conditions, costs.instrument))
        layers[layer.name] = timings[key]
    return layers


def _pair(dense: list[int], small: list[int]) -> tuple[Timing, Timing]:
    """Both timings; the compressed layer's is the ratio of the two times the dense layer's."""
    reference = Timing.of(dense)
    return reference, Timing(round(reference.ns * ratio(small, dense)), Timing.of(small).spread)


class FinishedSearch(NamedTuple):
    """A search that came to its end.

    Attributes:
        problem: What was searched.
        study: Its strategy and trials.
        trials: All trials.
        chosen: The finished trial with the least objective.
        network: The trained network that the chosen plan stands for; None of strategies that do not train.
    """

    problem: Problem
    study: Study
    trials: list[Trial]
    chosen: Trial
    network: nn.Module | None = None


Checks = tuple[Check, ...]
"""The checks of a plan, one per limit that is measured."""


def search_until_met(
    finished: FinishedSearch,
    check: Callable[[Problem, Proposal], Checks],
    search: Callable[[Problem], FinishedSearch],
    progress: Progress,
) -> tuple[FinishedSearch, Checks]:
    """Check a search's plan, and search again with limits moved until the plan keeps the budget.

    If the plan of a one-shot strategy leaves room, the limits are loosened once and the better plan is taken.

    Args:
        finished: The search as asked.
        check: Checks a plan: (problem, proposal) -> checks.
        search: Searches a problem with other limits.
        progress: Shows the measuring.

    Returns:
        The search whose plan is best among those that keep the budget, and that plan's checks.

    Raises:
        BudgetError: If the budget is still missed after `ATTEMPTS` checks, or no cheaper plan is left.
    """
    best: tuple[FinishedSearch, Checks] | None = None
    for attempt in range(1, ATTEMPTS + 1):
        proposal = finished.chosen.proposal
        if best and proposal == best[0].chosen.proposal:
            break
        (found,) = (check(finished.problem, proposal) for _ in progress([0], "measuring the plan", 1))
        checks = _counted(found, attempt)
        if finished.study.stopping:
            return finished, checks
        met = all(one.met for one in checks)
        if met and (best is None or _objective(finished) < _objective(best[0])):
            best = finished, checks
        elif best:
            break  # no better than the best so far
        if met and (min(one.room for one in checks) < ROOM or not finished.study.strategy.one_shot):
            break
        problem = finished.problem
        for one in checks:
            if met or not one.met:
                problem = tightened_problem(problem, one, proposal)
        try:
            check_feasible(problem)
        except BudgetError as error:
            raise BudgetError(f"{missed_message(checks)}; tightened, {error}") from error
        finished = search(problem)
    if best is None:
        raise BudgetError(missed_message(checks))
    return best[0], _counted(best[1], attempt)


def _counted(checks: Checks, attempts: int) -> Checks:
    return tuple(dataclasses.replace(one, attempts=attempts) for one in checks)


def _objective(finished: FinishedSearch) -> float:
    assert finished.chosen.objective is not None
    return finished.chosen.objective


def tightened_problem(problem: Problem, check: Check, proposal: Proposal) -> Problem:
    """Move a limit by as much as a check missed it or left room.

    Args:
        problem: The problem that was searched.
        check: The check of its plan.
        proposal: The plan. If it missed the limit, it is outside the new one.

    Returns:
        The same candidates with another limit. Candidates that turned out to take more than their dense layer are
        priced out.
    """
    metric = cast(Metric, check.limit.metric)
    dense = problem.dense[metric]
    frontiers = list(problem.frontiers)
    for number, (layer, frontier, at) in enumerate(zip(problem.layers, frontiers, proposal, strict=True)):
        if layer.name in check.slower:
            cost = frontier[at].cost.with_metric(metric, dense + 1)
            changed = dataclasses.replace(frontier[at], cost=cost)
            frontiers[number] = (*frontier[:at], changed, *frontier[at + 1 :])
    target = next(x.target for x in problem.limits if x.metric == metric)
    if check.met or check.room < 0:
        target = min(math.floor(target / (1 - check.room) * (1 - MARGIN)), dense)
    if check.room < 0:
        target = min(target, check.predicted - 1)
    limits = with_target(problem.limits, dataclasses.replace(check.limit, target=target))
    return dataclasses.replace(problem, frontiers=tuple(frontiers), limits=limits)


def measured_entries(prepared: Prepared, problem: Problem, checks: Checks) -> dict[str, Any]:
    """Describe the budgets on latency and energy for result.json.

    Args:
        prepared: The task, with the conditions of its costs.
        problem: The problem that was searched.
        checks: The checks of the chosen plan; none of what could not be measured here.

    Returns:
        By key of result.json: conditions, measurements, and the layers that no candidate makes cheaper.
    """
    done = {one.limit.metric: one.entry() for one in checks}
    found: dict[str, Any] = {}
    for limit in measured_limits(problem):
        metric = cast(Metric, limit.metric)
        slower = [x.name for x, f in zip(problem.layers, problem.frontiers, strict=True) if not _any_less(x, f, metric)]
        about = prepared.measured[metric].about()
        found[MEASURED_KEYS[metric]] = {**about, "none_faster": slower, "attempts": 0, **done.get(metric, {})}
    return found


def _any_less(layer: Layer, frontier: Sequence[Candidate], metric: Metric) -> bool:
    return any(c.cost[metric] < layer.cost[metric] for c in frontier)


def missed_message(checks: Checks) -> str:
    """Explain that a latency or energy budget was not kept.

    Args:
        checks: The last checks, of which at least one failed.
    """
    failed = next((one for one in checks if not one.met), checks[0])
    m, metric = failed.measured, failed.limit.metric
    return (
        f"{metric}={amount(metric, failed.limit.target)} was not kept in {failed.attempts} attempts: the last takes "
        f"{amount(metric, m.value)} (95 %: {amount(metric, m.low)} to {amount(metric, m.high)}). "
        "Is the machine busy? Try again on a calm one, or ask for more"
    )
