"""The registry of strategies: add one by a file and a line here (or an entry point of another package).

Entries are "module:Class", loaded when first asked for, so that `import rankopt` loads no optuna.
"""

from __future__ import annotations

from importlib import import_module

from rankopt.budget import Problem
from rankopt.core import RankoptError
from rankopt.registry import Registry
from rankopt.strategies.base import Strategy

STRATEGIES: Registry[str | type[Strategy]] = Registry(
    "strategy",
    "rankopt.strategies",
    {
        "knapsack": "rankopt.strategies.knapsack:Knapsack",
        "uniform": "rankopt.strategies.uniform:Uniform",
        "energy": "rankopt.strategies.energy:Energy",
        "random": "rankopt.strategies.random:Random",
        "greedy": "rankopt.strategies.greedy:Greedy",
        "evbmf": "rankopt.strategies.evbmf:Evbmf",
        "optuna": "rankopt.strategies.optuna:OptunaTpe",
    },
)


def strategy_class(name: str) -> type[Strategy]:
    """Raises RankoptError for an unknown name, listing the valid ones."""
    entry = STRATEGIES[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = getattr(import_module(module), attribute)
    assert isinstance(entry, type)
    return entry


def make_strategy(name: str, problem: Problem, seed: int = 0) -> Strategy:
    if seed < 0:
        raise RankoptError(f"seed is {seed}: give 0 or more")
    return strategy_class(name)(problem, seed)
