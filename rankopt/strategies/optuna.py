"""Bayesian search with any sampler of Optuna (Akiba et al. 2019), started at the exact allocation.

The sampler searches one of three spaces (`parametrisation`):

- *corrections*: a log-multiplier on every layer's predicted losses. The plan is the exact allocation under the
  multiplied losses: every plan uses up the budget, and zeros give the plan of `knapsack`.
- *positions*: relative frontier positions, projected onto the budget and filled up.
- *joint*: for each layer a categorical `LAYER.method`, and for the method drawn an integer `LAYER.METHOD.rank`
  (define-by-run): what a script for Optuna usually searches. Plans beyond the budget are projected, or penalised.

With several `objectives`, such as the loss, macs and latency, the metrics are minimised as shares of dense, and each
gets a price among the corrections. The search still chooses the plan of least loss within the budget; the report and
`Result.front` show the front.

The sampler knows no constraints, only points and objectives. A result is reported to it at the point that represents
the plan that was evaluated, so its knowledge depends on the trials alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import optuna
from optuna import pruners, samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import BUDGETS, RECONSTRUCTED, SAME, Candidate, Proposal, Trial
from rankopt.strategies.allocation import fill, project
from rankopt.strategies.base import Strategy
from rankopt.strategies.corrections import BLOCKS, WARM, WIDTH, Corrections
from rankopt.strategies.optuna_plugins import Pruning, SamplerFactory

MEMORYLESS = {"TPESampler", "GPSampler", "RandomSampler"}
"""Samplers that read only points and values; the others store notes with the trials that they proposed."""


SINGLE = {"CmaEsSampler"}  # samplers for one objective only


FIXED = {"CmaEsSampler", "GPSampler", "QMCSampler"}  # samplers that know no parameters that depend on others


OBJECTIVE = "objective"
"""Name of the loss among several objectives."""


ATTEMPTS = 10  # points drawn per ask in search of a new plan


class Optuna(Strategy):
    """Samples plans with Optuna, starting from the exact allocation and its near alternatives."""

    name = "optuna"

    def __init__(  # noqa: PLR0913  # the options
        self,
        problem: Problem,
        seed: int = 0,
        *,
        sampler: str | samplers.BaseSampler = "",
        parametrisation: str = "corrections",
        infeasible: str = "project",
        warm: int = WARM,
        n_startup_trials: int = 0,
        blocks: int = BLOCKS,
        width: float = WIDTH,
        objectives: str | Sequence[str] = OBJECTIVE,
        pruner: str | pruners.BasePruner = "",
    ) -> None:
        """Set up the search space.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: The same seed gives the same proposals.
            sampler: tpe, gp, cmaes, random, qmc, nsgaii, ..., the name of a class in `optuna.samplers`,
                "module:Class" of any other, or an object; a copy of it is seeded for each ask. Default: gp, with
                "joint" tpe.
            parametrisation: "corrections", "positions" or "joint".
            infeasible: What becomes of points beyond the budget, of positions and joint: "project" evaluates the
                nearest plan within it; "penalise" tells the sampler a bad value instead, and draws again.
            warm: How many plans of `knapsack` the search starts with.
            n_startup_trials: Trials that the sampler draws at random before it learns, those it starts with included;
                of samplers that take this number. 0: 8 for tpe and gp, the others' own default.
            blocks: Largest number of corrections; with more layers, neighbours share one.
            width: Log-multipliers lie within ± width.
            objectives: What to minimise: "objective", and metrics with a budget, as "objective,macs,latency" or a
                list. Several need a sampler for several objectives.
            pruner: median, hyperband, successivehalving, ..., the name of a class in `optuna.pruners`, "module:Class"
                of any other, or an object. It stops trials at low fidelities; by default the search does, by ASHA.

        Raises:
            RankoptError: For an unknown sampler or parametrisation, an option out of range or a missing package.
        """
        super().__init__(problem, seed)
        if blocks < 1:
            raise RankoptError(f"blocks is {blocks}: give 1 or more")
        if not width > 0:
            raise RankoptError(f"width is {width}: give more than 0")
        if infeasible not in {"project", "penalise"}:
            raise RankoptError(f"unknown infeasible={infeasible}: choose from project, penalise")
        if min(warm, n_startup_trials) < 0:
            raise RankoptError(f"warm is {warm}, n_startup_trials is {n_startup_trials}: give 0 or more of each")
        joint = parametrisation == "joint"
        startup = {"n_startup_trials": n_startup_trials} if n_startup_trials else {}
        self.samplers = SamplerFactory(sampler or ("tpe" if joint else "gp"), group=joint, **startup)
        self.sampler = self.samplers.kind
        self.pruning = Pruning(pruner) if pruner else None
        self.prunes = bool(pruner)
        self.metrics, self.warm = _metrics(objectives, problem), warm
        self.penalise = infeasible == "penalise"
        if joint and self.samplers.name in FIXED:
            raise RankoptError(f"sampler {sampler!r} takes no parameters that depend on others: for joint choose tpe")
        if self.metrics and self.samplers.name in SINGLE:
            raise RankoptError(f"sampler {sampler!r} takes one objective: for several choose gp, tpe or nsgaii")
        self.points = _parametrisation(parametrisation, problem, blocks, width, self.metrics)
        self.results: dict[Proposal, float | None] = {}  # plan -> objective, None if it failed
        self.pending: dict[Proposal, None] = {}  # proposed, without a result yet; in order
        self.points_of: dict[Proposal, tuple[float, ...]] = {}  # plan -> the point that represents it
        self.beyond_of: dict[Proposal, tuple[float, ...]] = {}  # plan -> the points drawn before it, beyond the budget
        self.beyond: list[tuple[float, ...]] = []  # all points beyond the budget, of plans with a result
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def propose(self, number: int) -> Proposal | None:
        for plan, point in self._draws(number):
            if plan not in self.results and plan not in self.pending:
                self.pending[plan] = None
                if point is not None:
                    self.points_of[plan] = self.points.representative(plan, point)
                return plan
        return None

    def _draws(self, number: int) -> Iterator[tuple[Proposal, list[float] | None]]:
        """Draw plans, with their points, until one is new.

        The first asks give the contenders of `knapsack`, the exact allocation first. Then come the sampler's plans, and
        then neighbours of the best plan, which have no point.
        """
        if number < self.warm:
            near = self.points if isinstance(self.points, Corrections) else Corrections(self.problem)
            contender = near.draw(self.seed, number)
            yield near.plan(contender), contender
        study = self._study(number)
        beyond: list[float] = []
        for attempt in range(ATTEMPTS):
            asked = _quietly(study.ask)
            point = self.points.suggest(asked)
            if self.penalise and attempt < ATTEMPTS - 1 and (excess := self.points.excess(point)) > 0:
                _tell(study, asked, self._penalty(excess))
                beyond += point
                continue
            plan = self.points.plan(point)
            self.beyond_of.setdefault(plan, tuple(beyond))
            yield plan, point
            if plan in self.results:  # the sampler learns that this point brings nothing new
                _tell(study, asked, self._values(plan))
        rng = np.random.default_rng([self.seed, number])
        finished = [(value, plan) for plan, value in self.results.items() if value is not None]
        for far in range(1, 1 + 2 * ATTEMPTS) if finished else ():  # small problems have few plans on the surface
            yield self._neighbour(min(finished)[1], far, rng), None

    def _neighbour(self, plan: Proposal, far: int, rng: np.random.Generator) -> Proposal:
        """Move two layers (beyond ATTEMPTS all) by up to `far` positions, and project onto the budget."""
        wanted = np.array(plan)
        moved = rng.permutation(len(plan))[: 2 if far <= ATTEMPTS else len(plan)]
        wanted[moved] += rng.integers(-far, far + 1, len(moved))
        return fill(self.problem, project(self.problem, tuple(map(int, wanted))))

    def promote(self, proposal: Proposal, rungs: Sequence[float]) -> bool | None:
        return None if self.pruning is None else self.pruning.promote(proposal, rungs)

    def tell(self, trial: Trial) -> None:
        if self.pruning is not None:
            self.pruning.tell(trial)
        plan = trial.proposal
        self.results[plan] = trial.objective
        self.pending.pop(plan, None)
        size = self.points.size
        if trial.note:
            self.points_of[plan] = trial.note[:size]
        self.beyond += [trial.note[i : i + size] for i in range(size, len(trial.note), size or 1)]

    def expect(self, running: Mapping[Proposal, tuple[float, ...]]) -> None:
        for plan, note in running.items():
            self.pending[plan] = None
            if note:
                size = self.points.size
                self.points_of[plan], self.beyond_of[plan] = note[:size], note[size:]

    def note(self, proposal: Proposal) -> tuple[float, ...]:
        point = self.points_of.get(proposal, ())
        return (*point, *self.beyond_of.get(proposal, ())) if point else ()

    def _study(self, number: int) -> optuna.Study:
        """Build an Optuna study of the results and the pending plans, with a sampler seeded for this ask.

        A new study for every ask makes the answer a function of these alone, also for samplers with a memory.
        """
        study = optuna.create_study(directions=["minimize"] * (1 + len(self.metrics)))
        # QMC draws one sequence: the seed stays the same, and the number of the ask is the position in it.
        seed = self.seed if self.sampler is samplers.QMCSampler else derived(self.seed, number)
        study.sampler = self.samplers.make(seed)
        for point in self.beyond:
            self._replay(study, point, self._penalty(self.points.excess(point)))
        for plan in (*self.results, *self.pending):
            if plan in self.points_of:  # else it came from another strategy's trials
                values = None if plan in self.pending else self._values(plan)
                self._replay(study, self.points_of[plan], values, plan in self.pending)
        return study

    def _penalty(self, excess: float) -> list[float] | None:
        """The objectives of a point beyond the budget: worse than all results, the more the further it is beyond."""
        finished = [x for x in self.results.values() if x is not None]
        if not finished:
            return None
        worst = max(finished) + (max(finished) - min(finished) + abs(max(finished))) * excess
        return [worst, *[1 + excess] * len(self.metrics)]

    def _values(self, plan: Proposal) -> list[float] | None:
        """The plan's objectives. A failure counts as the worst objective so far, so that it is avoided."""
        finished = [x for x in self.results.values() if x is not None]
        objective = self.results[plan]
        worst = max(finished, default=None) if objective is None else objective
        if worst is None:
            return None
        cost, dense = self.problem.cost(plan), self.problem.dense
        return [worst, *(cost[m] / max(dense[m], 1) for m in self.metrics)]

    def _replay(
        self, study: optuna.Study, point: Sequence[float], values: list[float] | None, pending: bool = False
    ) -> None:
        params, axes = self.points.params(point), self.points.axes(point)
        if self.samplers.name in MEMORYLESS:
            state = TrialState.RUNNING if pending else _state(values)
            study.add_trial(create_trial(state=state, values=values, params=params, distributions=axes))
            return
        study.enqueue_trial(params)
        asked = _quietly(study.ask)
        self.points.suggest(asked)
        _ = asked.relative_params  # samples (lazily), which is when such a sampler takes its notes on the trial
        if not pending:
            _tell(study, asked, values)


