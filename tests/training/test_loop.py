"""Training a compressed model: losses and settings, and that it continues after any stop to the same weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import rankopt
from rankopt import Recipe
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.run_folder import lock_folder
from rankopt.report.training import lines
from rankopt.search.compress import run_search
from rankopt.search.result import Result
from rankopt.search.settings import SearchSettings
from rankopt.search.train_run import train_run
from rankopt.training import checkpoint
from rankopt.training.initialization import from_scratch
from rankopt.training.loop import divergence, endless, split
from rankopt.training.losses import TrainingLoss, blocks, distance, factorised, recorded
from rankopt.training.recipe import make_optimizer, make_schedule
from tests.helpers.command import run

EVERYTHING = Recipe(
    epochs=2,
    optimizer="adamw",
    rate=1e-3,
    schedule="one-cycle",
    smoothing=0.1,
    distill=0.5,
    features=0.5,
    ema=0.9,
    precision="bfloat16",
    channels_last=True,
    best=True,
    layerwise=10,
    units="blocks",
)


@pytest.fixture(scope="module")
def result(digits):
    return run_search(digits, digits.problem({"params": 0.15}), SearchSettings())


@pytest.fixture(scope="module")
def digits_bits(digits, _cache):
    """A plan with int8 weights."""
    space = SearchSpace(name="bits", families=("svd_out", "cp_merged"), points=3, steps=0, precisions=("same", "int8"))
    prepared = prepare(digits.task, space, workers=1)
    return run_search(prepared, prepared.problem({"bytes": 0.1}), SearchSettings()), digits.task


@pytest.fixture(scope="module")
def task(digits):
    return digits.task


class Noisy:
    """A user's loader, which draws other batches in every epoch from torch's global generator."""

    def __init__(self, task, size=100):
        self.x, self.y = (torch.cat(part) for part in zip(*task.train, strict=True))
        self.size = size

    def __len__(self):
        return len(self.x) // self.size

    def __iter__(self):
        for some in torch.randperm(len(self.x)).split(self.size):
            yield self.x[some] + 0.1 * torch.randn(self.x[some].shape), self.y[some]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- what it reaches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=5),
        Recipe(epochs=5, distill=0.0, momentum=0.0, schedule="constant"),
        Recipe(epochs=5, optimizer="adamw", rate=2e-3, schedule="one-cycle", ema=0.9),
        Recipe(epochs=0, layerwise=150, layerwise_rate=3e-3),
        Recipe(epochs=0, layerwise=150, layerwise_rate=3e-3, units="blocks"),
    ],
    ids=lambda r: " ".join(f"{k}={v}" for k, v in r.changed().items()),
)
def test_training_helps_and_leaves_the_model_alone(result, task, recipe):
    before = {k: v.clone() for k, v in result.model.state_dict().items()}
    trained = rankopt.finetune(result.model, task, recipe)
    assert trained.info["before"] == pytest.approx(result.info["score"]["compressed"]["validation"])
    assert task.score(trained.model) > trained.info["before"] + 0.03
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())
    assert rankopt.count(trained.model, task.example_input) == result.plan.cost
    assert [len(x) for x in trained.info["losses"].values()] == [100 if recipe.epochs else 150]
    json.dumps(trained.info)


def test_without_labels_it_learns_from_the_dense_model_alone(result, task):
    unlabelled = dataclasses.replace(task, train=None, loss=None)
    trained = rankopt.finetune(result.model, unlabelled, Recipe(epochs=5))
    assert task.score(trained.model) > trained.info["before"] + 0.03


def test_all_settings_together(result, task):
    trained = rankopt.finetune(result.model, task, EVERYTHING)
    assert task.score(trained.model) > trained.info["before"]
    assert trained.info["recipe"] == dataclasses.asdict(EVERYTHING) and len(trained.info["epochs"]) == 2


def test_eval_mode_keeps_the_statistics_of_batch_norms(result, task):
    for eval_mode in (True, False):
        state = rankopt.finetune(result.model, task, Recipe(epochs=0.2, eval_mode=eval_mode)).model.state_dict()
        assert torch.equal(state["bn3.running_mean"], result.model.bn3.running_mean) == eval_mode


def test_best_keeps_the_best_epoch(result, task):
    """The second of three, by scores that are given."""
    given, seen = [0.5, 0.2, 0.6, 0.4], []  # before training, and after every epoch

    def score(model):
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return given[len(seen) - 1]

    scored = dataclasses.replace(task, score=score, test=None)
    best = rankopt.finetune(result.model, scored, Recipe(epochs=3, warmup=0, distill=0, best=True))
    assert [e["score"] for e in best.info["epochs"]] == given[1:]
    found = nn.utils.parameters_to_vector(best.model.parameters())
    assert torch.equal(found, seen[2])
    assert not torch.equal(found, seen[3])


def test_the_average_is_of_the_weights_after_every_step(result, task, tmp_path):
    recipe = Recipe(epochs=0.15, ema=0.8)
    kept = rankopt.finetune(result.model, task, recipe).model.state_dict()
    name = next(k for k in kept if k.endswith("bias"))
    plain = dataclasses.replace(recipe, ema=0.0)
    first, second, third = (
        _stopped_after(n, result.model, task, plain, tmp_path / str(n))[f"model.{name}"] for n in (1, 2, 3)
    )
    torch.testing.assert_close(kept[name], 0.8 * (0.8 * first + 0.2 * second) + 0.2 * third)


def _stopped_after(steps, model, task, recipe, folder):
    """The checkpoint's tensors after a number of steps."""
    count = itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(model, task, recipe, folder=folder, stop=lambda: next(count) == steps)
    return checkpoint.load(folder / checkpoint.FILE)[1]


