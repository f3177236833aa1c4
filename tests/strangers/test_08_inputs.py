"""Kind 8: inputs as people have them."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.model.forward import Undivided, batch_size, take
from rankopt.model.inputs import collect_batches, one_example
from tests.strangers.models import compress, example_batch, net

X = example_batch()
LABELS = torch.zeros(256).long()
SECOND = example_batch().flip(0)


class Record(NamedTuple):
    labels: Tensor
    e: Tensor
    x: Tensor


@dataclass
class Columns:
    x: Tensor
    labels: Tensor


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding: columns are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


def plain() -> nn.Module:
    return net(lambda s, x: s.h(s.a(x).relu()))


def within(result: rankopt.Result, one: Any) -> bool:
    return rankopt.count(result.model, one).params <= result.limits[0].target


@cache
def of_a_tensor() -> rankopt.Result:
    return compress(plain(), params=0.75)


def same_as_of_a_tensor(result: rankopt.Result) -> bool:
    expected = of_a_tensor()
    assert result.plan.cost == expected.plan.cost
    return all(torch.equal(a, b) for a, b in zip(result.model.parameters(), expected.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "batch",
    [
        collections.UserDict(x=X),
        Encoding(x=X),
        (Encoding(x=X), LABELS),
        collections.OrderedDict(x=X),
        {"x": X, "labels": LABELS},
        Columns(X, LABELS),
        Record(LABELS, SECOND, X),
        [X, LABELS],
    ],
    ids=["UserDict", "Encoding", "pair", "OrderedDict", "extra column", "dataclass", "NamedTuple", "list"],
)
def test_a_batch_may_be_any_of_these(batch):
    assert same_as_of_a_tensor(compress(plain(), [batch], params=0.75))


def test_a_column_that_forward_does_not_take_is_dropped_and_that_is_said():
    result = compress(plain(), [{"x": X, "labels": LABELS, "idx": LABELS}], params=0.75)
    assert any("'labels', 'idx'" in text for text in result.info["warnings"])
    assert "'labels', 'idx'" in " ".join(result.summary().split())


def test_nothing_is_dropped_where_forward_takes_keywords():
    model = net(lambda s, x, **more: s.h(s.a(x).relu()) * more["scale"])
    result = compress(model, [{"x": X, "scale": 2.0}], params=0.75)
    assert not any("does not take" in text for text in result.info["warnings"])


def test_several_positional_inputs_with_and_without_labels():
    model = net(lambda s, x, e: s.h(s.a(x).relu() + s.b(s.a(e))))
    for batch in ((X, SECOND), (X, SECOND, LABELS), ((X, SECOND), LABELS), [[X, SECOND], LABELS]):
        torch.testing.assert_close(collect_batches(model, [batch], 99)[0], (X[:99], SECOND[:99]))
    assert within(compress(model, [(X, SECOND, LABELS)], params=0.75), (X, SECOND))


def test_a_forward_may_take_the_batch_itself():
    by_attribute = net(lambda s, batch: s.h(s.a(batch.x).relu()))
    by_key = net(lambda s, batch: s.h(s.a(batch["x"]).relu()))
    assert same_as_of_a_tensor(compress(by_attribute, [Columns(X, LABELS)], params=0.75))
    assert same_as_of_a_tensor(compress(by_attribute, [Encoding(x=X, labels=LABELS)], params=0.75))
    assert same_as_of_a_tensor(compress(by_key, [{"x": X, "labels": LABELS}], params=0.75))


def detector() -> nn.Module:
    """As torchvision's: images of different sizes in a list, and a list of outputs."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)

        def forward(self, images: list[Tensor], targets: Any = None) -> dict[str, Tensor]:
            tallest, widest = (max(x.shape[i] for x in images) for i in (1, 2))
            padded = [nn.functional.pad(x, (0, widest - x.shape[2], 0, tallest - x.shape[1])) for x in images]
            z = self.head(self.body(torch.stack(padded)).relu())
            return {"boxes": z.mean((2, 3)), "scores": z.amax((2, 3))}

    return Detector().eval()


