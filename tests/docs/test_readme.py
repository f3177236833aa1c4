"""The README is short, starts with the two commands, and its figures are in a study's file."""

from __future__ import annotations

import json
import re

from tests.docs.pages import LINK, README
from tests.helpers import ROOT

LONGEST = 120  # lines


def test_the_two_commands_are_at_the_top():
    assert re.findall(r"^    (make \w+)", README[:1500], re.M) == ["make demo", "make test"]


def test_it_is_short():
    assert len(README.splitlines()) <= LONGEST


def test_every_link_leads_to_a_file():
    for link in LINK.findall(README):
        assert (ROOT / link).is_file(), link


def test_every_figure_of_the_results_table_is_in_the_study():
    cells = json.loads((ROOT / "studies" / "results" / "no_training.json").read_text())
    block = README.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    header, ours = (next(x for x in block.splitlines() if mark in x) for mark in ("parameters kept:", "**rankopt**"))
    budgets = [int(x) for x in header.split("|")[2:-1]]
    figures = [x.strip(" *") for x in ours.split("|")[2:-1]]
    assert len(figures) == len(budgets) >= 6
    for budget, figure in zip(budgets, figures, strict=True):
        assert figure == f"{100 * cells[f'resnet20 params={budget / 100}']['top1']:.2f}"
