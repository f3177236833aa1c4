"""Bayesian search with any sampler of Optuna (Akiba et al. 2019), started at the exact allocation.

The sampler searches one of two spaces (`parametrisation`):

- *corrections*: a log-multiplier on every layer's predicted losses. The plan is the exact allocation under the
  multiplied losses: every plan uses up the budget, and zeros give the plan of `knapsack`.
- *positions*: relative frontier positions, projected onto the budget and filled up.

With `also`, a metric such as macs, there are two objectives: the loss, and that metric's share of dense, which gets a
price among the corrections. The search still chooses the plan of least loss within the budget; the report shows the
front.

The sampler knows no constraints, only points and objectives. A result is reported to it at the point that represents
the plan that was evaluated, so its knowledge depends on the trials alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optuna
from optuna import samplers
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import METRICS, Proposal, Trial
from rankopt.strategies.allocation import fill, project
from rankopt.strategies.base import Strategy
from rankopt.strategies.corrections import BLOCKS, CONTENDERS, WIDTH, Corrections

NEEDS = {"CmaEsSampler": ("cmaes",), "GPSampler": ("scipy", "torch"), "QMCSampler": ("scipy",)}


NOT_ASKABLE = {"BaseSampler", "BaseGASampler", "BruteForceSampler", "GridSampler", "PartialFixedSampler"}


SETTINGS: dict[str, dict[str, Any]] = {  # deviations from Optuna's defaults, for searches of tens of trials
    "TPESampler": {"multivariate": True, "constant_liar": True, "n_startup_trials": CONTENDERS},
    "GPSampler": {"n_startup_trials": CONTENDERS},
    "NSGAIISampler": {"population_size": 10},
    "NSGAIIISampler": {"population_size": 10},
}


MEMORYLESS = {"TPESampler", "GPSampler", "RandomSampler"}
"""Samplers that read only points and values; the others store notes with the trials that they proposed."""


SINGLE = {"CmaEsSampler"}  # samplers for one objective only


ATTEMPTS = 10  # points drawn per ask in search of a new plan


class Optuna(Strategy):
    """Samples plans with Optuna, starting from the exact allocation and its near alternatives."""

    name = "optuna"

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        *,
        sampler: str = "gp",
        parametrisation: str = "corrections",
        blocks: int = BLOCKS,
        width: float = WIDTH,
        also: str = "",
    ) -> None:
        """Set up the search space.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: The same seed gives the same proposals.
            sampler: tpe, gp, cmaes, random, qmc, nsgaii, ..., or the name of a class in `optuna.samplers`.
            parametrisation: "corrections" or "positions".
            blocks: Largest number of corrections; with more layers, neighbours share one.
            width: Log-multipliers lie within ± width.
            also: A second metric to minimise: params, macs or bytes. Needs a sampler for several objectives.

        Raises:
            RankoptError: For an unknown sampler or parametrisation, an option out of range or a missing package.
        """
        super().__init__(problem, seed)
        if blocks < 1:
            raise RankoptError(f"blocks is {blocks}: give 1 or more")
        if not width > 0:
            raise RankoptError(f"width is {width}: give more than 0")
        self.sampler, self.also = sampler_class(sampler), also
        if also and also not in {limit.metric for limit in problem.limits}:
            known = ", ".join(METRICS)
            raise RankoptError(f"also={also!r}: give one of {known}, and a budget for it (--budget {also}=100%)")
        if also and self.sampler.__name__ in SINGLE:
            raise RankoptError(f"sampler {sampler!r} takes one objective: with also={also}, choose gp, tpe or nsgaii")
        self.points = _parametrisation(parametrisation, problem, blocks, width, also or None)
        axis = FloatDistribution(self.points.low, self.points.high)
        self.space: dict[str, BaseDistribution] = {f"x{i}": axis for i in range(self.points.size)}
        self.results: dict[Proposal, float | None] = {}  # plan -> objective, None if it failed
        self.pending: dict[Proposal, None] = {}  # proposed, without a result yet; in order
        self.points_of: dict[Proposal, tuple[float, ...]] = {}  # plan -> the point that represents it
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
        if number < CONTENDERS:
            near = self.points if isinstance(self.points, Corrections) else Corrections(self.problem)
            contender = near.draw(self.seed, number)
            yield near.plan(contender), contender
        study = self._study(number)
        for _ in range(ATTEMPTS):
            asked = _quietly(study.ask, self.space)
            point = [asked.params[x] for x in self.space]
            plan = self.points.plan(point)
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

    def tell(self, trial: Trial) -> None:
        plan = trial.proposal
        self.results[plan] = trial.objective
        self.pending.pop(plan, None)
        if trial.note:
            self.points_of[plan] = trial.note

    def note(self, proposal: Proposal) -> tuple[float, ...]:
        return self.points_of.get(proposal, ())

    def _study(self, number: int) -> optuna.Study:
        """Build an Optuna study of the results and the pending plans, with a sampler seeded for this ask.

        A new study for every ask makes the answer a function of these alone, also for samplers with a memory.
        """
        study = optuna.create_study(directions=["minimize"] * (1 + bool(self.also)))
        # QMC draws one sequence: the seed stays the same, and the number of the ask is the position in it.
        seed = self.seed if self.sampler is samplers.QMCSampler else derived(self.seed, number)
        study.sampler = make_sampler(self.sampler, seed)
        for plan in (*self.results, *self.pending):
            if plan in self.points_of:  # else it came from another strategy's trials
                self._replay(study, plan)
        return study

    def _values(self, plan: Proposal) -> list[float] | None:
        """The plan's objectives. A failure counts as the worst objective so far, so that it is avoided."""
        finished = [x for x in self.results.values() if x is not None]
        objective = self.results[plan]
        worst = max(finished, default=None) if objective is None else objective
        if worst is None:
            return None
        cost, dense = self.problem.cost(plan), self.problem.dense
        return [worst, cost[self.also] / dense[self.also]] if self.also else [worst]

    def _replay(self, study: optuna.Study, plan: Proposal) -> None:
        point = dict(zip(self.space, self.points_of[plan], strict=True))
        pending = plan in self.pending
        values = None if pending else self._values(plan)
        if self.sampler.__name__ in MEMORYLESS:
            state = TrialState.RUNNING if pending else _state(values)
            study.add_trial(create_trial(state=state, values=values, params=point, distributions=self.space))
            return
        study.enqueue_trial(point)
        asked = study.ask(self.space)
        _ = asked.relative_params  # samples (lazily), which is when such a sampler takes its notes on the trial
        if not pending:
            _tell(study, asked, values)


