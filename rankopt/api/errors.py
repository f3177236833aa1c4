"""Error messages in Python's words: they are written for the command line, whose options have the same names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from rankopt.core.errors import RankoptError

P = ParamSpec("P")
R = TypeVar("R")

ARGUMENTS = (
    *("budget", "max-drop", "minimize", "latency-on", "strategy", "trials", "seed", "space", "families", "ranks"),
    *("keep-dense", "fidelities", "refine", "out", "storage", "cache", "workers", "ray-address", "gpus-per-trial"),
    *("trial-timeout", "trial-memory", "evaluate", "task", "batch", "as-fast", "effort", "minutes"),
)
"""Options that are arguments in Python, with underscores."""


def in_python_words(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: its errors name arguments instead of options.

    Args:
        function: The function.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RankoptError as error:
            error.args = tuple(_translated(x) if isinstance(x, str) else x for x in error.args)
            raise

    return wrapped


def _translated(text: str) -> str:
    text = text.replace("--resume", "resume=True").replace("--option", "options")
    return re.sub(rf"--({'|'.join(ARGUMENTS)})\b", lambda match: match[1].replace("-", "_"), text)
