"""Modules that hold several maps: expanded they compute the same, cost the same, and are compressed part by part."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rankopt
from rankopt import count, inventory
from rankopt.candidates.search_space import SearchSpace
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.plan import multiplied_out
from rankopt.model.composites import expand_composites, take_ordinary_path
from rankopt.model.forward import inference
from rankopt.model.inventory import unfolded
from tests.helpers.models import Block, Everything, whole

SPACE = SearchSpace(name="quick", families=("svd_out",), points=5, steps=10)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# --- recurrent networks ---------------------------------------------------------------------------

recurrent = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["LSTM", "LSTM with projection", "GRU", "RNN", "RNN relu"]),
        "layers": st.integers(1, 3),
        "bidirectional": st.booleans(),
        "batch_first": st.booleans(),
        "bias": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.5]),
        "training": st.booleans(),
        "states": st.booleans(),
        "input": st.sampled_from(["batch", "one", "packed", "packed unsorted"]),
    }
)


@settings(max_examples=80)
@given(recurrent)
def test_recurrent_networks_compute_the_same(case):
    torch.manual_seed(0)
    kind, _, more = case["kind"].partition(" ")
    options = {"proj_size": 3} if more == "with projection" else {"nonlinearity": "relu"} if more else {}
    dropout = 0.0 if case["training"] else case["dropout"]
    module = getattr(nn, kind)(
        4,
        5,
        case["layers"],
        bias=case["bias"],
        batch_first=case["batch_first"],
        dropout=dropout if case["layers"] > 1 else 0.0,
        bidirectional=case["bidirectional"],
        dtype=torch.float64,
        **options,
    ).train(case["training"])
    other = whole(module)
    lengths = torch.tensor([2, 6, 1] if "unsorted" in case["input"] else [6, 2, 1])
    x = torch.randn(*((3, 6) if case["batch_first"] else (6, 3)), 4, dtype=torch.float64)
    if case["input"] == "one":
        x = torch.randn(6, 4, dtype=torch.float64)
    elif case["input"] != "batch":
        x = pack_padded_sequence(x, lengths, case["batch_first"], enforce_sorted="unsorted" not in case["input"])
    rows, batch = case["layers"] * (1 + case["bidirectional"]), () if case["input"] == "one" else (3,)
    h, c = (torch.randn(rows, *batch, n, dtype=torch.float64) for n in (options.get("proj_size", 5), 5))
    given_states = ((h, c) if kind == "LSTM" else h,) if case["states"] else ()
    (y, state), (y2, state2) = module(x, *given_states), other(x, *given_states)
    same(state, state2)
    if isinstance(x, PackedSequence):
        same(pad_packed_sequence(y), pad_packed_sequence(y2))
    else:
        same(y, y2)
    for name, p in module.named_parameters():
        same(getattr(other, name), p)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_macs_of_recurrent_networks_are_the_closed_form(kind):
    """Every weight is used once a time step, whatever the backend and whether the module is unfolded."""
    for layers, both, projection in itertools.product((1, 2), (False, True), (0, 3)):
        if projection and kind is not nn.LSTM:
            continue
        more = {"proj_size": projection} if projection else {}
        module = kind(6, 8, layers, batch_first=True, bidirectional=both, **more)
        x = torch.randn(2, 11, 6)
        expected = 11 * sum(p.numel() for n, p in module.named_parameters() if n.startswith("weight"))
        assert count(module, x) == count(whole(module), x) and count(module, x).macs == expected
        assert sum(layer.cost.macs for layer in inventory(unfolded(module, x), x)) == expected
    assert torch.backends.mkldnn.enabled


def test_gradients_are_the_same():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 6)
    module = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
    module.weight_hh_l1.requires_grad_(False)
    other = whole(module)
    for m in (module, other):
        m(x)[0].square().sum().backward()
    assert other.hh_l1.weight.grad is None and module.weight_hh_l1.grad is None
    torch.testing.assert_close(other.ih_l0_reverse.weight.grad, module.weight_ih_l0_reverse.grad)
    torch.testing.assert_close(other.hh_l0.bias.grad, module.bias_hh_l0.grad)


# --- attention ------------------------------------------------------------------------------------

attention = st.fixed_dictionaries(
    {
        "bias": st.booleans(),
        "bias_kv": st.booleans(),
        "zero": st.booleans(),
        "sizes": st.sampled_from([(None, None), (6, None), (6, 10)]),
        "batch_first": st.booleans(),
        "training": st.booleans(),
        "self": st.booleans(),
        "batched": st.booleans(),
        "mask": st.sampled_from([None, "bool", "float", "heads", "causal"]),
        "padding": st.sampled_from([None, "bool", "float"]),
        "weights": st.sampled_from([None, "mean", "heads"]),
    }
)


@settings(max_examples=120)
@given(attention)
def test_attention_computes_the_same(case):
    torch.manual_seed(0)
    kdim, vdim = (None, None) if case["self"] else case["sizes"]
    module = nn.MultiheadAttention(
        8,
        2,
        dropout=0.0 if case["training"] else 0.3,
        bias=case["bias"],
        add_bias_kv=case["bias_kv"],
        add_zero_attn=case["zero"],
        kdim=kdim,
        vdim=vdim,
        batch_first=case["batch_first"],
        dtype=torch.float64,
    ).train(case["training"])
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    batch, length, keys = 3, 5, 5 if case["self"] else 7

    def tensor(steps, size):
        x = (
            torch.randn(batch, steps, size, dtype=torch.float64)
            if case["batched"]
            else torch.randn(steps, size).double()
        )
        return x.transpose(0, 1) if case["batched"] and not case["batch_first"] else x

    query = tensor(length, 8)
    inputs = (query,) * 3 if case["self"] else (query, tensor(keys, kdim or 8), tensor(keys, vdim or 8))
    blocked = torch.ones(length, keys, dtype=torch.bool).triu(1)
    mask = {
        "bool": blocked,
        "float": torch.randn(length, keys, dtype=torch.float64),
        "heads": blocked.expand((batch if case["batched"] else 1) * 2, -1, -1),
        "causal": blocked,
    }.get(case["mask"])
    padding = torch.arange(keys) >= torch.tensor([[keys], [3], [2]])
    padding = padding if case["batched"] else padding[1]
    options = {
        "attn_mask": mask,
        "is_causal": case["mask"] == "causal",
        "key_padding_mask": padding.double() if case["padding"] == "float" else padding if case["padding"] else None,
        "need_weights": case["weights"] is not None,
        "average_attn_weights": case["weights"] == "mean",
    }
    if {"bool", "float"} == {case["padding"], "float" if case["mask"] == "float" else case["mask"] and "bool"}:
        options["key_padding_mask"] = None  # torch deprecates masks of two kinds
    other = whole(module)
    assert isinstance(other.q_proj, nn.Linear)
    for gradients in (True, False):  # without, torch may take its fused path
        with torch.set_grad_enabled(gradients):
            expected, found = module(*inputs, **options), other(*inputs, **options)
        same(found, expected)
    for name, p in module.named_parameters():
        same(other.get_parameter(name) if name.startswith("out") else getattr(other, name), p)


def test_attention_costs_the_same_unfolded():
    for need, padding in itertools.product((True, False), (None, torch.zeros(2, 5).bool())):

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x, need=need, padding=padding):
                return self.attention(x, x, x, padding if padding is None else padding[: len(x)], need_weights=need)[0]

        net, x = Net(), torch.randn(2, 5, 8)
        other = unfolded(net, x)
        assert count(net, x) == count(other, x)
        names = [layer.name for layer in inventory(other, x)]
        assert names == [f"attention.{n}_proj" for n in ("q", "k", "v", "out")]


# --- fused query-key-value maps ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qkv", "in_proj", "c_attn", "Wqkv", "query_key_value"])
def test_fused_linears_are_split_where_their_name_says_so(name):
    torch.manual_seed(0)
    model, x = Block(name), torch.randn(3, 5, 16)
    other = unfolded(model, x)
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(getattr(other, name).weight.detach(), getattr(model, name).weight.detach())
    assert count(other, x) == count(model, x)
    assert [layer.name for layer in inventory(other, x)] == [f"{name}.q", f"{name}.k", f"{name}.v", "head"]
    assert unfolded(model, x, split_qkv=False) is model
    assert unfolded(Block("three", bias=False), x).three.weight.shape == (48, 16)


# --- what must stay as it is --------------------------------------------------------------------------


class Kept(nn.Module):
    """Composite modules that cannot be replaced, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.hooked = nn.LSTM(6, 6, batch_first=True)
        self.hooked.register_forward_hook(lambda m, a, out: out)
        self.tied, self.tied_too = nn.GRU(6, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.tied_too.weight_hh_l0 = self.tied.weight_hh_l0
        self.own = type("Own", (nn.LSTM,), {})(6, 6, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.LSTM(6, 6, batch_first=True), "weight_hh_l0")
        self.read = nn.MultiheadAttention(6, 2)
        self.qkv = nn.Linear(6, 18)
        self.free = nn.LSTM(6, 6, batch_first=True)
        self.again = self.free

    def forward(self, x):
        for module in (self.hooked, self.tied, self.tied_too, self.own, self.normed, self.free, self.again):
            x = module(x)[0]
        return nn.functional.linear(nn.functional.linear(x, self.read.in_proj_weight), self.qkv.weight.T)


def test_the_inventory_says_why_a_module_cannot_be_expanded():
    model, x = Kept(), torch.randn(2, 4, 6)
    other = unfolded(model, x)
    torch.testing.assert_close(other(x), model(x))
    reasons = {layer.name: layer.reason for layer in inventory(other, x)}
    for name, reason in {
        "hooked": "hooks",
        "tied": "shared: tied.weight_hh_l0, tied_too.weight_hh_l0",
        "tied_too": "shared",
        "own": "a subclass of LSTM",
        "normed": "parametrised",
        "read": "not called as a module",
        "qkv": "not called as a module",
    }.items():
        assert reason in reasons[name], (name, reasons[name])
    assert reasons["free.hh_l0"] is None and other.again is other.free and isinstance(model.free, nn.LSTM)
    assert "unfold it first" in {x.name: x.reason for x in inventory(model, x)}["free"]


def test_states_of_a_wrong_size_are_refused():
    with pytest.raises(ValueError, match=r"a state is \(1, 1, 6\), expected \(1, 2, 6\)"):
        whole(nn.GRU(6, 6, batch_first=True))(torch.randn(2, 4, 6), torch.randn(1, 1, 6))
    with pytest.raises(ValueError, match="takes no nested tensors: pad them"):
        x = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)])
        whole(nn.MultiheadAttention(6, 2, batch_first=True))(x, x, x)


