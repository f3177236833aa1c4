"""Checking a latency budget on the rebuilt model.

Predicted latencies add up layers that were timed alone. So the chosen plan's model is built and timed beside the dense
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

from rankopt.candidates.latency import Latencies, expanded, layer_inputs, ratio, sample_modules, signature
from rankopt.candidates.latency_table import Conditions, Timing, interleaved, passes
from rankopt.candidates.prepare import Prepared
from rankopt.core.budget import Limit, amount
from rankopt.core.errors import BudgetError
from rankopt.core.problem import Problem, check_feasible
from rankopt.core.progress import Progress
from rankopt.core.records import Candidate, Layer, Proposal, Trial
from rankopt.core.result_record import LatencyCheckEntry, LatencyEntry
from rankopt.search.loop import Study

ATTEMPTS = 8  # checks, each after a search


BLOCK = 20  # rounds of measuring both models between looks at the interval


FEWEST = 40  # rounds, at least


SECONDS = 20.0  # after which the interval is taken as it is


NARROW = 0.01  # measuring ends when the interval is narrower than this share of the median


MARGIN = 0.005  # by which a limit is tightened beyond the miss


ROOM = 0.02  # share of the budget that a one-shot plan may leave unused


NOISE = 0.02  # a layer within this of the dense layer's time counts as equally fast


@dataclass(frozen=True)
class Measured:
    """Latency of a compressed model, measured beside the dense one, in nanoseconds.

    Where the budget is a fraction, `latency`, `low` and `high` are the ratio of the two models, measured in turns,
    times the dense latency from when the costs were measured.

    Attributes:
        dense: Median latency of the dense model in this measurement.
        latency: Median latency of the compressed model.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        rounds: How often both models were measured.
    """

    dense: int
    latency: int
    low: int
    high: int
    rounds: int


@dataclass(frozen=True)
class Check:
    """Whether a plan keeps a latency budget.

    Attributes:
        limit: The limit as asked.
        predicted: The plan's predicted latency in nanoseconds.
        measured: The model's measured latency.
        layers: Name -> (dense timing, compressed timing) of every layer that the plan changes.
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
        """Names of compressed layers that are slower than their dense ones."""
        return [n for n, (dense, small) in self.layers.items() if small.ns > (1 + NOISE) * dense.ns]

    @property
    def met(self) -> bool:
        """Whether the interval's upper end is within the limit, and no layer is slower than dense."""
        return self.room >= 0 and not self.slower

    def entry(self) -> LatencyCheckEntry:
        """The check as JSON content, for result.json."""
        return {
            "target": self.limit.target,
            "predicted": self.predicted,
            "dense": self.measured.dense,
            "latency": self.measured.latency,
            "low": self.measured.low,
            "high": self.measured.high,
            "rounds": self.measured.rounds,
            "met": self.met,
            "attempts": self.attempts,
            "layers": {n: {"dense": dense.ns, "latency": small.ns} for n, (dense, small) in self.layers.items()},
        }


def latency_limit(problem: Problem) -> Limit | None:
    """Find the limit on latency.

    Args:
        problem: The problem with its limits.

    Returns:
        The limit, or None if latency is not limited.
    """
    return next((x for x in problem.limits if x.metric == "latency"), None)


def checkable_limit(prepared: Prepared, problem: Problem) -> Limit | None:
    """Find a limit on latency that can be measured on this machine.

    Args:
        prepared: The task, with the device of its latencies.
        problem: The problem with its limits.

    Returns:
        The limit, or None if there is none or the latencies are those of another device.
    """
    here = prepared.latencies is not None and not prepared.latencies.foreign
    return latency_limit(problem) if here else None


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
        limit: The latency limit as asked; the problem's own may have been tightened since.
        problem: The problem that the proposal solves.
        proposal: The plan to check.

    Returns:
        The measured latency of the model and of every layer that the plan changes.
    """
    latencies = prepared.latencies
    assert latencies is not None
    small = prepared.apply(problem, proposal)
    measured = measure(prepared.task.model, small, prepared.task.example_input, latencies, limit)
    candidates = problem.candidates(proposal)
    layers = _time_layers(prepared, problem, candidates, small, latencies.conditions)
    return Check(limit, problem.cost(proposal).latency, measured, layers)


def measure(dense: nn.Module, small: nn.Module, example_input: Any, latencies: Latencies, limit: Limit) -> Measured:
    """Measure both models in turns, until the median is known well enough.

    Args:
        dense: The dense model.
        small: The compressed model.
        example_input: One example.
        latencies: The conditions, and the dense model's latency when the costs were measured.
        limit: The limit; if it is a fraction, the ratio of both models is what counts.
    """
    reference = latencies.dense if limit.requested <= 1 else None
    before, after = in_turns(dense, small, example_input, latencies.conditions, ratios=reference is not None)
    values = [reference * y / x for x, y in zip(before, after, strict=True)] if reference else list(map(float, after))
    low, high = interval(values)
    return Measured(round(median(before)), round(median(values)), round(low), math.ceil(high), len(values))


def in_turns(
    dense: nn.Module, small: nn.Module, example_input: Any, conditions: Conditions, ratios: bool = True
) -> tuple[list[int], list[int]]:
    """Time two models in turns, until the 95 % interval of the median is narrow.

    Args:
        dense: The dense model.
        small: The compressed model.
        example_input: One example; it is expanded to the conditions' batch.
        conditions: Device, batch, threads and runtime.
        ratios: Whether the interval is that of the ratios of both models, or that of the compressed model's times.

    Returns:
        Nanoseconds of the dense and of the compressed model, one of each per round.
    """
    both = passes([dense, small], expanded(example_input, conditions.batch), conditions)
    before: list[int] = []
    after: list[int] = []
    end = time.monotonic() + SECONDS
    while True:
        more_before, more_after = interleaved(both, conditions, BLOCK)
        before += more_before
        after += more_after
        values = [y / x for x, y in zip(before, after, strict=True)] if ratios else list(map(float, after))
        low, high = interval(values)
        if len(values) >= FEWEST and (high - low < NARROW * median(values) or time.monotonic() > end):
            return before, after


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the distribution-free 95 % interval of the median: the order statistics n/2 ∓ 1.96 √n / 2.

    Args:
        values: The sample, of n numbers.

    Returns:
        The lower and the upper end.
    """
    ordered, n = sorted(values), len(values)
    k = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[k], ordered[n - 1 - k]