# --- losses ------------------------------------------------------------------------------------------


def test_the_loss_is_the_formula(result, task):
    """Against torch's own cross entropy with smoothing, KL divergence and a mean over layers by hand."""
    recipe = Recipe(smoothing=0.1, distill=0.3, temperature=3.0, features=0.7)
    x, y = task.train[0]
    small, dense = result.model.eval(), task.model.eval()
    z, z0 = small(x), dense(x).detach()
    kl = F.kl_div(F.log_softmax(z / 3, 1), F.softmax(z0 / 3, 1), reduction="batchmean")
    names = factorised(small)
    with recorded(small, names) as a, recorded(dense, names) as b:
        small(x), dense(x)
    parts = [((a[n][0] - b[n][0]) ** 2).mean() / b[n][0].var(correction=0) for n in names]
    wanted = 0.7 * F.cross_entropy(z, y, label_smoothing=0.1) + 0.3 * 9 * kl + 0.7 * sum(parts) / len(parts)
    torch.testing.assert_close(TrainingLoss(recipe, task, dense, small)(small, (x, y)), wanted)


def test_another_teacher_is_listened_to(result, task):
    class Stubborn(nn.Module):
        def forward(self, x):
            return F.one_hot(torch.full((len(x),), 3), 10) * 20.0

    trained = rankopt.finetune(result.model, task, Recipe(epochs=3, distill=1.0, temperature=1.0), teacher=Stubborn())
    assert (trained.model(task.train[0][0]).argmax(1) == 3).all()


def test_weights_in_fewer_bits_learn_and_stay_in_fewer_bits(digits_bits):
    """They are trained wide and rounded again; without it int8 weights would never move."""
    result, task = digits_bits
    kinds = {k: v.dtype for k, v in result.model.state_dict().items()}
    assert torch.int8 in kinds.values()
    for recipe in (Recipe(epochs=1, ema=0.9), Recipe(epochs=0, layerwise=10)):
        small = rankopt.finetune(result.model, task, recipe).model
        assert {k: v.dtype for k, v in small.state_dict().items()} == kinds
        moved = [k for k, v in small.state_dict().items() if not torch.equal(v, result.model.state_dict()[k])]
        assert any(kinds[k] == torch.int8 for k in moved)
    drawn = from_scratch(task.model, result.plan)
    assert {k: v.dtype for k, v in drawn.state_dict().items()} == kinds
    assert all(v.any() for v in drawn.state_dict().values() if v.dtype == torch.int8)


