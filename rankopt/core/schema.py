"""Files that may come from elsewhere: read within limits, and checked against the type that their content must have.

Every reader of JSON and TOML goes through here. A type is a TypedDict, a dataclass, or anything else that pydantic
takes; numbers and texts must be of the type itself, except that a whole number may stand for a float.
"""

from __future__ import annotations

import functools
import json
import math
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.core.errors import RankoptError
from rankopt.core.files import read_bytes
from rankopt.core.text import LONGEST, shortened

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

LARGEST = 2**24
"""The largest file of text that is read, in bytes. A run of 10,000 layers takes 5 MB."""


DEEPEST = 32
"""Lists and tables within each other. rankopt's own files have up to 7."""


LARGEST_NUMBER = 2**63
"""Whole numbers are below it: none of rankopt's counts is larger."""


def read_json(path: Path, kind: Any, most: int = LARGEST) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        kind: The type of its content.
        most: The largest size that is read, in bytes.

    Returns:
        The content, as `kind`.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: Its content is not what it should be. The message names the first entry that is wrong.
    """
    return parse_json(read_bytes(path, most), kind)


def parse_json(text: str | bytes, kind: Any) -> Any:
    """Read JSON text, as `read_json`.

    Args:
        text: The text.
        kind: The type of its content.

    Returns:
        The content, as `kind`.

    Raises:
        ValueError: Its content is not what it should be.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    return checked(content, kind)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: It is too large or not TOML, its tables nest too deeply, a text is longer than LONGEST, or a number
            is not finite.
    """
    try:
        content = tomllib.loads(read_bytes(path, LARGEST).decode(), parse_float=_finite)
    except RecursionError:
        raise _too_deep() from None
    _check_limits(content, LONGEST)
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {shortened(text, 40)!r}, which is no finite number")
    return number


def checked(content: Any, kind: Any) -> Any:
    """Check some content, and convert it to a type.

    Args:
        content: What json or tomllib read, or values of the same types.
        kind: The type.

    Returns:
        The content as `kind`: lists are tuples where it says so, and tables are dataclasses.

    Raises:
        RankoptError: A dataclass refused its values.
        ValueError: The content is not of the type. The message names the first entry that is wrong.
    """
    from pydantic import ValidationError

    _check_limits(content)
    # As JSON, of which a list may become a tuple while all else stays strict. Lone surrogates, which file names
    # may hold, have no UTF-8.
    text = json.dumps(content, default=str, ensure_ascii=False).encode("utf-8", "replace")
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise _in_words(error, content) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _check_limits(content: Any, longest: float = math.inf) -> None:
    """Raise ValueError for lists and tables that nest too deeply, for large numbers and for long texts."""
    level = [content]
    for _ in range(DEEPEST):
        if any(isinstance(x, int) and abs(x) >= LARGEST_NUMBER for x in level):
            raise ValueError("it holds a whole number of more than 63 bits")
        names = [name for x in level if isinstance(x, dict) for name in x]
        if any(isinstance(x, str) and len(x) > longest for x in (*level, *names)):
            raise ValueError(f"it holds a text of more than {longest:,} characters")
        inner = [list(x.values()) if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list, tuple))]
        level = [value for values in inner for value in values]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it holds more than {DEEPEST} lists or tables within each other")


def _in_words(error: ValidationError, content: Any) -> ValueError:
    """The first of pydantic's errors in one line; an error of rankopt's own as it is."""
    first = error.errors(include_url=False)[0]
    if isinstance(own := first.get("ctx", {}).get("error"), RankoptError):
        return own
    missing, place = first["type"] == "missing", []
    for key in first["loc"]:
        if key in content if isinstance(content, dict) else isinstance(content, (list, tuple)) and isinstance(key, int):
            content = content[key]
        elif not missing:
            continue  # pydantic's name of a member of a union
        place.append(str(key))
    given = "" if missing else f" = {shortened(repr(first['input']), 40)}"
    what = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    where = shortened(".".join(place), 100) or "the whole"
    return ValueError(f"{where}{given} is not what it should be: {what[0].lower()}{what[1:]}")
