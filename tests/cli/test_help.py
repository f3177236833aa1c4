"""What --help says: commands in the order of their use, in panels, and no default that markup swallows."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest
from typer.main import get_command

import rankopt
from rankopt.cli.main import app
from rankopt.strategies.registry import strategy_options
from tests.helpers.command import run

ORDER = ["inspect", "search", "report", "apply", "export", "train", "sweep", "benchmark", "hardware", "run", "cache"]
PANELS = ["Compress a model", "Use a finished run", "Compare", "Experiments"]


def test_commands_in_the_order_of_their_use():
    command = [sys.executable, "-m", "rankopt.cli", "--help"]  # a process of its own: imports decide the order
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^│ (\w+)  ", shown, re.M) == ORDER
    assert re.findall(r"^╭─ (.*?) ─", shown, re.M) == ["Options", *PANELS]


@pytest.mark.parametrize("name", ORDER)
def test_options(name):
    """Rich takes [text] for a style and shows nothing; more than six options in one panel are hard to read."""
    panels = {}
    for option in get_command(app).commands[name].params:
        assert not re.search(r"\[[a-z#/@]", option.help or ""), option.name
        if option.param_type_name == "option":
            panels.setdefault(option.rich_help_panel, []).append(option.name)
    assert all(len(names) <= 7 for names in panels.values()), panels


@pytest.mark.parametrize("name", ["", *ORDER])
def test_what_an_option_takes_is_said_in_words(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown, _ = run(*name.split(), "--help")
    assert not re.search(r"<[\w\[\] ]+>|default: inf", shown)
    for flag in ("--help", "--verbose", "--resume", "--html", "--prune"):
        assert not re.search(rf"{flag} +(-\w|--no-html)? +(BOOL|TEXT)", shown)


def test_units_and_forms(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = {"search": ["--budget +METRIC=VALUE", "--trials +N", "--trial-timeout +SECONDS", r"\* +TASK  +a built-in"]}
    words |= {"run": ["--budget-minutes +MINUTES", r"\* +FILE.toml"], "train": ["--epochs +EPOCHS", r"\* +RUN  "]}
    for command, expected in words.items():
        shown, _ = run(command, "--help")
        assert all(re.search(form, shown) for form in expected), shown


def test_strategies_are_listed_with_their_options():
    shown, _ = run("search", "--list-strategies")
    for name in rankopt.STRATEGIES:
        assert f"\n{name}: " in f"\n{shown}"
        for option, default in strategy_options(name).items():
            assert f"    --option {option}={default}\n" in shown


def test_verbose_shows_the_traceback_of_an_error(caplog, tmp_path):
    """Before and after the command's name; without it, one line has to do."""
    task = tmp_path / "broken.py"
    task.write_text("def net():\n    raise ValueError('no data')\n")
    command = ("search", f"{task}:net", "--budget", "params=0.5", "--out", tmp_path / "run")
    with caplog.at_level("DEBUG", "rankopt"):  # puts the level back at the end
        for arguments, verbose in ((command, False), ((*command, "--verbose"), True), (("-v", *command), True)):
            logging.getLogger("rankopt").setLevel("WARNING")
            caplog.clear()
            _, stderr = run(*arguments, code=2)
            assert "no data" in stderr
            assert ("raise ValueError('no data')" in caplog.text) is verbose


@pytest.mark.parametrize(
    ("command", "parameter", "incomplete", "found"),
    [
        ("search", "task", "dig", ["digits"]),
        ("search", "task", "my_", []),
        ("export", "task", "", ["digits"]),
        ("search", "strategy", "opt", ["optuna"]),
        ("benchmark", "strategies", "knapsack,ene", ["knapsack,energy"]),
        ("search", "families", "cp,svd_g", ["cp,svd_grouped"]),
        ("search", "space", "def", ["default"]),
        ("sweep", "space", "def", ["default"]),
    ],
)
def test_what_a_shell_completes(command, parameter, incomplete, found):
    chosen = get_command(app).commands[command]
    context = chosen.make_context(command, [], resilient_parsing=True)
    (asked,) = [p for p in chosen.params if p.name == parameter]
    assert [item.value for item in asked.shell_complete(context, incomplete)] == found


def test_completion_can_be_installed(monkeypatch):
    shown, _ = run("--help")
    assert "--install-completion" in shown
    assert "--show-completion" in shown


@pytest.mark.parametrize("command", ["search", "sweep", "benchmark", "run", "train"])
def test_commands_that_evaluate_or_train_take_the_same_options_of_ray(command):
    options = {o for p in get_command(app).commands[command].params for o in p.opts}
    assert {"--workers", "--gpus-per-trial", "--cpus-per-trial", "--ray-address"} <= options
