"""Text from elsewhere, such as names and errors, made safe to print: no character of it controls a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

LONGEST = 2000
"""Characters of a name, an error or a note that are shown."""


# C0 and C1 controls, line and paragraph separators, and what turns the direction of text.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Write control characters as escapes, such as \x1b; line feeds stay.

    Args:
        text: One or more lines.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else _escape(found[0]), text)


def one_line(text: str) -> str:
    """As `escaped`, and cut off what is longer than LONGEST.

    Args:
        text: A name, an error or a note.
    """
    return escaped(shortened(text, LONGEST))


def reason(error: object) -> str:
    """The text of an error for a message of one line: escaped, and cut off where it quotes a long value.

    Args:
        error: The error.
    """
    return shortened(escaped(str(error)), LONGEST // 4)


def escaped(text: str) -> str:
    r"""Write control characters as escapes, line feeds as \n.

    Args:
        text: The text.
    """
    return _CONTROLS.sub(lambda found: _escape(found[0]), text)


def in_one_line(content: Any) -> Any:
    """Apply `one_line` to all texts in the content of a JSON file, keys included.

    Args:
        content: Dictionaries, lists and single values.
    """
    if isinstance(content, str):
        return one_line(content)
    if isinstance(content, dict):
        return {one_line(key): in_one_line(value) for key, value in content.items()}
    return [in_one_line(x) for x in content] if isinstance(content, list) else content


def few(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are: "a, b, c and 4 more".

    Args:
        names: The names.
        most: How many are shown.
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shortened(text: str, most: int) -> str:
    """Cut off the end of a long text.

    Args:
        text: The text.
        most: Characters that are kept.
    """
    return text if len(text) <= most else text[: most - 1] + "…"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