@pytest.mark.parametrize("number", [1, 2, 5])
def test_images_in_a_list(number):
    sizes = [(12, 10), (9, 14), (8, 8), (12, 12), (10, 9)][:number]
    images = [torch.randn(3, *size) for size in sizes]
    targets = [{"boxes": torch.zeros(2, 4)} for _ in images]
    for batch in ((images, targets), [tuple(images), targets]):
        result = compress(detector(), [batch, batch], params=0.8)
        assert result.info["cost"]["dense"]["macs"] == 12 * 10 * (16 * 27 + 8 * 16)  # of the first image
        assert not any("whole batch" in text for text in result.info["warnings"])


def test_the_limit_on_examples_counts_images():
    images = [torch.randn(3, 8, 8 + i) for i in range(3)]
    batches = collect_batches(detector(), [(images, None)] * 4, 7)
    assert [batch_size(x) for x in batches] == [3, 3, 1]
    assert [len(x[0]) for x in batches] == [3, 3, 1]


def test_feature_maps_in_a_list_are_cut_along_their_first_dimension():
    model = net(lambda s, maps: s.h(s.a(maps[0]).relu() + s.b(maps[1])))
    (x,) = collect_batches(model, [([X, torch.randn(256, 128)], LABELS)], 10)
    assert [len(t) for t in x[0]] == [10, 10]


GRAPH = {"x": X, "e": torch.randint(9, 256, (2, 500), generator=torch.Generator().manual_seed(0))}


def test_a_graph_counts_as_one_example_and_that_is_said():
    model = net(lambda s, x, e: s.h(s.a(x)[e[0]]))
    result = compress(model, [GRAPH, GRAPH], params=0.75)
    assert within(result, GRAPH)
    assert result.info["cost"]["dense"]["macs"] == 256 * 64 * 128 + 500 * 128 * 10
    assert any("the whole batch counts as one example" in text for text in result.info["warnings"])
    assert rankopt.count(model, GRAPH).macs == result.info["cost"]["dense"]["macs"]


def test_a_cut_that_gives_another_number_of_rows_is_noticed_too():
    model = net(lambda s, x: s.h(s.a(x).relu()).mean(0, keepdim=True))  # one output for all nodes
    assert isinstance(one_example(model, X), Undivided)
    assert batch_size(one_example(model, X)) == 1
    assert take(one_example(model, X), slice(1)).inputs.shape == X.shape


def test_a_graph_of_more_nodes_than_examples_are_taken_stays_whole():
    model = net(lambda s, x, e: s.h(s.a(x)[e[0]]))
    (graph, *others) = collect_batches(model, [GRAPH] * 3, 2)
    assert len(graph.inputs["x"]) == 256 and len(others) == 1


def test_a_graph_is_timed_with_a_batch_of_one_only():
    from rankopt.model.inputs import expanded

    example = one_example(net(lambda s, x, e: s.h(s.a(x)[e[0]])), GRAPH)
    assert expanded(example, 1) is example
    with pytest.raises(rankopt.TaskError, match="batch=1"):
        expanded(example, 8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"y": X}, r"dict\) does not fit the model's forward\(x, e\)"),
        ((X,), r"does not fit the model's forward\(x, e\)"),
        ((X, X[:, :9]), "does not run on a calibration batch"),
        ({"x": 1, "e": 2}, "holds no tensor"),
        ((), "an empty tuple"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(batch, message):
    with pytest.raises(rankopt.TaskError, match=message):
        compress(net(lambda s, x, e: s.h(s.a(x) + s.a(e))), [batch], params=0.75)


def test_batches_that_are_built_in_different_ways_are_refused():
    model = plain()
    with pytest.raises(rankopt.TaskError, match="in another way than the first one"):
        compress(model, [{"x": X}, X], params=0.75)


def test_a_mapping_as_calibration_is_refused():
    with pytest.raises(rankopt.TaskError, match="calibration is a dict: give batches"):
        compress(plain(), {"x": X}, params=0.75)
