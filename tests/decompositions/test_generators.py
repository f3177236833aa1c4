"""Tensor-train matrices and convolutions, nonlinear networks, and layers whose weight is built from cores."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rankopt
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.errors import RankoptError
from rankopt.core.records import Layer
from rankopt.decompositions import generators
from rankopt.decompositions.generators import AugmentedTreeNetwork, BrickWall, Mera, TreeNetwork, WeightGenerator
from rankopt.decompositions.joint_fit import Joint
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.tensor_train_matrix import even_factors
from tests.helpers.layers import make

JOINT = [name for name, family in DECOMPOSITIONS.items() if isinstance(family, Joint)]
NETWORKS = [name for name in JOINT if isinstance(DECOMPOSITIONS[name], WeightGenerator)]


def fitted(family, layer, weight, rank, steps=0):
    (fit,) = family.fit(layer, weight, [rank], None, None, steps)
    return fit


def linear(t, c):
    return Layer("", "Linear", (t, c))


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


# --- tensor trains ---------------------------------------------------------------------------------


@given(st.integers(1, 3000))
def test_even_factors_are_the_least_that_are_even(n):
    a, b, c = even_factors(n)
    assert n <= a * b * c <= max(n + 1, 1.4 * n) and a <= b <= c <= 3 * a
    smaller = [x * y * z for x in range(1, 16) for y in range(x, 3 * x + 1) for z in range(y, 3 * x + 1)]
    assert not any(n <= product < a * b * c for product in smaller)


def test_trains_start_at_tensorlys_and_end_below():
    torch.manual_seed(0)
    conv, matrix = DECOMPOSITIONS["tt_conv"], DECOMPOSITIONS["tt_matrix"]
    kernel, weight = random(12, 8, 3, 3).cumsum(0), random(27, 8).cumsum(0)
    # 12 = 3 2 2, falling; 8 = 2 2 2; 27 = 3 3 3
    modes = kernel.permute(2, 3, 0, 1).reshape(9, 3, 2, 2, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(9, 6, 4, 4)
    pairs = weight.reshape(3, 3, 3, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(6, 6, 6)
    cases = [
        (conv, Layer("", "Conv2d", (12, 8, 3, 3)), kernel, modes, (4, 7, 3)),
        (matrix, linear(27, 8), weight, pairs, (3, 4)),
    ]
    for family, layer, dense, tensor, rank in cases:
        with tensorly.backend_context("pytorch"):
            theirs = tensorly.tt_to_tensor(tensorly.decomposition.tensor_train(tensor, [1, *rank, 1]))
        error = ((tensor - theirs).square().sum() / tensor.square().sum()).item()
        assert fitted(family, layer, dense, rank).error == pytest.approx(error, rel=1e-6)
        assert fitted(family, layer, dense, rank, 100).error < error


def test_entries_of_a_train_convolution_are_products_of_core_slices():
    """Thesis, equation 6.11, with empty channels: 11 outputs of 12, 5 inputs of 6."""
    torch.manual_seed(0)
    family, layer = DECOMPOSITIONS["tt_conv"], Layer("", "Conv2d", (11, 5, 2, 3))
    g0, g1, g2, g3 = cores = tuple(random(*s) for s in family.shapes(layer, (3, 4, 2)))
    weight = family.weight(layer, cores)
    assert [c.shape[1:3] for c in (g1, g2, g3)] == [(3, 1), (2, 2), (2, 3)]
    for t, c, y, x in [(0, 0, 0, 0), (10, 4, 1, 2), (7, 3, 0, 1)]:
        (t1, t2, t3), (c1, c2, c3) = np.unravel_index(t, (3, 2, 2)), np.unravel_index(c, (1, 2, 3))
        entry = g0[:, 3 * y + x] @ g1[:, t1, c1] @ g2[:, t2, c2] @ g3[:, t3, c3]
        torch.testing.assert_close(weight[t, c, y, x], entry.squeeze())


@pytest.mark.parametrize(("t", "c", "rank"), [(60, 11, (2, 3)), (8, 60, (5, 2)), (1, 27, (2, 3)), (50, 50, (9, 16))])
def test_inputs_are_contracted_from_the_cheaper_end(t, c, rank):
    torch.manual_seed(0)
    family, module = DECOMPOSITIONS["tt_matrix"], nn.Linear(c, t)
    layer = rankopt.inventory(module, torch.zeros(1, 3, c))[0]
    rank = family.valid(layer, rank)
    small = family.build(module, layer, rank)
    load_factors(small, tuple(random(*s) for s in family.shapes(layer, rank)))
    for shape in [(c,), (0, c), (2, 4, c)]:
        x = torch.randn(shape)
        torch.testing.assert_close(small(x), nn.functional.linear(x, small.weight, small.bias), rtol=1e-3, atol=1e-3)
    cost = rankopt.count(small, torch.zeros(1, 3, c)).macs
    assert cost == family.cost(layer, rank).macs
    small.from_the_end = not small.from_the_end
    assert rankopt.count(small, torch.zeros(1, 3, c)).macs >= cost
    x = torch.randn(2, c)
    torch.testing.assert_close(small(x), nn.functional.linear(x, small.weight, small.bias), rtol=1e-3, atol=1e-3)


# --- networks --------------------------------------------------------------------------------------


def test_networks_contract_their_cores_from_coarse_to_fine():
    """Against the contraction written out, for 2^4 entries."""
    torch.manual_seed(0)
    layer = linear(4, 4)
    top, left, right, mix = random(3, 4), random(3, 2, 2), random(4, 2, 2), random(2, 2, 2, 2)
    tree = torch.einsum("ab,aij,bkl->ijkl", top.tanh(), left, right)
    torch.testing.assert_close(TreeNetwork().weight(layer, (top, left, right)), tree.reshape(4, 4))
    mixed = torch.einsum("ijkl,jkmn->imnl", tree.tanh(), mix).reshape(4, 4)
    for family in (AugmentedTreeNetwork(), Mera()):
        torch.testing.assert_close(family.weight(layer, (top, left, right, mix)), mixed)


def by_numpy(family, q, cores):
    """The entries of a network of Q indices with tanh, contracted index by index with np.einsum.

    It knows the pictures of the networks alone: which core joins which indices of the level before.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    cores = [c.numpy() for c in cores]

    def joined(state, axes, core):
        """Contract neighbouring axes of the state with the first axes of a core, whose others take their place."""
        axes = list(axes)
        old = letters[: state.ndim]
        new = letters[state.ndim : state.ndim + core.ndim - len(axes)]
        inside = "".join(old[a] for a in axes)
        out = old[: axes[0]] + new + old[axes[-1] + 1 :]
        return np.einsum(f"{old},{inside + new}->{out}", state, core)

    def mixed(state, first):
        for k in range(first, state.ndim - 1, 2):
            state = joined(state, (k, k + 1), cores.pop(0))
        return state

    if family == "brick_wall":
        state, sizes = np.ones(()), [2] * (q // 2 - 1) + [2 + q % 2]
        for _ in sizes:
            state = np.multiply.outer(state, cores.pop(0))
        layer = 0
        while cores:
            state = mixed(np.tanh(state), 1 - layer % 2)
            layer += 1
        return state
    state, below = cores.pop(0), [q - q // 2, q // 2]
    while max(below) > 1:
        state, position = np.tanh(state), 0
        for s in below:
            if s > 1:
                state = joined(state, (position,), cores.pop(0))
            position += 1 + (s > 1)
        below = [part for s in below for part in ((s - s // 2, s // 2) if s > 1 else (1,))]
        if family == "mera":
            state = mixed(np.tanh(state), 1)
    return mixed(np.tanh(state), 1) if family == "augmented_ttn" else state


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(16, 16), (5, 7), (8, 6, 3, 3)])  # 8, 6 and 9 indices
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_independent_contraction_in_numpy_rebuilds_the_weight(name, shape, number):
    torch.manual_seed(0)
    family, layer = DECOMPOSITIONS[name], Layer("", "Linear" if len(shape) == 2 else "Conv2d", shape)
    cores = tuple(random(*s) for s in family.shapes(layer, family.valid(layer, (number,))))
    entries = by_numpy(name, family.indices(layer), cores).reshape(-1)[: layer.weights]
    weight = entries.reshape(*shape[2:], *shape[:2])  # kernel position, output, input
    if len(shape) == 4:
        weight = weight.transpose(2, 3, 0, 1)
    np.testing.assert_allclose(family.weight(layer, cores).numpy(), weight, rtol=1e-5, atol=1e-8)


def test_a_circuit_has_its_depth_as_rank_and_fits_products():
    family, layer = BrickWall(), linear(16, 16)  # 8 indices: 4 pairs, then 3 and 4 gates in turn
    assert [len(family.shapes(layer, (depth,))) for depth in (1, 2, 3)] == [4 + 3, 4 + 3 + 4, 4 + 3 + 4 + 3]
    assert family.full_rank(layer) == (8,) and family.valid(layer, (99,)) == (8,)
    torch.manual_seed(0)
    a, b, c, d = (random(2, 2) for _ in range(4))
    product = torch.einsum("ab,cd,ef,gh->abcdefgh", a, b, c, d).reshape(16, 16)
    assert fitted(BrickWall("linear"), layer, product, (1,), 200).error < 1e-6


def test_networks_differ_where_there_are_more_levels():
    levels = {name: DECOMPOSITIONS[name].levels(8) for name in NETWORKS}
    assert len(levels["ttn"]) == 2 and len(levels["augmented_ttn"]) == 3 and len(levels["mera"]) == 4
    assert [c.into for c in levels["mera"][1]] == [(2,), (2, 2), (2,)]
    assert [c.into for c in levels["augmented_ttn"][-1]] == [(1,), (1, 1), (1, 1), (1, 1), (1,)]


@pytest.mark.parametrize("family", [TreeNetwork("linear"), AugmentedTreeNetwork("linear"), Mera("linear")])
def test_linear_networks_represent_every_tree_tensor(family):
    """A random hierarchical Tucker tensor (2^8 entries, bonds of 3), its contraction written out."""
    torch.manual_seed(0)
    nodes = [random(3, 3, 3) for _ in range(2)]
    leaves = [random(3, 2, 2) for _ in range(4)]
    tensor = torch.einsum("xy,xab,ycd,aij,bkl,cmn,dop->ijklmnop", random(3, 3), *nodes, *leaves)
    assert fitted(family, linear(16, 16), tensor.reshape(16, 16), (3,)).error < 1e-20
    assert fitted(family, linear(16, 16), tensor.reshape(16, 16), (2,), 20).error > 1e-4


def test_a_linear_tree_starts_within_the_bound_of_the_hierarchical_svd():
    """Grasedyck 2010, theorem 3.11: squared error at most the sum of the bonds' squared singular-value tails."""
    torch.manual_seed(0)
    weight = random(16, 16).cumsum(0)
    tensor = weight.reshape((2,) * 8)
    bound = 0.0
    for first, indices in [(0, 4), (0, 2), (2, 2), (4, 2), (6, 2)]:  # both halves share one bond
        axes = tuple(range(first, first + indices))
        others = [k for k in range(8) if k not in axes]
        values = np.linalg.svd(tensor.permute(*axes, *others).reshape(2**indices, -1).numpy(), compute_uv=False)
        bound += (values[3:] ** 2).sum()
    error = fitted(TreeNetwork("linear"), linear(16, 16), weight, (3,)).error * weight.square().sum().item()
    assert 0 < error <= bound
    assert fitted(TreeNetwork("linear"), linear(16, 16), weight, (16,)).error < 1e-20  # full rank


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_and_are_deterministic(name):
    case, family = make("conv3x3"), DECOMPOSITIONS[name]
    errors = []
    for steps in (0, 10, 60):
        torch.manual_seed(steps)
        fit, again = (
            next(iter(family.fit(case.layer, case.module.weight, [(3,)], case.moment, case.metric, steps)))
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(fit.factors, again.factors, strict=True))
        errors.append(fit.error)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.9 * errors[0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("activation", ["linear", "tanh", "silu"])
def test_gradients_of_every_core(name, activation):
    """At the start already, and against finite differences."""
    family = type(DECOMPOSITIONS[name])(activation)
    torch.manual_seed(0)
    layer, weight = linear(5, 7), random(5, 7)
    cores = [c.detach().requires_grad_() for c in fitted(family, layer, weight, (3,)).factors]
    target = random(5, 7)

    def loss(*cores):
        return (family.weight(layer, cores) - target).square().sum()

    assert torch.autograd.gradcheck(loss, cores)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss(*cores), cores))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_name_can_have_an_activation(name):
    silu = DECOMPOSITIONS[f"{name}-silu"]
    assert (silu.name, silu.activation, type(silu)) == (f"{name}-silu", "silu", type(DECOMPOSITIONS[name]))
    assert f"{name}-silu" in DECOMPOSITIONS and f"{name}-silu" not in list(DECOMPOSITIONS)
    for unknown in (f"{name}-magic", f"{name}-tanh", f"{name}-", "tt-silu"):  # tanh is what the plain name has
        assert unknown not in DECOMPOSITIONS
        with pytest.raises(RankoptError, match="unknown decomposition"):
            DECOMPOSITIONS[unknown]


def test_a_search_space_sets_the_activation():
    layer = linear(16, 16)
    space = SearchSpace(
        families=("mera", "ttn-linear", "svd_out"), activation="silu", layers={"x": {"families": "ttn"}}
    )
    assert space.families_of(layer) == ("mera-silu", "ttn-linear", "svd_out")  # a name that has its own keeps it
    assert space.families_of(replace(layer, name="x")) == ("ttn-silu",)
    assert space.warnings([layer]) == []
    assert "has no effect" in SearchSpace(activation="silu").warnings([layer])[0]
    assert SearchSpace(families=(Mera("silu"), Mera(), Mera)).families == ("mera-silu", "mera", "mera")
    with pytest.raises(RankoptError, match="search space 'default': unknown activation 'magic': choose from linear"):
        SearchSpace(activation="magic")


def test_a_space_at_the_default_activation_is_the_one_of_earlier_versions():
    assert "activation" not in SearchSpace().settings()
    assert SearchSpace(activation="silu").settings()["activation"] == "silu"


def test_a_plan_rebuilds_the_activation(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(32, 16)
    task = rankopt.Task(model=model, example_input=x[:1], calibration=[x])
    space = SearchSpace(families=("brick_wall",), activation="silu", points=4, smallest=0.3, steps=5)
    result = rankopt.compress(task, budget={"params": 0.7}, space=space, cache=tmp_path / "cache")
    result.save(tmp_path / "run")
    assert result.plan.choices[0].method == "brick_wall-silu"
    loaded = rankopt.load(model, tmp_path / "run")
    assert loaded[0].family.activation == "silu"
    torch.testing.assert_close(loaded(x), result.model(x))
    assert not torch.allclose(loaded(x), model(x))


def test_activations_matter_and_unknown_ones_are_refused():
    torch.manual_seed(0)
    layer, family = linear(16, 16), TreeNetwork("tanh")
    cores = tuple(random(*s) for s in family.shapes(layer, (3,)))
    others = [TreeNetwork(a).weight(layer, cores) for a in ("linear", "silu")]
    assert all((family.weight(layer, cores) - w).norm() > 0.1 * w.norm() for w in others)
    with pytest.raises(RankoptError, match="unknown activation 'magic': choose from linear, tanh, silu"):
        TreeNetwork("magic")


def test_networks_are_in_a_search_space_of_their_own():
    assert not {*SearchSpace().families, *load_space("default").families} & {*NETWORKS}
    assert set(load_space("tensor-networks").families) == {*NETWORKS}
    assert "tt_matrix" in SearchSpace().families and "tt_conv" in load_space("all").families


# --- memory ----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor's storage that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("shape", [(64, 64), (65, 33), (32, 8, 3, 3)])
def test_no_tensor_of_a_fit_is_larger_than_a_few_weights(name, shape):
    family, layer = DECOMPOSITIONS[name], Layer("", "Linear" if len(shape) == 2 else "Conv2d", shape)
    if family.full_rank(layer) is None:
        assert name.startswith("tt_")
        return
    ranks = family.ranks(layer, [0.1, 0.9])
    with Largest() as largest:
        # One step: each further one, up to lbfgs.HISTORY, keeps two vectors of the searched numbers
        fits = list(family.fit(layer, torch.randn(shape), ranks, None, None, 1 / family.effort))
    statistics = max(layer.patch, layer.out_channels) ** 2  # what calibration holds for the layer anyway
    assert len(fits) == len(ranks) > 0
    assert largest.elements <= max(2 * layer.weights, statistics)


@pytest.mark.parametrize("name", NETWORKS)
def test_building_a_weight_takes_three_states_at_most(name):
    family, layer = DECOMPOSITIONS[name], linear(256, 256)  # 16 indices
    rank = family.valid(layer, (4,))
    cores = tuple(torch.randn(s) for s in family.shapes(layer, rank))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        _ = family.weight(layer, cores)
    changes = [e.nbytes() for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 2 * 2**16 * 4 <= max(np.cumsum(changes)) <= 3.2 * 2**16 * 4


def test_training_a_circuit_keeps_states_of_layers_not_of_gates():
    """Each layer has 7 or 8 gates on the whole state."""
    family, layer, size = BrickWall(), linear(256, 256), 2**16 * 4
    cores = tuple(torch.randn(s, requires_grad=True) for s in family.shapes(layer, (8,)))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        family.weight(layer, cores).square().sum().backward()
    changes = [e.nbytes() for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(np.cumsum(changes)) < (8 + 8 + 6) * size  # of the gates: 8 * 8 * size
    assert all(core.grad.abs().max() > 0 for core in cores)


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_states_that_are_computed_again_give_the_same_gradients(activation, monkeypatch):
    family, layer, found = BrickWall(activation), linear(6, 7), []
    for kept in (generators.KEPT_ENTRIES, 0):
        monkeypatch.setattr(generators, "KEPT_ENTRIES", kept)
        torch.manual_seed(0)
        cores = [torch.randn(s, requires_grad=True) for s in family.shapes(layer, (3,))]
        found.append(torch.autograd.grad(family.weight(layer, cores).square().sum(), cores))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- layers whose weight is built from cores --------------------------------------------------------


class Counted(TreeNetwork):
    built = 0

    def weight(self, layer, factors):
        type(self).built += 1
        return super().weight(layer, factors)


@pytest.fixture
def small():
    """A built convolution in eval mode, its factors loaded."""
    torch.manual_seed(0)
    family, conv = Counted(), nn.Conv2d(8, 12, 3, padding=1)
    layer = rankopt.inventory(conv, torch.zeros(1, 8, 6, 6))[0]
    module = family.build(conv, layer, (3,)).eval()
    load_factors(module, fitted(family, layer, conv.weight, (3,)).factors)
    Counted.built = 0
    return module


@torch.no_grad()
def check(module):
    """The module's output is that of its cores as they are now."""
    x = torch.randn(2, 8, 6, 6, dtype=module.cores[0].dtype)
    fresh = module.family.weight(module.layer, tuple(module.cores))
    torch.testing.assert_close(module(x), nn.functional.conv2d(x, fresh, module.bias, padding=1))


@torch.no_grad()
def test_the_weight_is_built_once_and_again_when_a_core_changes(small):
    x = torch.randn(1, 8, 6, 6)
    for _ in range(3):
        small(x)
    assert Counted.built == 1
    core = small.cores[1]
    changes = [
        lambda: core.mul_(2),
        lambda: small.load_state_dict({k: v + 0.1 for k, v in small.state_dict().items()}),
        lambda: small.load_state_dict({k: v + 0.1 for k, v in small.state_dict().items()}, assign=True),
        lambda: setattr(small.cores[0], "data", torch.randn_like(small.cores[0])),
        lambda: (small.cores[0].data.mul_(3), small.eval()),
        small.double,
    ]
    for change in changes:
        before = small.weight
        change()
        check(small)
        assert not torch.equal(before, small.weight)


def test_the_weight_is_rebuilt_where_gradients_are_wanted(small):
    x = torch.randn(2, 8, 6, 6)
    for mode in (True, False):
        small.train(mode)
        optimizer = torch.optim.SGD(small.parameters(), 0.01)
        small(x).square().sum().backward()
        assert all(c.grad is not None and c.grad.abs().max() > 0 for c in small.cores)
        optimizer.step()
        optimizer.zero_grad()
        check(small)
    with torch.inference_mode():
        inside = small(x)
    torch.testing.assert_close(small(x), inside)
    small.requires_grad_(requires_grad=False)
    y = x.clone().requires_grad_()
    small(y).sum().backward()  # the weight kept is no inference tensor
    assert y.grad.abs().max() > 0


def test_the_kept_weight_is_neither_counted_nor_saved_nor_copied(small):
    x = torch.zeros(1, 8, 6, 6)
    costs = [rankopt.count(small, x)]
    small.train()
    costs += [rankopt.count(small, x), rankopt.count(small.eval(), x)]
    assert costs == [rankopt.Cost(costs[0].params, 864 * 36, 4 * costs[0].params)] * 3
    with FlopCounterMode(display=False) as fresh, torch.no_grad():
        small.train()(x)
    assert fresh.get_total_flops() // 2 > costs[0].macs  # what building it takes
    small.eval()
    assert set(small.state_dict()) == {"bias", *(f"cores.{k}" for k in range(len(small.cores)))}
    copied = copy.deepcopy(small)
    with torch.no_grad():
        copied.cores[0].mul_(2)
    check(copied)
    check(small)
    assert len(pickle.dumps(small)) < 4 * small.weight.numel() + 4 * costs[0].params + 6000
    check(pickle.loads(pickle.dumps(small)))
