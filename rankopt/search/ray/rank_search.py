"""Plans under a budget for people who have a Ray Tune trainable of their own; imported as rankopt.ray.

Unlike the rest of this room, this module imports ray at its top: it is for those who use it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune.search import Searcher
from torch import nn

from rankopt.candidates.cache import Cache, FactorStore
from rankopt.candidates.latency import key
from rankopt.candidates.prepare import Budget, Prepared
from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import RECONSTRUCTED, Candidate, Proposal, Trial
from rankopt.decompositions.plan import apply
from rankopt.search.loop import Outcome, Study, trial_limit
from rankopt.strategies.registry import StrategyLike, configured, make_strategy, strategy_class

PLAN = "plan"
"""The key of a trial's config."""


LayerPlans = Mapping[str, str]
"""Layer name -> what it becomes: "dense", "svd_out 8", "tucker2 4x6 int8 reconstructed"."""


@dataclass
class PlanBuilder:
    """Builds the model of a plan, in any process.

    Attributes:
        model: The dense model.
        problem: The candidates.
        factors: Their factors.
    """

    model: nn.Module
    problem: Problem
    factors: FactorStore

    def __call__(self, plan: LayerPlans) -> nn.Module:
        """Build a compressed model.

        Args:
            plan: The plan of a trial: `config["plan"]`.

        Returns:
            A copy of the dense model with the plan's layers replaced.

        Raises:
            RankoptError: The plan is not of this problem.
        """
        proposal = proposal_of(self.problem, plan)
        return apply(self.model, self.problem.layers, self.problem.candidates(proposal), self.factors)


class RankSearch(Searcher):  # type: ignore[misc]
    """Proposes plans under a budget, for the `search_alg` of ray.tune.TuneConfig.

    Each trial's config holds a plan, `config["plan"]`; `builder` makes a model of it. The search ends after `trials`:
    give TuneConfig num_samples=-1.
    """

    _metric: str
    _mode: str

    def __init__(
        self,
        prepared: Any,
        budget: Budget,
        strategy: StrategyLike = "optuna",
        trials: int | None = None,
        *,
        metric: str,
        mode: str,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the search up.

        Args:
            prepared: What `rankopt.prepare` returned.
            budget: As of `rankopt.compress`.
            strategy: As of `rankopt.compress`.
            trials: As of `rankopt.compress`.
            metric: What the trainable reports and this searches for.
            mode: "min" or "max".
            seed: As of `rankopt.compress`.
            options: As of `rankopt.compress`.

        Raises:
            RankoptError: As `rankopt.compress`.
        """
        if mode not in ("min", "max"):
            raise RankoptError(f"mode is {mode!r}: choose min or max")
        super().__init__(metric=metric, mode=mode)
        found: Prepared = getattr(prepared, "_prepared", prepared)
        self.problem = found.problem(budget)
        name, read = configured(strategy, options)
        if strategy_class(name).trains:
            raise RankoptError(
                f"strategy {name!r} delivers one trained network, which is no plan for trials: give another "
                "one, or use rankopt.compress"
            )
        self.asked = name, seed, read
        self.limit = trials
        self.running: dict[str, Proposal] = {}
        # The same on every machine, and with all that a plan needs: trials may run anywhere.
        factors = FactorStore(Cache(found.factors.cache.folder.resolve()))
        factors.keep(c.key for frontier in self.problem.frontiers for c in frontier if c.key)
        lean = dataclasses.replace(self.problem, counter=None)
        self.builder = PlanBuilder(found.task.model, lean, factors)
        self._begin([], 0, lambda s: s.measure(found, lambda items, what, total: items))

    def _begin(
        self,
        trials: list[Trial],
        asked: int,
        prepare: Any = None,
        running: Mapping[Proposal, tuple[float, ...]] | None = None,
    ) -> None:
        """Make the study, as it was after some trials and with others running, which are noted with `Strategy.note`."""
        name, seed, options = self.asked
        strategy = make_strategy(name, self.problem, seed, options)
        if prepare:
            prepare(strategy)
        self.study = Study(self.problem, strategy, trial_limit(strategy, self.limit), trials=trials)
        strategy.restore(trials, asked)
        strategy.expect(running or {})
        self.study.pending = dict.fromkeys(self.running.values(), asked)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of the next trial; called by Tune.

        Args:
            trial_id: The trial.
        """
        proposal = self.study.next()
        if proposal is None:
            return None if self.running else str(Searcher.FINISHED)
        self.running[trial_id] = proposal
        return {PLAN: plan_of(self.problem, proposal)}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Learn from a trial that ended; called by Tune.

        Args:
            trial_id: The trial.
            result: Its last result.
            error: Whether it failed.
        """
        if (proposal := self.running.pop(trial_id, None)) is None:
            return
        value = None if error or not result else result.get(self._metric)
        if value is None or not math.isfinite(value):
            failed = "the trial failed" if value is None else f"{self._metric} is {value}"
            self.study.finish(proposal, Outcome(error=f"{failed}: Tune has the reason"))
        else:
            objective = float(value) if self._mode == "min" else -float(value)
            self.study.finish(proposal, Outcome(objective, seconds=float((result or {}).get("time_total_s", 0.0))))

    def __getstate__(self) -> dict[str, Any]:
        """What Tune keeps on disk: everything but the study, which is made again from its trials."""
        state = {k: v for k, v in self.__dict__.items() if k != "study"}
        strategy = self.study.strategy
        notes = {proposal: strategy.note(proposal) for proposal in self.running.values()}
        return state | {"trials": self.study.trials, "n_asked": strategy.n_asked, "notes": notes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trials, asked, notes = (state.pop(name) for name in ("trials", "n_asked", "notes"))
        self.__dict__.update(state)
        self._begin(trials, asked, running=notes)

    def save(self, checkpoint_path: str) -> None:
        """Write the state; called by Tune.

        Args:
            checkpoint_path: The file.
        """
        Path(checkpoint_path).write_bytes(cloudpickle.dumps(self.__getstate__()))

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a state that `save` wrote; called by Tune.Tuner.restore.

        Args:
            checkpoint_path: The file.
        """
        self.__setstate__(cloudpickle.loads(Path(checkpoint_path).read_bytes()))


def plan_of(problem: Problem, proposal: Proposal) -> dict[str, str]:
    """Write a proposal as a plan.

    Args:
        problem: Its problem.
        proposal: One frontier index per layer.
    """
    chosen = problem.candidates(proposal)
    return {layer.name: _text(one) for layer, one in zip(problem.layers, chosen, strict=True)}


def proposal_of(problem: Problem, plan: LayerPlans) -> Proposal:
    """Read a plan.

    Args:
        problem: Its problem.
        plan: As `plan_of` writes it.

    Raises:
        RankoptError: It is not of this problem.
    """
    found = []
    for layer, frontier in zip(problem.layers, problem.frontiers, strict=True):
        known = {_text(one): at for at, one in enumerate(frontier)}
        if plan.get(layer.name) not in known:
            raise RankoptError(
                f"the plan says {plan.get(layer.name)!r} for layer {layer.name!r}, which is no candidate of this "
                "search: build it with the builder of the RankSearch that proposed it"
            )
        found.append(known[plan[layer.name]])
    return tuple(found)


def _text(candidate: Candidate) -> str:
    return key(candidate) + f" {RECONSTRUCTED}" * (candidate.form == RECONSTRUCTED)
