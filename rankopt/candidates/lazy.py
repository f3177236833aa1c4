"""A lazy frontier: candidates are fitted as a budget asks for them.

A few ranks of every family are fitted for any budget. They show how the objective depends on a layer's error, and give
low estimates of the errors of all other candidates (`rankopt.candidates.estimate`). For a budget, the candidates that
these estimates make part of a good plan are fitted; that corrects the estimates, which is repeated until nothing that
is not fitted could be part of a good plan. A family that never becomes part of one is dropped on the evidence of its
few fits.

These few are fitted with all their steps. What steps gain depends on the rank, for `cp` from 2 % with few components to
nine tenths with many, so that shorter fits say little about the errors of others.

A good plan is one at the prices of the limits (`rankopt.core.dual`): each layer takes a candidate of least loss plus
priced cost, or nearly. That includes the exact allocations under losses that differ from the predicted ones by some
factor, which strategies try.

Ranks near the same one of the few are fitted at once, in batches that are always the same: what is fitted for one
budget does not depend on other budgets, nor on what the cache holds. All that is offered has factors and the error of
these.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress

import numpy as np
from typing_extensions import TypedDict

from rankopt.candidates.cache import VERSION
from rankopt.candidates.calibration import Statistics
from rankopt.candidates.effort import EFFORTS, SMALL, Effort
from rankopt.candidates.estimate import LOW, cells, estimated_errors, spread
from rankopt.candidates.fit import Fitted, Request, as_candidates, fit, in_order, rough_seconds
from rankopt.candidates.pool import Pool
from rankopt.core.dual import Array, Positions, drop_impossible, maximise_dual, pick
from rankopt.core.files import digest
from rankopt.core.problem import Problem, ProblemTable
from rankopt.core.records import DENSE, SAME, Candidate, Rank
from rankopt.core.result_record import FittingEntry
from rankopt.decompositions.registry import DECOMPOSITIONS

FACTORS = 7  # factors on a layer's losses that are looked at, between e^-width and e^width

Menus = dict[str, list[Candidate]]
"""Candidates by layer name."""


Pair = tuple[str, str]
"""A layer's name and a family."""


Fits = dict[Pair, dict[Rank, Fitted]]
"""Fits by layer, family and rank."""


class _Record(TypedDict):
    """What was fitted for a budget within some minutes."""

    fits: list[tuple[str, str, list[Rank]]]
    rounds: int
    settled: bool


def lazy_effort(name: str, grid: Sequence[Request]) -> Effort | None:
    """The effort of a name, for a task.

    Args:
        name: One of `SearchSpace.effort`.
        grid: All fits that the search space allows.

    Returns:
        None where everything is to be fitted: because that was asked for, takes seconds, or needs no steps.
    """
    small = sum(map(rough_seconds, grid)) < SMALL
    return None if small or all(x.steps == 0 for x in grid) else EFFORTS.get(name)