class Odd(nn.Module):
    """Indices in a buffer, a ReLU in place, and an output as HuggingFace's whose logits come last."""

    class Output(OrderedDict):
        @property
        def logits(self):
            return self["logits"]

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)
        self.register_buffer("index", torch.arange(63, -1, -1))

    def forward(self, x):
        first = self.a(x)
        y = self.b(F.relu(first, inplace=True))
        return self.Output(first=y.mean(), logits=self.head(y.mean((2, 3))))


def test_indices_outputs_of_a_class_and_changes_in_place(task):
    torch.manual_seed(0)
    odd = Odd().eval()

    def loss(out, target):
        return F.cross_entropy(out.logits, target)

    x, y = task.train[0]
    own = dataclasses.replace(task, model=odd, train=[(x, y)], loss=loss, score=None, test=None)
    lesson = TrainingLoss(Recipe(distill=1.0), own, odd, odd)
    assert lesson(odd, (x, y)).item() == pytest.approx(0, abs=1e-6), "against itself"
    for precision in ("float32", "bfloat16"):
        trained = rankopt.finetune(odd, own, Recipe(epochs=2, ema=0.9, precision=precision)).model
        assert torch.equal(trained.index, odd.index)
    with recorded(odd, ["a"]) as maps:
        odd(x)
    assert maps["a"][0].min() < 0, "what the layer gave, before the ReLU"


def test_one_example_is_no_reason_to_explode():
    z, wanted = torch.tensor([[2.5]]), torch.tensor([[2.0]])
    assert divergence(z, wanted).item() == pytest.approx(0.25 / 4)
    assert [len(x) for x in split([torch.zeros(129, 3)], 64)] == [43, 43, 43]


def test_a_loader_that_shuffles_unlabelled_inputs_gives_the_same_weights(result, task):
    x = torch.cat(list(task.calibration))
    loader = DataLoader(x, batch_size=50, shuffle=True)
    own = dataclasses.replace(task, calibration=loader)
    recipe = Recipe(epochs=0, layerwise=5)
    assert same(*(rankopt.finetune(result.model, own, recipe).model for _ in range(2)))


def test_frozen_layers_stay(result, task):
    model = copy.deepcopy(result.model)
    (first, *_), fixed = factorised(model), {}
    for name, p in model.get_submodule(first).named_parameters():
        fixed[name] = p.requires_grad_(False).clone()
    small = rankopt.finetune(model, task, Recipe(epochs=1, layerwise=5)).model
    assert all(torch.equal(p, fixed[name]) for name, p in small.get_submodule(first).named_parameters())


def test_layers_learn_each_by_itself(result, task):
    """No gradient of one layer's error reaches another; without `apart` it does."""
    x, names = task.train[0][0], factorised(result.model)
    for apart in (True, False):
        small = rankopt.finetune(result.model, task, Recipe(epochs=0, layerwise=1)).model.eval()
        with recorded(task.model, names) as wanted:
            task.model(x)
        with recorded(small, names, apart=apart) as maps:
            small(x)
        distance({names[-1]: maps[names[-1]]}, wanted).backward()
        reached = {n for n in names if any(p.grad is not None for p in small.get_submodule(n).parameters())}
        assert (reached == {names[-1]}) == apart
    assert blocks(result.model) == names, "layers of the model itself"


def test_a_divergence_at_a_temperature_has_gradients_of_one_size():
    z, wanted = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10)
    sizes = [torch.autograd.grad(divergence(z, wanted, t), z)[0].norm() for t in (20.0, 40.0)]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 20), (0.3, 20), (0.05, 3)])
