"""Recorded steps: everything about them but the recording itself, which a stand-in does on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankopt
from rankopt import Recipe
from rankopt.core.records import Task
from rankopt.report.training import lines
from rankopt.training import loop, precision
from rankopt.training.loop import Losses, train
from rankopt.training.recipe import make_optimizer
from rankopt.training.step import MOST_SHAPES, WARM_UP, Capture, Step, can_fuse


class Recording:
    """Stands in for CUDA graphs: recording a function runs it on copies of nothing, replaying it runs it."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            work()

        return replay


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 5) for n in sizes]


def net():
    torch.manual_seed(0)
    return Net()


def task(model, data):
    return Task(
        model=model,
        example_input=torch.zeros(1, 3, 8, 8),
        calibration=[x for x, _ in data],
        score=lambda m: float((m(data[0][0]).argmax(1) == data[0][1]).float().mean()),
        train=data,
        loss=F.cross_entropy,
    )


def close(a, b):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.fixture
def recording(monkeypatch):
    stand_in = Recording()
    monkeypatch.setattr(loop, "recorder", lambda device: stand_in)
    return stand_in


FULL = Recipe(epochs=12, rate=0.05, ema=0.9, distill=0.5, smoothing=0.1)


@pytest.mark.parametrize(
    "recipe",
    [
        FULL,
        dataclasses.replace(FULL, optimizer="adamw", rate=1e-3, schedule="one-cycle"),
        Recipe(epochs=12, momentum=0),
    ],
    ids=["sgd", "adamw", "no momentum"],
)
def test_recorded_steps_give_the_same_weights(recipe, monkeypatch):
    """Also where the last batch of an epoch is smaller, and the learning rate changes at every step."""
    data = batches(16, 16, 16, 7)
    plain = rankopt.finetune(net(), task(net(), data), recipe)
    stand_in = Recording()
    monkeypatch.setattr(loop, "recorder", lambda device: stand_in)
    recorded = rankopt.finetune(net(), task(net(), data), recipe)
    close(recorded.model, plain.model)
    assert stand_in.recorded == 2 and stand_in.replayed == 12 * 4 - 2 * WARM_UP
    assert recorded.info["execution"]["graphs"] == 2 and plain.info["execution"]["graphs"] == 0
    for a, b in zip(recorded.info["losses"]["whole"], plain.info["losses"]["whole"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_recorded_training_goes_on_after_a_stop(recording, channels_last, optimizer, tmp_path):
    """The optimizer's state comes back in the memory format of the weights, which fused steps need."""
    data = batches(16, 16, 16)
    recipe = dataclasses.replace(FULL, channels_last=channels_last, optimizer=optimizer, rate=1e-3, epochs=8)
    whole = rankopt.finetune(net(), task(net(), data), recipe)
    count = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(net(), task(net(), data), recipe, folder=tmp_path, stop=lambda: next(count) == 10)
    again = rankopt.finetune(net(), task(net(), data), recipe, folder=tmp_path, resume=True)
    close(again.model, whole.model)
    assert recording.recorded == 3


def test_layer_by_layer_and_feature_maps_are_recorded(digits, recording):
    from rankopt.search.compress import run_search
    from rankopt.search.settings import SearchSettings

    result = run_search(digits, digits.problem({"params": 0.15}), SearchSettings())
    recipe = Recipe(epochs=2, features=0.5, layerwise=25, eval_mode=True)
    trained = rankopt.finetune(result.model, digits.task, recipe)
    assert recording.recorded >= 2 and digits.task.score(trained.model) > trained.info["before"]


def test_a_replay_invalidates_cached_weights():
    """Autograd's version counters, by which caches notice changes, count what a graph writes."""
    model = net()
    optimizer = make_optimizer(Recipe(), model.parameters(), fused=True)
    take = Step(model, loop.supervised(F.cross_entropy), optimizer, 5.0, Capture(Recording()))
    batch = batches(8)[0]
    for _ in range(WARM_UP + 1):
        take(batch)
    recorded = next(iter(take.recorded.values()))
    recorded.replay = lambda: None  # as a graph: nothing that Python sees
    before = [p._version for p in model.parameters()]
    take(batch)
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("source", [lambda: torch.rand(()), random.random], ids=["torch", "python"])
def test_random_numbers_of_the_cpu_are_not_recorded(source):
    class Drawing(Net):
        def forward(self, x):
            return super().forward(x) * (1 + float(source()))

    model, recording = Drawing(), Recording()
    capture = Capture(recording)
    optimizer = make_optimizer(Recipe(), model.parameters(), fused=True)
    train(model, batches(8), loop.supervised(F.cross_entropy), optimizer, steps=8, capture=capture)
    assert recording.recorded == 0 and "random numbers on the CPU" in capture.reason


def test_what_cannot_be_recorded_is_trained_as_before_and_the_reason_said():
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    ends = []
    for capture in (None, Capture(refuse)):
        model = net()
        optimizer = make_optimizer(Recipe(), model.parameters(), fused=capture is not None)
        train(model, batches(8), loop.supervised(F.cross_entropy), optimizer, steps=8, capture=capture)
        ends.append(model)
    close(*ends)
    assert capture.reason == "RuntimeError: operation not permitted when stream is capturing"
    execution = {
        "device": "cuda:0 (H)",
        "precision": "bfloat16",
        "channels_last": True,
        "graphs": 0,
        "not_recorded": capture.reason,
        "milliseconds": {"tf32": 6.5, "bfloat16, channels_last": 4.9},
        "steps_per_second": 200.0,
    }
    about = {"recipe": {}, "teacher": None, "from_scratch": False, "run": "r", "seconds": 1.0, "before": None}
    score = {"compressed": {"validation": None, "test": None}}
    said = lines({"score": score, "training": {**about, "test_before": None, "execution": execution}})
    assert "kernel by kernel (RuntimeError: operation not permitted" in said[1] and "tf32 6.5 ms" in said[1]


def test_few_shapes_are_recorded_and_others_trained_as_they_come():
    sizes = range(4, 4 + MOST_SHAPES + 2)
    model, recording = net(), Recording()
    optimizer = make_optimizer(Recipe(), model.parameters(), fused=True)
    steps = 6 * len(sizes)
    train(model, batches(*sizes), loop.supervised(F.cross_entropy), optimizer, steps=steps, capture=Capture(recording))
    assert recording.recorded == MOST_SHAPES


def test_parameters_that_fused_optimizers_do_not_take():
    a = torch.zeros(4, 6)
    assert can_fuse([a]) and can_fuse([torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)])
    assert not can_fuse([a[:, ::2]]) and not can_fuse([a.long()])
    capture = Capture(Recording())
    model = net()
    unfused = make_optimizer(Recipe(), model.parameters(), fused=False)
    Step(model, loop.supervised(F.cross_entropy), unfused, None, capture)
    assert capture.reason == "the optimizer is not fused"


def test_losses_are_read_now_and_then(monkeypatch):
    monkeypatch.setattr(loop, "READ_SECONDS", 1e9)
    losses = Losses([0.5], 1, 100)
    assert [losses.add(torch.tensor(float(i))) for i in range(100)] == [False] * 99 + [True]
    assert losses.known == [0.5, *range(100)]
    losses.add(torch.tensor(1.0))
    losses.add(torch.tensor(float("nan")))
    with pytest.raises(rankopt.TaskError, match="loss is nan at step 102"):
        losses.read()


def test_auto_is_float32_on_a_cpu_and_what_is_fastest_elsewhere(monkeypatch):
    data = batches(8)
    recipe = Recipe(epochs=2, precision="auto", distill=0.5)
    plain = rankopt.finetune(net(), task(net(), data), dataclasses.replace(recipe, precision="float32"))
    auto = rankopt.finetune(net(), task(net(), data), recipe)
    assert auto.info["execution"]["precision"] == "float32" and not auto.info["execution"]["channels_last"]
    close(plain.model, auto.model)
    depthwise = net()
    depthwise.conv = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1))
    faster = rankopt.finetune(depthwise, task(net(), data), recipe)
    assert faster.info["execution"]["channels_last"]
    close(
        faster.model,
        rankopt.finetune(depthwise, task(net(), data), dataclasses.replace(recipe, precision="float32")).model,
    )

    seconds = {("tf32", False): 4.0, ("tf32", True): 3.0, ("bfloat16", False): 2.0, ("bfloat16", True): 1.0}
    monkeypatch.setattr(precision, "fastest", precision.time_choices)
    given = precision.time_choices(net(), data, recipe, lambda r, m: loop.supervised(F.cross_entropy))
    assert set(given["milliseconds"]) == {"tf32", "tf32, channels_last", "bfloat16", "bfloat16, channels_last"}
    monkeypatch.setattr(precision, "_seconds", lambda m, b, r, f: seconds[r.precision, r.channels_last])
    found = precision.time_choices(net(), data, recipe, lambda r, m: None)
    assert found["precision"] == "bfloat16" and found["channels_last"]


