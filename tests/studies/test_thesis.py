"""The thesis's parameter counts from our cost model, and its rank rules beside tensorly's."""

from __future__ import annotations

import csv
import runpy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.cp_tensor import validate_cp_rank
from tensorly.tt_tensor import validate_tt_rank
from tensorly.tucker_tensor import validate_tucker_rank
from torch import nn

from rankopt.candidates.prepare import mark_dense
from rankopt.core.records import Layer
from rankopt.decompositions.plan import replace
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.experiments.config import read_study
from rankopt.model.inventory import inventory
from tests.helpers import ROOT

STUDIES = ROOT / "studies"
thesis = runpy.run_path(str(STUDIES / "thesis.py"))
LAYER = st.builds(
    lambda t, c, k: Layer("x", "Conv2d", (t, c, k, k)), *[st.integers(2, 600)] * 2, st.sampled_from([1, 3, 5])
)
SHARE = st.floats(0.01, 1.0)


@pytest.mark.parametrize("name", thesis["UNCOMPRESSED"])
def test_models_are_those_of_the_thesis(name):
    model = thesis["MODELS"]["build"](name).eval()
    assert sum(p.numel() for p in model.parameters()) == thesis["UNCOMPRESSED"][name]
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_counts_are_those_printed():
    rows = thesis["rows"]()
    assert len(rows) == 18 * 13
    of_cp = {(r["model"], r["fraction"]): r["difference"] for r in rows if r["method"] == "CP"}
    exact = {key for key in of_cp if key[0] != "ResNet-50"}
    assert len(exact) == 20 and not any(of_cp[key] for key in exact)
    assert not any(r["difference"] for r in rows if r["method"] == "Tucker" and r["model"] != "ResNet-50")
    assert all(r["remark"] not in ("", thesis["UNEXPLAINED"]) for r in rows if r["difference"])
    with (STUDIES / "results" / "thesis_parameters.csv").open(newline="") as file:
        assert [{k: str(v) for k, v in r.items()} for r in rows] == list(csv.DictReader(file))


@given(LAYER, SHARE)
def test_ranks_are_tensorlys(layer, share):
    t, c, *kernel = layer.shape
    assert thesis["cp_rank"](layer, share) == (max(1, validate_cp_rank(layer.shape, share)),)
    tucker = validate_tucker_rank(layer.shape, share, fixed_modes=[2, 3])
    assert thesis["tucker_rank"](layer, share) == (tucker[1], tucker[0])
    modes = (c, *kernel, t)
    drawn = validate_tt_rank(modes, share)
    assert thesis["tt_rank"](layer, share) == tuple(drawn[1:-1])
    cut = validate_tt_rank(modes, tuple(drawn), allow_overparametrization=False)
    assert thesis["tt_svd_rank"](layer, share) == tuple(cut[1:-1])


@given(LAYER.filter(lambda x: x.kernel[0] > 1), SHARE)
def test_cp_is_what_the_search_space_tries(layer, share):
    """thesis-cp.toml has nearest = true; ranks that would not make the layer smaller are left out there."""
    family, rank = DECOMPOSITIONS["cp"], thesis["cp_rank"](layer, share)
    expected = [rank] if family.weights(layer, rank) < layer.weights else []
    assert family.ranks(layer, [share], nearest=True) == expected


@pytest.mark.parametrize(("method", "family"), thesis["FAMILIES"].items())
def test_counts_are_those_of_models_that_run(method, family):
    """ResNet-18 with its layers really replaced, at 10 %."""
    model, network = thesis["MODELS"]["build"]("ResNet-18").eval(), thesis["Network"].of("ResNet-18")
    assert len(network.layers) == 16
    for layer in network.layers:
        rank = thesis["rank"](method, layer, 0.1, True)
        module: nn.Module = model.get_submodule(layer.name)
        model = replace(model, layer, DECOMPOSITIONS[family].build(module, layer, rank))
    counted, beside = network.count(method, 0.1, True)
    assert sum(p.numel() for p in model.parameters()) == counted - beside
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", thesis["UNCOMPRESSED"])
def test_every_case_of_one_family_fits_its_budget_and_factorises_every_layer(name):
    """The budget is CP's printed count, or for ResNet-50 that of our own ranks."""
    network = thesis["Network"].of(name)
    layers = inventory(thesis["MODELS"]["build"](name), torch.zeros(1, 3, 32, 32))
    cases = [c for c in read_study(STUDIES / "thesis_accuracy.toml").cases if c.name.startswith(f"{name}-")]
    one_family = [c.experiment for c in cases if c.experiment.search.strategy == "uniform"]
    assert len(one_family) == 4 * 3 * 2
    for experiment in one_family:
        space, (limit,) = experiment.space, experiment.budget.values()
        free = [x for x in mark_dense(layers, space) if x.reason is None]
        assert [x.name for x in free] == [x.name for x in network.layers]
        count, beside = network.dense, 0
        for layer in free:
            (family,) = space.families_of(layer)
            rank = min(space.ranks(family, layer), key=lambda r: DECOMPOSITIONS[family].weights(layer, r))
            count += DECOMPOSITIONS[family].cost(layer, rank).params - layer.cost.params
            beside += thesis["stored_besides"]("CP", layer, rank) if family == "cp" else 0
        assert count + beside <= limit
        if space.families == ("cp",) and name != "ResNet-50":
            assert count + beside == limit
