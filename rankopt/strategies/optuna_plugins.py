"""Samplers and pruners of Optuna and of others: by name, as "module:Class", or as objects."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna import pruners, samplers
from optuna.trial import TrialState

from rankopt.core.errors import RankoptError
from rankopt.core.records import Proposal, Trial
from rankopt.core.registry import imported
from rankopt.strategies.corrections import WARM

T = TypeVar("T")


NEEDS = {"CmaEsSampler": ("cmaes",), "GPSampler": ("scipy", "torch"), "QMCSampler": ("scipy",)}


NOT_ASKABLE = ("BruteForceSampler", "GridSampler")
"""Samplers that need a finite space, or one that is given beforehand."""


NOT_BY_NAME = {"PartialFixedSampler", "PatientPruner", "PercentilePruner", "ThresholdPruner"}
"""Classes that need arguments: they are given as objects."""


ETA = 3  # a fidelity is reported to pruners as this many times the step of the one below


SETTINGS: dict[str, dict[str, Any]] = {  # deviations from Optuna's defaults, for searches of tens of trials
    "TPESampler": {"multivariate": True, "constant_liar": True, "n_startup_trials": WARM},
    "GPSampler": {"n_startup_trials": WARM},
    "NSGAIISampler": {"population_size": 10},
    "NSGAIIISampler": {"population_size": 10},
    "SuccessiveHalvingPruner": {"min_resource": 1, "reduction_factor": ETA},
}


def sampler_class(name: str) -> type[samplers.BaseSampler]:
    """Look up a sampler of Optuna.

    Args:
        name: "gp", "GPSampler", ...; case, dashes and underscores do not matter. Or "module:Class".

    Returns:
        The class.

    Raises:
        RankoptError: If there is none of that name, or a package that it needs is missing.
    """
    return _class_of(name, "sampler", samplers, samplers.BaseSampler)  # type: ignore[type-abstract]


def _class_of(name: str, what: str, offered: Any, base: type[T]) -> type[T]:
    if ":" in name:
        found = imported(name, what)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise RankoptError(f"{what} {name!r} is {found!r}: give a subclass of optuna.{what}s.{base.__name__}")
        return found
    classes = [x for x in offered.__all__ if x.lower().endswith(what) and not inspect.isabstract(getattr(offered, x))]
    known = {x.lower().removesuffix(what): x for x in classes if x not in (*NOT_ASKABLE, *NOT_BY_NAME)}
    full = known.get(name.lower().replace("-", "").replace("_", "").removesuffix(what))
    if full is None:
        raise RankoptError(f"unknown {what} {name!r}: choose from {', '.join(sorted(known))}")
    missing = [x for x in NEEDS.get(full, ()) if importlib.util.find_spec(x) is None]
    if missing:
        raise RankoptError(f"{what} {name!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return getattr(offered, full)


def _made(kind: type[T], what: str, **options: Any) -> T:
    """An object with settings for tens of trials, and of the options those that its class takes."""
    taken = inspect.signature(kind).parameters
    settings = {**SETTINGS.get(kind.__name__, {}), **{k: v for k, v in options.items() if k in taken}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return kind(**settings)
        except TypeError as error:
            raise RankoptError(f"{what} {kind.__name__} cannot be made ({error}): give an object in Python") from None


class SamplerFactory:
    """Makes the samplers of a search: a fresh one for each ask, with a seed of its own.

    Attributes:
        name: Name of their class.
    """

    def __init__(self, sampler: str | samplers.BaseSampler, **options: Any) -> None:
        """Look the sampler up.

        Args:
            sampler: Its name, "module:Class", or an object, which is copied and never changed.
            options: Further arguments, of which a class is given those that it takes.

        Raises:
            RankoptError: If it is unknown, cannot be used, or an object is given `n_startup_trials` beside its own.
        """
        self.pattern = sampler if isinstance(sampler, samplers.BaseSampler) else None
        if self.pattern is None and not isinstance(sampler, str):
            raise RankoptError(f"sampler {sampler!r} is no sampler of Optuna: give a name, MODULE:CLASS or an object")
        self.kind = type(sampler) if isinstance(sampler, samplers.BaseSampler) else sampler_class(sampler)
        self.name, self.options = self.kind.__name__, options
        if self.name in NOT_ASKABLE:
            raise RankoptError(f"sampler {self.name} needs a finite space: choose tpe or random")
        if self.pattern is not None and "n_startup_trials" in options:
            raise RankoptError(f"n_startup_trials is given beside a {self.name} object: give it to the object")

    def make(self, seed: int) -> samplers.BaseSampler:
        """Make a sampler.

        Args:
            seed: Its seed, if it takes one; the random states of an object are seeded by it.
        """
        if self.pattern is None:
            return _made(self.kind, "sampler", **self.options, seed=seed)
        made = copy.deepcopy(self.pattern)
        _seed(made, np.random.default_rng(seed), set())
        return made


def _seed(found: Any, rng: np.random.Generator, seen: set[int]) -> None:
    """Seed the random states in an object and what it holds; Optuna's own `reseed_rng` takes no seed."""
    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, np.random.RandomState):
        found.seed(int(rng.integers(2**32)))
    elif isinstance(found, np.random.Generator):
        found.bit_generator.state = type(found.bit_generator)(int(rng.integers(2**32))).state
    elif isinstance(found, (list, tuple, dict)):
        for item in found.values() if isinstance(found, dict) else found:
            _seed(item, rng, seen)
    elif hasattr(found, "__dict__") and not isinstance(found, (type, optuna.Study)):
        if isinstance(state := getattr(found, "rng", None), np.random.RandomState):
            _seed(state, rng, seen)  # Optuna makes it when it is first asked for
        _seed(vars(found), rng, seen)


