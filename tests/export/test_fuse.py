"""Fused copies compute the same with fewer operations; layers that must not be touched are left alone."""

from __future__ import annotations

import copy
import functools
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import rankopt
from rankopt import count, fuse
from rankopt.candidates.latency import random_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.export.dataflow import Dataflow
from rankopt.export.fuse import dense_twin, merge_depthwise
from rankopt.model.layer_kinds import describe, is_linear
from rankopt.model.quantization import QuantizedMixin, quantize_
from tests.helpers.layers import FORMED, MODULES, PAIRS, build_forms, inputs, make
from tests.helpers.models import Everything, compressed

MODULE = sys.modules["rankopt.export.fuse"]


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
    return model.eval()


@torch.no_grad()
def same(model, fused, *xs):
    for x in xs:
        expected, got = (m(x) for m in (model, fused))
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def number(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


class Block(nn.Module):
    """As of a ResNet: its shortcut uses what the first layers use, too."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.down(x))


def resnet():
    return settled(
        nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
            *(Block(16, 16, 1), Block(16, 24, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
        )
    )


def vgg():
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(512, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.ReLU(), nn.Linear(64, 10)]
    return settled(nn.Sequential(*layers))


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

# --- batch norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "norms"), [(resnet, 7), (vgg, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norms_are_folded(build, norms, channels_last):
    model = build()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, IMAGES, channels_last=channels_last)
    assert number(model, nn.modules.batchnorm._BatchNorm) == norms
    assert number(fused, nn.modules.batchnorm._BatchNorm) == 0 and number(fused, nn.Identity) == norms
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    if channels_last:
        assert fused[0].weight.is_contiguous(memory_format=torch.channels_last)
    same(model, fused, IMAGES, IMAGES[:1] * 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("family", "form"), FORMED)
def test_batch_norms_are_folded_into_the_last_factor(family, form):
    model = resnet()
    small, plan = compressed(model, [IMAGES], family, form, 0.5, 2)
    assert plan.choices
    fused = fuse(small.eval(), IMAGES)
    same(small, fused, IMAGES)
    assert number(fused, nn.BatchNorm2d) == 0
    assert number(fused, rankopt.decompositions.modules.Reconstructed) == 0


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), torch.randn(5, 4, 9)),
        (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6, affine=False), torch.randn(5, 4, 4, 5, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), torch.randn(5, 4, 5, 6)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(5, 4)),
    ],
)
def test_norms_of_every_kind_of_layer(layer, norm, x):
    model = settled(nn.Sequential(layer, norm))
    fused = fuse(model, x)
    same(model, fused, x)
    assert isinstance(fused[1], nn.Identity)


class Reads(nn.Module):
    """Its forward does one thing more than layer after layer."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.norm, self.what, self.kept = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), what, None

    def forward(self, x):
        return self.what(self, x)


def second_use(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def in_place(m, x):
    return m.norm(m.conv(x).relu_())


def view(m, x):
    y = m.conv(x)
    mean = y.flatten(1).mean()
    return m.norm(y) * mean


def twice(m, x):
    return m.norm(m.conv(x)) + m.norm(m.conv(x + 1))


def norm_twice(m, x):
    return m.norm(m.norm(m.conv(x)))


def returned(m, x):
    y = m.conv(x)
    return m.norm(y), {"features": y}


def weight_read(m, x):
    return m.norm(m.conv(x)) * m.conv.weight.sum()


def statistics_read(m, x):
    return m.norm(m.conv(x)) - m.norm.running_mean.sum()


def called_aside(m, x):
    return m.norm(m.conv(x)) + m.conv.forward(x)


@pytest.mark.parametrize(
    "what", [second_use, in_place, view, twice, norm_twice, returned, weight_read, statistics_read, called_aside]
)
def test_outputs_with_another_use_and_layers_used_again_are_left_alone(what):
    model = settled(Reads(what))
    fused = fuse(model, IMAGES)
    assert isinstance(fused.norm, nn.BatchNorm2d) and torch.equal(fused.conv.weight, model.conv.weight)
    first = [m(IMAGES) for m in (model, fused)]
    torch.testing.assert_close(first[1], first[0])


def tied(m):
    m.other = nn.Conv2d(3, 8, 3)
    m.other.weight = m.conv.weight


def hooked(m):
    m.seen = []
    m.conv.register_forward_hook(lambda *args: None)


def hooked_around(m):
    m.conv = nn.Sequential(m.conv)
    m.conv.register_forward_hook(lambda module, args, out: None)


def own_forward(m):
    m.conv.forward = lambda x: nn.functional.conv2d(x, m.conv.weight) * 2


def parametrised(m):
    parametrizations.weight_norm(m.conv)


def no_statistics(m):
    m.norm = nn.BatchNorm2d(8, track_running_stats=False)


def a_subclass(m):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    m.conv = Doubled(3, 8, 3)


@pytest.mark.parametrize("change", [tied, hooked, hooked_around, own_forward, parametrised, no_statistics, a_subclass])
def test_shared_hooked_and_strange_layers_are_left_alone(change):
    model = Reads(lambda m, x: m.norm(m.conv(x)) + (m.other(x) if hasattr(m, "other") else 0))
    change(model)
    model = settled(model)
    fused = fuse(model, IMAGES)
    assert isinstance(fused.norm, nn.BatchNorm2d)
    same(model, fused, IMAGES)


def test_names_that_share_a_module_all_lead_to_the_new_one():
    model = Reads(lambda m, x: m.norm(m.conv(x)))
    model.alias = nn.ModuleList([model.conv])
    model = settled(model)
    fused = fuse(model, IMAGES)
    assert fused.alias[0] is fused.conv is not model.conv and isinstance(fused.norm, nn.Identity)
    same(model, fused, IMAGES)


def test_a_copy_that_would_compute_something_else_is_refused():
    """A forward that reaches its layers through a list of its own sees none of the replacements."""
    model = Reads(lambda m, x: m.norm(m.kept[0](x)))
    model.kept = [model.conv]
    with pytest.raises(rankopt.RankoptError, match="not the model's"):
        fuse(settled(model), IMAGES)


def test_models_that_cannot_be_traced_are_fused():
    """Its way depends on the data, which torch.fx and torch.export refuse."""
    model = settled(Reads(lambda m, x: m.norm(m.conv(x)).relu() if x.sum().item() > -1e9 else x))
    fused = fuse(model, IMAGES)
    assert isinstance(fused.norm, nn.Identity)
    same(model, fused, IMAGES)


def test_unfolded_and_packed_models_pass_through():
    torch.manual_seed(0)
    x = {"x": torch.randn(4, 7, 8), "lengths": torch.tensor([7, 3, 5, 6])}
    model = rankopt.unfolded(Everything(), x).eval()
    with torch.no_grad():
        torch.testing.assert_close(fuse(model, x)(**x), model(**x), rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_run_says_so():
    with pytest.raises(rankopt.TaskError, match="does not run on example_input"):
        fuse(nn.Linear(4, 2), torch.randn(1, 3))


# --- merging -----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_linear_chains_are_merged_where_that_saves(sizes, biases):
    torch.manual_seed(0)
    pairs = list(itertools.pairwise(sizes))
    model = nn.Sequential(*(nn.Linear(a, b, bias=bias) for (a, b), bias in zip(pairs, biases, strict=False)))
    model, x = model.double(), torch.randn(3, 2, sizes[0], dtype=torch.float64)
    fused = fuse(model, x)
    same(model, fused, x)
    before, after = count(model, x).macs, count(fused, x).macs
    assert after <= before
    left = [m for m in fused if isinstance(m, nn.Linear)]
    for a, b in itertools.pairwise(left):
        assert a.in_features * b.out_features >= a.weight.numel() + b.weight.numel(), "nothing is left to merge"


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([1, 2]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2),
    st.sampled_from(["zeros", "reflect", "circular"]),
    st.tuples(st.booleans(), st.booleans()),
)
def test_adjacent_pointwise_convolutions_are_merged(channels, groups, strides, padding, mode, biases):
    torch.manual_seed(0)
    a, b, c = (groups * n for n in channels)
    first = nn.Conv2d(a, b, 1, strides[0], padding, groups=groups, padding_mode=mode, bias=biases[0])
    model = nn.Sequential(first, nn.Conv2d(b, c, 1, strides[1], groups=groups, bias=biases[1])).double()
    x = torch.randn(2, a, 7, 9, dtype=torch.float64)
    fused = fuse(model, x)
    same(model, fused, x)
    assert count(fused, x).macs <= count(model, x).macs


def test_layers_between_or_around_convolutions_keep_them_apart():
    for between in (nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4, track_running_stats=False)):
        model = nn.Sequential(nn.Conv2d(8, 4, 1), between, nn.Conv2d(4, 2, 1)).eval()
        assert number(fuse(model, torch.randn(2, 8, 6, 6)), nn.Conv2d) == 2
    padded = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1, padding=1))  # the padding has no bias
    fused = fuse(padded, torch.randn(2, 2, 6, 6))
    assert number(fused, nn.Conv2d) == 2
    expands = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1))  # one would take twice the MACs
    assert number(fuse(expands, torch.randn(2, 8, 6, 6)), nn.Conv2d) == 2


