"""Task files on Ray's workers: imported there under the same name, with what the running program changed in them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import TaskError
from rankopt.core.task_file import LOADED, load_file, module_name, send_files
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.svd import SvdOut
from rankopt.experiments.tasks import load_task
from rankopt.search.compress import run_search
from rankopt.search.ray.runner import RaySearch
from rankopt.search.settings import SearchSettings

SPACE = SearchSpace(families=("svd_out",), points=3, steps=0)

TASK = """
import argparse
import enum
import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rankopt import Task
import neighbour
from .nets import Net

argparse.ArgumentParser().parse_args()  # as in a script of its own
SCALE, SEEN, OPENED = 1.0, [], None


class Part(enum.Enum):
    VALIDATION = "validation"


@dataclass
class Settings:
    part: Part = Part.VALIDATION
    size: int = 32


class Wide(Net):
    width = 1

    def forward(self, x):
        return super().forward(x) * SCALE


@functools.cache
def data(part):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 16, generator=generator)


class Score:
    def __init__(self, settings, target):
        self.settings, self.target = settings, target

    def __call__(self, model):
        assert isinstance(model, Wide) and self.settings.part is Part.VALIDATION
        assert (SCALE, Wide.width, SEEN, neighbour.LEVEL) == (2.0, 5, ["here"], 7)
        loader = DataLoader(TensorDataset(data(self.settings.part), self.target), self.settings.size, num_workers=1)
        with torch.no_grad():
            return 1 / (1 + sum((model(x) - y).square().mean().item() for x, y in loader))


def task():
    global SCALE, OPENED
    SCALE, Wide.width, neighbour.LEVEL = 2.0, 5, 7
    SEEN.append("here")
    OPENED = open(__file__)  # cannot be sent, and is not
    net = Wide().eval()
    with torch.no_grad():
        score = Score(Settings(), net(data(Part.VALIDATION)))
    return Task(net, torch.zeros(1, 16), (x for x in data(Part.VALIDATION).split(32)), score=score)
"""

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
"""

# What a worker does with what it is sent, in a process that knows nothing of the task.
WORKER = """
import pickle, sys
from pathlib import Path
from rankopt.core.task_file import restore

files, payload = pickle.loads(Path(sys.argv[1]).read_bytes())
for file in files:
    file.load(Path(sys.argv[2]))
changes, task = pickle.loads(payload)
restore(changes)
print(task.score(task.model), sys.modules[type(task.model).__module__].__file__)
"""


@pytest.fixture
def task_file(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "neighbour.py").write_text("LEVEL = 0\n")
    (folder / "nets.py").write_text(NETS)
    (folder / "everything.py").write_text(TASK)
    yield folder / "everything.py"
    for name in [n for n in sys.modules if n == "neighbour" or n.startswith("rankopt_task_everything")]:
        del sys.modules[name]
    LOADED.clear()


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_a_search_on_ray_with_all_that_a_task_file_may_hold(task_file, cluster):
    prepared = prepare(load_task(f"{task_file}:task"), SPACE, cache=task_file.parent / "cache")
    found = {}
    for name, runner in {"here": None, "there": RaySearch(1)}.items():
        given = {} if runner is None else {"runner": runner}
        result = run_search(prepared, prepared.problem({"params": 0.5}), SearchSettings("random", 3), **given)
        assert result.info["trials"]["finished"] == 3
        found[name] = result.info["objective"]["best"], result.info["score"]["compressed"]["validation"]
    assert found["there"] == pytest.approx(found["here"], rel=1e-5)


@pytest.mark.slow
def test_a_decomposition_that_was_registered_here_is_known_to_workers(cluster, digits):
    class Own(SvdOut):
        name = "own_on_ray"

    space = SearchSpace(families=(Own(),), points=3, steps=0)
    try:
        prepared = prepare(digits.task, space, workers=1)
        settings = SearchSettings("random", 2)
        result = run_search(prepared, prepared.problem({"params": 0.5}), settings, runner=RaySearch(1))
    finally:
        DECOMPOSITIONS.registered.clear()
    assert result.info["trials"]["failed"] == 0
    assert "own_on_ray" in {row["method"] for row in result.info["layers"]}