@dataclass
class LazyFits:
    """The fits of a task, made as they are asked for.

    Attributes:
        statistics: Calibration statistics of the layers.
        requests: All fits that the search space allows.
        effort: How many of them to make.
        workers: As of `rankopt.candidates.fit.fit`.
        limit: Seconds from a budget on, after which no further fits start.
        limited: The minutes that were asked for, of which `limit` is what was left; None for no limit. What was
            fitted in that time is kept in the cache, so that a search that goes on has the same candidates.
        seconds: Seconds of fitting by family so far.
        first: The fits of a few ranks, for any budget.
        made: All fits that were made so far, for whatever budget.
        added: What a lower precision adds to the error, by layer name and precision; the dense layer's own error in it
            by layer name, precision and DENSE.
    """

    statistics: Statistics
    requests: Sequence[Request]
    effort: Effort
    workers: int | Pool | None = None
    limit: float = math.inf
    limited: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    first: Fits = field(default_factory=dict)
    made: Fits = field(default_factory=dict)
    added: dict[tuple[str, ...], float] = field(default_factory=dict)

    @cached_property
    def grid(self) -> dict[Pair, Request]:
        """All fits that the search space allows, by layer name and family."""
        return {(x.layer.name, x.family): x for x in self.requests}

    @cached_property
    def cells(self) -> dict[Pair, list[tuple[Rank, ...]]]:
        """The ranks that are not fitted first, in groups that are fitted at once, by layer name and family."""
        return {pair: cells(r.ranks, self._first_ranks(pair)) for pair, r in self.grid.items()}

    def start(self) -> tuple[Menus, dict[str, float]]:
        """Fit a few ranks of every family.

        Returns:
            Their candidates, and seconds of fitting by family, to which those of later fits are added.
        """
        self.first = self._fit([(pair, self._first_ranks(pair)) for pair in self.grid])
        self.made = {pair: dict(found) for pair, found in self.first.items()}
        return self.menus({}), self.seconds

    def menus(self, further: Mapping[Pair, Mapping[Rank, Fitted]]) -> Menus:
        """The candidates of the first fits and of others.

        Args:
            further: The others.
        """
        found: Menus = {layer.name: [] for layer in self.statistics.layers}
        for pair, request in self.grid.items():
            fits = {**self.first[pair], **further.get(pair, {})}
            found[pair[0]] += as_candidates(request.layer, request.family, list(fits.values()))
        return {name: in_order(candidates) for name, candidates in found.items()}

    def worth_measuring(self, menus: Menus, offers: Menus) -> Menus:
        """The candidates of the first fits that no estimate beats in both parameters and error.

        Losses at equal errors differ between families; what is not going to be chosen says little about what is.

        Args:
            menus: Candidates of the first fits.
            offers: All candidates that could be offered.
        """
        estimated = self._estimated(offers, {})

        def kept(name: str, c: Candidate) -> bool:
            return not any(o.cost.params <= c.cost.params and o.error < LOW * c.error for o in estimated[name])

        return {name: [c for c in found if kept(name, c)] or found for name, found in menus.items()}

    def after_first(self, menus: Menus, spent: float, minutes: float | None) -> None:
        """Note what the first fits have shown.

        Args:
            menus: Their candidates in all precisions. Lower ones add to the error: the median over a layer's counts.
            spent: Seconds that the preparation took so far.
            minutes: How long it may take for a budget; None for as long as it takes.
        """
        self.limited = minutes
        self.limit = math.inf if minutes is None else max(0.0, 60 * minutes - spent)
        for name, candidates in menus.items():
            own = {(c.method, c.rank): c.error for c in candidates if c.precision == SAME}
            for precision in {c.precision for c in candidates} - {SAME}:
                lower = [c for c in candidates if c.precision == precision]
                added = [c.error - own.get((c.method, c.rank), 0.0) for c in lower]
                self.added[name, precision] = max(0.0, float(np.median(added)))
                for dense in (c for c in lower if c.method == DENSE):
                    self.added[name, precision, DENSE] = dense.error

    def all_of(self, name: str) -> Fits:
        """Make all fits of one layer.

        Args:
            name: The layer's name.
        """
        return self._further({pair: r.ranks for pair, r in self.grid.items() if pair[0] == name})

    def for_limits(self, offers: Menus, state: Callable[[Menus], Problem]) -> tuple[Fits, FittingEntry]:
        """Fit what can be part of a good plan.

        Args:
            offers: All candidates that could be offered, with their costs; their errors are estimated here.
            state: States the problem of some candidates, whose losses it predicts from their errors.

        Returns:
            The fits that this budget needs besides the first ones, and what was decided on which evidence.
        """
        further: Fits = {}
        rounds, until = 0, time.monotonic() + self.limit
        band = _Band(state(self._estimated(offers, further)), self.effort)
        record = "lazy-" + digest(VERSION, self._first_keys, self.effort, self.limited, band.problem.limits)
        if self.limited and (kept := self.statistics.cache.read_json(record, _Record)):
            further = self._further({(layer, family): ranks for layer, family, ranks in kept["fits"]})
            band = _Band(state(self._estimated(offers, further)), self.effort)
            return further, self._entry(further, band, kept["rounds"], settled=kept["settled"])
        while True:
            wanted = self._missing(further, band.near())
            if rounds == 0:  # that corrects the estimates by which the rest is chosen
                wanted = self._missing(further, band.best_of_families()) or wanted
            if not wanted or rounds == self.effort.rounds or time.monotonic() >= until:
                break
            for pair, found in self._further(wanted, until).items():
                further.setdefault(pair, {}).update(found)
            rounds += 1
            band = _Band(state(self._estimated(offers, further)), self.effort)
        if self.limited:
            fits = [(layer, family, list(found)) for (layer, family), found in further.items()]
            self.statistics.cache.write_json(record, {"fits": fits, "rounds": rounds, "settled": not wanted})
        return further, self._entry(further, band, rounds, settled=not wanted)

    @property
    def _first_keys(self) -> list[str]:
        return [one.key for found in self.first.values() for one in found.values()]

    def _first_ranks(self, pair: Pair) -> tuple[Rank, ...]:
        """Those that are fitted for any budget: all where fits take no steps."""
        ranks = self.grid[pair].ranks
        return ranks if DECOMPOSITIONS[pair[1]].closed_form else tuple(spread(ranks, self.effort.points))

    def _further(self, wanted: Mapping[Pair, Sequence[Rank]], until: float = math.inf) -> Fits:
        """The fits of the cells that hold these ranks, of which each is made once."""
        hit = {pair: [c for c in self.cells[pair] if not set(c).isdisjoint(ranks)] for pair, ranks in wanted.items()}
        missing = [(pair, c) for pair, found in hit.items() for c in found if c[0] not in self.made[pair]]
        for pair, found in self._fit(missing, until).items():
            self.made[pair].update(found)
        made = self.made
        return {pair: {r: made[pair][r] for c in found for r in c if r in made[pair]} for pair, found in hit.items()}

    def _fit(self, wanted: Sequence[tuple[Pair, tuple[Rank, ...]]], until: float = math.inf) -> Fits:
        """Fit some ranks of a layer and family at once, and others."""
        steps = {pair: math.ceil(self.effort.steps * self.grid[pair].steps) for pair, _ in wanted}
        requests = [self.grid[pair]._replace(ranks=ranks, steps=steps[pair]) for pair, ranks in wanted]
        made, seconds = fit(self.statistics, requests, self.workers, until)
        for family, spent in seconds.items():
            self.seconds[family] = self.seconds.get(family, 0.0) + spent
        found: Fits = {pair: {} for pair, _ in wanted}
        for (pair, _), fits in zip(wanted, made, strict=True):
            found[pair].update((one.rank, one) for one in fits)
        return found

    def _estimated(self, offers: Menus, further: Mapping[Pair, Mapping[Rank, Fitted]]) -> Menus:
        """The offers, with the errors that are known or estimated."""
        errors: dict[Pair, dict[Rank, float]] = {}
        for pair, request in self.grid.items():
            known = {r: f.error for r, f in {**self.first[pair], **further.get(pair, {})}.items()}
            errors[pair] = dict(zip(request.ranks, map(float, estimated_errors(request.ranks, known)), strict=True))

        def of(name: str, c: Candidate) -> float:
            if c.method == DENSE:
                return self.added.get((name, c.precision, DENSE), 0.0)
            return errors[name, c.method][c.rank] + self.added.get((name, c.precision), 0.0)

        return {name: [dataclasses.replace(c, error=of(name, c)) for c in found] for name, found in offers.items()}

    def _missing(
        self, further: Mapping[Pair, Mapping[Rank, Fitted]], wanted: Mapping[Pair, Sequence[Rank]]
    ) -> dict[Pair, list[Rank]]:
        """What of the wanted is neither among the first fits nor among these, in the grid's order."""
        missing = {}
        for pair, request in self.grid.items():
            known = {*self.first[pair], *further.get(pair, {})}
            ranks = [r for r in request.ranks if r in wanted.get(pair, ()) and r not in known]
            if ranks:
                missing[pair] = ranks
        return missing

    def _entry(
        self, further: Mapping[Pair, Mapping[Rank, Fitted]], band: _Band, rounds: int, *, settled: bool
    ) -> FittingEntry:
        dropped = [pair for pair in self.grid if self.cells[pair] and not further.get(pair)]
        return {
            "candidates": sum(len(r.ranks) for r in self.grid.values()),
            "first": sum(map(len, self.first.values())),
            "final": sum(map(len, further.values())),
            "rounds": rounds,
            "settled": settled,
            "bound": band.bound,
            "gain": 0.0,
            "dropped": [
                {"layer": layer, "family": family, "behind": band.behind.get((layer, family))}
                for layer, family in dropped
            ],
        }


