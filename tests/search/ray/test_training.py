"""Trainings on Ray: the weights of a training in this process, also after a stop, and where a machine is lost."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import rankopt.training.finetune as module
from rankopt.candidates.pool import pack
from rankopt.core.errors import StudyError, TaskError
from rankopt.core.records import Task
from rankopt.search.ray.runner import RaySearch
from rankopt.search.ray.training import Resources, Training, _Shown
from rankopt.training import checkpoint
from rankopt.training.finetune import finetune
from rankopt.training.recipe import Recipe

RECIPE = Recipe(epochs=3, layerwise=0, distill=0.0)


class Loss:
    """A loss that keeps a checkpoint of every step, and does something at one step, once for all processes."""

    def __init__(self, folder, at=0, what=""):
        self.marker, self.at, self.what = Path(folder) / "done", at, what
        self.calls = 0

    def __call__(self, out, target):
        self.calls += 1
        module.SECONDS = 0.0
        if self.what and self.calls == self.at and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            if self.what == "die":
                os._exit(1)
            raise ArithmeticError("on purpose")
        return nn.functional.cross_entropy(out, target)


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
    found = task(Loss(folder))
    try:
        return weights(finetune(found.model, found, RECIPE))
    finally:
        torch.set_num_threads(threads)


def away(folder, loss, **options):
    found = task(loss)
    return RaySearch(1).finetune(found.model, found, RECIPE, folder=folder, **options)


def left_behind():
    return {path.name for path in Path(tempfile.gettempdir()).glob("rankopt-train-*")}


@pytest.mark.slow
def test_the_weights_are_those_of_a_training_here(cluster, tmp_path):
    before, shown, notes = left_behind(), [], []

    def progress(items, what, total):
        shown.append((what, total))
        yield from items

    trained = away(tmp_path, Loss(tmp_path), progress=progress, note=notes.append)
    assert torch.equal(weights(trained), here(tmp_path))
    assert shown == [("training", 18)] and notes[-1].startswith("training, loss") and len(trained.info["epochs"]) == 3
    assert (tmp_path / checkpoint.FILE).is_file() and left_behind() == before


@pytest.mark.slow
def test_another_worker_goes_on_where_one_was_lost(cluster, tmp_path):
    """The first training dies at its tenth step; the second begins at a checkpoint, and so makes fewer than all 18."""
    loss = Loss(tmp_path, at=10, what="die")
    trained = away(tmp_path, loss)
    assert (tmp_path / "done").exists()
    assert torch.equal(weights(trained), here(tmp_path))


@pytest.mark.slow
def test_a_stop_leaves_a_checkpoint_to_go_on_from(cluster, tmp_path):
    before, asked = left_behind(), []
    with pytest.raises(KeyboardInterrupt):
        away(tmp_path, Loss(tmp_path), stop=lambda: len(asked) > 0 or bool(asked.append(1)))
    if (tmp_path / checkpoint.FILE).is_file():  # else it was stopped before the first step
        assert torch.equal(weights(away(tmp_path, Loss(tmp_path), resume=True)), here(tmp_path))
    assert left_behind() == before


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
    training = Training(pack((found.model, found, RECIPE, None), False), None, Resources(1, 1, 1), str(tmp_path))
    update = training.poll(60)
    assert isinstance(update.error, TaskError) and "CUDA" in str(update.error) and update.trained is None
    assert training.folder.is_dir()
    training.close()
    assert not training.folder.exists()


def test_displays_show_what_began_elsewhere():
    shown = []

    def progress(items, what, total):
        for item in items:
            shown.append((what, item))
            yield item
        shown.append(f"end of {what}")

    display = _Shown(progress)
    display.show(1, "layers", 2, 1)
    display.show(1, "layers", 2, 2)
    display.show(2, "layers", 2, 2)
    display.end()
    one = [("layers", 0), ("layers", 1), "end of layers"]
    assert shown == one + one
