"""Code blocks of the README and the docs run, and their command lines exist.

A Python block with a title is shown only; the title says why (what it needs is a download, a GPU or a finished run).
The others of a page run one after the other in one namespace, as a reader would paste them.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib

import pytest
import torch
from typer.main import get_command

import rankopt
from rankopt.candidates.search_space import load_space
from rankopt.cli.main import app
from rankopt.export.export import export
from tests.docs.pages import PAGES, blocks
from tests.helpers import ROOT
from tests.helpers.command import run

COMMANDS = get_command(app).commands
TASK = "# my_task.py"
RUNNING = [page for page in PAGES if any(not b.info.strip() for b in blocks(page, "python"))]


# --- Python ----------------------------------------------------------------------------------------


def readers_names():
    """What a reader has before the first block."""

    def build_model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4))

    torch.manual_seed(0)
    batches = [(torch.randn(64, 24), torch.zeros(64))]
    return {"model": build_model(), "build_model": build_model, "train_loader": batches, "top1": lambda model: 0.5}


def demo(quick_space):
    run("search", "digits", "--budget", "params=0.3", "--space", quick_space, "--out", "runs/demo", "--no-html")


def onnx_file(quick_space):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(3600, 10))
    export(model, "onnx", "runs/r20/export.onnx", torch.randn(2, 3, 32, 32))


SETUP = {"docs/tutorials/first_compression.md": demo, "docs/how-to/export.md": onnx_file}


@pytest.mark.parametrize("page", RUNNING)
def test_python_blocks_run(page, tmp_path, monkeypatch, quick_space):
    monkeypatch.chdir(tmp_path)
    SETUP.get(page, lambda space: None)(quick_space)
    names = readers_names()
    for block in blocks(page, "python"):
        if not block.info.strip():
            exec(compile(block.code, page, "exec"), names)
    if isinstance(names.get("result"), rankopt.Result):
        for limit in names["result"].limits:
            assert names["result"].plan.cost[limit.metric] <= limit.target


@pytest.mark.parametrize("page", sorted(PAGES))
def test_blocks_that_do_not_run_are_python_and_say_why(page):
    for block in blocks(page, "python"):
        assert not block.info.strip() or re.fullmatch(r'\s*title="[\w./ ]+"', block.info)
        if "--8<--" not in block.code:
            compile(block.code, page, "exec")


def test_the_example_task_works_the_first_time(tmp_path, quick_space):
    (source,) = (b.code for b in blocks("README.md", "python") if b.code.startswith(TASK))
    (tmp_path / "my_task.py").write_text(source)
    stdout, _ = run("inspect", "my_task.py:my_cnn", cwd=tmp_path)
    assert "Conv2d" in stdout
    search = ("search", "my_task.py:my_cnn", "--budget", "params=0.5", "--out", "runs/mine", "--space", quick_space)
    run(*search, cwd=tmp_path)
    info = json.loads((tmp_path / "runs" / "mine" / "result.json").read_text())
    assert info["budget"]["params"]["achieved"] <= info["budget"]["params"]["target"]
    stdout, _ = run("apply", "runs/mine", "--task", "my_task.py:my_cnn", "--check", cwd=tmp_path)
    assert "as planned" in stdout


# --- the command line --------------------------------------------------------------------------------


def command_lines(page):
    """What stands after a prompt, comments aside, as words."""
    for block in blocks(page, "console"):
        for line in re.findall(r"^\$ (rankopt .*)$", block.code, re.M):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", [page for page in sorted(PAGES) if list(command_lines(page))])
def test_command_lines_are_read(page):
    for _, name, *arguments in command_lines(page):
        COMMANDS[name].make_context(name, arguments)  # refuses unknown options and missing arguments


@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_and_options_in_the_text_exist(page):
    commands = [get_command(app), *COMMANDS.values()]
    options = {name for c in commands for p in c.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    for name in re.findall(r"`rankopt ([a-z]+)", PAGES[page]):
        assert name in COMMANDS, name
    others = r"```text\n.*?```|^(?:#SBATCH|srun) .*?$|`(?:python|pip|pytest) [^`]*`"  # options of other commands
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(others, "", PAGES[page], flags=re.S | re.M)):
        assert option in options, option


# --- TOML and JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in sorted(PAGES) if blocks(page, "toml", "json")])
def test_files_are_read(page, tmp_path):
    for block in blocks(page, "toml", "json"):
        if block.language == "json":
            json.loads(block.code)
            continue
        content = tomllib.loads(block.code)
        if "families" in content:
            path = tmp_path / "space.toml"
            path.write_text(block.code)
            load_space(path)


def test_entry_points_in_the_text_are_groups_that_are_read():
    groups = {registry.group for registry in (rankopt.DECOMPOSITIONS, rankopt.STRATEGIES)}
    named = {g for page in PAGES for g in re.findall(r'\[project\.entry-points\."([\w.]+)"\]', PAGES[page])}
    assert named == groups


def test_modules_and_files_in_the_text_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:rankopt|studies|tests|examples|search_spaces)/[\w/.-]+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