def test_rates_rise_to_the_largest_and_fall(schedule, warmup, steps):
    recipe = Recipe(rate=0.5, schedule=schedule, warmup=warmup)
    optimizer = make_optimizer(recipe, [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))])
    plan, rates = make_schedule(recipe, optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    assert max(rates) <= 0.5 + 1e-12 and (steps < 20 or max(rates) == pytest.approx(0.5, rel=0.02))
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert steps < 20 or peak == pytest.approx(warmup * steps, abs=1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]


def test_batches_do_not_depend_on_what_the_model_draws():
    def draw(between, start=0):
        found = []
        for x in itertools.islice(endless(Loader(), 5, start), 9 - start):
            found.append(x.clone())
            torch.rand(between)
        return found

    class Loader:
        def __len__(self):
            return 4

        def __iter__(self):
            for i in torch.randperm(4):
                yield i + torch.rand(3)

    plain = draw(0)
    assert torch.equal(torch.stack(draw(7)), torch.stack(plain))
    assert not torch.equal(plain[0], plain[4])
    for start in (1, 4, 6):
        assert torch.equal(torch.stack(draw(3, start)), torch.stack(plain[start:]))


def test_a_data_loader_serves(result, task):
    x, y = (torch.cat(part) for part in zip(*task.train, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 100, shuffle=True)
    own = dataclasses.replace(task, train=loader)
    a, b = (rankopt.finetune(result.model, own, Recipe(epochs=1, seed=s)).model for s in (1, 1))
    assert same(a, b)
    assert not same(a, rankopt.finetune(result.model, own, Recipe(epochs=1, seed=2)).model)


# --- stops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "stream"),
    [
        (Recipe(epochs=2), False),
        (EVERYTHING, True),
        (Recipe(epochs=2, schedule="constant", momentum=0.0, layerwise=5, eval_mode=True), True),
    ],
    ids=["plain", "everything", "constant"],
)
def test_it_goes_on_at_any_step_to_the_same_weights(result, task, recipe, stream, tmp_path):
    own = dataclasses.replace(task, train=Noisy(task)) if stream else task
    whole = rankopt.finetune(result.model, own, recipe)
    last = recipe.layerwise + 2 * len(own.train)
    for number, steps in enumerate({recipe.layerwise or 1, len(own.train) + 3, last}):
        folder = tmp_path / str(number)
        _stopped_after(steps, result.model, own, recipe, folder)
        again = rankopt.finetune(result.model, own, recipe, folder=folder, resume=True)
        assert same(again.model, whole.model)
        for key in ("losses", "epochs", "before"):
            assert again.info[key] == whole.info[key]


def test_checkpoints_of_others_and_damaged_ones_are_refused(result, task, tmp_path):
    recipe = Recipe(epochs=1)
    _stopped_after(3, result.model, task, recipe, tmp_path)
    again = {"folder": tmp_path, "resume": True}
    with pytest.raises(rankopt.StudyError, match="go on with resume"):
        rankopt.finetune(result.model, task, recipe, folder=tmp_path)
    for other in ({"rate": 0.02}, {"seed": 1}):
        with pytest.raises(rankopt.StudyError, match="belongs to another training"):
            rankopt.finetune(result.model, task, dataclasses.replace(recipe, **other), **again)
    with pytest.raises(rankopt.StudyError, match="belongs to another training"):
        rankopt.finetune(result.model, task, recipe, teacher=result.model, **again)
    path = tmp_path / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(rankopt.StudyError, match="damaged"):
        rankopt.finetune(result.model, task, recipe, **again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": -1.0}, "rate is -1.0: give a number"),
        ({"optimizer": "adam"}, "choose from sgd, adamw"),
        ({"best": 1}, "best is 1: give true or false"),
        ({"momentum": float("nan")}, "momentum is nan"),
        ({"clip": True}, "clip is True"),
        ({"layerwise": 0.5}, "layerwise is 0.5: give a whole number"),
        ({"epochs": float("inf")}, "epochs is inf"),
    ],
)
def test_bad_recipes(settings, message):
    with pytest.raises(rankopt.RankoptError, match=message):
        Recipe(**settings)