def _state(values: list[float] | None) -> TrialState:
    return TrialState.FAIL if values is None else TrialState.COMPLETE


def _tell(study: optuna.Study, asked: optuna.Trial, values: list[float] | None) -> None:
    study.tell(asked, values, state=_state(values))


def _quietly(ask: Callable[[], optuna.Trial]) -> optuna.Trial:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return ask()


def derived(seed: int, number: int) -> int:
    """Derive the seed of one ask.

    Args:
        seed: The search's seed.
        number: Number of the ask.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


# --- what is searched ------------------------------------------------------------------------------


def _metrics(objectives: str | Sequence[str], problem: Problem) -> tuple[str, ...]:
    """The metrics that are minimised beside the objective."""
    names = [x.strip() for x in (objectives.split(",") if isinstance(objectives, str) else objectives)]
    limited = {limit.metric for limit in problem.limits}
    if names.count(OBJECTIVE) != 1 or len(set(names)) < len(names):
        raise RankoptError(f"objectives={','.join(names)}: give {OBJECTIVE} and other metrics, each once")
    for name in names:
        if name not in (OBJECTIVE, *BUDGETS):
            raise RankoptError(f"unknown objective {name!r}: choose from {OBJECTIVE}, {', '.join(BUDGETS)}")
        if name != OBJECTIVE and name not in limited:
            raise RankoptError(f"objective {name!r} needs a budget: --budget {name}=100%, if it is not to be limited")
    return tuple(x for x in names if x != OBJECTIVE)


def _parametrisation(
    name: str, problem: Problem, blocks: int, width: float, metrics: tuple[str, ...]
) -> Parametrisation:
    if name == "corrections":
        return NamedCorrections(problem, blocks, width, metrics)
    if name == "positions":
        return Positions(problem)
    if name == "joint":
        return Joint(problem)
    raise RankoptError(f"unknown parametrisation {name!r}: choose from corrections, positions, joint")


class Parametrisation(Protocol):
    """What a sampler searches: points, and the plans that they stand for.

    Attributes:
        size: Number of coordinates of a point.
    """

    size: int

    def suggest(self, trial: optuna.Trial) -> list[float]:
        """Let a trial draw a point."""

    def params(self, point: Sequence[float]) -> dict[str, Any]:
        """A point as Optuna's parameters."""

    def axes(self, point: Sequence[float]) -> dict[str, BaseDistribution]:
        """The distributions of these parameters."""

    def plan(self, point: Sequence[float]) -> Proposal:
        """The plan of a point, within the budget."""

    def excess(self, point: Sequence[float]) -> float:
        """By which share of the budget a point is beyond it; 0 or less within."""

    def representative(self, plan: Proposal, point: Sequence[float]) -> tuple[float, ...]:
        """The point at which the sampler learns a plan's result."""


