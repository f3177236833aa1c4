"""Options of strategies and recipes, given as KEY=VALUE text or as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rankopt.core.errors import RankoptError


def parse_pairs(texts: Iterable[str]) -> dict[str, str]:
    """Read options from the command line.

    Args:
        texts: "KEY=VALUE" each.

    Returns:
        Key -> value, as text.

    Raises:
        RankoptError: A text has no "=".
    """
    pairs = [text.partition("=") for text in texts]
    for key, equals, _ in pairs:
        if not equals:
            raise RankoptError(f"option {key!r} is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def typed_options(options: Mapping[str, Any], known: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Convert options to the types of their defaults.

    Args:
        options: Name -> value, or its text.
        known: Name -> default of every option there is.
        whose: What the options belong to, for messages.

    Returns:
        Name -> value, of the options given.

    Raises:
        RankoptError: An option is unknown, or its value cannot be converted.
    """
    typed = {}
    for key, value in options.items():
        if key not in known:
            valid = ", ".join(f"{k}={v}" for k, v in known.items()) or "none"
            raise RankoptError(f"{whose} has no option {key!r}; its options: {valid}")
        kind = type(known[key])
        if isinstance(value, type):  # a class goes by its name, which result.json and study.db can hold
            value = f"{value.__module__}:{value.__qualname__}"  # noqa: PLW2901
        try:
            typed[key] = {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(value)
        except (ArithmeticError, KeyError, TypeError, ValueError):
            raise RankoptError(f"{whose}: option {key}={value} is no {kind.__name__}") from None
    return typed


def check_choice(whose: str, option: str, value: str, allowed: Sequence[str]) -> None:
    """Check an option that is one of several words.

    Args:
        whose: What the option belongs to, for messages.
        option: The option.
        value: Its value.
        allowed: The values that it may have.

    Raises:
        RankoptError: It has another one.
    """
    if value not in allowed:
        raise RankoptError(f"{whose}: unknown {option} {value!r}; choose from {', '.join(allowed)}")