def test_packed_inputs_of_a_whole_model_are_refused():
    packed = pack_padded_sequence(torch.randn(2, 4, 6), torch.tensor([4, 2]), batch_first=True)
    with pytest.raises(rankopt.TaskError, match="give the padded tensor and the lengths"):
        rankopt.compress(nn.LSTM(6, 6, batch_first=True), [packed], {"params": 0.5}, space=SPACE)


# --- the fused path of encoders ------------------------------------------------------------------------


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("changed", ["layers.0.self_attn.q_proj", "layers.1.self_attn.out_proj", "layers.0.linear1"])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "norm_first": False}])
def test_factorised_encoders_take_the_ordinary_path(changed, options):
    model = encoder(**options)
    small = expand_composites(copy.deepcopy(model), [changed])
    x = torch.randn(3, 5, 16)
    layer = next(layer for layer in inventory(small, x) if layer.name == changed)
    family, part = rankopt.DECOMPOSITIONS["svd_out"], small.get_submodule(changed)
    (fit,) = family.fit(layer, part.weight.detach(), [family.full_rank(layer)])
    new = family.build(part, layer, fit.rank)
    load_factors(new, fit.factors)
    small.set_submodule(changed, new)
    take_ordinary_path(small)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
        fused = model(x, src_key_padding_mask=padding)
        assert fused[1, 3:].abs().max() == 0, "torch took its path of nested tensors"
        torch.testing.assert_close(small(x, src_key_padding_mask=padding), fused)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        torch.testing.assert_close(small(x, causal, is_causal=True), model(x, causal, is_causal=True))
        nested, at = torch.nested.nested_tensor([x[0], x[1, :3]]), int(changed[7])
        torch.testing.assert_close(
            small.layers[at](nested).to_padded_tensor(0.0), model.layers[at](nested).to_padded_tensor(0.0)
        )
    with inference(model):  # no fused path at all
        torch.testing.assert_close(small(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding))
    torch.testing.assert_close(small(x), model(x))  # with gradients


