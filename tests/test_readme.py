"""What the README shows runs, and what it claims stands in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

import rankopt
from rankopt.export.export import export
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_two_commands_are_at_the_top():
    commands = re.findall(r"^    (make \w+)", README[:1500], re.M)
    assert commands == ["make demo", "make test"]


def test_the_example_task_works_the_first_time(tmp_path, quick_space):
    (source,) = (b for b in BLOCKS if b.startswith("# my_task.py"))
    (tmp_path / "my_task.py").write_text(source)
    stdout, _ = run("inspect", "my_task.py:my_cnn", cwd=tmp_path)
    assert "Conv2d" in stdout
    run(
        "search",
        "my_task.py:my_cnn",
        "--budget",
        "params=0.5",
        "--out",
        "runs/mine",
        "--space",
        quick_space,
        cwd=tmp_path,
    )
    info = json.loads((tmp_path / "runs" / "mine" / "result.json").read_text())
    assert info["budget"]["params"]["achieved"] <= info["budget"]["params"]["target"]
    stdout, _ = run("apply", "runs/mine", "--task", "my_task.py:my_cnn", "--check", cwd=tmp_path)
    assert "as planned" in stdout


def test_the_five_lines_run(tmp_path, quick_space, monkeypatch):
    (source,) = (b for b in BLOCKS if b.startswith("import rankopt"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def build_model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4))

    names = {
        "model": build_model(),
        "build_model": build_model,
        "train_loader": [(torch.randn(64, 24), torch.zeros(64))],
        "top1": lambda model: 0.5,
    }
    exec(compile(source, "README.md", "exec"), names)
    assert rankopt.count(names["small"], torch.zeros(1, 24)).params <= 350


def test_the_lines_without_torch_run(tmp_path, monkeypatch):
    (source,) = (b for b in BLOCKS if "onnxruntime" in b)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(3600, 10))
    export(model, "onnx", "runs/r20/export.onnx", torch.randn(2, 3, 32, 32))
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    torch.testing.assert_close(torch.tensor(names["y"]), model(torch.zeros(1, 3, 32, 32)).detach())


def test_every_figure_of_the_results_table_is_in_the_study():
    cells = json.loads((ROOT / "studies" / "results" / "no_training.json").read_text())
    block = README.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    header, ours = (next(x for x in block.splitlines() if mark in x) for mark in ("parameters kept:", "**rankopt**"))
    budgets = [int(x) for x in header.split("|")[2:-1]]
    figures = [x.strip(" *") for x in ours.split("|")[2:-1]]
    assert len(figures) == len(budgets) >= 6
    for budget, figure in zip(budgets, figures, strict=True):
        assert figure == f"{100 * cells[f'resnet20 params={budget / 100}']['top1']:.2f}"


def test_names_in_the_readme_exist():
    for name in [*rankopt.DECOMPOSITIONS, *rankopt.STRATEGIES]:
        assert f"`{name}`" in README
    for path in re.findall(r"`(\w+\.py)`", README):
        assert list((ROOT / "rankopt").rglob(path)), path
