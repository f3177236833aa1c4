"""What the reference says of the registries is true of the code, and nothing public is missing from it."""

from __future__ import annotations

import dataclasses
import re
from typing import get_type_hints

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates.search_space import space_names
from rankopt.core.result_record import ResultInfo
from rankopt.strategies.registry import strategy_class, strategy_options
from rankopt.training.recipe import Recipe
from tests.docs.pages import PAGES

API = PAGES["docs/reference/python-api.md"]
FAMILIES = PAGES["docs/reference/decompositions.md"]
STRATEGIES = PAGES["docs/reference/strategies.md"]
SPACES = PAGES["docs/reference/search-space.md"]
TASK = PAGES["docs/reference/task.md"]

OF_LINEAR = dict(re.findall(r"^\| `(\w+)` of a Linear \| `([^`]+)` \|", FAMILIES, re.M))
OF_CONVOLUTION = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", FAMILIES, re.M))
RANKS = dict(re.findall(r"^\| `(\w+)` \|.*\| \(([\w, χ]+)\)[^|]*\|$", FAMILIES, re.M))
LINEAR_RANKS = {**RANKS, "ht": "R1, R2, R, R3, R4"}
SAMPLE = {"svd_grouped": (4, 2), "btt": (2, 2, 3), "tr": (2, 2, 3, 2), "tucker": (4, 2, 2, 5)}


def rows(text, heading):
    """The first cells of the first table below a heading."""
    table = re.search(rf"^{heading}$(?:\n|.)*?((?:^\|.*\n)+)", text, re.M)
    return [[c.strip() for c in line[1:-1].split("|")] for line in table[1].splitlines()[2:]]


@pytest.mark.parametrize("name", rankopt.__all__)
def test_every_public_name_is_documented(name):
    assert f"::: rankopt.{name}\n" in API + "\n" or f"{{ #rankopt.{name} }}" in API


@pytest.mark.parametrize("name", rankopt.DECOMPOSITIONS.built_in)
def test_every_family_is_documented(name):
    table = FAMILIES.split("## Number of weights")[0]
    assert f"| `{name}` |" in table
    assert f"`{name}`" in FAMILIES.split("## Number of weights")[1]
    kind = type(rankopt.DECOMPOSITIONS[name])
    assert f"::: {kind.__module__}.{kind.__qualname__}\n" in FAMILIES


@pytest.mark.parametrize("name", rankopt.STRATEGIES.built_in)
def test_every_strategy_is_documented(name):
    kind = strategy_class(name)
    assert f"::: {kind.__module__}.{kind.__qualname__}\n" in STRATEGIES
    assert any(row[0] == f"`{name}`" for row in rows(STRATEGIES, "# Strategies"))


def test_every_option_of_a_strategy_is_documented_with_its_default():
    said = {(row[0].strip("`"), row[1].strip("`")): row[2] for row in rows(STRATEGIES, "## Options")}
    there = {(s, o): str(v) for s in rankopt.STRATEGIES.built_in for o, v in strategy_options(s).items()}
    assert said == there


def documented(page):
    return set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`[^|]*) \|", page, re.M))))


def test_every_setting_of_a_search_space_is_documented():
    settings = {f.name for f in dataclasses.fields(rankopt.SearchSpace)} - {"name"}
    assert settings <= documented(SPACES)
    assert all(f"`{name}`" in SPACES for name in space_names())


def test_every_field_of_a_task_and_of_a_recipe_is_documented():
    assert {f.name for f in dataclasses.fields(rankopt.Task)} - {"name"} <= documented(TASK)
    missing = {f.name for f in dataclasses.fields(Recipe)} - documented(PAGES["docs/how-to/train-after.md"])
    assert missing <= {"epochs", "rate", "layerwise_rate", "seed"}


def test_every_entry_of_result_json_is_documented():
    assert set(get_type_hints(ResultInfo)) == documented(PAGES["docs/reference/result-json.md"])


# --- the number of weights ---------------------------------------------------------------------------


def weights(formula, values):
    """A formula of the table, with · and ² as Python has them."""
    return eval(formula.replace("·", "*").replace("²", "**2"), {"__builtins__": {}}, values)


def named(text, rank):
    return dict(zip(text.replace(" ", "").split(","), rank, strict=True))


@pytest.mark.parametrize("name", OF_CONVOLUTION)
def test_formulas_of_weights(name):
    module = nn.Linear(30, 24) if name == "tt_matrix" else nn.Conv2d(16, 24, 3)
    x = torch.zeros(1, 30) if name == "tt_matrix" else torch.zeros(1, 16, 8, 8)
    (layer,) = rankopt.inventory(module, x)
    family = rankopt.DECOMPOSITIONS[name]
    rank = family.valid(layer, SAMPLE.get(name, tuple(range(2, 2 + len(family.full_rank(layer))))))
    values = {"C": 16, "T": 24, "k": 3} | named(RANKS[name], rank)
    if name.startswith("tt_"):
        outputs, inputs = family.channels(layer)
        values |= {f"J{i}": v for i, v in enumerate(outputs, 1)} | {f"I{i}": v for i, v in enumerate(inputs, 1)}
    assert weights(OF_CONVOLUTION[name], values) == family.weights(layer, rank)


@pytest.mark.parametrize("name", OF_LINEAR)
def test_formulas_of_weights_of_a_linear(name):
    (layer,) = rankopt.inventory(nn.Linear(30, 24), torch.zeros(1, 30))  # 5 x 6 and 4 x 6
    family = rankopt.DECOMPOSITIONS[name]
    rank = family.valid(layer, (2,) * len(family.full_rank(layer)))
    values = [
        {"C1": a, "C2": 30 // a, "T1": b, "T2": 24 // b, **named(LINEAR_RANKS[name], rank)}
        for a in (5, 6)
        for b in (4, 6)
    ]
    assert family.weights(layer, rank) in [weights(OF_LINEAR[name], v) for v in values]
