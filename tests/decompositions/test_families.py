"""Single families: ranks at which one turns into another, closed forms, and independent references."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.errors import PlanError
from rankopt.core.records import Choice, Cost, Layer, Plan
from rankopt.decompositions import parameter_search as fitting
from rankopt.decompositions.cp import divergence
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.plan import rebuild
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.counting import count
from rankopt.model.inventory import inventory
from tests.helpers.layers import PAIRS, make

KERNEL = Layer("", "Conv2d", (64, 32, 3, 5))


def fit(family, case, rank, *, steps=200, calibrated=True):
    statistics = (case.moment, case.metric) if calibrated else (None, None)
    (found,) = DECOMPOSITIONS[family].fit(case.layer, case.module.weight, [rank], *statistics, steps)
    return found


def plain_error(weight, approximation):
    return float((weight - approximation).square().sum() / weight.square().sum())


# --- where one family is another -----------------------------------------------------------------

SAME = [
    ("tr", (1, 3, 4, 5), "tt", (3, 4, 5), "conv3x3"),
    ("tr", (1, 2, 3, 2), "tt", (2, 3, 2), "linear"),
    ("btt", (6, 1, 1), "cp_merged", (6,), "conv3x3"),
    ("btt", (4, 1, 1), "cp_merged", (4,), "grouped same reflect"),
    ("btt", (1, 3, 5), "tucker2", (3, 5), "conv3x3"),
    ("btt", (1, 3, 5), "tucker2", (3, 5), "grouped same reflect"),
]


@pytest.mark.parametrize(("family", "rank", "other", "other_rank", "name"), SAME)
def test_a_degenerate_rank_is_another_family(family, rank, other, other_rank, name):
    """The other family's factors fit the stages as they are, at the same cost, and stand for the same layer."""
    case, a, b = make(name), DECOMPOSITIONS[family], DECOMPOSITIONS[other]
    factors = fit(other, case, other_rank, steps=20).factors
    assert a.valid(case.layer, rank) == rank and a.cost(case.layer, rank) == b.cost(case.layer, other_rank)
    torch.testing.assert_close(a.weight(case.layer, factors), b.weight(case.layer, factors))
    modules = [a.build(case.module, case.layer, rank), b.build(case.module, case.layer, other_rank)]
    for module in modules:
        load_factors(module, factors)
    torch.testing.assert_close(modules[0](case.x), modules[1](case.x))


@pytest.mark.parametrize(("family", "rank", "other", "other_rank", "name"), [s for s in SAME if s[4] != "linear"])
def test_and_its_fit_is_as_good(family, rank, other, other_rank, name):
    case = make(name)
    ours = fit(family, case, rank, steps=400).error
    assert ours <= fit(other, case, other_rank, steps=400).error * 1.05


def test_whole_spatial_modes_are_tucker2():
    case = make("conv3x3")
    expected = fit("tucker2", case, (4, 6)).error
    assert fit("tucker", case, (4, 3, 3, 6)).error == pytest.approx(expected, rel=0.02)
    assert fit("ht", case, (4, 9, 6)).error == pytest.approx(expected, rel=0.02)


def test_a_merged_kernel_mode_is_no_worse_than_two():
    """R_h x R_w filters are among the R_s = R_h R_w of ht."""
    case = make("conv3x3")
    assert fit("ht", case, (5, 4, 7)).error < fit("tucker", case, (5, 2, 2, 7)).error * 1.01


# --- closed forms ----------------------------------------------------------------------------------


def test_weights_are_the_literatures():
    t, c, h, w = KERNEL.shape
    closed = {
        ("svd_grouped", (4, 7)): 7 * (c * h * w + 4 * t),
        ("tucker", (5, 2, 3, 6)): c * 5 + h * 2 + w * 3 + 5 * 2 * 3 * 6 + 6 * t,
        ("btt", (3, 4, 5)): 3 * (c * 4 + h * w * 4 * 5 + t * 5),
        ("tr", (2, 4, 5, 6)): 2 * c * 4 + 4 * h * 5 + 5 * w * 6 + 2 * 6 * t,
        ("ht", (5, 4, 6)): c * 5 + h * w * 4 + 5 * 4 * 6 + 6 * t,
    }
    for (family, rank), weights in closed.items():
        assert DECOMPOSITIONS[family].weights(KERNEL, rank) == weights, family
    linear, (c1, c2, t1, t2) = Layer("", "Linear", (240, 128)), (8, 16, 15, 16)
    ring = 2 * c1 * 3 + 3 * c2 * 4 + 4 * t1 * 5 + 2 * 5 * t2
    assert DECOMPOSITIONS["tr"].weights(linear, (2, 3, 4, 5)) == ring
    tree = c1 * 2 + c2 * 3 + 2 * 3 * 4 + 4 * 5 * 6 + t1 * 5 + t2 * 6
    assert DECOMPOSITIONS["ht"].weights(linear, (2, 3, 4, 5, 6)) == tree