class Pruning:
    """Stops trials at low fidelities by a pruner of Optuna.

    The pruner sees a study of its own, in which the fidelities are steps 1, 3, 9, ... and a trial's objective is the
    last of them.
    """

    def __init__(self, pruner: str | pruners.BasePruner) -> None:
        """Look the pruner up.

        Args:
            pruner: Its name ("median", "HyperbandPruner", ...), "module:Class", or an object, which is copied.

        Raises:
            RankoptError: If it is unknown or cannot be used.
        """
        if isinstance(pruner, pruners.BasePruner):
            made = copy.deepcopy(pruner)
        elif isinstance(pruner, str):
            kind = _class_of(pruner, "pruner", pruners, pruners.BasePruner)  # type: ignore[type-abstract]
            made = _made(kind, "pruner")
        else:
            raise RankoptError(f"pruner {pruner!r} is no pruner of Optuna: give a name, MODULE:CLASS or an object")
        # Hyperband draws brackets by the study's name: it must not be a random one.
        self.study = optuna.create_study(pruner=made, sampler=samplers.RandomSampler(0), study_name="fidelities")
        self.running: dict[Proposal, optuna.Trial] = {}

    def promote(self, proposal: Proposal, rungs: Sequence[float]) -> bool:
        """Decide whether a trial goes on to the next fidelity.

        Args:
            proposal: The plan.
            rungs: Its objective at each fidelity so far; the last one is new.
        """
        if proposal not in self.running:
            self.running[proposal] = self.study.ask()
        trial = self.running[proposal]
        trial.report(rungs[-1], ETA ** (len(rungs) - 1))
        return not trial.should_prune()

    def tell(self, trial: Trial) -> None:
        """Note the end of a trial; of one that ran elsewhere or earlier, all that came before, too.

        Args:
            trial: The trial.
        """
        if trial.proposal not in self.running:
            for level in range(len(trial.rungs)):
                self.promote(trial.proposal, trial.rungs[: level + 1])
        running = self.running.pop(trial.proposal, None) or self.study.ask()
        if trial.objective is not None:
            running.report(trial.objective, ETA ** len(trial.rungs))
        ends = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
        self.study.tell(running, trial.objective, state=ends[trial.state])
