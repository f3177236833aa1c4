"""Random models under random budgets: none is exceeded, counted independently of rankopt."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch

import rankopt
from rankopt.model.stand_in import all_outputs, same
from tests.helpers.random_models import (
    count_bytes,
    count_disk,
    count_macs,
    count_memory,
    count_params,
    random_model,
)

FAMILIES = ("svd_out", "cp_merged", "tucker2", "tt_matrix", "svd_grouped", "tr", "ttn")

METRICS = ("params", "macs", "bytes", "memory", "disk")


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 700))])
def test_no_budget_is_exceeded(seed, tmp_path):
    """The model meets its budgets and costs what is said, or is refused with what is least possible, which is."""
    model, batch = random_model(seed)
    before = all_outputs(model, batch)
    draw = Random(seed)
    metrics = draw.sample(METRICS, draw.choice((1, 1, 1, 2, 3)))
    budget = {metric: draw.uniform(0.3, 1.0) for metric in metrics}
    precisions = draw.choice((("same",), ("same", "int8"), ("same", "float16")))
    space = rankopt.SearchSpace(families=tuple(draw.sample(FAMILIES, 2)), points=4, steps=3, precisions=precisions)

    def counted(model):
        return {
            "params": count_params(model),
            "macs": count_macs(model, batch[:1]),
            "bytes": count_bytes(model),
            "memory": count_memory(model, batch[:1]),
            "disk": count_disk(model, tmp_path),
        }

    def compressed(budget):
        return rankopt.compress(model, [batch], budget, space=space)

    dense = counted(model)
    limits = {metric: share * dense[metric] for metric, share in budget.items()}
    try:
        result = compressed(budget)
    except rankopt.RankoptError as error:
        if "together" in str(error) or "no layer that can be factorised" in str(error):
            return
        metric, least = re.search(r"Give (\w+)=(\d+) or more", str(error)).groups()
        assert int(least) > limits[metric], error
        if int(least) >= dense[metric]:
            return  # nothing is smaller
        result, limits = compressed({metric: int(least)}), {metric: int(least)}
    found = counted(result.model)
    assert all(found[metric] <= limit for metric, limit in limits.items())
    said = result.info["cost"]["compressed"]
    assert {m: said[m] for m in METRICS if said[m]} == {m: found[m] for m in METRICS if said[m]}
    assert all(torch.isfinite(z).all() for z in all_outputs(result.model, batch))
    assert same(before, all_outputs(model, batch)), "the user's own model is as it was"
