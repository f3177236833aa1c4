"""Tasks by name: built-in, a function of a file, a function of a module; and where their results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankopt.cli.app import default_folder
from rankopt.core.errors import TaskError
from rankopt.experiments.tasks import load_task

NET = """
import torch
from torch import nn
import rankopt


def small():
    return rankopt.Task(nn.Linear(8, 8), torch.zeros(1, 8), [torch.randn(4, 8)])


def none():
    return None
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the working folder."""
    (tmp_path / "own_package_21").mkdir()
    (tmp_path / "own_package_21" / "__init__.py").write_text("")
    (tmp_path / "own_package_21" / "nets.py").write_text(NET)
    (tmp_path / "own_package_21" / "broken.py").write_text("import not_installed_21\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_package_21"


def test_a_function_of_a_module(package):
    task = load_task(f"{package}.nets:small")
    assert task.name == f"{package}.nets:small"
    assert task.model.in_features == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{0}.nets:large", "own_package_21.nets has no function 'large': name a built-in task"),
        ("{0}.nets:none", "returned NoneType"),
        (
            "{0}.broken:small",
            "module own_package_21.broken cannot be imported: ModuleNotFoundError: No module named 'not_i",
        ),
        ("{0}.nothing:small", "No module named 'own_package_21.nothing'"),
        ("not_installed_21:small", "No module named 'not_installed_21'"),
        ("folder/nets:small", "unknown task 'folder/nets:small': name a built-in task"),
        (":small", "unknown task ':small'"),
        ("..nets:small", "unknown task '..nets:small'"),
        ("digitz", "or package.module:function"),
    ],
)
def test_what_cannot_be_loaded(package, name, message):
    with pytest.raises(TaskError) as error:
        load_task(name.format(package))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("digits", "digits-knapsack"),
        ("work/nets.py:resnet", "nets-resnet-knapsack"),
        ("work/nets.py:vit", "nets-vit-knapsack"),
        ("package.nets:vit", "nets-vit-knapsack"),
    ],
)
def test_each_function_has_a_folder_of_its_own(task, folder):
    assert default_folder(task, "knapsack") == Path("runs") / folder
    assert default_folder(task, "my.module:Own") == Path("runs") / folder.replace("knapsack", "my.module-Own")