CP = [name for family, name in PAIRS if family == "cp"]


@pytest.mark.parametrize("name", CP)
@pytest.mark.parametrize("limit", [9, 1000])
def test_the_depthwise_pair_of_cp_is_merged(name, limit, monkeypatch):
    merge = functools.partial(merge_depthwise, largest=limit)
    monkeypatch.setattr(MODULE, "JOINS", (merge,))
    case = make(name)
    module = build_forms("cp", case, (5,), steps=2)[0][0].eval()
    model = nn.Sequential(module)
    fused = fuse(model, case.x)
    same(model, fused, case.x)
    area = case.layer.patch // case.layer.in_channels
    merged = fused[0]
    stages = number(merged, nn.Identity)
    assert stages == (area <= limit) or count(module, case.x).macs > case.layer.macs or case.layer.in_channels == 1


def test_convolutions_along_one_axis_are_no_pair():
    def depthwise(kernel, **options):
        return nn.Conv2d(4, 4, kernel, groups=4, bias=False, **options)

    assert merge_depthwise(depthwise((3, 1)), depthwise((1, 3)), ()) is not None
    for pair in (
        (depthwise((3, 1)), depthwise((3, 1))),
        (depthwise((3, 1), stride=(1, 2)), depthwise((1, 3))),
        (depthwise((3, 1)), depthwise((1, 3), padding=(1, 0))),
        (depthwise((3, 1), padding="same"), depthwise((1, 3), padding="valid")),
        (depthwise((3, 1), padding=(1, 0), padding_mode="reflect"), depthwise((1, 3), padding=(0, 1))),
        (nn.Conv2d(4, 4, (3, 1), groups=4), depthwise((1, 3))),
        (nn.Conv2d(4, 8, (3, 1), groups=4, bias=False), depthwise((1, 3))),
    ):
        assert merge_depthwise(*pair, ()) is None


