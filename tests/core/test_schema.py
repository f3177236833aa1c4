"""Content of files is of the type that it must have, or the first entry that is not is named."""

from __future__ import annotations

import pytest

from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.errors import RankoptError
from rankopt.core.result_record import CostsEntry
from rankopt.core.schema import DEEPEST, checked, parse_json, read_toml
from rankopt.core.text import LONGEST, in_one_line, one_line, printable
from rankopt.experiments.config import read_study

STUDY = "task = 'digits'\n"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({"dense": 1}, CostsEntry, "dense = 1 is not what it should be: an object"),
        ({"dense": {"params": 1}}, CostsEntry, "dense.macs is not what it should be: field required"),
        ({"points": True}, SearchSpace, "points = True is not what it should be: a valid integer"),
        ([1, 2**63], list[int], "more than 63 bits"),
        ("x", list[int], "the whole = 'x' is not what it should be"),
        ([[1.0, "y" * 1000]], list[tuple[float, float]], r"^0\.1 = 'y{38}… is not"),
    ],
)
def test_the_first_wrong_entry_is_named(content, kind, message):
    with pytest.raises(ValueError, match=message):
        checked(content, kind)


def test_lists_are_tuples_and_whole_numbers_floats_where_the_type_says_so():
    assert checked([[1, 2], [0.5, 1e999]], tuple[tuple[float, ...], ...]) == ((1.0, 2.0), (0.5, float("inf")))
    assert checked({"fractions": [1], "keep_dense": ["a"]}, SearchSpace).fractions == (1.0,)


@pytest.mark.parametrize("depth", [DEEPEST + 1, 900, 200_000])
def test_deep_nesting_is_refused(tmp_path, depth):
    with pytest.raises(ValueError, match="within each other"):
        parse_json("[" * depth + "]" * depth, list)
    (tmp_path / "a.toml").write_text("a = " + "[" * depth + "]" * depth)
    with pytest.raises(ValueError, match="within each other"):
        read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_dense = 1.5", "keep_dense = 1.5 is not what it should be: a valid array"),
        ("keep_dense = [true]", "keep_dense.0 = True is not what it should be: a valid string"),
        ("points = 1979-05-27", "points = '1979-05-27' is not"),
        (f"description = '{'y' * (LONGEST + 1)}'", "a text of more than 2,000 characters"),
    ],
)
def test_a_search_space_of_another_type_is_refused(tmp_path, text, message):
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(RankoptError, match=message):
        load_space(tmp_path / "space.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget = [{a = 1}]", r"budget = \[{'a': 1}\] is not"),
        ("budget = 0.5\nspace = {keep_dense = 1.5}", "budget = 0.5 is not"),
        ("budget.params = 0.5\nspace = {keep_dense = 1.5}", "keep_dense = 1.5 is not"),
        ("budget.params = 0.5\ncases = [1]", r"cases\.0 = 1 is not"),
        ("budget.params = 0.5\noptions = {a = [1]}", r"options\.a = \[1\] is not"),
        ("budget.params = 0.5\ntraining = {rate = '1'}", "rate is '1': give a number"),
    ],
)
def test_a_study_of_another_type_is_refused(tmp_path, text, message):
    (tmp_path / "study.toml").write_text(STUDY + text)
    with pytest.raises(RankoptError, match=message):
        read_study(tmp_path / "study.toml")


# --- text -----------------------------------------------------------------------------------------------

ATTACKS = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x1b]52;c;YQ==\x07",
    "\x9b2J",
    *("a\rb", "a\x08b", "\x7f"),
    *("\u202eabc", "\u2028"),
]


@pytest.mark.parametrize("text", ATTACKS)
def test_no_character_controls_a_terminal(text):
    for shown in (printable(text), one_line(text), in_one_line({text: [text]}).popitem()[1][0]):
        assert shown.isprintable() and "\\" in shown
    assert one_line(one_line(text)) == one_line(text)


def test_ordinary_text_stays():
    text = "layer1.0.conv – ≤ 5 %, 3 × 3, naïve, 日本"
    assert printable(text) == one_line(text) == text
    assert (printable("a\nb"), one_line("a\nb")) == ("a\nb", "a\\nb")
    assert len(one_line("x" * 10**6)) == LONGEST
