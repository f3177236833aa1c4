"""A latency budget is a promise: it is checked on the rebuilt model, and where it misses the search is tightened."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from torch import nn

from rankopt.candidates.latency import Latencies, expanded, layer_inputs, ratio, sample_modules, signature
from rankopt.candidates.latency_table import Conditions, Timing, interleaved, passes
from rankopt.candidates.prepare import Prepared
from rankopt.core.budget import Limit, amount
from rankopt.core.errors import BudgetError
from rankopt.core.problem import Problem, check_feasible
from rankopt.core.records import Candidate, Layer, Proposal, Trial
from rankopt.search.loop import Study

ATTEMPTS = 8


BLOCK, FEWEST, SECONDS = 20, 40, 20.0  # measured until the interval is narrow, or for so long


NARROW = 0.01  # width of the interval, over the median


MARGIN = 0.005  # by how much more than it missed a limit is tightened


ROOM = 0.02  # of a budget that may be left


NOISE = 0.02  # a layer within this of the dense one's time is as fast


@dataclass(frozen=True)
class Measured:
    """Latency of a compressed model beside the dense one, in nanoseconds; low and high: 95 % of the median.

    Where the budget is a fraction, these are the ratio of the two, measured in turns, times the dense model's latency
    as it was when the costs were measured.
    """

    dense: int
    latency: int
    low: int
    high: int
    rounds: int


@dataclass(frozen=True)
class Check:
    """Whether a plan keeps a latency budget. layers: name -> (dense, compressed), where layers are factorised."""

    limit: Limit
    predicted: int
    measured: Measured
    layers: dict[str, tuple[Timing, Timing]]
    attempts: int = 0

    @property
    def room(self) -> float:
        """What is left of the limit, as a share of it; negative where it is missed."""
        return 1 - self.measured.high / self.limit.target

    @property
    def slower(self) -> list[str]:
        """Factorised layers that are slower than dense."""
        return [n for n, (dense, small) in self.layers.items() if small.ns > (1 + NOISE) * dense.ns]

    @property
    def met(self) -> bool:
        """The interval's upper end is within the limit, and no layer is slower than dense."""
        return self.room >= 0 and not self.slower

    def about(self) -> dict[str, Any]:
        """For result.json."""
        m = dataclasses.asdict(self.measured)
        layers = {n: {"dense": d.ns, "latency": s.ns} for n, (d, s) in self.layers.items()}
        outcome = {"met": self.met, "attempts": self.attempts}
        return {"target": self.limit.target, "predicted": self.predicted, **m, **outcome, "layers": layers}


def latency_limit(problem: Problem) -> Limit | None:
    """The limit on latency, if there is one."""
    return next((x for x in problem.limits if x.metric == "latency"), None)


def checkable_limit(prepared: Prepared, problem: Problem) -> Limit | None:
    """The limit on latency, if there is one and the device is here."""
    here = prepared.latencies is not None and not prepared.latencies.foreign
    return latency_limit(problem) if here else None


def with_target(limits: Sequence[Limit], wanted: Limit) -> tuple[Limit, ...]:
    """The limits, that of the same metric replaced."""
    return tuple(wanted if x.metric == wanted.metric else x for x in limits)


def check(prepared: Prepared, limit: Limit, problem: Problem, proposal: Proposal) -> Check:
    """Rebuild a plan's model and measure it. limit: what was asked; problem's own may be tighter."""
    latencies = prepared.latencies
    assert latencies is not None
    small = prepared.apply(problem, proposal)
    measured = measure(prepared.task.model, small, prepared.task.example_input, latencies, limit)
    candidates = problem.candidates(proposal)
    layers = _time_layers(prepared, problem, candidates, small, latencies.conditions)
    return Check(limit, problem.cost(proposal).latency, measured, layers)


def measure(dense: nn.Module, small: nn.Module, example_input: Any, latencies: Latencies, limit: Limit) -> Measured:
    """Both models in turns, until the median is known well enough."""
    whole = latencies.dense if limit.requested <= 1 else None
    before, after = in_turns(dense, small, example_input, latencies.conditions, whole is not None)
    values = [whole * y / x for x, y in zip(before, after, strict=True)] if whole else list(map(float, after))
    low, high = interval(values)
    return Measured(round(median(before)), round(median(values)), round(low), math.ceil(high), len(values))