class _Fixed:
    """Parametrisations by the same float parameters in every trial."""

    names: Sequence[str]
    low: float
    high: float

    def suggest(self, trial: optuna.Trial) -> list[float]:
        """Let a trial draw a point.

        Args:
            trial: Optuna's trial.
        """
        return [trial.suggest_float(name, self.low, self.high) for name in self.names]

    def params(self, point: Sequence[float]) -> dict[str, Any]:
        """Name the coordinates of a point.

        Args:
            point: The point.
        """
        return dict(zip(self.names, point, strict=True))

    def axes(self, point: Sequence[float]) -> dict[str, BaseDistribution]:
        """Name the coordinates' distributions.

        Args:
            point: The point.
        """
        return dict.fromkeys(self.names, FloatDistribution(self.low, self.high))


class NamedCorrections(Corrections, _Fixed):
    """Corrections as Optuna's parameters, named after the first layer of their block."""

    @cached_property
    def names(self) -> list[str]:  # type: ignore[override]
        """Names of the coordinates."""
        of_blocks = [f"{self.problem.layers[b[0]].name}.correction" for b in self.blocks]
        return of_blocks + [f"{metric}.price" for metric in self.metrics]

    def excess(self, point: Sequence[float]) -> float:
        """None: the plan of every point is within the budget.

        Args:
            point: The point.
        """
        return 0.0


