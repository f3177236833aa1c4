"""Training on a GPU: pytest -m gpu tests/gpu/test_training.py."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankopt
from rankopt import Recipe
from rankopt.core.records import Task
from rankopt.training import loop
from rankopt.training.loop import new_capture, supervised, train
from rankopt.training.losses import TrainingLoss
from rankopt.training.recipe import make_optimizer

pytestmark = pytest.mark.gpu

FULL = Recipe(epochs=12, rate=0.02, ema=0.9, distill=0.5, smoothing=0.1)


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Linear(16, 5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.linear(self.dropout(F.relu(self.norm(self.conv(x))).mean((2, 3))))


class Waiting(Net):
    """Its forward pass waits for the GPU, which cannot be recorded."""

    def forward(self, x):
        return super().forward(x) * (1.0 if x.mean().item() < 1e9 else 2.0)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def net(kind=Net, **options):
    torch.manual_seed(0)
    return kind(**options).cuda()


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 12, 12, generator=generator), torch.arange(n) % 5) for n in sizes]


def task(model, data):
    return Task(
        model=model,
        example_input=torch.zeros(1, 3, 12, 12),
        calibration=[x for x, _ in data],
        score=lambda m: float((m(data[0][0].cuda()).argmax(1).cpu() == data[0][1]).float().mean()),
        train=data,
        loss=F.cross_entropy,
    )


def close(a, b):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)


def not_recorded(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "recorder", lambda device: None)
        return function()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_recorded_training_gives_the_same_weights(optimizer, channels_last, monkeypatch):
    data = batches(32, 32, 32, 20)
    rate = 0.02 if optimizer == "sgd" else 1e-3
    recipe = dataclasses.replace(FULL, optimizer=optimizer, rate=rate, channels_last=channels_last)

    def run():
        return rankopt.finetune(net(), task(net(), data), recipe)

    plain, recorded = not_recorded(monkeypatch, run), run()
    print(recorded.info["execution"], plain.info["execution"])
    assert recorded.info["execution"]["not_recorded"] == "" and recorded.info["execution"]["graphs"] == 2
    close(recorded.model, plain.model)
    (_, first), *_, (_, last) = recorded.info["losses"]["whole"]
    assert last < first


def test_a_model_that_waits_is_trained_kernel_by_kernel(monkeypatch):
    """Dropout too: a failed recording must not leave torch's generator in a bad state."""
    data = batches(32, 32)
    ends = [
        run(lambda: rankopt.finetune(net(Waiting, dropout=0.3), task(net(Waiting), data), FULL))
        for run in (lambda f: f(), lambda f: not_recorded(monkeypatch, f))
    ]
    print(ends[0].info["execution"]["not_recorded"])
    assert ends[0].info["execution"]["graphs"] == 0 and ends[0].info["execution"]["not_recorded"]
    close(ends[0].model, ends[1].model)
    again = rankopt.finetune(net(), task(net(), data), FULL)
    assert again.info["execution"]["graphs"] == 1, "the next model is recorded"


def test_dropout_draws_at_every_replay():
    def run(seed):
        model = net(dropout=0.5)
        moving = list(model.parameters())
        capture = new_capture(model, moving, 30)
        optimizer = make_optimizer(Recipe(rate=1e-12), moving, fused=True)
        found = train(model, batches(32), supervised(F.cross_entropy), optimizer, steps=30, seed=seed, capture=capture)
        assert capture.shapes == 1, capture.reason
        return found[5:]

    one = run(1)
    assert len({round(x, 5) for x in one}) > 20
    assert one == pytest.approx(run(1), rel=1e-4) and one != pytest.approx(run(2), rel=1e-4)


def test_replayed_steps_do_not_wait():
    """torch raises where something waits for the GPU."""
    data = [(x.cuda(), y.cuda()) for x, y in batches(32, 32)]
    model, teacher = net(), net()
    moving = list(model.parameters())
    capture = new_capture(model, moving, 60)
    optimizer = make_optimizer(Recipe(), moving, fused=True)
    loss = TrainingLoss(Recipe(), task(teacher, data), teacher, model)

    def after_step(step, losses):
        torch.cuda.set_sync_debug_mode("error" if 5 <= step < 55 else "default")

    try:
        history = train(model, data, loss, optimizer, steps=60, clip=5.0, after_step=after_step, capture=capture)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(history) == 60 and capture.shapes == 1, capture.reason


