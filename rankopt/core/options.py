"""Options given as KEY=VALUE text, converted to the type of their defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rankopt.core.errors import RankoptError


def parse_pairs(texts: Iterable[str]) -> dict[str, str]:
    """ "KEY=VALUE", ... -> a dictionary. Raises RankoptError."""
    pairs = [text.partition("=") for text in texts]
    for key, equals, _ in pairs:
        if not equals:
            raise RankoptError(f"option {key!r} is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def typed_options(options: Mapping[str, Any], known: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Options, as text or values, in the type of their defaults. Raises RankoptError."""
    typed = {}
    for key, value in options.items():
        if key not in known:
            valid = ", ".join(f"{k}={v}" for k, v in known.items()) or "none"
            raise RankoptError(f"{whose} has no option {key!r}; its options: {valid}")
        kind = type(known[key])
        try:
            typed[key] = {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise RankoptError(f"{whose}: option {key}={value} is no {kind.__name__}") from None
    return typed
