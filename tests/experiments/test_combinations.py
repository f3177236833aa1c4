"""Cases that a study's file writes as one: a case per combination of the entries of its lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankopt.core.errors import RankoptError
from rankopt.core.progress import StopCondition
from rankopt.experiments.cases import run_cases
from rankopt.experiments.config import read_study
from rankopt.search.loop import search
from rankopt.search.progress import ProgressBar

TEXT = """
task = "digits"

[lists]
sizes = [{ percent = 30, share = 0.3 }, { percent = 15, share = 0.15 }]
families = [{ family = "svd_out", all = ["svd_out", "svd_in"] }, { family = "tt", all = ["tt"] }]

[[cases]]
name = "dense"
budget.params = 1.0

[[cases]]
each = ["sizes", "families"]
name = "{family}-{percent}%"
budget.params = "{share}"
space = { base = "default", families = "{all}", fractions = ["{share}"] }
minutes = "{percent}"
"""


@pytest.fixture
def write(tmp_path):
    def written(text):
        (tmp_path / "study.toml").write_text(text)
        return tmp_path / "study.toml"

    return written


def test_there_is_a_case_for_every_combination_in_order(write):
    cases = read_study(write(TEXT)).cases
    assert [c.name for c in cases] == ["dense", "svd_out-30%", "tt-30%", "svd_out-15%", "tt-15%"]
    chosen = cases[1]
    assert chosen.experiment.budget == {"params": 0.3} and chosen.minutes == 30
    assert chosen.experiment.space.families == ("svd_out", "svd_in")
    assert [c.experiment.space.fractions for c in cases[1:]] == [(0.3,), (0.3,), (0.15,), (0.15,)]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('each = ["sizes", "families"]', 'each = ["size"]', "each names 'size'; the lists are sizes, families"),
        ('each = ["sizes", "families"]', 'each = "sizes"', "each is 'sizes': give a list of names"),
        ('"{share}"', '"{shares}"', "'{shares}': no list of its `each` has 'shares'; they have percent, share, family"),
        ("{family}-{percent}%", "{family}", "two cases have one name"),
        ("percent = 30,", "", "no list of its `each` has 'percent'"),
        ("[lists]", "[listen]", "unknown key 'listen'"),
    ],
)
def test_what_makes_no_sense_is_refused(write, before, after, message):
    with pytest.raises(RankoptError) as error:
        read_study(write(TEXT.replace(before, after, 1)))
    assert message in str(error.value)


def test_a_pattern_chooses_cases(write, tmp_path):
    study = read_study(write(TEXT))

    def begun(*only):
        """The first case that would be done, before anything of it is."""
        events = run_cases(study, tmp_path / "out", search, tmp_path, StopCondition(), ProgressBar(), only)
        return next(events).name

    assert begun("tt-*") == "tt-30%"
    assert begun("*-15%", "svd*") == "svd_out-30%"
    assert begun() == "dense"
    with pytest.raises(RankoptError, match=r"unknown case 'btt\*'; the cases are dense, svd_out-30%"):
        begun("tt-*", "btt*")


def test_every_case_of_the_thesis_is_read_and_the_first_networks_come_first():
    cases = read_study(Path(__file__).parents[2] / "studies" / "thesis_accuracy.toml").cases
    assert len(cases) == 6 * (1 + 4 * (3 + 3 + 1))
    assert [c.name for c in cases[:2]] == ["ResNet-18-dense", "VGG-16-dense"]
    assert all(c.minutes is not None for c in cases)