def sent_and_run(task_file, tmp_path, other_machines):
    """What a task scores in another process, and the file that it ran there."""
    task = load_task(f"{task_file}:task")
    task.calibration = ()  # generators are not sent; an Evaluator does not hold it
    sent = send_files(pickle.dumps, task, other_machines)
    (tmp_path / "sent").write_bytes(pickle.dumps(sent))
    if other_machines:
        task_file.parent.rename(tmp_path / "away")
    command = [sys.executable, "-c", WORKER, str(tmp_path / "sent"), str(tmp_path / "scratch")]
    # The working folder is one from which neither the task nor its neighbours can be imported.
    ran = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert ran.returncode == 0, ran.stderr
    score, file = ran.stdout.split()
    assert float(score) == pytest.approx(task.score(task.model), rel=1e-6)
    return Path(file)


def test_another_process_runs_the_file_where_it_lies(task_file, tmp_path):
    assert sent_and_run(task_file, tmp_path, other_machines=False) == task_file


def test_a_machine_without_the_file_gets_it_and_its_neighbours(task_file, tmp_path):
    ran = sent_and_run(task_file, tmp_path, other_machines=True)
    assert ran == tmp_path / "scratch" / module_name(task_file) / "everything.py"


def test_a_file_that_was_edited_meanwhile_runs_as_it_was(task_file, tmp_path):
    load_task(f"{task_file}:task")
    files, _ = send_files(pickle.dumps, module_name(task_file), other_machines=False)
    task_file.write_text("raise RuntimeError('edited')")
    files[0].load(tmp_path)
    assert sys.modules[module_name(task_file)].Wide.width == 1


def test_only_what_changed_since_the_import_is_sent(task_file):
    load_task(f"{task_file}:task")
    file = LOADED[module_name(task_file)]
    changed = {(owner, name) for _, owner, name in file.changes()}
    assert changed == {("", "SCALE"), ("", "SEEN"), ("", "OPENED"), ("Wide", "width"), ("", "LEVEL")}


def test_a_tensor_that_a_task_writes_into_has_changed(tmp_path):
    (tmp_path / "writes.py").write_text("import torch\nA, B = torch.zeros(3), torch.zeros(3)\ndef task(): A[0] = 1\n")
    with pytest.raises(TaskError):
        load_task(f"{tmp_path / 'writes.py'}:task")
    ((key, value),) = LOADED.pop(module_name(tmp_path / "writes.py")).changes().items()
    assert key[2] == "A" and torch.equal(value, torch.tensor([1.0, 0, 0]))


def test_a_task_that_is_not_used_is_not_run_again(task_file, tmp_path):
    (tmp_path / "other.py").write_text("ONE = 1\n")
    with pytest.raises(TaskError):
        load_task(f"{tmp_path / 'other.py'}:task")
    task = load_task(f"{task_file}:task")
    files, _ = send_files(pickle.dumps, task.model, other_machines=False)
    assert [f.path for f in files] == [task_file]


def test_a_folder_full_of_code_is_not_sent_to_other_machines(task_file):
    load_task(f"{task_file}:task")
    (task_file.parent / "huge.py").write_bytes(b"#" * (21 << 20))
    assert send_files(pickle.dumps, module_name(task_file), other_machines=False)
    with pytest.raises(TaskError, match="folder of their own"):
        send_files(pickle.dumps, module_name(task_file), other_machines=True)


def test_two_files_of_one_name_are_two_modules(tmp_path):
    """A teacher's task.py beside a student's: each pickles, and is read elsewhere, as its own."""
    functions = []
    for width in (1, 2):
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / "task.py").write_text(f"WIDTH = {width}\nclass Net:\n    width = WIDTH\n")
        functions.append(load_file(folder / "task.py").Net)
    assert [pickle.loads(pickle.dumps(f)).width for f in functions] == [1, 2]
    files, payload = send_files(pickle.dumps, [f() for f in functions], other_machines=False)
    assert len({f.name for f in files}) == 2 and all(f.name.startswith("rankopt_task_task_") for f in files)
    for file in files:
        del sys.modules[file.name], LOADED[file.name]
        file.load(tmp_path)
    assert [net.width for net in pickle.loads(payload)[1]] == [1, 2]
