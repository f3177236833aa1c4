"""A lazy frontier: candidates are fitted with few steps at first, and to the end as a budget asks for them.

Some ranks of every family are fitted with a few steps, for any budget; errors of the ranks between are interpolated.
Candidates that another one of their layer will beat are given up, whatever their family, and the others get more steps:
successive halving (`rankopt.candidates.halving`). From the two errors of each that is left follows the error that it is
likely to reach. A fit that has converged is left out of the next round.

For a budget, the candidates that these likely errors make part of a good plan are fitted to the end; that corrects the
errors, which is repeated until all candidates of good plans are fitted to the end. A good plan is one at the prices of
the limits (`rankopt.core.dual`): each layer takes a candidate of least loss plus priced cost, or nearly. That includes
the exact allocations under losses that differ from the predicted ones by some factor, which strategies try.

What is fitted for one budget does not depend on other budgets, nor on what the cache holds: a fit's result does not
depend on what it is stacked with, and where neighbouring ranks of a small layer share a batch, batches are always the
same. Every candidate that is offered has factors, and their measured error.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from rankopt.candidates.cache import VERSION
from rankopt.candidates.calibration import Statistics
from rankopt.candidates.effort import EFFORTS, SMALL, Effort, Rung
from rankopt.candidates.fit import Fitted, as_candidates, fit, in_order
from rankopt.candidates.halving import UNKNOWN, Reached, beaten, between, paths, segments
from rankopt.candidates.jobs import Request, rough_seconds, work_of
from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.pool import Pool
from rankopt.core.budget import Limit
from rankopt.core.dual import Array, Positions, drop_impossible, maximise_dual, pick
from rankopt.core.files import digest
from rankopt.core.problem import Problem, ProblemTable
from rankopt.core.records import DENSE, SAME, Candidate, Layer, Rank
from rankopt.core.result_record import FittingEntry
from rankopt.decompositions.registry import DECOMPOSITIONS

FACTORS = 7  # factors on a layer's losses that are looked at, between e^-width and e^width


DEAR = 30.0
"""Rough seconds of a layer's fits of one family in the last rung, from which on they go through `Effort.dear`."""


DEAREST = 1 / 3
"""The largest share of a layer's weights at which such fits are made; errors of larger ranks are extrapolated."""


INTERPOLATED = 1.1
"""By how much an interpolated error may be too small, at most, where it decides that other candidates are given up."""


AT_ONCE = 2_000_000
"""`work_of` ranks that are fitted to the end at once: those of small layers, a step of which is mostly overhead.

Families that stack ranks fit them one by one."""


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


def is_small(grid: Sequence[Request]) -> bool:
    """Whether all fits of a task take seconds.

    Args:
        grid: All fits that the search space allows.
    """
    return sum(map(rough_seconds, grid)) < SMALL