def _excess(problem: Problem, plan: Proposal) -> float:
    """By which share of its limits a plan exceeds them; 0 or less within."""
    targets = np.maximum([x.target for x in problem.limits], 1)
    return float((problem.excess(plan) / targets).max(initial=0.0))


class Joint:
    """Parametrisation by a method for each layer, and by the rank of this method.

    The methods are those on the layer's frontier, stored precisions and forms apart. A rank of one number is itself the
    parameter, and stands for the nearest candidate; of several numbers, `LAYER.METHOD.ranks` counts the candidates from
    the cheapest, 1, on. A parameter has the same range in all trials, which is why it is named after its method, too.

    Attributes:
        size: Number of coordinates: the layers that have a choice. A point holds their frontier positions.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.free = [i for i, f in enumerate(problem.frontiers) if len(f) > 1]
        self.size = len(self.free)
        self.menus = [_menu(problem.frontiers[i]) for i in self.free]  # method -> rank parameter's value -> position
        self.names = [problem.layers[i].name for i in self.free]

    def suggest(self, trial: optuna.Trial) -> list[float]:
        """Let a trial draw a method for each layer, and its rank.

        Args:
            trial: Optuna's trial.
        """
        point: list[float] = []
        for name, menu in zip(self.names, self.menus, strict=True):
            method = trial.suggest_categorical(f"{name}.method", list(menu))
            what, ranks = menu[str(method)]
            drawn = trial.suggest_int(f"{name}.{method}.{what}", min(ranks), max(ranks)) if len(ranks) > 1 else 0
            point.append(ranks[min(ranks, key=lambda r: abs(r - drawn))])
        return point

    def params(self, point: Sequence[float]) -> dict[str, Any]:
        """Name methods and ranks of a point.

        Args:
            point: The point.
        """
        return {name: value for name, value, _ in self._named(point)}

    def axes(self, point: Sequence[float]) -> dict[str, BaseDistribution]:
        """Name their distributions.

        Args:
            point: The point.
        """
        return {name: axis for name, _, axis in self._named(point)}

    def _named(self, point: Sequence[float]) -> Iterator[tuple[str, Any, BaseDistribution]]:
        for name, menu, at in zip(self.names, self.menus, point, strict=True):
            for method, (what, ranks) in menu.items():
                if (rank := next((r for r, x in ranks.items() if x == at), None)) is not None:
                    yield f"{name}.method", method, CategoricalDistribution(list(menu))
                    if len(ranks) > 1:
                        yield f"{name}.{method}.{what}", rank, IntDistribution(min(ranks), max(ranks))

    def _wanted(self, point: Sequence[float]) -> Proposal:
        wanted = [0] * len(self.problem.frontiers)
        for i, at in zip(self.free, point, strict=True):
            wanted[i] = int(at)
        return tuple(wanted)

    def excess(self, point: Sequence[float]) -> float:
        """By which share of the budget a point is beyond it.

        Args:
            point: The point.
        """
        return _excess(self.problem, self._wanted(point))

    def plan(self, point: Sequence[float]) -> Proposal:
        """Project a point onto the budget.

        Args:
            point: The point.
        """
        return fill(self.problem, project(self.problem, self._wanted(point)))

    def representative(self, plan: Proposal, point: Sequence[float]) -> tuple[float, ...]:
        """The point at which a sampler learns a plan's result: where the projection put it.

        Args:
            plan: The plan.
            point: The point that it came from.
        """
        return tuple(plan[i] for i in self.free)


def _menu(frontier: Sequence[Candidate]) -> dict[str, tuple[str, dict[int, int]]]:
    """For each method of a frontier the name of its rank parameter, and its values with their positions."""
    methods: dict[str, list[int]] = {}
    for at, c in enumerate(frontier):
        form = [c.form] if c.form == RECONSTRUCTED else []
        methods.setdefault(" ".join([c.method, *form, *([c.precision] if c.precision != SAME else [])]), []).append(at)
    menu = {}
    for method, positions in methods.items():
        single = {frontier[at].rank[0]: at for at in positions if len(frontier[at].rank) == 1}
        level = dict(enumerate(positions, 1))
        menu[method] = ("rank", single) if len(single) == len(positions) else ("ranks", level)
    return menu


class Positions(_Fixed):
    """Parametrisation by relative frontier positions: 0 is the cheapest candidate, 1 dense.

    Attributes:
        low: Least value of a coordinate.
        high: Greatest value of a coordinate.
        size: Number of coordinates: the layers that have a choice.
    """

    low, high = 0.0, 1.0

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.free = [i for i, f in enumerate(problem.frontiers) if len(f) > 1]
        self.size = len(self.free)
        self.names = [f"{problem.layers[i].name}.position" for i in self.free]

    def _wanted(self, point: Sequence[float]) -> Proposal:
        wanted = [0] * len(self.problem.frontiers)
        for i, x in zip(self.free, point, strict=True):
            wanted[i] = round(x * (len(self.problem.frontiers[i]) - 1))
        return tuple(wanted)

    def excess(self, point: Sequence[float]) -> float:
        """By which share of the budget a point is beyond it.

        Args:
            point: Relative positions, (size,).
        """
        return _excess(self.problem, self._wanted(point))

    def plan(self, point: Sequence[float]) -> Proposal:
        """Project a point onto the budget.

        Args:
            point: Relative positions, (size,).

        Returns:
            The plan, filled up.
        """
        return fill(self.problem, project(self.problem, self._wanted(point)))

    def representative(self, plan: Proposal, point: Sequence[float]) -> tuple[float, ...]:
        """The point at which a sampler learns a plan's result: where the projection put it.

        Args:
            plan: The plan.
            point: The point that it came from.
        """
        return tuple(plan[i] / (len(self.problem.frontiers[i]) - 1) for i in self.free)
