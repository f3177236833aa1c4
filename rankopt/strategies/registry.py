"""The registry of strategies.

A strategy is added by a file and a line here, or by an entry point "rankopt.strategies" of another package. Entries are
"module:Class" and imported on first use, so that `import rankopt` does not import optuna.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rankopt.core.errors import RankoptError
from rankopt.core.options import typed_options
from rankopt.core.problem import Problem
from rankopt.core.registry import Registry, imported
from rankopt.strategies.base import ConfiguredStrategy, Strategy


def _fault(name: str, found: Any) -> str | None:  # noqa: ARG001
    """What is wrong with what another package registered."""
    if isinstance(found, type) and issubclass(found, Strategy):
        return None
    return f"it is {found!r}, not a subclass of Strategy"


StrategyLike = str | type[Strategy] | ConfiguredStrategy
"""Name of a strategy, "module:Class", "FILE.py:Class", the class, or the class with its options: `Mine(depth=3)`."""


STRATEGIES: Registry[str | type[Strategy]] = Registry(
    "strategy",
    "rankopt.strategies",
    {
        "knapsack": "rankopt.strategies.knapsack:Knapsack",
        "uniform": "rankopt.strategies.baselines:Uniform",
        "energy": "rankopt.strategies.baselines:Energy",
        "random": "rankopt.strategies.baselines:Random",
        "greedy": "rankopt.strategies.baselines:Greedy",
        "evbmf": "rankopt.strategies.evbmf:Evbmf",
        "lasso": "rankopt.strategies.lasso:Lasso",
        "lasso-train": "rankopt.strategies.lasso_train:LassoTrain",
        "differentiable": "rankopt.strategies.differentiable:Differentiable",
        "lc": "rankopt.strategies.learning_compression:LearningCompression",
        "optuna": "rankopt.strategies.optuna:Optuna",
        "thompson": "rankopt.strategies.thompson:Thompson",
        "rl": "rankopt.strategies.rl:Agent",
    },
    _fault,
)


def strategy_class(name: str) -> type[Strategy]:
    """Look up a strategy's class.

    Args:
        name: Name in the registry, "module:Class" or "FILE.py:Class".

    Raises:
        RankoptError: If there is no such strategy; the message lists all names.
    """
    entry = name if ":" in name else STRATEGIES[name]
    found = imported(entry, "strategy") if isinstance(entry, str) else entry
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise RankoptError(f"strategy {name!r} is {found!r}: give a subclass of rankopt.strategies.base.Strategy")
    return found


def strategy_name(strategy: str | type[Strategy]) -> str:
    """Name a strategy so that `strategy_class` finds it again.

    Args:
        strategy: Its name, or its class.

    Raises:
        RankoptError: If it is something else, or the class cannot be imported by its name.
    """
    if isinstance(strategy, str):
        return strategy
    if not (isinstance(strategy, type) and issubclass(strategy, Strategy)):
        raise RankoptError(
            f"strategy {strategy!r} is no class: give a subclass of rankopt.Strategy, or one with its options "
            "and without a problem, as Mine(depth=3)"
        )
    registered: str = getattr(strategy, "name", "")
    if registered in STRATEGIES and strategy_class(registered) is strategy:
        return registered
    name = f"{strategy.__module__}:{strategy.__qualname__}"
    if "<locals>" in name:
        raise RankoptError(
            f"strategy {name!r} lies within a function and cannot be imported: make it known by rankopt.register"
        )
    if imported(name, "strategy") is not strategy:
        raise RankoptError(f"strategy {name!r} is another class than the one given: define it once, in a module")
    return name


def configured(strategy: StrategyLike, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Read a strategy as users give it.

    Args:
        strategy: The strategy.
        options: Its own options, as values or text.

    Returns:
        Its name, by which `strategy_class` finds it, and its options in the types of their defaults.

    Raises:
        RankoptError: If there is no such strategy or option, or options are given twice.
    """
    if not isinstance(strategy, ConfiguredStrategy):
        name = strategy_name(strategy)
        return name, read_options(name, options or {})
    if options:
        raise RankoptError(f"options {', '.join(options)} are given beside a strategy that has its own: give it these")
    name = strategy_name(strategy.strategy)
    return name, read_options(name, strategy.options)


def register_strategy(strategy: type[Strategy]) -> str:
    """Make a strategy known in this process by its name, which is returned.

    Args:
        strategy: The class.

    Raises:
        RankoptError: It has no name, or the name is taken.
    """
    name = getattr(strategy, "name", None)
    if not isinstance(name, str):
        raise RankoptError(f"the strategy {strategy.__name__} has no name: give it the class attribute `name`")
    return STRATEGIES.add(name, strategy)


def make_strategy(name: str, problem: Problem, seed: int = 0, options: Mapping[str, Any] | None = None) -> Strategy:
    """Make a strategy.

    Args:
        name: Name in the registry.
        problem: The candidates of every layer, and the limits.
        seed: Seed of its proposals, 0 or more.
        options: Its own options, as values or text.

    Raises:
        RankoptError: For an unknown strategy or option, or a negative seed.
    """
    if seed < 0:
        raise RankoptError(f"seed is {seed}: give 0 or more")
    found, read = strategy_class(name), read_options(name, options or {})
    if inspect.isabstract(found):
        raise RankoptError(f"strategy {name!r} lacks {' and '.join(sorted(found.__abstractmethods__))}: write it")
    try:
        inspect.signature(found).bind(problem, seed, **read)
    except TypeError as error:
        raise RankoptError(
            f"strategy {name!r} cannot be made ({error}): begin __init__(self, problem, seed=0, *, OPTION=DEFAULT, ...)"
        ) from None
    return found(problem, seed, **read)


def strategy_options(name: str) -> dict[str, Any]:
    """List a strategy's own options.

    Args:
        name: Name in the registry.

    Returns:
        Option -> default.
    """
    parameters = inspect.signature(strategy_class(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def read_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a strategy's options to the types of their defaults.

    Args:
        name: Name in the registry.
        options: Options as values, or as text from the command line.

    Returns:
        The options that were given.

    Raises:
        RankoptError: For an option that the strategy does not have, or a value that cannot be converted.
    """
    return typed_options(options, strategy_options(name), f"strategy {name!r}")
