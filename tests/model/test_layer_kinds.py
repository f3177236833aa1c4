"""Layers of every kind, from their weights as matrices to small models trained on real data."""

from __future__ import annotations

import inspect as source
import pydoc_data.topics
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankopt
from rankopt import inventory
from rankopt.api.inspection import Inspection
from rankopt.candidates.input_moments import frequencies, moments
from rankopt.candidates.prepare import mark_dense, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.progress import silent
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.experiments.digits import TRAIN, VALIDATION, data
from rankopt.model.layer_kinds import as_matrix, describe, in_own_shape
from rankopt.report.html import write_report
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.strategies.registry import STRATEGIES, make_strategy, strategy_class
from tests.helpers.layers import MODULES, make
from tests.helpers.spaces import QUICK

# --- what a family sees --------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODULES))
def test_a_weight_as_matrices_goes_back_to_its_own_shape(name):
    module = MODULES[name]()
    layer = describe(module)
    matrices = as_matrix(layer, module.weight)
    assert matrices.shape == (layer.groups, layer.out_channels, layer.patch) and layer.own_shape == module.weight.shape
    assert torch.equal(in_own_shape(layer, matrices), module.weight)
    assert torch.equal(in_own_shape(layer, matrices.reshape(layer.shape)), module.weight)


def test_depth_is_taken_from_the_plane():
    """svd_spatial of a Conv3d is R(2+1)D (Tran 2018), its two parts in the other order."""
    case = make("3d")
    first, second = DECOMPOSITIONS["svd_spatial"].build(case.module, case.layer, (5,))
    assert (type(first), first.kernel_size, first.stride) == (nn.Conv3d, (3, 1, 1), (1, 1, 1))
    assert (type(second), second.kernel_size, second.stride) == (nn.Conv3d, (1, 2, 3), (1, 2, 1))


def test_the_stage_of_an_axis_is_transposed_and_others_are_not():
    case = make("transposed")
    stages = list(DECOMPOSITIONS["cp"].build(case.module, case.layer, (5,)))
    assert [type(s) for s in stages] == [nn.Conv2d, nn.ConvTranspose2d, nn.ConvTranspose2d, nn.Conv2d]
    assert [s.stride for s in stages] == [(1, 1), (2, 1), (1, 2), (1, 1)]
    assert [s.output_padding for s in stages[1:3]] == [(1, 0), (0, 0)]


@pytest.mark.parametrize("size", [(29, 18), (30, 18)])
def test_transposed_layers_with_a_size_given_stay_dense(size):
    class Sized(nn.Module):
        def __init__(self, *, keyword):
            super().__init__()
            self.up, self.keyword = nn.ConvTranspose2d(8, 8, 3, stride=2), keyword

        def forward(self, x):
            return self.up(x, output_size=size) if self.keyword else self.up(x, size)

    for keyword in (True, False):
        (layer,) = inventory(Sized(keyword=keyword), torch.zeros(1, 8, 14, 8))
        assert "called with more than its input" in layer.reason


def test_a_depthwise_layer_has_only_its_kernel_to_decompose():
    """Which separates where it has two axes; else there is nothing to take apart."""
    line, plane = nn.Conv1d(8, 8, 5, groups=8), nn.Conv2d(8, 8, 3, groups=8)
    layers = [*inventory(line, torch.zeros(1, 8, 9)), *inventory(plane, torch.zeros(1, 8, 9, 9))]
    reasons = [x.reason for x in mark_dense(layers, SearchSpace())]
    assert "it is depthwise" in reasons[0] and reasons[1] is None
    assert SearchSpace().ranks("svd_spatial", layers[1]) == [(1,)]


# --- Embedding -----------------------------------------------------------------------------------