def test_costs_are_the_thesis():
    """Table 6.1, equations 6.13 to 6.18 and 6.11, without padding, and where the thesis' formulas omit a term."""
    t, c, d, x, y = 64, 32, 3, 11, 13
    conv = nn.Conv2d(c, t, d, bias=False)
    (layer,) = inventory(conv, torch.zeros(1, c, x, y))
    x1, y1 = x - d + 1, y - d + 1  # X', Y'
    cost = {name: DECOMPOSITIONS[name].cost for name in ("cp", "tucker2", "tt", "tt_conv")}
    # Standard convolution: the table's T C X' Y' omits d²; the text above it has it.
    assert layer.cost.params == t * c * d * d and layer.cost.macs == t * c * d * d * x1 * y1
    # CP: the thesis counts all stages at X' Y'. The first 1 x 1 runs on X Y, the d x 1 on X' Y.
    r = 7
    cp = cost["cp"](layer, (r,))
    assert cp.params == r * (c + 2 * d + t)
    assert cp.macs == r * (c + 2 * d + t) * x1 * y1 + r * c * (x * y - x1 * y1) + r * d * (x1 * y - x1 * y1)
    # Tucker: 6.15 and 6.16 as they stand; the spatial factors of 6.5 are in the core.
    r3, r4 = 5, 6
    tucker = cost["tucker2"](layer, (r3, r4))
    assert tucker.params == c * r3 + t * r4 + r3 * r4 * d**2
    assert tucker.macs == c * r3 * x * y + (r3 * d**2 + t) * r4 * x1 * y1
    # TT: 6.18 counts the d x 1 stage at X Y, where its output has X' Y positions.
    r3, r, r4 = 4, 5, 6
    tt = cost["tt"](layer, (r3, r, r4))
    assert tt.params == c * r3 + d * r3 * r + d * r4 * r + r4 * t
    thesis = c * r3 * x * y + d * r3 * r * x * y + d * r4 * r * x1 * y1 + r4 * t * x1 * y1
    assert tt.macs == thesis - d * r3 * r * (x - x1) * y
    # Garipov: the cores of 6.11, with 64 = 4 4 4 and 32 as 2 4 4; the thesis gives no count. Here one dense
    # convolution, where 6.12 contracts the input with the cores and so holds C R maps.
    r1, r2, r3 = 4, 5, 6
    garipov = cost["tt_conv"](layer, (r1, r2, r3))
    assert garipov.params == d * d * r1 + r1 * (4 * 2) * r2 + r2 * (4 * 4) * r3 + r3 * (4 * 4)
    assert garipov.macs == t * c * d * d * x1 * y1
    for name, rank in [("cp", (7,)), ("tucker2", (5, 6)), ("tt", (4, 5, 6)), ("tt_conv", (4, 5, 6))]:
        small = DECOMPOSITIONS[name].build(conv, layer, rank)
        assert count(small, torch.zeros(1, c, x, y)) == cost[name](layer, rank)
    # With as many outputs as inputs all stages have the same number of positions, and 6.14 is exact.
    (padded,) = inventory(nn.Conv2d(c, t, d, padding=1, bias=False), torch.zeros(1, c, x, y))
    assert cost["cp"](padded, (7,)).macs == 7 * (c + 2 * d + t) * x * y


