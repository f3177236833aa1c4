"""result.json holds what its documented records say, no more and no less."""

from __future__ import annotations

import ast
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from typing_extensions import is_typeddict

from rankopt.candidates.prepare import Prepared
from rankopt.core import result_record
from rankopt.core.result_record import ResultInfo
from rankopt.core.run_folder import read_result, write_result
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings

RECORDS = [x for x in vars(result_record).values() if isinstance(x, type) and is_typeddict(x)]


def differences(value: Any, kind: Any, path: str = "info") -> list[str]:
    """Where a value is not of an annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        if not isinstance(value, dict):
            return [f"{path} is {value!r}"]
        hints, extras = get_type_hints(kind), get_type_hints(kind, include_extras=True)
        required = {k for k, hint in extras.items() if get_origin(hint) is not typing.NotRequired}
        found = [f"{path} lacks {k}" for k in required - value.keys()]
        found += [f"{path} has {k}" for k in value.keys() - hints.keys()]
        return found + [d for k in value.keys() & hints.keys() for d in differences(value[k], hints[k], f"{path}.{k}")]
    if origin in (types.UnionType, typing.Union):
        tried = [differences(value, x, path) for x in arguments]
        return [] if [] in tried else [d for ds in tried for d in ds]
    if origin is typing.Literal:
        return [] if value in arguments else [f"{path} is {value!r}"]
    if origin is dict:
        return [
            d
            for k, v in value.items()
            for d in differences(k, arguments[0]) + differences(v, arguments[1], f"{path}.{k}")
        ]
    if origin is not None:  # a list or sequence
        if not isinstance(value, list | tuple):
            return [f"{path} is {value!r}"]
        return [d for v in value for d in differences(v, arguments[0], f"{path}[]")]
    if kind is Any or (kind is float and type(value) is int):
        return []
    return [] if type(value) is kind else [f"{path} is {value!r}, not {kind}"]


@pytest.mark.parametrize("settings", [SearchSettings("knapsack", refine=True), SearchSettings("random", trials=3)])
def test_a_result_has_the_documented_entries(digits: Prepared, tmp_path: Path, settings: SearchSettings) -> None:
    out = tmp_path / "run"
    out.mkdir()
    result = run_search(digits, digits.problem({"params": 0.4, "macs": 0.9}), settings, out)
    assert differences(result.info, ResultInfo) == []
    assert differences(read_result(out), ResultInfo) == []


def test_what_is_written_is_read(digits: Prepared, tmp_path: Path) -> None:
    info = run_search(digits, digits.problem({"params": 0.4}), SearchSettings()).info
    write_result(tmp_path, info)
    assert read_result(tmp_path) == info


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_every_key_is_documented(record: type) -> None:
    (tree,) = ast.parse(inspect.getsource(record)).body
    own = {x.target.id for x in tree.body if isinstance(x, ast.AnnAssign)}  # type: ignore[attr-defined]
    text = inspect.getdoc(record) or ""
    documented = [k.strip() for line in re.findall(r"^    ([a-z_, ]+): [A-Z\"`]", text, re.M) for k in line.split(",")]
    assert sorted(documented) == sorted(own)
