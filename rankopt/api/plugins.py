"""Strategies and decompositions of one's own, made known to this process."""

from __future__ import annotations

from typing import TypeVar

from rankopt.core.errors import RankoptError
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.registry import family_name
from rankopt.strategies.base import Strategy
from rankopt.strategies.registry import register_strategy

P = TypeVar("P", bound=type[Strategy] | type[Decomposition] | Decomposition)


def register(plugin: P) -> P:
    """Make a strategy or a decomposition known by its `name`, as in `strategy="shaken"` or in a search space's file.

    It holds for this process and the workers that it starts. Another program that loads a model with the decomposition
    registers it, too; a package does so for everyone with an entry point. A registered class may be registered again,
    as when a notebook's cell is run again.

    Args:
        plugin: A subclass of `Strategy`, an object of a `Decomposition`, or a class of one whose `__init__` takes no
            arguments.

    Returns:
        The same, so that this can be a decorator.

    Raises:
        RankoptError: If it is neither, or its name is missing or taken.

    Example:
        >>> @rankopt.register
        ... class Shaken(rankopt.Strategy):
        ...     name = "shaken"
    """
    if isinstance(plugin, type) and issubclass(plugin, Strategy):
        register_strategy(plugin)
    elif isinstance(plugin, Decomposition) or (isinstance(plugin, type) and issubclass(plugin, Decomposition)):
        family_name(plugin)
    else:
        raise RankoptError(f"{plugin!r} is neither a Strategy class nor a Decomposition: derive from one of these")
    return plugin