def test_grouped_svd_starts_at_alds():
    """Without correlations between the slices, each has its truncated SVD (Eckart-Young) and no step helps."""
    case = make("conv3x3")
    weight = case.module.weight.detach()
    slices = weight.numpy().reshape(12, 4, 18).transpose(1, 0, 2)
    lost = sum(float((np.linalg.svd(s, compute_uv=False)[3:] ** 2).sum()) for s in slices)
    for steps in (0, 100):
        found = fit("svd_grouped", case, (4, 3), steps=steps, calibrated=False).error
        assert found == pytest.approx(lost / float(weight.square().sum()), rel=1e-6)


def test_no_worse_than_tensorly():
    """In the weight metric, where tensorly fits too."""
    case, linear = make("conv3x3"), make("linear")
    weight, matrix = case.module.weight.detach(), linear.module.weight.detach()
    modes = matrix.reshape(4, 5, 3, 4)  # (T1, T2, C1, C2)
    with tensorly.backend_context("pytorch"):
        decompose = tensorly.decomposition
        core, factors = decompose.tucker(weight, [6, 5, 2, 2], n_iter_max=200)
        references = [
            ("tucker", (5, 2, 2, 6), case, tensorly.tucker_to_tensor((core, factors))),
            (
                "tr",
                (2, 3, 6, 4),
                case,
                tensorly.tr_to_tensor(decompose.tensor_ring(weight.permute(1, 2, 3, 0), [2, 3, 6, 4, 2])).permute(
                    3, 0, 1, 2
                ),
            ),
            (
                "tr",
                (1, 3, 6, 4),
                linear,
                tensorly.tr_to_tensor(decompose.tensor_ring(modes.permute(2, 3, 0, 1), [1, 3, 6, 4, 1]))
                .permute(2, 3, 0, 1)
                .reshape(20, 12),
            ),
        ]
        core, factors = decompose.partial_tucker(weight.flatten(2), [7, 5, 4], modes=[0, 1, 2], n_iter_max=200)[0]
        references.append(
            ("ht", (5, 4, 7), case, tensorly.tucker_to_tensor((core, factors)).reshape(weight.shape)),
        )
    for family, rank, on, reference in references:
        ours = fit(family, on, rank, steps=2000, calibrated=False).error
        assert ours <= plain_error(on.module.weight.detach(), reference) * 1.001, (family, rank)


def test_hierarchical_tucker_of_a_linear_layer_finds_a_weight_of_that_form():
    case, ht = make("linear"), DECOMPOSITIONS["ht"]
    torch.manual_seed(1)
    rank = (2, 3, 4, 2, 3)
    cores = tuple(torch.randn(s, dtype=torch.float64) for s in ht.core_shapes(case.layer, rank))
    case.module.weight.data = ht.weight(case.layer, cores)
    assert fit("ht", case, rank, calibrated=False).error < 1e-10
    assert fit("ht", case, rank).error < 1e-6  # in the output metric too
    assert fit("ht", case, (2, 3, 3, 2, 3), calibrated=False).error > 1e-4


def test_components_of_a_degenerate_tensor_do_not_diverge(monkeypatch):
    """a∘a∘b + a∘b∘a + b∘a∘a has rank 3 and no best approximation of rank 2 (de Silva and Lim 2008)."""
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    terms = [torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a))]
    weight = sum(terms)[:, :, None]  # (T, C, 1, k)
    # From the start of a fit, turned a little: the exact start is a saddle.
    case = make("conv3x3")
    case.layer, case.module = Layer("", "Conv2d", (2, 2, 1, 2)), nn.Conv2d(2, 2, (1, 2)).double()
    case.module.weight.data = weight + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    bounded = fit("cp_merged", case, (2,), steps=2000, calibrated=False)
    assert bounded.error < 0.01 and divergence(bounded.factors) < 50
    monkeypatch.setattr(fitting, "SEARCH_RIDGE", 1e-12)
    free = fit("cp_merged", case, (2,), steps=2000, calibrated=False)
    assert divergence(free.factors) > 5 * divergence(bounded.factors)