def test_bad_tasks(result, task):
    def attempt(model=result.model, recipe=None, **changes):
        rankopt.finetune(model, dataclasses.replace(task, **changes), recipe or Recipe(epochs=1))

    with pytest.raises(rankopt.TaskError, match="nothing to train"):
        attempt(recipe=Recipe(epochs=0))
    with pytest.raises(rankopt.TaskError, match="train is empty"):
        attempt(train=[])
    with pytest.raises(rankopt.TaskError, match="how many batches an epoch has"):
        attempt(train=iter(task.train))
    with pytest.raises(rankopt.TaskError, match="gives no batch"):
        attempt(train=Empty())
    with pytest.raises(rankopt.TaskError, match=r"must give \(input, target\)"):
        attempt(train=[x for x, _ in task.train])
    with pytest.raises(rankopt.TaskError, match="no factorised layer"):
        attempt(task.model, Recipe(epochs=0, layerwise=3))
    with pytest.raises(rankopt.TaskError, match="no factorised layer"):
        attempt(task.model, Recipe(features=1.0))
    with pytest.raises(rankopt.TaskError, match="without a score"):
        attempt(recipe=Recipe(epochs=1, best=True), score=None)
    with pytest.raises(rankopt.TaskError, match="lower learning rate"):
        attempt(recipe=Recipe(epochs=5, rate=1e9, clip=0, distill=0))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda out, y: F.cross_entropy(out, y[1:]), "the task's loss raised ValueError"),
        (lambda out, y: F.cross_entropy(out, y, reduction="none"), r"of shape \(50,\): it must give a tensor with one"),
        (lambda out, y: F.cross_entropy(out, y).detach(), "the task's loss has no gradient"),
        (lambda out, y: 1.0, "the task's loss gave a value float"),
    ],
)
def test_bad_losses(result, task, loss, said):
    with pytest.raises(rankopt.TaskError, match=said):
        rankopt.finetune(result.model, dataclasses.replace(task, loss=loss), Recipe(epochs=1))


def test_bad_teachers_and_labels_that_are_missing(result, task):
    with pytest.raises(rankopt.TaskError, match="the teacher cannot take the task's inputs: RuntimeError"):
        rankopt.finetune(result.model, task, Recipe(epochs=1), teacher=nn.Linear(3, 10))
    for lack in ({"train": None}, {"loss": None}):
        own = dataclasses.replace(task, **lack)
        for recipe in (Recipe(epochs=1, distill=0), Recipe(epochs=1, smoothing=0.1)):
            with pytest.raises(rankopt.TaskError, match="is for labels: give the task train and loss"):
                rankopt.finetune(result.model, own, recipe)
        assert rankopt.finetune(result.model, own, Recipe(epochs=0.1)).info["labels"] is False


class Empty:
    def __len__(self):
        return 5

    def __iter__(self):
        return iter([])


# --- on the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    result.save(path)
    return path


def test_train_apply_and_report(folder, result, task, tmp_path):
    out = tmp_path / "trained"
    command = ("train", folder, "--task", "digits", "--out", out, "--epochs", 3, "--option", "distill=0.5")
    assert "not listened to with distill=0" in run(*command, "--teacher", "digits", "--option", "distill=0", code=2)[1]
    stdout, _ = run(*command, "--layerwise", 20, "--option", "channels_last=true")
    info = json.loads((out / "result.json").read_text())
    before, after = info["training"]["test_before"], info["score"]["compressed"]["test"]
    assert before == result.info["score"]["compressed"]["test"] < after and f"{after:.2%}"[:-1] in stdout
    assert {p.name for p in out.iterdir()} == {"plan.json", "model.safetensors", "result.json", "report.html"}
    assert "as planned" in run("apply", out, "--task", "digits", "--check")[0]
    page = (out / "report.html").read_text()
    assert "The training" in page and 'id="losses-' in page and 'id="scores-' in page and "distill=0.5" in page
    assert "3 epochs of sgd" in run("report", out)[0]
    small = rankopt.load(task.model, out)
    assert task.test(small.eval()) == pytest.approx(after)
    assert "is finished: choose another --out" in run(*command, code=2)[1]
    other = tmp_path / "other"
    other.mkdir()
    held = lock_folder(other)
    assert "another process is at work in" in run(*command[:4], "--out", other, "--epochs", 1, code=2)[1]
    os.close(held)


