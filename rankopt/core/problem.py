"""The optimisation problem that strategies see: one candidate per layer, within the limits."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankopt.core.budget import BYTES, Limit, amount, at_least
from rankopt.core.errors import BudgetError
from rankopt.core.records import MEASURED, Candidate, Cost, Layer, Proposal
from rankopt.core.result_record import FittingEntry

Counter = Callable[[Sequence[Candidate]], Mapping[str, int]]
"""Counts memory and disk of the model that a plan's candidates make."""


NOT_ADDITIVE = ("memory", "disk")
"""The metrics whose sum over layers is an estimate; a `Counter` counts them."""


class ProblemTable(NamedTuple):
    """A problem as float64 arrays: n layers, up to m candidates each, k limits. Integers up to 2^53 stay exact.

    Attributes:
        losses: (n, m) predicted losses, infinite where a layer has fewer candidates.
        costs: (k, n, m) costs in each limit's metric; a shorter row repeats its last candidate's.
        room: (k,) what each limit leaves for the n layers together; of metrics that do not add up, an estimate.
    """

    losses: NDArray[np.float64]
    costs: NDArray[np.float64]
    room: NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What a strategy solves: choose one candidate per layer so that the whole model stays within the limits.

    Attributes:
        layers: The free layers: those that may be factorised.
        frontiers: For each free layer its Pareto frontier of candidates, cheapest first; dense last, unless one is
            exact.
        dense: The dense model's cost.
        limits: The budget.
        kept: The layers that stay dense, with their reasons: they explain why a budget cannot be met.
        counter: Counts memory and disk of a whole plan, of which the candidates' costs are estimates. None: they are
            taken to add up.
        fitting: Which candidates were fitted for this budget, and why not the others; None if all were.
    """

    layers: tuple[Layer, ...]
    frontiers: tuple[tuple[Candidate, ...], ...]
    dense: Cost
    limits: tuple[Limit, ...]
    kept: tuple[Layer, ...] = ()
    counter: Counter | None = None
    fitting: FittingEntry | None = field(default=None, compare=False, repr=False)

    @property
    def fixed(self) -> Cost:
        """The cost of everything but the free layers."""
        rest = self.dense
        for layer in self.layers:
            rest = rest - layer.cost
        return rest

    def frontier(self, name: str) -> tuple[Candidate, ...] | None:
        """The Pareto frontier of a free layer; None if there is no such layer.

        Args:
            name: The layer's name.
        """
        return next((f for x, f in zip(self.layers, self.frontiers, strict=True) if x.name == name), None)

    def candidates(self, proposal: Proposal) -> tuple[Candidate, ...]:
        """The candidates that a proposal chooses.

        Args:
            proposal: One frontier index per free layer.
        """
        return tuple(f[i] for f, i in zip(self.frontiers, proposal, strict=True))

    def cost(self, proposal: Proposal) -> Cost:
        """The whole model's cost under a proposal.

        Args:
            proposal: One frontier index per free layer.
        """
        total = self.sum(proposal)
        return dataclasses.replace(total, **self.counter(self.candidates(proposal))) if self.counter else total

    def sum(self, proposal: Proposal) -> Cost:
        """The sum of all layers' costs: the model's cost, but for memory and disk an estimate, which takes no time.

        Args:
            proposal: One frontier index per free layer.
        """
        total = self.fixed
        for candidate in self.candidates(proposal):
            total = total + candidate.cost
        return total

    def loss(self, proposal: Proposal) -> float:
        """Predicted rise of the objective: the sum of the layers' losses.

        Args:
            proposal: One frontier index per free layer.
        """
        return sum(c.loss for c in self.candidates(proposal))

    def fits(self, proposal: Proposal) -> bool:
        """Whether the model stays within all limits under a proposal.

        Args:
            proposal: One frontier index per free layer.
        """
        return bool((self.excess(proposal) <= 0).all())

    def excess(self, proposal: Proposal) -> NDArray[np.int64]:
        """By how much the model exceeds each limit under a proposal, (k,); negative where room is left.

        Args:
            proposal: One frontier index per free layer.
        """
        counted = self.counter and any(x.metric in NOT_ADDITIVE for x in self.limits)
        cost = self.cost(proposal) if counted else self.sum(proposal)
        return np.array([cost[x.metric] - x.target for x in self.limits], np.int64)

    def seems_to_fit(self, proposal: Proposal) -> bool:
        """As `fits`, but by the layers' costs alone, for strategies that look at many proposals.

        Args:
            proposal: One frontier index per free layer.
        """
        of_layers = [sum(c.cost[x.metric] for c in self.candidates(proposal)) for x in self.limits]
        return bool((np.array(of_layers) <= self.table.room).all())

    @cached_property
    def least(self) -> tuple[int, ...]:
        """For each limit, the least that its metric can be, taken alone: the cost of `cheapest`."""
        return tuple(self.cost_in(x.metric, self.cheapest(x.metric)) for x in self.limits)

    def cheapest(self, metric: str, target: int = 0) -> Proposal:
        """The plan that costs least in a metric.

        Where costs only estimate, plans are counted: the cheapest by the estimates, the dense one, and those that keep
        the layers of one parent dense (a composite, which is then not expanded). The answer depends neither on limits
        nor on errors, which are not known before fitting: a budget of its cost can be met whenever it is asked for.

        Args:
            metric: The metric.
            target: A cost that is low enough: no more plans are counted.
        """
        plan = tuple(f.index(cheapest(f, metric)) for f in self.frontiers)
        if self.counter is None or metric not in NOT_ADDITIVE:
            return plan
        dense = tuple(next((i for i, c in enumerate(f) if c.unchanged), len(f) - 1) for f in self.frontiers)
        plan = min(plan, dense, key=lambda p: self.cost_in(metric, p))
        for parent in dict.fromkeys(x.name.rpartition(".")[0] for x in self.layers):
            if self.cost_in(metric, plan) <= target:
                break
            inside = [x.name.rpartition(".")[0] == parent for x in self.layers]
            kept = tuple(d if i else p for d, p, i in zip(dense, plan, inside, strict=True))
            plan = min(plan, kept, key=lambda p: self.cost_in(metric, p))
        return plan

    def cost_in(self, metric: str, proposal: Proposal) -> int:
        """The whole model's cost under a proposal in one metric; only memory and disk take time.

        Args:
            metric: The metric.
            proposal: One frontier index per free layer.
        """
        return (self.cost(proposal) if metric in NOT_ADDITIVE else self.sum(proposal))[metric]

    @cached_property
    def table(self) -> ProblemTable:
        """The problem as arrays."""
        fixed = [self.fixed[x.metric] for x in self.limits]
        for i, x in enumerate(self.limits):  # what the sum overestimates of the cheapest plan, which must not be lost
            if self.counter and x.metric in NOT_ADDITIVE:
                plan = self.cheapest(x.metric, x.target)
                fixed[i] -= max(0, self.sum(plan)[x.metric] - self.cost(plan)[x.metric])
        return ProblemTable(
            padded([[c.loss for c in f] for f in self.frontiers], math.inf),
            np.array([padded([[c.cost[x.metric] for c in f] for f in self.frontiers]) for x in self.limits]),
            np.array([x.target - n for x, n in zip(self.limits, fixed, strict=True)], float),
        )


def cheapest(candidates: Iterable[Candidate], metric: str) -> Candidate:
    """The candidate that costs least in a metric; of several, the first by name, whatever their errors.

    Args:
        candidates: Candidates of a layer.
        metric: The metric.
    """
    return min(candidates, key=lambda c: (c.cost[metric], *c.label))


def padded(rows: Sequence[Sequence[float]], filler: float | None = None) -> NDArray[np.float64]:
    """Rows of different lengths as one array (rows, longest row).

    Args:
        rows: The rows.
        filler: What fills up shorter rows; None: their own last value.
    """
    width = max(map(len, rows), default=0)
    whole = [[*row, *[row[-1] if filler is None else filler] * (width - len(row))] for row in rows]
    return np.array(whole, float).reshape(len(rows), width)


def check_feasible(problem: Problem) -> None:
    """Check that each limit, taken alone, can be met.

    Args:
        problem: The problem.

    Raises:
        BudgetError: A limit is below the cost of the cheapest candidates; the message gives that cost, what it is made
            of, and what to do.
    """
    if not problem.limits:
        return
    for limit in problem.limits:
        least = problem.cost_in(limit.metric, problem.cheapest(limit.metric, limit.target))
        if least > limit.target:
            raise BudgetError(_shortfall(problem, limit, least))


def cannot_be_met_together(problem: Problem) -> BudgetError:
    """The error to raise if limits that can be met one by one exclude each other.

    Args:
        problem: The problem.
    """
    limits = ", ".join(f"{x.metric}={amount(x.metric, x.target)}" for x in problem.limits)
    least = ", ".join(f"{x.metric}={amount(x.metric, n)}" for x, n in zip(problem.limits, problem.least, strict=True))
    return BudgetError(
        f"these limits cannot be met together: {limits}\nEach alone could be as low as {least}: raise one of them."
    )


# --- why a budget cannot be met ----------------------------------------------------------------------


WIDTH, SHOWN = 100, 4  # columns of a line, and parts of the least cost that are listed


REST = {
    "params": "everything else: norms, biases, weights outside of layers",
    "macs": "everything else: operations outside of layers, such as attention",
    "bytes": "everything else: norms, biases, buffers, weights outside of layers",
    "latency": "everything else, not timed by itself",
    "energy": "everything else, not measured by itself",
    "memory": "everything else: activations at the peak, norms, buffers",
    "disk": "everything else: norms, biases, buffers, the file's header",
}
"""What the cost of a model holds beside its layers, by metric."""


def _shortfall(problem: Problem, limit: Limit, least: int) -> str:
    """Why a limit cannot be met: the largest parts of the least cost, and what to do."""
    metric, dense = limit.metric, problem.dense[limit.metric]
    parts = sorted(_parts(problem, limit, least), key=lambda part: -part[0])
    lines = [f"{100 * cost / dense:5.1f} %  {text}" for cost, text in parts[:SHOWN] if cost >= 1e-3 * dense]
    lower = "lower ranks or int8" if metric in BYTES else "lower ranks"
    return "\n".join(
        [
            f"budget {metric}={amount(metric, limit.target)} cannot be met:",
            f"the least achievable in this search space is {amount(metric, least)} "
            f"({math.ceil(10_000 * least / dense) / 100:.2f} % of dense), made of",
            *(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in lines),
            f"Give {metric}={at_least(metric, least)} or more, change what keeps layers dense, or search {lower}.",
        ]
    )


def _parts(problem: Problem, limit: Limit, least: int) -> list[tuple[int, str]]:
    """What the least cost is made of: layers that stay dense by reason, the others at their smallest, and the rest."""
    metric = limit.metric
    groups: dict[str, list[Layer]] = defaultdict(list)
    for layer in problem.kept:
        groups[layer.reason or "it has no candidate"].append(layer)
    replaced, smallest = 0, 0
    for layer, candidates in zip(problem.layers, problem.frontiers, strict=True):
        cost = cheapest(candidates, metric).cost[metric]
        if cost < layer.cost[metric]:
            replaced, smallest = replaced + 1, smallest + cost
        else:
            groups["no candidate is cheaper than the layer itself"].append(layer)
    parts = []
    for reason, layers in groups.items():
        cost = sum(x.cost[metric] for x in layers)
        parts.append((cost, f"{_names(layers, metric)} {'stays' if len(layers) == 1 else 'stay'} dense: {reason}"))
    rest = least - smallest - sum(cost for cost, _ in parts)
    some = f"the {replaced} layers that can be replaced" if replaced > 1 else "the layer that can be replaced"
    others = REST[metric]
    if metric in MEASURED and problem.kept:  # only layers that can be replaced are measured
        largest = max(problem.kept, key=lambda x: x.cost.macs)
        others += f", with {_names(problem.kept, 'macs')} dense ({largest.reason})"
    return [*parts, (smallest, f"{some}, at the smallest"), (rest, others)]


def _names(layers: Sequence[Layer], metric: str) -> str:
    """The names of the two largest layers, and how many more there are."""
    first = sorted(layers, key=lambda x: -x.cost[metric])[:2]
    names = [repr(x.name) if x.name else "the model" for x in first]
    if more := len(layers) - len(first):
        return f"{', '.join(names)} and {more} more"
    return " and ".join(names)
