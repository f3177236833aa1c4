"""Files from elsewhere: any damage to plan.json, result.json, study.db or a cache entry gives one clear error."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rankopt
from rankopt.candidates.cache import Cache, FactorStore
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.run_folder import read_result, report_damage
from rankopt.core.schema import LARGEST
from rankopt.decompositions.types import Nested
from rankopt.experiments.digits import DigitsNet
from rankopt.report.html import write_report
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import Store, read_trials
from rankopt.search.summary import summary

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CURVES = dict[str, list[list[float]]]
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("outer") / "run"
    out.mkdir()
    run_search(digits, digits.problem({"params": 0.3}), SearchSettings("random", 3), out)
    return out


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def outside(run):
    return {p: p.stat().st_mtime_ns for p in run.parent.rglob("*") if run not in (p, *p.parents)}


@contextmanager
def with_a_change(run, name, data):
    """A JSON file of a run with one value changed; what is read then may be refused, and touches nothing outside."""
    good = (run / name).read_text()
    content = json.loads(good)
    path = data.draw(st.sampled_from(list(places(content))))
    before = outside(run)
    try:
        (run / name).write_text(json.dumps(changed(content, path, data.draw(JSON))))
        try:
            yield
        except RankoptError as error:
            assert str(error)
        assert outside(run) == before
    finally:
        (run / name).write_text(good)


@FUZZ
@given(data=st.data())
def test_any_change_of_a_plan_loads_or_is_refused(run, data):
    with with_a_change(run, "plan.json", data):
        assert isinstance(rankopt.load(DigitsNet, run), torch.nn.Module)


def test_each_entry_of_a_plan_may_be_anything(run):
    """Those that fuzzing seldom picks, whole."""
    good = (run / "plan.json").read_text()
    content = json.loads(good)
    content["layers"] = content["layers"][:2]
    try:
        for path in places(content):
            for new in (None, 3, "x", [], {}):
                (run / "plan.json").write_text(json.dumps(changed(content, path, new)))
                with suppress(RankoptError):
                    rankopt.load(DigitsNet, run)
    finally:
        (run / "plan.json").write_text(good)


@settings(FUZZ, max_examples=15)  # each draws all pictures
@given(data=st.data())
def test_any_change_of_a_result_is_reported_or_refused(run, data):
    with with_a_change(run, "result.json", data):
        with report_damage(run):
            summary(read_result(run))
        write_report(run)


def test_a_file_too_large_is_not_read(run, tmp_path):
    for name, read in (
        ("plan.json", lambda: rankopt.load(DigitsNet, tmp_path)),
        ("result.json", lambda: read_result(tmp_path)),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(LARGEST + 1)
        with pytest.raises(RankoptError, match="larger than"):
            read()
        (tmp_path / name).unlink()
    for name in ("plan.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(10 * LARGEST)
    with pytest.raises(RankoptError, match="larger than the plan's model"):
        rankopt.load(DigitsNet, tmp_path)


# --- study.db ----------------------------------------------------------------------------------------


def reopen(digits, folder):
    return Store(folder, digits.problem({"params": 0.3}), {}, resume=True).trials()


def test_a_truncated_study_is_noticed_wherever_it_is_cut(run, digits, tmp_path):
    whole = (run / "study.db").read_bytes()
    path = tmp_path / "study.db"
    for share in (0, 0.001, 0.3, 0.6, 0.9, 0.999):
        path.write_bytes(whole[: math.floor(share * len(whole))])
        for read in (lambda: reopen(digits, tmp_path), lambda: read_trials(tmp_path)):
            with pytest.raises(StudyError, match=r"study\.db"):
                read()
        assert path.read_bytes() == whole[: math.floor(share * len(whole))], "nothing is overwritten"


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE trial_values SET value = value / 2 WHERE trial_id = 2",
        "UPDATE trial_params SET param_value = 0 WHERE trial_id = 2",
        "UPDATE trial_user_attributes SET value_json = '0.99' WHERE key = 'score' AND trial_id = 1",
        "DELETE FROM trial_user_attributes WHERE key = 'checksum' AND trial_id = 1",
        "UPDATE trials SET state = 'PRUNED' WHERE trial_id = 3",
        "DELETE FROM trial_params WHERE trial_id = 1",
        "DROP TABLE trial_params",
    ],
)
def test_an_edited_study_is_noticed(run, digits, tmp_path, edit):
    (tmp_path / "study.db").write_bytes((run / "study.db").read_bytes())
    assert len(read_trials(tmp_path)) == 3
    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute(edit).rowcount != 0
    connection.close()
    with pytest.raises(StudyError, match=r"damaged|cannot be used"):
        reopen(digits, tmp_path)
    with pytest.raises(StudyError, match=r"damaged|cannot be used"):
        read_trials(tmp_path)


# --- the cache ---------------------------------------------------------------------------------------


def flip(path):
    """Change the last byte, which is a number's: the file's form stays sound."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x55
    path.write_bytes(content)


def test_silent_damage_of_the_cache_is_noticed(tmp_path):
    cache = Cache(tmp_path)
    cache.write_tensors("statistics", {"a": torch.rand(5, 5, dtype=torch.float64), "b": torch.tensor(3.0)})
    cache.write_tensors("fit", {"0.0": torch.rand(3), "1.0": torch.rand(4)})
    cache.write_json("curve", {"x": [[0.5, 0.25]]})
    assert cache.read_tensors("statistics") is not None and cache.read_json("curve", CURVES) == {"x": [[0.5, 0.25]]}
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            path.write_text(path.read_text().replace("0.25", "0.75"))
        else:
            flip(path)
    assert cache.read_tensors("statistics") is None and cache.read_json("curve", CURVES) is None
    assert len(FactorStore(cache)["fit/0"][0]) == 3
    with pytest.raises(RankoptError, match="is damaged, and removed now"):
        FactorStore(cache)["fit/1"]
    assert not cache.path("fit", "safetensors").exists()


@pytest.mark.parametrize("damage", ["tensor", "shapes", "rank"])
def test_damaged_factors_of_all_ranks_are_noticed(tmp_path, damage):
    cache = Cache(tmp_path)
    nested = Nested(torch.rand(1, 5, 3).double(), torch.rand(1, 3, 4).double(), torch.rand(4), torch.float32)
    cache.write_nested("fit", nested, [[[2, 4], [5, 2]]], {})
    assert [tuple(f.shape) for f in FactorStore(cache)["fit/0"]] == [(2, 4), (5, 2)]
    if damage == "tensor":
        flip(cache.path("fit", "safetensors"))
    elif damage == "shapes":
        cache.write_nested("fit", nested, [[[7, 4], [5, 2]]], {})
    with pytest.raises(RankoptError, match="is damaged, and removed now"):
        FactorStore(cache)["fit/1" if damage == "rank" else "fit/0"]
    assert not cache.path("fit", "safetensors").exists()