def in_turns(
    dense: nn.Module, small: nn.Module, example_input: Any, conditions: Conditions, ratios: bool = True
) -> tuple[list[int], list[int]]:
    """Nanoseconds of both models, until the median of the ratios (else of the small model's) is known well enough."""
    both = passes([dense, small], expanded(example_input, conditions.batch), conditions)
    before: list[int] = []
    after: list[int] = []
    end = time.monotonic() + SECONDS
    while True:
        for kept, new in zip((before, after), interleaved(both, conditions, BLOCK), strict=True):
            kept += new
        values = [y / x for x, y in zip(before, after, strict=True)] if ratios else list(map(float, after))
        low, high = interval(values)
        if len(values) >= FEWEST and (high - low < NARROW * median(values) or time.monotonic() > end):
            return before, after


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, whatever the distribution: order statistics n/2 ∓ 1.96 √n / 2."""
    ordered, n = sorted(values), len(values)
    k = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[k], ordered[n - 1 - k]


def _time_layers(
    prepared: Prepared, problem: Problem, candidates: Sequence[Candidate], small: nn.Module, conditions: Conditions
) -> dict[str, tuple[Timing, Timing]]:
    """Each factorised layer beside the dense one; equal ones are timed once."""
    todo = [(x, c) for x, c in zip(problem.layers, candidates, strict=True) if not c.unchanged]
    x = expanded(prepared.task.example_input, conditions.batch)
    inputs = layer_inputs(prepared.model, [layer for layer, _ in todo], x)
    found: dict[tuple[Any, ...], tuple[Timing, Timing]] = {}
    layers = {}
    for layer, c in todo:
        dense = prepared.model.get_submodule(layer.name)
        same = (signature(dense, inputs[layer.name]), c.method, c.rank, c.form, c.precision)
        if same not in found:
            pair = [dense, small.get_submodule(layer.name)]
            found[same] = _pair(*sample_modules(pair, inputs[layer.name], conditions))
        layers[layer.name] = found[same]
    return layers


class Searched(NamedTuple):
    """A search that came to its end."""

    problem: Problem
    study: Study
    trials: list[Trial]
    chosen: Trial


def search_until_met(
    found: Searched, check: Callable[[Problem, Proposal], Check], search: Callable[[Problem], Searched], progress: Any
) -> tuple[Searched, Check]:
    """Check, and search again with the limit moved until it is kept; a one-shot plan that leaves room is bettered.

    Raises BudgetError, after ATTEMPTS or where nothing faster is left, if it never is.
    """
    kept: tuple[Searched, Check] | None = None
    for number in range(1, ATTEMPTS + 1):
        if kept and found.chosen.proposal == kept[0].chosen.proposal:
            break
        (seen,) = (check(found.problem, found.chosen.proposal) for _ in progress([0], "measuring the latency", 1))
        seen = dataclasses.replace(seen, attempts=number)
        if found.study.stopping:
            return found, seen
        if seen.met and (kept is None or found.chosen.objective < kept[0].chosen.objective):  # type: ignore[operator]
            kept = found, seen
        elif kept:
            break  # nothing better: what was kept before stays
        if seen.met and (seen.room < ROOM or not found.study.strategy.one_shot):
            break
        problem = tightened_problem(found.problem, seen, found.chosen.proposal)
        try:
            check_feasible(problem)
        except BudgetError as error:
            raise BudgetError(f"{missed_message(seen)}; tightened, {error}") from error
        found = search(problem)
    if kept is None:
        raise BudgetError(missed_message(seen))
    return kept[0], dataclasses.replace(kept[1], attempts=number)


def _pair(dense: list[int], small: list[int]) -> tuple[Timing, Timing]:
    whole = Timing.of(dense)
    return whole, Timing(round(whole.ns * ratio(small, dense)), Timing.of(small).spread)


def tightened_problem(problem: Problem, seen: Check, proposal: Proposal) -> Problem:
    """The same frontiers with the costs that were seen, and a limit that makes up for a miss or for room left.

    A layer that turned out slower than dense is given up. A plan that missed is outside the new limit.
    """
    frontiers = list(problem.frontiers)
    for number, (layer, frontier, at) in enumerate(zip(problem.layers, frontiers, proposal, strict=True)):
        if layer.name in seen.slower:
            cost = dataclasses.replace(frontier[at].cost, latency=problem.dense.latency + 1)
            changed = dataclasses.replace(frontier[at], cost=cost)
            frontiers[number] = (*frontier[:at], changed, *frontier[at + 1 :])
    limit = latency_limit(problem)
    assert limit is not None
    target = limit.target
    if seen.met or seen.room < 0:
        target = min(math.floor(target / (1 - seen.room) * (1 - MARGIN)), problem.dense.latency)
    if seen.room < 0:
        target = min(target, seen.predicted - 1)
    limits = with_target(problem.limits, dataclasses.replace(seen.limit, target=target))
    return dataclasses.replace(problem, frontiers=tuple(frontiers), limits=limits)


def latency_entry(prepared: Prepared, problem: Problem, kept: Check | None) -> dict[str, Any]:
    """The entry of result.json: conditions, what was measured, and which layers no candidate makes faster."""
    latencies = prepared.latencies
    if latencies is None or latency_limit(problem) is None:
        return {}
    slower = [x.name for x, f in zip(problem.layers, problem.frontiers, strict=True) if not _any_faster(x, f)]
    found = {**latencies.about(), "none_faster": slower, "attempts": 0}
    return {"latency": found | (kept.about() if kept else {})}


def _any_faster(layer: Layer, frontier: Sequence[Candidate]) -> bool:
    return any(c.cost.latency < layer.cost.latency for c in frontier)


def missed_message(failed: Check) -> str:
    """What to say when the search was tightened as often as it may be."""
    m = failed.measured
    return (
        f"latency={amount('latency', failed.limit.target)} was not kept in {failed.attempts} attempts: the last takes "
        f"{amount('latency', m.latency)} (95 %: {amount('latency', m.low)} to {amount('latency', m.high)}). "
        "Is the machine busy? Try again on a calm one, or ask for more"
    )