def lazy_effort(name: str, grid: Sequence[Request]) -> Effort | None:
    """The effort of a name, for a task.

    Args:
        name: One of `SearchSpace.effort`.
        grid: All fits that the search space allows.

    Returns:
        None where everything is to be fitted: because that was asked for, takes seconds, or needs no steps.
    """
    return None if is_small(grid) or all(x.steps == 0 for x in grid) else EFFORTS.get(name)


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
        first: The fits for any budget, of what no other candidate has beaten.
        reached: What all that no other candidate has beaten have reached, by layer, family and rank: those of `first`,
            and the ranks between.
        made: All fits to the end that were made so far, for whatever budget.
        untried: Layers and families that no time was left for.
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
    reached: dict[Pair, dict[Rank, Reached]] = field(default_factory=dict)
    made: Fits = field(default_factory=dict)
    untried: set[Pair] = field(default_factory=set)
    added: dict[tuple[str, ...], float] = field(default_factory=dict)

    @cached_property
    def grid(self) -> dict[Pair, Request]:
        """All fits that the search space allows, by layer name and family."""
        return {(x.layer.name, x.family): x for x in self.requests}

    @cached_property
    def cells(self) -> dict[Pair, list[tuple[Rank, ...]]]:
        """The ranks of the first fits that are not at their end, in groups that are fitted at once."""
        return {pair: self._cells(pair) for pair in self.grid if not self._at_end(pair)}

    @cached_property
    def segments(self) -> dict[tuple[Pair, Rung], list[tuple[Rank, ...]]]:
        """The ranks of each direction in which they grow, from one that is fitted in a rung to the next."""
        found = {p: paths(r.layer, r.family, r.ranks) for p, r in self.grid.items()}
        return {
            (pair, rung): [x for path in of_pair for x in segments(path, rung.stride, rung.pieces, self._cheap(pair))]
            for pair, of_pair in found.items()
            for rung in self._rungs(pair)
        }

    def _rungs(self, pair: Pair) -> tuple[Rung, ...]:
        return self.effort.dear if pair in self.dear else self.effort.rungs

    def _cheap(self, pair: Pair) -> Callable[[Rank], bool]:
        """Tells which ranks are fitted before a budget asks for them: where fits take long, no large ones."""
        most = DEAREST * self.grid[pair].layer.weights if pair in self.dear else math.inf
        return lambda rank: self._weights(pair, rank) <= most

    @cached_property
    def dear(self) -> set[Pair]:
        """Families and layers whose fits in the last rung would take long."""
        last = self.effort.rungs[-1]
        every = {p: r._replace(steps=self._steps_of_rung(p, last)) for p, r in self.grid.items()}
        return {p for p, r in every.items() if rough_seconds(r) > DEAR * last.stride}

    def start(
        self, offers: Menus, metrics: Sequence[str], begun: float = 0.0, minutes: float | None = None
    ) -> tuple[Menus, dict[str, float]]:
        """Fit candidates with few steps, and those that are not beaten with more.

        Args:
            offers: All candidates that could be offered, with their costs.
            metrics: Metrics that budgets may limit.
            begun: Value of `time.monotonic()` when the preparation began.
            minutes: How long it may take, after which no further fits start, but for those that each layer needs to
                be offered anything; None for as long as it takes. What was fitted in that time is kept in the cache,
                as for a budget.

        Returns:
            The candidates that are left, and seconds of fitting by family, to which those of later fits are added.
        """
        self.limited, until = minutes, math.inf if minutes is None else begun + 60 * minutes
        self.reached = {pair: dict.fromkeys(r.ranks, UNKNOWN) for pair, r in self.grid.items()}
        record = self._first_record(offers, metrics) if minutes else ""
        kept = self.statistics.cache.read_json(record, list[list[Pair]]) if minutes else None
        known = iter(kept if kept and len(kept) == 2 * len(self.effort.rungs) else ())
        made = []
        for number in range(len(self.effort.rungs)):
            leading = self._leading(offers, metrics)
            made.append(self._climb(leading, number, until, next(known, None)))
            self._give_up(offers, metrics)  # by leaders, which saves the steps of most others
            made.append(self._climb(self.grid.keys() - leading, number, until, next(known, None)))
            self._give_up(offers, metrics)
        if minutes:
            self.statistics.cache.write_json(record, [[[*pair] for pair in pairs] for pairs in made])
        self.made = {pair: {} if pair in self.cells else dict(found) for pair, found in self.first.items()}
        return self.menus({}), self.seconds

    def _first_record(self, offers: Menus, metrics: Sequence[str]) -> str:
        asked = [(layer, family, r.ranks, r.steps) for (layer, family), r in self.grid.items()]
        key = (VERSION, self.statistics.key, self.effort, self.limited, asked, _costs(offers, metrics))
        return "first-" + digest(*key)

    def _climb(self, pairs: Collection[Pair], number: int, until: float, only: Collection[Pair] | None) -> list[Pair]:
        """Fit what is left of some families and layers with the steps of a rung.

        Args:
            pairs: The families and layers.
            number: The number of the rung, from 0.
            until: When time is out.
            only: What was fitted in the time of an earlier search; None for what there is time for.

        Returns:
            What was fitted.
        """
        going_on = [p for p in self.grid if p in pairs and self.reached[p] and not self._is_known(p)]
        rung = {pair: self._rungs(pair)[number] for pair in going_on}
        wanted = {pair: self._to_fit(pair, rung[pair]) for pair in going_on if only is None or pair in only}
        wanted = {pair: ranks for pair, ranks in wanted.items() if ranks}
        steps = {pair: min(self._steps(pair), self._steps_of_rung(pair, rung[pair])) for pair in wanted}
        passing = {pair for pair in wanted if not self._ended(pair, rung[pair])} - self.needed
        if number == len(self.effort.rungs) - 1:
            passing &= self.dear
        if self.limited is not None:  # when time is out, these are offered as they are
            passing = set()
        sure = {p: ranks for p, ranks in wanted.items() if only is not None or (number == 0 and p in self.needed)}
        found = self._fit([*sure.items()], steps, passing=passing)
        found |= self._fit([x for x in wanted.items() if x[0] not in sure], steps, until, passing)
        made = [pair for pair, fits in found.items() if fits]
        for pair in made:
            self.first[pair] = {r: x for r, x in self.first.get(pair, {}).items() if x.ended} | found[pair]
            self._note(pair, rung[pair])
        if number == 0:
            self.untried |= set(going_on).difference(made)
            self.first |= {pair: {} for pair in self.untried}
            self.reached |= {pair: {} for pair in self.untried}
        return made

    @cached_property
    def needed(self) -> set[Pair]:
        """What each layer is offered however little time there is: closed forms, or its first family."""
        closed = {pair for pair in self.grid if DECOMPOSITIONS[pair[1]].closed_form}
        layers = {name for name, _ in closed}
        others: dict[str, Pair] = {}
        for pair in self.grid:
            others.setdefault(pair[0], pair)
        return closed | {pair for name, pair in others.items() if name not in layers}

    def _leading(self, offers: Menus, metrics: Sequence[str]) -> set[Pair]:
        """Of each layer the family with the most candidates that are likely to be better than cheaper ones."""
        found = set()
        for layer in self.statistics.layers:
            fitted = [(pair, dataclasses.replace(c, error=x.likely)) for pair, c, x in self._known(layer, offers)]
            likely = [c for _, c in fitted]
            lost = beaten(likely, [c.error for c in likely], metrics)
            places = Counter(pair for (pair, _), gone in zip(fitted, lost, strict=True) if not gone)
            found |= {pair for pair, _ in places.most_common(1)}
        return found

    def _known(self, layer: Layer, offers: Menus) -> list[tuple[Pair, Candidate, Reached]]:
        """The offers of a layer that are left and have been fitted, or lie between some that have."""
        menu = [((layer.name, c.method), c) for c in offers[layer.name] if c.precision == SAME and c.method != DENSE]
        found = [(pair, c, self.reached[pair].get(c.rank, UNKNOWN)) for pair, c in menu]
        return [(pair, c, x) for pair, c, x in found if x is not UNKNOWN]

    def _to_fit(self, pair: Pair, rung: Rung) -> tuple[Rank, ...]:
        """The ranks to fit in a rung: of fits that go on later, some, so that what is left is fitted or between two.

        Those whose search has come to its own end are left out.
        """
        left = self.reached[pair].keys()
        if self._at_end(pair):
            return tuple(left)
        inner = [x for x in self.segments[pair, rung] if not left.isdisjoint(x[1:-1])]
        ends = {rank for x in inner for rank in (x[0], x[-1])}
        fitted = {rank for x in self.segments[pair, rung] for rank in (x[0], x[-1])}
        known = {r for r, x in self.first.get(pair, {}).items() if x.ended}
        return tuple(r for r in self.grid[pair].ranks if (r in ends or (r in left and r in fitted)) and r not in known)

    def _note(self, pair: Pair, rung: Rung) -> None:
        """Note what fits have reached, and what those between them are likely to have."""
        left, found = self.reached[pair], self.first[pair]
        errors = {rank: x.error for rank, x in found.items()}
        starts = {rank: x.start for rank, x in found.items() if x.start is not None}
        for known in (errors, starts):
            known.update(self._between(pair, rung, known))
        before = {rank: starts.get(rank) if x is UNKNOWN else x.error for rank, x in left.items()}
        ended = left.keys() if self._ended(pair, rung) else {rank for rank, x in found.items() if x.ended}
        ended |= {r for low, *middle, high in self.segments[pair, rung] if {low, high} <= ended for r in middle}
        self.reached[pair] = {rank: Reached(before[rank], errors[rank], rank in ended) for rank in left}
        self.first[pair] = {rank: x for rank, x in found.items() if rank in left}

    def _between(self, pair: Pair, rung: Rung, known: Mapping[Rank, float]) -> dict[Rank, float]:
        """Errors of the ranks between those whose errors are known."""
        found = {}
        for low, *middle, high in self.segments[pair, rung]:
            if low in known and high in known:
                ends = [self._weights(pair, rank) for rank in (low, high)]
                for rank in (r for r in middle if r not in known):
                    found[rank] = between((known[low], known[high]), ends, self._weights(pair, rank))
        return found

    def _weights(self, pair: Pair, rank: Rank) -> int:
        return DECOMPOSITIONS[pair[1]].weights(self.grid[pair].layer, rank)

    def _give_up(self, offers: Menus, metrics: Sequence[str]) -> None:
        """Leave out what another candidate of the layer has beaten in each of its forms; closed forms cost nothing."""
        for layer in self.statistics.layers:
            fitted = self._known(layer, offers)
            dense = dense_candidate(layer)
            errors = [x.sure if c.rank in self.first[pair] else INTERPOLATED * x.sure for pair, c, x in fitted]
            now = [dense, *(dataclasses.replace(c, error=e) for e, (_, c, _) in zip(errors, fitted, strict=True))]
            lost = beaten(now, [dense.error, *(x.best for *_, x in fitted)], metrics)[1:]
            kept = {(pair, c.rank) for (pair, c, _), gone in zip(fitted, lost, strict=True) if not gone}
            for pair in {pair for pair, *_ in fitted}:
                if not DECOMPOSITIONS[pair[1]].closed_form:
                    self.first[pair] = {r: x for r, x in self.first[pair].items() if (pair, r) in kept}
                    self.reached[pair] = {r: x for r, x in self.reached[pair].items() if (pair, r) in kept}

    def _steps(self, pair: Pair) -> int:
        """Steps of fits to the end, before the family's own factor."""
        return math.ceil(self.effort.share * self.grid[pair].steps)

    def _steps_of_rung(self, pair: Pair, rung: Rung) -> int:
        return math.ceil(rung.steps / DECOMPOSITIONS[pair[1]].effort)

    def _ended(self, pair: Pair, rung: Rung) -> bool:
        """Whether fits are at their end with the steps of a rung."""
        return DECOMPOSITIONS[pair[1]].closed_form or self._steps(pair) <= self._steps_of_rung(pair, rung)

    def _at_end(self, pair: Pair) -> bool:
        """Whether the first fits are at their end."""
        return self._ended(pair, self._rungs(pair)[-1])

    def _is_known(self, pair: Pair) -> bool:
        """Whether all that is left is fitted to the end."""
        return all(x.ended for x in self.reached[pair].values())

    def _cells(self, pair: Pair) -> list[tuple[Rank, ...]]:
        if DECOMPOSITIONS[pair[1]].stacks_ranks:
            return [(rank,) for rank in self.reached[pair]]
        found: list[list[Rank]] = []
        room = 0
        for rank in self.reached[pair]:
            work = work_of(self.grid[pair].layer, pair[1], [rank])
            if not found or work > room:
                found.append([])
                room = AT_ONCE
            found[-1].append(rank)
            room -= work
        return [tuple(cell) for cell in found]

    def menus(self, further: Mapping[Pair, Mapping[Rank, Fitted]]) -> Menus:
        """The candidates of the first fits and of others.

        Args:
            further: The others.
        """
        found: Menus = {layer.name: [] for layer in self.statistics.layers}
        for pair, request in self.grid.items():
            fits = {**self.first[pair], **further.get(pair, {})}
            found[pair[0]] += as_candidates(request.layer, request.family, [x for x in fits.values() if x.key])
        return {name: in_order(candidates) for name, candidates in found.items()}

    def after_first(self, menus: Menus, spent: float) -> None:
        """Note what the first fits have shown.

        Args:
            menus: Their candidates in all precisions. Lower ones add to the error: the median over a layer's counts.
            spent: Seconds that the preparation took so far.
        """
        self.limit = math.inf if self.limited is None else max(0.0, 60 * self.limited - spent)
        for name, candidates in menus.items():
            own = {(c.method, c.rank): c.error for c in candidates if c.precision == SAME}
            for precision in {c.precision for c in candidates} - {SAME}:
                lower = [c for c in candidates if c.precision == precision]
                added = [c.error - own.get((c.method, c.rank), 0.0) for c in lower]
                self.added[name, precision] = max(0.0, float(np.median(added)))
                for dense in (c for c in lower if c.method == DENSE):
                    self.added[name, precision, DENSE] = dense.error

    def all_of(self, name: str) -> Fits:
        """Fit all of one layer to the end that no other candidate has beaten.

        Args:
            name: The layer's name.
        """
        return self._further({pair: [*left] for pair, left in self.reached.items() if pair[0] == name})

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
        record = self._record(offers, band.problem.limits) if self.limited else ""
        if self.limited and (kept := self.statistics.cache.read_json(record, _Record)):
            further = self._further({(layer, family): ranks for layer, family, ranks in kept["fits"]})
            band = _Band(state(self._estimated(offers, further)), self.effort)
            return further, self._entry(further, band, kept["rounds"], settled=kept["settled"])
        while True:
            wanted = self._missing(further, band.near())
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

    def _record(self, offers: Menus, limits: Sequence[Limit]) -> str:
        first = sorted(one.key or "" for found in self.first.values() for one in found.values())
        costs = _costs(offers, [limit.metric for limit in limits])
        return "lazy-" + digest(VERSION, first, self.effort, self.limited, limits, costs)

    def _further(self, wanted: Mapping[Pair, Sequence[Rank]], until: float = math.inf) -> Fits:
        """The fits of the cells that hold these ranks, of which each is made once."""
        hit = {p: [c for c in self.cells.get(p, ()) if not set(c).isdisjoint(ranks)] for p, ranks in wanted.items()}
        missing = [(pair, c) for pair, found in hit.items() for c in found if c[0] not in self.made[pair]]
        for pair, found in self._fit(missing, {pair: self._steps(pair) for pair in hit}, until).items():
            self.made[pair].update(found)
        made = self.made
        return {pair: {r: made[pair][r] for c in found for r in c if r in made[pair]} for pair, found in hit.items()}

    def _fit(
        self,
        wanted: Sequence[tuple[Pair, tuple[Rank, ...]]],
        steps: Mapping[Pair, int],
        until: float = math.inf,
        passing: Collection[Pair] = (),
    ) -> Fits:
        """Fit some ranks of a layer and family at once, and others; of those in passing only the errors are needed."""
        requests = [
            self.grid[pair]._replace(ranks=ranks, steps=steps[pair], factors=pair not in passing)
            for pair, ranks in wanted
        ]
        made, seconds = fit(self.statistics, requests, self.workers, until)
        for family, spent in seconds.items():
            self.seconds[family] = self.seconds.get(family, 0.0) + spent
        found: Fits = {pair: {} for pair, _ in wanted}
        for (pair, _), fits in zip(wanted, made, strict=True):
            found[pair].update((one.rank, one) for one in fits)
        return found

    def _estimated(self, offers: Menus, further: Mapping[Pair, Mapping[Rank, Fitted]]) -> Menus:
        """What of the offers is left, with the errors that are known or likely."""
        errors = {pair: self._likely(pair, further.get(pair, {})) for pair in self.grid}

        def of(name: str, c: Candidate) -> float:
            if c.method == DENSE:
                return self.added.get((name, c.precision, DENSE), 0.0)
            return errors[name, c.method][c.rank] + self.added.get((name, c.precision), 0.0)

        def left(name: str, c: Candidate) -> bool:
            return c.method == DENSE or c.rank in self.reached[name, c.method]

        return {
            name: [dataclasses.replace(c, error=of(name, c)) for c in found if left(name, c)]
            for name, found in offers.items()
        }

    def _likely(self, pair: Pair, fitted: Mapping[Rank, Fitted]) -> dict[Rank, float]:
        """The errors of what is left: those of fits to the end, and otherwise likely ones.

        Fits to the end show by how much the likely errors of their family and layer are off, which is interpolated.
        """
        likely = {rank: x.likely for rank, x in self.reached[pair].items()}
        known = sorted(
            (self._weights(pair, rank), x.error / likely[rank]) for rank, x in fitted.items() if likely[rank]
        )
        if known:
            sizes, off = np.log(np.array(known).T.clip(1e-300))
            likely = {
                r: x * math.exp(np.interp(math.log(self._weights(pair, r)), sizes, off)) for r, x in likely.items()
            }
        return likely | {rank: x.error for rank, x in fitted.items()}

    def _missing(
        self, further: Mapping[Pair, Mapping[Rank, Fitted]], wanted: Mapping[Pair, Sequence[Rank]]
    ) -> dict[Pair, list[Rank]]:
        """What of the wanted is not fitted to the end, in the grid's order."""
        missing = {}
        for pair in self.cells:
            known = further.get(pair, {})
            ranks = [r for r in self.reached[pair] if r in wanted.get(pair, ()) and r not in known]
            if ranks:
                missing[pair] = ranks
        return missing

    def _entry(
        self, further: Mapping[Pair, Mapping[Rank, Fitted]], band: _Band, rounds: int, *, settled: bool
    ) -> FittingEntry:
        dropped = [
            pair for pair, left in self.reached.items() if not left or (pair in self.cells and not further.get(pair))
        ]
        return {
            "candidates": sum(len(r.ranks) for r in self.grid.values()),
            "first": sum(map(len, self.first.values())),
            "final": sum(map(len, further.values())),
            "rounds": rounds,
            "settled": settled and not self.untried,
            "bound": band.bound,
            "gain": 0.0,
            "dropped": [
                {"layer": layer, "family": family, "behind": band.behind.get((layer, family))}
                for layer, family in dropped
            ],
        }


def _costs(offers: Menus, metrics: Sequence[str]) -> list[tuple[Any, ...]]:
    """What candidates there are, and what they cost, by which what was chosen among them is recognised."""
    found = ((name, c) for name, menu in offers.items() for c in menu)
    return [(name, c.method, c.rank, c.form, c.precision, [c.cost[m] for m in metrics]) for name, c in found]


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
        self.behind = self._behind()

    def near(self) -> dict[Pair, list[Rank]]:
        """The ranks of the candidates in the band."""
        found: dict[Pair, list[Rank]] = defaultdict(list)
        for layer, frontier, within in zip(self.problem.layers, self.problem.frontiers, self.within, strict=True):
            for candidate in compress(frontier, within):
                found[layer.name, candidate.method].append(candidate.rank)
        return found

    def _behind(self) -> dict[Pair, float]:
        found: dict[Pair, float] = {}
        for i, (layer, frontier) in enumerate(zip(self.problem.layers, self.problem.frontiers, strict=True)):
            for j, candidate in enumerate(frontier):
                pair = (layer.name, candidate.method)
                if candidate.method != DENSE:
                    found[pair] = min(found.get(pair, math.inf), float(self.least[i, j]))
        return found