def test_encoders_and_decoders_unfold_together():
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 2, 32, 0.0, batch_first=True)
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    other = unfolded(model, (source, target))
    assert not any(isinstance(m, nn.MultiheadAttention) for m in other.modules())
    for training in (True, False):
        torch.testing.assert_close(other.train(training)(source, target), model.train(training)(source, target))
    with torch.no_grad():
        torch.testing.assert_close(other(source, target), model(source, target))
    assert count(other, (source, target)) == count(model, (source, target))


# --- the whole way ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    torch.manual_seed(0)
    model = Everything().eval()
    lengths = torch.randint(3, 8, (64,))
    lengths[0] = 7
    batches = [{"x": torch.randn(64, 7, 8), "lengths": lengths}]
    made = rankopt.compress(model, batches, {"params": 0.5}, space=SPACE, cache=tmp_path_factory.mktemp("cache"))
    return model, batches[0], made


def test_parts_are_compressed_one_by_one_and_load_from_the_plan_alone(everything, tmp_path):
    model, x, made = everything
    assert made.info["budget"]["params"]["achieved"] <= 0.5 * count(model, x).params
    assert made.plan.cost == count(made.model, x)
    names = {c.name for c in made.plan.choices}
    assert {"lstm.hh_l1_reverse", "body.layers.0.self_attn.v_proj", "body.layers.0.linear2", "block.qkv.k"} <= names
    made.save(tmp_path)
    small = rankopt.load(Everything, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(small(**x), made.model(**x))
    assert isinstance(model.lstm, nn.LSTM) and model.body.use_nested_tensor, "the caller's model is as it was"
    again = multiplied_out(model, made.model)
    with torch.no_grad():
        torch.testing.assert_close(again(**x), made.model(**x), atol=1e-5, rtol=1e-4)


def test_composites_that_stay_dense_are_not_expanded(tmp_path):
    torch.manual_seed(0)
    model, x = Everything().eval(), {"x": torch.randn(32, 7, 8), "lengths": torch.full((32,), 7)}
    keep = SearchSpace(
        name="quick",
        families=("svd_out",),
        points=5,
        steps=10,
        keep_dense=("lstm*", "*self_attn*", "gru*"),
        split_qkv=False,
    )
    made = rankopt.compress(model, [x], {"params": 0.85}, space=keep, cache=tmp_path / "cache")
    assert type(made.model.lstm) is nn.LSTM and type(made.model.gru) is nn.GRU
    assert type(made.model.body.layers[0].self_attn) is nn.MultiheadAttention
    reasons = {c.name: c.reason for c in made.plan.choices}
    assert "keeps lstm* dense" in reasons["lstm.ih_l0"] and "block.qkv" in reasons
    made.save(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(rankopt.load(Everything, tmp_path / "run").eval()(**x), made.model(**x))
    with pytest.raises(rankopt.PlanError, match=r"no layer 'lstm\.ih_l0'"):
        other = Everything()
        other.lstm = nn.Identity()
        rankopt.load(other, tmp_path / "run")


def test_a_recurrent_network_alone_is_refined_and_searched_by_every_kind_of_strategy(tmp_path):
    torch.manual_seed(0)
    model, batches = nn.GRU(12, 24, batch_first=True), [torch.randn(48, 6, 12)]
    for strategy in ("knapsack", "lasso", "evbmf"):
        made = rankopt.compress(
            model,
            batches,
            {"params": 0.6},
            strategy=strategy,
            space=SPACE,
            cache=tmp_path,
            refine=strategy == "knapsack",
        )
        assert made.info["budget"]["params"]["achieved"] <= 0.6 * count(model, batches[0]).params
    made.save(tmp_path / "run")
    torch.testing.assert_close(rankopt.load(model, tmp_path / "run")(batches[0]), made.model(batches[0]))
