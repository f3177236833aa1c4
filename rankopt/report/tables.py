"""CSV files that spreadsheets open without running anything in them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rankopt.core.files import write_beside
from rankopt.core.text import escaped

FORMULA = ("=", "+", "-", "@")
"""A text that begins with one of these is a formula to a spreadsheet."""


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file. Texts that a spreadsheet would compute get an apostrophe in front.

    Args:
        path: The file.
        rows: The rows, that of the column names first.
    """
    cells = [[_cell(value) for value in row] for row in rows]

    def write(beside: Path) -> None:
        with beside.open("w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file, lineterminator="\n").writerows(cells)

    write_beside(path, write)


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{escaped(value)}" if value.lstrip().startswith(FORMULA) else escaped(value)