def test_a_loss_that_is_not_finite_is_noticed():
    with pytest.raises(rankopt.TaskError, match="lower learning rate"):
        rankopt.finetune(net(), task(net(), batches(32)), Recipe(epochs=150, rate=1e12, clip=0, distill=0))


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "tf32"])
def test_it_goes_on_after_a_stop(precision, tmp_path):
    data, count = batches(32, 32), iter(range(1000))
    recipe = dataclasses.replace(FULL, precision=precision, epochs=15)
    whole = rankopt.finetune(net(), task(net(), data), recipe)
    print(whole.info["execution"])
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(net(), task(net(), data), recipe, folder=tmp_path, stop=lambda: next(count) == 12)
    again = rankopt.finetune(net(), task(net(), data), recipe, folder=tmp_path, resume=True)
    assert len(again.info["epochs"]) == 15 and again.info["execution"]["graphs"] == 1
    for x, y in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0.2, atol=0.05)
    if precision == "auto":
        assert len(whole.info["execution"]["milliseconds"]) == 4


def test_batches_that_lie_on_the_gpu_are_those_of_the_cpu():
    x = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    sides = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        data = rankopt.data.DeviceImages(
            x, torch.arange(50), 16, mean=(0.4,) * 3, std=(0.2,) * 3, padding=2, flip=True, device=device
        )
        sides.append([(a.cpu(), b.cpu()) for a, b in data])
    for (a, b), (c, d) in zip(*sides, strict=True):
        torch.testing.assert_close(a, c)
        assert torch.equal(b, d)


def test_layer_by_layer_and_feature_maps_are_recorded(digits):
    from rankopt.experiments.tasks import load_task
    from rankopt.search.compress import run_search
    from rankopt.search.settings import SearchSettings

    result = run_search(digits, digits.problem({"params": 0.15}), SearchSettings())
    own = load_task("digits")
    own.model.cuda()
    trained = rankopt.finetune(result.model.cuda(), own, Recipe(epochs=3, features=0.5, layerwise=40, precision="auto"))
    print(trained.info["execution"])
    assert trained.info["execution"]["not_recorded"] == "" and trained.info["execution"]["graphs"] >= 2
    assert own.score(trained.model) > trained.info["before"]


def test_a_training_on_ray_takes_place_on_the_gpu_and_returns_to_the_cpu(tmp_path):
    """What the actor does, in this process; models come from a machine without a GPU."""
    from rankopt.candidates.pool import pack
    from rankopt.experiments.tasks import load_task
    from rankopt.search.ray.away import Job, Resources, Workplace
    from rankopt.search.ray.training import _train

    own, recipe = load_task("digits"), Recipe(epochs=1)
    parcel, job = pack((own.model, own, recipe, None), False), Job("the training", _train, None, folder=tmp_path)
    training = Workplace(parcel, job, {}, Resources(1, 1, 1))
    update = training.poll(600)
    training.close()
    assert update.error is None and update.files
    assert update.result.info["execution"]["device"].startswith("cuda")
    assert all(p.device.type == "cpu" for p in update.result.model.parameters())


def test_a_whole_case_takes_place_on_the_gpu(tmp_path):
    """What a worker of `rankopt run --workers N --gpus-per-trial 1` does, in this process."""
    from rankopt.core.progress import StopCondition
    from rankopt.experiments.cases import CaseFinished, run_cases
    from rankopt.experiments.config import read_study
    from rankopt.search.progress import ProgressBar
    from rankopt.search.storage.local import read_trials
    from tests.helpers.crews import PretendedCrew

    (tmp_path / "study.toml").write_text(
        'task = "digits"\nspace = { base = "default", families = ["svd_out"], points = 4, steps = 0 }\n'
        "training = { epochs = 0.5 }\n"
        '[[cases]]\nname = "a"\nbudget.params = 0.3\n[[cases]]\nname = "b"\nbudget.macs = 0.5\n'
    )
    study, out = read_study(tmp_path / "study.toml"), tmp_path / "out"
    events = list(run_cases(study, out, PretendedCrew(2, -1, 1.0), None, StopCondition(), ProgressBar()))
    assert [e.name for e in events if isinstance(e, CaseFinished)] == ["b", "a"], events
    for case in ("a", "b"):
        assert all(trial["device"].startswith("cuda") for trial in read_trials(out / case))
        training = json.loads((out / case / "trained" / "result.json").read_text())["training"]
        assert training["execution"]["device"].startswith("cuda")