def with_gain(entry: FittingEntry, problem: Problem) -> FittingEntry:
    """Complete what was decided by what fitting everything could gain.

    Args:
        entry: What was decided.
        problem: The problem of the candidates that are offered.
    """
    *_, least = _priced(problem)
    return {**entry, "gain": max(0.0, 1 - entry["bound"] / least) if least > 0 else 0.0}


def _priced(problem: Problem) -> tuple[ProblemTable, Positions, Array, float]:
    """A problem as a table, and its `maximise_dual`."""
    table = drop_impossible(problem.table)
    if np.isinf(table.losses).all(axis=1).any():  # where costs only estimate, a plan may still fit when it is counted
        table = problem.table
    return table, *maximise_dual(table)


class _Band:
    """The candidates of a problem that are best, or nearly, at the prices of its limits.

    Attributes:
        bound: No plan within the limits has a smaller predicted loss.
        behind: By how much a plan with the best candidate of a family on a layer loses more than the bound, at least.
    """

    def __init__(self, problem: Problem, effort: Effort) -> None:
        self.problem = problem
        table, plan, prices, self.bound = _priced(problem)
        paid = np.tensordot(prices, table.costs, 1)
        unit = effort.slack * float(pick(table.losses, plan).mean())
        self.least = table.losses + paid - (table.losses + paid).min(axis=1, keepdims=True)
        self.within = np.zeros_like(table.losses, bool)
        for factor in np.exp(np.linspace(-effort.width, effort.width, FACTORS)):
            reduced = factor * table.losses + paid
            self.within |= reduced - reduced.min(axis=1, keepdims=True) <= factor * unit
        for limit in range(len(problem.limits)):
            costs = np.where(np.isfinite(table.losses), table.costs[limit], math.inf)
            self.within[np.arange(len(costs)), costs.argmin(axis=1)] = True
        self.behind = {pair: value for pair, (value, _) in self._best().items()}

    def near(self) -> dict[Pair, list[Rank]]:
        """The ranks of the candidates in the band."""
        found: dict[Pair, list[Rank]] = defaultdict(list)
        for layer, frontier, within in zip(self.problem.layers, self.problem.frontiers, self.within, strict=True):
            for candidate in compress(frontier, within):
                found[layer.name, candidate.method].append(candidate.rank)
        return found

    def best_of_families(self) -> dict[Pair, list[Rank]]:
        """For each layer the best rank of each family that has candidates in the band."""
        near = self.near()
        return {pair: [rank] for pair, (_, rank) in self._best().items() if pair in near}

    def _best(self) -> dict[Pair, tuple[float, Rank]]:
        found: dict[Pair, tuple[float, Rank]] = {}
        for i, (layer, frontier) in enumerate(zip(self.problem.layers, self.problem.frontiers, strict=True)):
            for j, candidate in enumerate(frontier):
                pair, value = (layer.name, candidate.method), float(self.least[i, j])
                if candidate.method != DENSE and value < found.get(pair, (math.inf,))[0]:
                    found[pair] = value, candidate.rank
        return found