def test_divergence_is_the_terms_energy_over_their_sums():
    factors = fit("cp", make("grouped same reflect"), (5,), steps=20).factors
    v = [f.reshape(2, f.shape[0] // 2, -1) for f in factors]
    terms = torch.einsum("grc,grh,grw,gtr->grtchw", *v).flatten(2)
    expected = terms.square().sum((1, 2)) / terms.sum(1).square().sum(1)
    assert divergence(factors, 2) == pytest.approx(expected.max().item())


# --- ranks -----------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=150)
def test_a_valid_rank_stays_as_it_is(data):
    sizes = [data.draw(st.integers(1, 24)) for _ in range(2)]
    kernel = data.draw(st.sampled_from([(), (1, 1), (1, 3), (3, 3), (5, 2)]))
    kinds = ("Conv2d", "Conv3d", "ConvTranspose1d") if kernel else ("Linear", "Embedding")
    layer = Layer("", data.draw(st.sampled_from(kinds)), (*sizes, *kernel))
    for family in DECOMPOSITIONS:
        decomposition = DECOMPOSITIONS[family]
        full = decomposition.full_rank(layer)
        if full is not None:
            rank = tuple(data.draw(st.integers(1, 40)) for _ in full)
            cut = decomposition.valid(layer, rank)
            assert decomposition.valid(layer, cut) == cut and min(cut) >= 1
            assert all(decomposition.valid(layer, r) == r for r in decomposition.ranks(layer, [0.3, 0.9]))


@pytest.mark.parametrize(
    ("method", "rank"), [("svd_grouped", (3, 2)), ("svd_grouped", (16, 1)), ("tr", (2, 8, 2, 2)), ("btt", (2, 0, 1))]
)
def test_a_plan_with_a_rank_that_no_layer_can_have_is_refused(method, rank):
    model = nn.Sequential(nn.Conv2d(8, 12, 3))
    choice = Choice("0", "Conv2d", (12, 8, 3, 3), method, rank, 1, 1, 0.0, "")
    with pytest.raises(PlanError, match="cannot have rank"):
        rebuild(model, Plan((choice,), Cost(0, 0, 0), Cost(0, 0, 0)))


def test_the_space_of_all_families_names_every_one_that_is_exact_at_some_rank():
    assert set(load_space("all").families) == {f for f, family in DECOMPOSITIONS.built_in.items() if family.exact}
    assert SearchSpace().families == load_space("default").families


# --- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (f, n)
        for f, n in PAIRS
        if f in {"svd_grouped", "tucker", "tr", "ht"} and n in {"grouped same reflect", "linear", "3d", "transposed"}
    ],
)
def test_new_kinds_of_module_take_unbatched_inputs_and_export(family, name):
    case = make(name)
    rank = DECOMPOSITIONS[family].ranks(case.layer, [0.6])[0]
    module = DECOMPOSITIONS[family].build(case.module, case.layer, rank).eval()
    load_factors(module, fit(family, case, rank, steps=2).factors)
    expected = module(case.x)
    torch.testing.assert_close(torch.stack([module(x) for x in case.x]), expected)
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(module, (case.x,), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(case.x[:3]), expected[:3])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation, backward ones too, returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes) if sizes else self.elements
        return result


@pytest.mark.parametrize("family", list(DECOMPOSITIONS))
@pytest.mark.parametrize("shape", [(64, 16, 3, 3), (96, 4, 3, 3), (6, 24, 5, 5), (48, 96), (120, 24)])
def test_no_tensor_is_larger_than_the_weight_and_its_statistics(family, shape):
    """No operation of a fit returns more elements than the largest of the weight, S and H has; at any rank."""
    torch.manual_seed(0)
    layer, decomposition = Layer("", "Conv2d" if len(shape) == 4 else "Linear", shape), DECOMPOSITIONS[family]
    if decomposition.full_rank(layer) is None:
        assert len(shape) == 2 or family == "tt_matrix"
        return
    x, y = (torch.randn(1, n, 2 * n, dtype=torch.float64) for n in (layer.patch, layer.out_channels))
    ranks = decomposition.ranks(layer, [0.1, 0.95])
    given = torch.randn(shape), x @ x.mT, y @ y.mT
    most = max(t.numel() for t in given)
    for rank in ranks:  # in one step: each further one, up to lbfgs.HISTORY, keeps two vectors of the searched numbers
        with Largest() as largest:
            list(decomposition.fit(layer, given[0], [rank], *given[1:], 1))
        assert largest.elements <= most
    with Largest() as largest:
        list(decomposition.fit(layer, given[0], ranks, *given[1:], 1))
    assert largest.elements <= max(most, fitting.CPU_BATCH)
