"""Options of strategies and recipes, given as KEY=VALUE text or as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
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
    """Convert options to the types of their defaults. Objects stay what they are where that is text or None.

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
            value = text_of(value)  # noqa: PLW2901
        if kind is type(None) or (kind is str and not isinstance(value, (str, int, float, PathLike))):
            typed[key] = value
            continue
        try:
            typed[key] = {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(value)
        except (ArithmeticError, KeyError, TypeError, ValueError):
            raise RankoptError(f"{whose}: option {key}={value} is no {kind.__name__}") from None
    return typed


def text_of(value: Any) -> str:
    """Write an option's value as text that is the same in every process, for result.json and study.db.

    Args:
        value: The value. Of an object only its class is written, of a class its name.
    """
    if isinstance(value, (list, tuple)):
        return ",".join(map(text_of, value))
    if value is None or isinstance(value, (str, int, float, PathLike)):
        return str(value)
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


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