# --- dense weights, built once -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_dense_twins_of_every_kind(name):
    case = make(name)
    for family in [family for family, kind in PAIRS if kind == name]:
        rank = (DECOMPOSITIONS[family].ranks(case.layer, [0.5]) or [DECOMPOSITIONS[family].full_rank(case.layer)])[0]
        for module in build_forms(family, case, rank, steps=0)[0]:
            twin = dense_twin(module.eval())
            assert type(twin) is (nn.Linear if is_linear(case.module) else type(case.module))
            assert count(twin, case.x) == count(case.module, case.x)
            torch.testing.assert_close(twin(case.x), module(case.x))


def test_factors_that_cost_more_than_the_dense_layer_are_multiplied_out():
    torch.manual_seed(0)
    dense = nn.Conv2d(32, 32, 3, stride=2, padding=1)  # the 1 x 1 in front runs on four times the positions
    x = inputs(dense, torch.float32)[0]
    kinds = []
    for fraction in (0.1, 0.9):
        small, _ = compressed(nn.Sequential(dense), [x], "cp_merged", "factorised", fraction, 2)
        fused = fuse(small.eval(), x)
        same(small, fused, x)
        assert count(fused, x).macs <= count(dense, x).macs
        kinds.append(type(fused[0]).__name__)
    assert kinds == ["Factorised", "Conv2d"]


def test_a_layer_alone_is_built_once_too():
    case = make("conv3x3")
    for family in ("tt_conv", "cp_merged"):
        module = build_forms(family, case, DECOMPOSITIONS[family].full_rank(case.layer), steps=0)[0][-1].eval()
        fused = fuse(module, case.x)
        assert type(fused) is nn.Conv2d and not fused.weight.requires_grad
        same(module, fused, case.x)


def catches(m, x):
    try:
        m.norm(x)  # of too few channels
    except RuntimeError:
        return m.norm(m.conv(x)) * 2


def test_a_forward_that_catches_what_a_layer_raises():
    model = settled(Reads(catches))
    fused = fuse(model, IMAGES)
    assert isinstance(fused.norm, nn.BatchNorm2d), "called twice"
    same(model, fused, IMAGES)


def test_measured_takes_the_faster_form(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    small, _ = compressed(nn.Sequential(nn.Linear(32, 32)), [x], "svd_out", "factorised", 0.5, 2)
    small.eval()
    for times, kind in [((2.0, 1.0), "Linear"), ((1.0, 2.0), "Factorised")]:
        monkeypatch.setattr(MODULE, "medians", lambda functions, seconds, times=times: list(times))
        assert type(fuse(small, x, measured=True)[0]).__name__ == kind
    monkeypatch.undo()
    same(small, fuse(small, x, measured=True), x)  # by the clock


# --- who uses what -----------------------------------------------------------------------------------


def test_followers():
    model = resnet()
    flow = Dataflow(model, IMAGES[:1])
    follower = {name: flow.follower(m) for name, m in model.named_modules()}
    assert follower["0"] is model[1] and follower["1"] is None, "the ReLU writes into it, and a block reads that"
    assert follower["3.conv1"] is model[3].bn1 and follower["3.bn1"] is None, "a function of torch comes next"
    assert follower["3.down.0"] is model[3].down[1]
    assert follower["2"] is None, "both branches of a block use it"


def test_rounded_weights_stay_rounded():
    """A layer of more MACs than dense is built once, but not where that would widen what is kept in int8."""
    conv = nn.Conv2d(8, 8, 3, padding=1).eval()
    family, layer = DECOMPOSITIONS["svd_out"], describe(conv, "")
    small = random_factors(family.build(conv, layer, (8,)))
    x = torch.randn(1, 8, 6, 6)
    assert type(fuse(nn.Sequential(small), x)[0]) is nn.Conv2d
    quantize_(small, "int8")
    kept = fuse(nn.Sequential(small), x)
    assert any(isinstance(m, QuantizedMixin) for m in kept.modules())
    torch.testing.assert_close(kept(x), small(x))