def _state(values: list[float] | None) -> TrialState:
    return TrialState.FAIL if values is None else TrialState.COMPLETE


def _tell(study: optuna.Study, asked: optuna.Trial, values: list[float] | None) -> None:
    study.tell(asked, values, state=_state(values))


def _quietly(ask: Any, space: dict[str, BaseDistribution]) -> optuna.Trial:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return ask(space)


def derived(seed: int, number: int) -> int:
    """Derive the seed of one ask.

    Args:
        seed: The search's seed.
        number: Number of the ask.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


# --- samplers ------------------------------------------------------------------------------------


def sampler_class(name: str) -> type[samplers.BaseSampler]:
    """Look up a sampler of Optuna.

    Args:
        name: "gp", "GPSampler", ...; case, dashes and underscores do not matter.

    Returns:
        The class in `optuna.samplers`.

    Raises:
        RankoptError: If there is none of that name, or a package that it needs is missing.
    """
    known = {x.lower().removesuffix("sampler"): x for x in samplers.__all__ if x.endswith("Sampler")}
    known = {short: x for short, x in known.items() if x not in NOT_ASKABLE}
    full = known.get(name.lower().replace("-", "").replace("_", "").removesuffix("sampler"))
    if full is None:
        raise RankoptError(f"unknown sampler {name!r}: choose from {', '.join(sorted(known))}")
    missing = [x for x in NEEDS.get(full, ()) if importlib.util.find_spec(x) is None]
    if missing:
        raise RankoptError(f"sampler {name!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return getattr(samplers, full)


def make_sampler(sampler: type[samplers.BaseSampler], seed: int, **options: Any) -> samplers.BaseSampler:
    """Make a sampler with settings for tens of trials.

    Args:
        sampler: Its class.
        seed: Its seed, if it takes one.
        options: Further arguments of its class.
    """
    settings = {**SETTINGS.get(sampler.__name__, {}), **options}
    if "seed" in inspect.signature(sampler.__init__).parameters:
        settings["seed"] = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return sampler(**settings)


# --- what is searched ------------------------------------------------------------------------------


def _parametrisation(
    name: str, problem: Problem, blocks: int, width: float, also: str | None
) -> Corrections | Positions:
    if name == "corrections":
        return Corrections(problem, blocks, width, also)
    if name == "positions":
        return Positions(problem)
    raise RankoptError(f"unknown parametrisation {name!r}: choose from corrections, positions")


class Positions:
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

    def plan(self, point: Sequence[float]) -> Proposal:
        """Project a point onto the budget.

        Args:
            point: Relative positions, (size,).

        Returns:
            The plan, filled up.
        """
        wanted = [0] * len(self.problem.frontiers)
        for i, x in zip(self.free, point, strict=True):
            wanted[i] = round(x * (len(self.problem.frontiers[i]) - 1))
        return fill(self.problem, project(self.problem, tuple(wanted)))

    def representative(self, plan: Proposal, point: Sequence[float]) -> tuple[float, ...]:
        """The point at which a sampler learns a plan's result: where the projection put it.

        Args:
            plan: The plan.
            point: The point that it came from.
        """
        return tuple(plan[i] / (len(self.problem.frontiers[i]) - 1) for i in self.free)