def _time_layers(
    prepared: Prepared, problem: Problem, candidates: Sequence[Candidate], small: nn.Module, conditions: Conditions
) -> dict[str, tuple[Timing, Timing]]:
    """Time each changed layer beside the dense one; equal layers are timed once."""
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
            timings[key] = _pair(*sample_modules(pair, inputs[layer.name], conditions))
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
    """

    problem: Problem
    study: Study
    trials: list[Trial]
    chosen: Trial


def search_until_met(
    finished: FinishedSearch,
    check: Callable[[Problem, Proposal], Check],
    search: Callable[[Problem], FinishedSearch],
    progress: Progress,
) -> tuple[FinishedSearch, Check]:
    """Check a search's plan, and search again with the limit moved until the plan keeps the budget.

    If the plan of a one-shot strategy leaves room, the limit is loosened once and the better plan is taken.

    Args:
        finished: The search as asked.
        check: Checks a plan: (problem, proposal) -> check.
        search: Searches a problem with other limits.
        progress: Shows the measuring.

    Returns:
        The search whose plan is best among those that keep the budget, and that plan's check.

    Raises:
        BudgetError: If the budget is still missed after `ATTEMPTS` checks, or no faster plan is left.
    """
    best: tuple[FinishedSearch, Check] | None = None
    for attempt in range(1, ATTEMPTS + 1):
        proposal = finished.chosen.proposal
        if best and proposal == best[0].chosen.proposal:
            break
        (result,) = (check(finished.problem, proposal) for _ in progress([0], "measuring the latency", 1))
        result = dataclasses.replace(result, attempts=attempt)
        if finished.study.stopping:
            return finished, result
        if result.met and (best is None or _objective(finished) < _objective(best[0])):
            best = finished, result
        elif best:
            break  # no better than the best so far
        if result.met and (result.room < ROOM or not finished.study.strategy.one_shot):
            break
        problem = tightened_problem(finished.problem, result, proposal)
        try:
            check_feasible(problem)
        except BudgetError as error:
            raise BudgetError(f"{missed_message(result)}; tightened, {error}") from error
        finished = search(problem)
    if best is None:
        raise BudgetError(missed_message(result))
    return best[0], dataclasses.replace(best[1], attempts=attempt)


def _objective(finished: FinishedSearch) -> float:
    assert finished.chosen.objective is not None
    return finished.chosen.objective


def tightened_problem(problem: Problem, check: Check, proposal: Proposal) -> Problem:
    """Move the latency limit by as much as a check missed it or left room.

    Args:
        problem: The problem that was searched.
        check: The check of its plan.
        proposal: The plan. If it missed the limit, it is outside the new one.

    Returns:
        The same candidates with another limit. Candidates that turned out slower than their dense layer are priced out.
    """
    frontiers = list(problem.frontiers)
    for number, (layer, frontier, at) in enumerate(zip(problem.layers, frontiers, proposal, strict=True)):
        if layer.name in check.slower:
            cost = dataclasses.replace(frontier[at].cost, latency=problem.dense.latency + 1)
            changed = dataclasses.replace(frontier[at], cost=cost)
            frontiers[number] = (*frontier[:at], changed, *frontier[at + 1 :])
    limit = latency_limit(problem)
    assert limit is not None
    target = limit.target
    if check.met or check.room < 0:
        target = min(math.floor(target / (1 - check.room) * (1 - MARGIN)), problem.dense.latency)
    if check.room < 0:
        target = min(target, check.predicted - 1)
    limits = with_target(problem.limits, dataclasses.replace(check.limit, target=target))
    return dataclasses.replace(problem, frontiers=tuple(frontiers), limits=limits)


def latency_entry(prepared: Prepared, problem: Problem, check: Check | None) -> LatencyEntry | None:
    """Describe a latency budget for result.json.

    Args:
        prepared: The task, with the conditions of its latencies.
        problem: The problem that was searched.
        check: The check of the chosen plan; None if it could not be measured here.

    Returns:
        Conditions, measurements, and the layers that no candidate makes faster; None if latency is not limited.
    """
    latencies = prepared.latencies
    if latencies is None or latency_limit(problem) is None:
        return None
    slower = [x.name for x, f in zip(problem.layers, problem.frontiers, strict=True) if not _any_faster(x, f)]
    measured: dict[str, object] = {**check.entry()} if check else {}
    entry = {**latencies.about(), "none_faster": slower, "attempts": 0, **measured}
    return cast(LatencyEntry, entry)


def _any_faster(layer: Layer, frontier: Sequence[Candidate]) -> bool:
    return any(c.cost.latency < layer.cost.latency for c in frontier)


def missed_message(failed: Check) -> str:
    """Explain that a latency budget was not kept.

    Args:
        failed: The last check.
    """
    m = failed.measured
    return (
        f"latency={amount('latency', failed.limit.target)} was not kept in {failed.attempts} attempts: the last takes "
        f"{amount('latency', m.latency)} (95 %: {amount('latency', m.low)} to {amount('latency', m.high)}). "
        "Is the machine busy? Try again on a calm one, or ask for more"
    )
