"""Trainings on Ray: the weights of a training in this process, also after a stop, and where a machine is lost."""

import os
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import rankopt.training.finetune as module
from rankopt.candidates.pool import pack
from rankopt.core.errors import StudyError, TaskError
from rankopt.core.records import Task
from rankopt.search.ray.away import Job, Resources, Workplace
from rankopt.search.ray.runner import RaySearch
from rankopt.search.ray.training import Shown, _train
from rankopt.training import checkpoint
from rankopt.training.finetune import finetune
from rankopt.training.recipe import Recipe

RECIPE = Recipe(epochs=3, layerwise=0, distill=0.0)


class Loss:
    """A loss that keeps a checkpoint of every step and counts calls by process, and does something at one of them."""

    def __init__(self, folder, at=0, what="", seconds=0.0):
        self.folder, self.at, self.what, self.seconds = Path(folder), at, what, seconds

    def __call__(self, out, target):
        module.SECONDS = 0.0
        with (self.folder / f"calls-{os.getpid()}").open("a") as file:
            file.write("x")
        time.sleep(self.seconds)
        if self.what and self.counts() == [self.at]:
            time.sleep(2)  # until the last checkpoint has been fetched
            if self.what == "die":
                os._exit(1)
            raise ArithmeticError("on purpose")
        return nn.functional.cross_entropy(out, target)

    def counts(self):
        files = sorted(self.folder.glob("calls-*"), key=lambda path: path.stat().st_mtime_ns)
        return [path.stat().st_size for path in files]


def task(loss):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 8, generator=generator), torch.randint(4, (96,), generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 96, 16)]
    return Task(net, x[:1], [x], train=batches, loss=loss)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", module.SECONDS)


def weights(trained):
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


def here(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (folder / "here").mkdir()
    found = task(Loss(folder / "here"))
    try:
        return weights(finetune(found.model, found, RECIPE))
    finally:
        torch.set_num_threads(threads)


def away(folder, loss, **options):
    found = task(loss)
    return RaySearch(1).finetune(found.model, found, RECIPE, folder=folder, **options)


def left_behind():
    return {path.name for path in Path(tempfile.gettempdir()).glob("rankopt-*-away-*")}


@pytest.mark.slow
def test_the_weights_are_those_of_a_training_here(cluster, tmp_path):
    before, shown, notes = left_behind(), [], []

    def progress(items, what, total):
        shown.append((what, total))
        yield from items

    trained = away(tmp_path, Loss(tmp_path), progress=progress, note=notes.append)
    assert torch.equal(weights(trained), here(tmp_path))
    assert shown == [("training", 18)] and notes[-1].startswith("training, loss") and len(trained.info["epochs"]) == 3
    assert (tmp_path / checkpoint.FILE).is_file() and left_behind() <= before


@pytest.mark.slow
def test_another_worker_goes_on_where_one_was_lost(cluster, tmp_path):
    """The first dies at its tenth step; the second begins with the checkpoint that had come here."""
    loss = Loss(tmp_path, at=10, what="die")
    trained = away(tmp_path, loss)
    assert loss.counts() == [10, 18 - 9]
    assert torch.equal(weights(trained), here(tmp_path))


@pytest.mark.slow
def test_a_stop_leaves_a_checkpoint_to_go_on_from(cluster, tmp_path):
    before, loss = left_behind(), Loss(tmp_path, seconds=0.3)
    with pytest.raises(KeyboardInterrupt):
        away(tmp_path, loss, stop=lambda: sum(loss.counts()) >= 3)
    (steps,) = loss.counts()
    assert 3 <= steps < 18
    again = away(tmp_path, loss, resume=True)
    assert loss.counts() == [steps, 18 - steps]
    assert torch.equal(weights(again), here(tmp_path)) and left_behind() <= before


@pytest.mark.slow
def test_an_error_of_the_training_is_one_sentence(cluster, tmp_path):
    with pytest.raises(TaskError, match="ArithmeticError: on purpose"):
        away(tmp_path, Loss(tmp_path, at=2, what="raise"))
    (tmp_path / checkpoint.FILE).write_bytes(b"damaged")
    with pytest.raises(StudyError, match=f"^{tmp_path / checkpoint.FILE} is damaged"):
        away(tmp_path, Loss(tmp_path), resume=True)


# --- without Ray --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_training_that_asked_for_a_gpu_does_not_take_place_on_the_cpu(tmp_path):
    found = task(Loss(tmp_path))
    parcel, job = pack((found.model, found, RECIPE, None), False), Job("the training", _train, None, folder=tmp_path)
    training = Workplace(parcel, job, {}, Resources(1, 1, 1))
    update = training.poll(60)
    assert isinstance(update.error, TaskError) and "CUDA" in str(update.error) and update.result is None
    assert training.root.is_dir()
    training.close()
    assert not training.root.exists()


def test_displays_show_what_began_elsewhere():
    shown = []

    def progress(items, what, total):
        for item in items:
            shown.append((what, item))
            yield item
        shown.append(f"end of {what}")

    display = Shown(progress)
    display.show(1, "layers", 2, 1)
    display.show(1, "layers", 2, 2)
    display.show(2, "layers", 2, 2)
    display.end()
    one = [("layers", 0), ("layers", 1), "end of layers"]
    assert shown == one + one