def test_an_embedding_is_fitted_as_the_linear_layer_of_one_hot_vectors():
    """At any rank as svd_out of a Linear with the whole moment matrix, and so the optimum."""
    case, family = make("embedding"), DECOMPOSITIONS["svd_out"]
    linear = nn.Linear(40, 12, bias=False).double()
    linear.weight.data = case.module.weight.detach().T.clone()
    (as_linear,) = inventory(linear, torch.zeros(1, 40, dtype=torch.float64))
    for rank in (1, 4, 9):
        (ours,) = family.fit(case.layer, case.module.weight, [(rank,)], case.moment, case.metric)
        (other,) = family.fit(as_linear, linear.weight, [(rank,)], torch.diag_embed(case.moment), case.metric)
        assert ours.error == pytest.approx(other.error, rel=1e-6)
        torch.testing.assert_close(ours.factors[1] @ ours.factors[0], other.factors[1] @ other.factors[0])


def test_an_embeddings_error_is_that_of_its_output():
    """On tokens that are all seen often, the declared error is the mean over tokens, measured."""
    torch.manual_seed(0)
    table, x = nn.Embedding(30, 12).double(), torch.arange(30).repeat(2, 3)
    (layer,) = inventory(table, x)
    moment = moments(table, [layer], [x])[""]
    (fit,) = DECOMPOSITIONS["svd_out"].fit(layer, table.weight, [(5,)], moment)
    small = DECOMPOSITIONS["svd_out"].build(table, layer, (5,))
    rankopt.decompositions.modules.load_factors(small, fit.factors)
    measured = (small(x) - table(x)).square().sum() / table(x).square().sum()
    assert fit.error == pytest.approx(measured.item(), rel=1e-6)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=60).filter(any))
def test_tokens_that_were_not_seen_count_but_not_more_than_those_seen_once(counts):
    counts = torch.tensor([counts], dtype=torch.float64)
    found = frequencies(counts)
    assert found.sum().item() == pytest.approx(1.0) and found.min() > 0
    torch.testing.assert_close(
        found / found.max(), counts.clamp_min(found.min() / found.max() * counts.max()) / counts.max()
    )
    once, unseen = (counts == 1).sum().item(), (counts == 0).sum().item()
    mass = found[counts == 0].sum().item() * (counts.sum().item() + min(once + 1, unseen))
    assert mass == pytest.approx(min(once + 1, unseen))


TABLES = {
    "max_norm": lambda: nn.Embedding(9, 8, max_norm=1.0),
    "scale_grad_by_freq": lambda: nn.Embedding(9, 8, scale_grad_by_freq=True),
    "sparse": lambda: nn.Embedding(9, 8, sparse=True),
    "EmbeddingBag cannot be factorised": lambda: nn.EmbeddingBag(9, 8),
}


@pytest.mark.parametrize("reason", list(TABLES))
def test_tables_that_must_stay_dense_say_why(reason):
    (layer,) = inventory(TABLES[reason](), torch.zeros(1, 3, dtype=torch.long))
    assert reason in layer.reason


def test_a_table_tied_to_the_output_layer_stays_dense():
    table, out = nn.Embedding(9, 8), nn.Linear(8, 9)
    out.weight = table.weight
    layers = inventory(nn.Sequential(table, out), torch.zeros(1, 3, dtype=torch.long))
    assert all("shared: 0.weight, 1.weight" in x.reason for x in layers)


# --- whole models --------------------------------------------------------------------------------


class Words(nn.Module):
    """Token ids (b, n) -> (b, 2), from the mean of their vectors."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(400, 24, padding_idx=0), nn.Linear(24, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.table(x).sum(1) / (x > 0).sum(1, keepdim=True).clamp_min(1)))


def words():
    """Pieces of 12 words of Python's manual or of its source: which of the two is it?"""
    texts = [" ".join(pydoc_data.topics.topics.values())[:90000], source.getsource(re) + source.getsource(source)]
    found = [re.findall(r"\w+|[^\s\w]", text.lower()) for text in texts]
    common = [word for word, _ in Counter(found[0] + found[1]).most_common(398)]
    index = {word: i + 2 for i, word in enumerate(common)}
    pieces = [torch.tensor([index.get(w, 1) for w in f[: len(f) // 12 * 12]]).view(-1, 12)[:1500] for f in found]
    y = torch.cat([torch.full((len(p),), i) for i, p in enumerate(pieces)])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.cat(pieces)[order], y[order]


def moving(part):
    """Digits that move by a pixel a frame, (n, 1, 4, 8, 8): into which of four directions?"""
    x = data(part)[0]
    y = torch.randint(4, (len(x),), generator=torch.Generator().manual_seed(0))
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    frames = [
        torch.stack([a.roll((t * i, t * j), (1, 2)) for t in range(4)], 1)
        for a, (i, j) in zip(x, [steps[k] for k in y], strict=True)
    ]
    return torch.stack(frames), y


MODELS = {
    "signals": lambda: nn.Sequential(  # a digit as one line of 64 pixels
        *(nn.Conv1d(1, 12, 5, stride=2, padding=2), nn.ReLU(), nn.Conv1d(12, 20, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(320, 10)),
    ),
    "videos": lambda: nn.Sequential(
        *(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 12, (2, 3, 3), stride=(2, 1, 1)), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 4)),
    ),
    "autoencoder": lambda: nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), nn.ReLU()),
        nn.ConvTranspose2d(8, 1, 3, stride=2, padding=1, output_padding=1),
    ),
    "text": Words,
}
NEW = {"signals": "Conv1d", "videos": "Conv3d", "autoencoder": "ConvTranspose2d", "text": "Embedding"}