def test_a_kill_while_results_are_written_loses_nothing(folder, task, tmp_path, monkeypatch):
    out, recipe = tmp_path / "trained", Recipe(epochs=1)

    def killed(self, folder):
        (folder / "plan.json").write_text("half")
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Result, "save", killed)
        train_run(folder, task, recipe, out)
    again = train_run(folder, task, recipe, out, resume=True)
    assert same(again.model, rankopt.finetune(rankopt.load(task.model, folder), task, recipe).model)
    assert not (out / checkpoint.FILE).exists() and same(again.model, rankopt.load(task.model, out))


def test_a_kill_before_the_report_leaves_it_to_the_resumed_training(folder, task, tmp_path):
    """All else is written then, also the checkpoint is still there; the weights stay as they are."""
    out = tmp_path / "trained"
    trained = train_run(folder, task, Recipe(epochs=0.1), out)
    (out / checkpoint.FILE).write_bytes(b"left")
    command = ("train", folder, "--task", "digits", "--out", out, "--epochs", 0.1)
    assert "is finished" in run(*command, code=2)[1]
    before = (out / "result.json").read_bytes(), (out / "model.safetensors").read_bytes()
    stdout, _ = run(*command, "--resume")
    assert "The training" in (out / "report.html").read_text() and str(out / "report.html") in stdout.replace("\n", "")
    assert before == ((out / "result.json").read_bytes(), (out / "model.safetensors").read_bytes())
    assert not (out / checkpoint.FILE).exists() and same(trained.model, rankopt.load(task.model, out))
    assert "is finished" in run(*command, "--resume", code=2)[1]


def test_a_training_that_does_harm_is_reported():
    scores = {"compressed": {"validation": 0.5, "test": 0.6}}
    about = {"recipe": {}, "teacher": None, "from_scratch": False, "run": "r", "seconds": 1.0}
    told = lines({"score": scores, "training": {**about, "before": 0.6, "test_before": 0.6}})
    assert [": less than before; try a lower rate" in x for x in told] == [False, True, False]
    gentle = {**about, "recipe": {"epochs": 0, "layerwise": 9}, "before": 0.6, "test_before": 0.6, "labels": False}
    told = lines({"score": scores, "training": gentle})
    assert "from predictions alone" in told[0] and "a lower layerwise_rate" in told[1]


def test_bad_commands(folder, tmp_path):
    common = ("train", folder, "--task", "digits", "--out", tmp_path / "out")
    assert "has no option 'lr'" in run(*common, "--option", "lr=3", code=2)[1]
    assert "option clip=none is no float" in run(*common, "--option", "clip=none", code=2)[1]
    assert "rate is -1.0" in run(*common, "--rate", -1, code=2)[1]
    assert "there is no" in run("train", tmp_path, "--task", "digits", code=2)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stopped_after_its_minutes_and_killed_at_a_random_step(folder, tmp_path):
    """--minutes, then kill -9, then an end: the weights of a training that nothing disturbed."""
    command = [sys.executable, "-m", "rankopt.cli", "train", str(folder), "--task", "digits", "--epochs", "5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*command[3:], "--out", whole)
    _, stderr = run(*command[3:], "--out", broken, "--minutes", 0, code=130)
    assert "go on with --resume" in stderr and (broken / checkpoint.FILE).is_file()
    often = "import sys, rankopt.cli.main; import rankopt.training.finetune as f; f.SECONDS = 0; "
    often += "rankopt.cli.main.main()"
    arguments = [sys.executable, "-c", often, *command[3:], "--out", str(broken), "--resume"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = checkpoint.load(broken / checkpoint.FILE)[0]["step"]
    goal = start + random.randint(5, 60)
    while process.poll() is None and checkpoint.load(broken / checkpoint.FILE)[0]["step"] < goal:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = checkpoint.load(broken / checkpoint.FILE)[0]["step"]
    assert goal <= step < 100
    run(*command[3:], "--out", broken, "--resume")
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
