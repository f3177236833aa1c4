"""Random models under random budgets: none is exceeded, counted independently of rankopt."""

from __future__ import annotations

from random import Random

import pytest
import torch

import rankopt
from rankopt.model.stand_in import all_outputs, same
from tests.helpers.random_models import count_macs, count_params, random_model

FAMILIES = ("svd_out", "cp_merged", "tucker2", "tt_matrix", "svd_grouped", "tr")


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(i, marks=pytest.mark.slow) for i in range(20, 300))])
def test_no_budget_is_exceeded(seed):
    """The model meets its budget, or is refused with a sentence that says what is least possible."""
    model, batch = random_model(seed)
    before = all_outputs(model, batch)
    draw = Random(seed)
    metric, share = draw.choice(("params", "macs")), draw.uniform(0.3, 1.0)
    space = rankopt.SearchSpace(families=tuple(draw.sample(FAMILIES, 2)), points=4, steps=3)
    counted = {"params": count_params, "macs": lambda m: count_macs(m, batch[:1])}[metric]
    dense = counted(model)
    try:
        result = rankopt.compress(model, [batch], {metric: share}, space=space)
    except rankopt.RankoptError as error:
        assert "least" in str(error), error
        return
    assert counted(result.model) <= share * dense
    assert all(torch.isfinite(z).all() for z in all_outputs(result.model, batch))
    assert same(before, all_outputs(model, batch)), "the user's own model is as it was"