def examples(kind):
    """((x, y) to train on, (x, y) to score on)."""
    if kind == "text":
        x, y = words()
        return (x[:2000], y[:2000]), (x[2000:], y[2000:])
    if kind == "videos":
        return moving(TRAIN), moving(VALIDATION)
    parts = data(TRAIN), data(VALIDATION)
    if kind == "signals":
        return tuple((x.flatten(2), y) for x, y in parts)
    return tuple((x, x) for x, _ in parts)


@pytest.fixture(scope="module", params=list(MODELS))
def prepared(request):
    """A model of the kind, trained for a moment, with its candidates."""
    kind = request.param
    torch.manual_seed(0)
    model, ((x, y), held_out) = MODELS[kind](), examples(kind)
    loss = F.mse_loss if kind == "autoencoder" else F.cross_entropy

    def score(model):
        z = model(held_out[0])
        if kind == "autoencoder":
            return 1 - (F.mse_loss(z, held_out[1]) / held_out[1].var()).item()
        return (z.argmax(1) == held_out[1]).float().mean().item()

    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        batch = torch.randint(len(x), (100,), generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimiser.step()
    task = rankopt.Task(
        model.eval(),
        x[:1],
        x[:500].split(100),
        score,
        objective=(lambda m: loss(m(x[:500]), y[:500]).item()) if kind == "autoencoder" else None,
        train=list(zip(x[:500].split(100), y[:500].split(100), strict=True)),
        loss=loss,
        name=kind,
    )
    return prepare(task, QUICK, workers=1)


def test_a_model_of_each_kind_becomes_smaller_and_comes_back(prepared, tmp_path):
    kind = prepared.task.name
    made = run_search(prepared, prepared.problem({"params": 0.6}), SearchSettings(refine=True), tmp_path)
    assert rankopt.count(made.model, prepared.task.example_input).params <= 0.6 * prepared.dense.params
    choice = next(c for c in made.plan.choices if c.kind == NEW[kind] and c.method != "dense")
    score = made.info["score"]
    assert score["dense"]["validation"] > 0.7
    assert score["compressed"]["validation"] > score["dense"]["validation"] - 0.05
    small = rankopt.load(MODELS[kind], tmp_path).eval()
    x = prepared.task.example_input
    torch.testing.assert_close(small(x), made.model.eval()(x))
    assert choice.shape == tuple(prepared.task.model.get_submodule(choice.name).weight.shape)
    assert NEW[kind] in write_report(tmp_path).read_text()
    table = repr(Inspection(prepared.layers, {x.name: ["svd_out"] for x in prepared.layers}, prepared.dense))
    assert f"{NEW[kind]}" in table and "×".join(map(str, choice.shape)) in table


OPTIONS = {name: {"steps": 8} for name in STRATEGIES if strategy_class(name).trains}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_takes_layers_of_each_kind(prepared, strategy):
    problem = prepared.problem({"params": 0.6})
    made = make_strategy(strategy, problem, 0, OPTIONS.get(strategy, {}))
    made.measure(prepared, silent)
    assert made.problem.fits(made.ask())
    assert made.problem.limits == problem.limits