def test_a_choice_is_kept_in_the_checkpoint(monkeypatch, tmp_path):
    from rankopt.training import finetune as module

    chosen = {"precision": "bfloat16", "channels_last": True, "milliseconds": {"bfloat16, channels_last": 1.0}}
    monkeypatch.setattr(module, "fastest", lambda *args: chosen)
    data, recipe = batches(8, 8), Recipe(epochs=4, precision="auto", ema=0.9)
    whole = rankopt.finetune(net(), task(net(), data), recipe)
    assert whole.info["execution"]["precision"] == "bfloat16" and whole.info["recipe"]["precision"] == "auto"
    count = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(net(), task(net(), data), recipe, folder=tmp_path, stop=lambda: next(count) == 3)
    monkeypatch.setattr(module, "fastest", lambda *args: pytest.fail("measured again"))
    again = rankopt.finetune(net(), task(net(), data), recipe, folder=tmp_path, resume=True)
    for x, y in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(x, y)


# --- early stopping ----------------------------------------------------------------------------------


def test_patience_stops_after_epochs_without_a_better_score(tmp_path):
    """Scores 0.5, 0.6, 0.4, 0.6, 0.9: the third and the fourth epoch bring nothing new."""
    data = batches(8, 8)

    def run(**options):
        given = iter([0.1, 0.5, 0.6, 0.4, 0.6, 0.9, 0.9])
        own = dataclasses.replace(task(net(), data), score=lambda m: next(given))
        return rankopt.finetune(net(), own, Recipe(epochs=6, patience=2, schedule="constant"), **options)

    found = run()
    assert [e["score"] for e in found.info["epochs"]] == [0.5, 0.6, 0.4, 0.6]
    assert len(found.info["losses"]["whole"]) == 8
    assert len(run(folder=tmp_path).info["epochs"]) == 4
    again = rankopt.finetune(
        net(), task(net(), data), Recipe(epochs=6, patience=2, schedule="constant"), folder=tmp_path, resume=True
    )
    assert len(again.info["epochs"]) == 4, "a training that ended does not go on"


def test_patience_needs_a_score():
    with pytest.raises(rankopt.TaskError, match="leave out patience"):
        rankopt.finetune(net(), dataclasses.replace(task(net(), batches(8)), score=None), Recipe(patience=1))


def test_models_with_copies_of_themselves_are_left_alone():
    """Neither the model nor the teacher changes its memory format."""
    model, own = net(), task(net(), batches(8))
    before = own.model.conv.weight.stride()
    rankopt.finetune(copy.deepcopy(model), own, Recipe(epochs=1, channels_last=True))
    assert own.model.conv.weight.stride() == before
