"""How --help names what an option takes, and what a shell completes: for all commands in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

PLACEHOLDERS = {
    "batch": "N|dynamic",
    "budget": "METRIC=VALUE",
    "budget_minutes": "MINUTES",
    "budgets": "METRIC=VALUES",
    "cache": "FOLDER",
    "case": "CASE",
    "device": "DEVICE",
    "effort": "quick|normal|thorough",
    "epochs": "EPOCHS",
    "evaluate": "knees|all|none",
    "families": "FAMILY,...",
    "fidelities": "SHARE,...",
    "folder": "FOLDER",
    "keep": "GB",
    "keep_dense": "LAYER",
    "latency_on": "CONDITIONS",
    "layerwise": "STEPS",
    "max_drop": "SCORE",
    "merge": "FOLDER",
    "minimize": "METRIC",
    "minutes": "MINUTES",
    "option": "KEY=VALUE",
    "patience": "EPOCHS",
    "ray_address": "ADDRESS",
    "run": "RUN",
    "run_task": "TASK",
    "space": "SPACE",
    "storage": "URL",
    "strategies": "STRATEGY,...",
    "strategy": "STRATEGY",
    "study": "FILE.toml",
    "task": "TASK",
    "teacher": "TASK",
    "to": "FORMAT",
    "trial_memory": "GB",
    "trial_timeout": "SECONDS",
}
"""Parameter -> what stands for its value, where the type says too little."""

OF_TYPES = {bool: "", int: "N", float: "NUMBER", Path: "PATH"}
"""Type -> what stands for a value of it. A flag takes none."""


def placeholder(parameter: Any) -> str:
    """What stands for a parameter's value in --help and in the reference: METRIC=VALUE, N, or nothing for a flag.

    Args:
        parameter: A parameter of a command.
    """
    kind = parameter.type_descriptor.annotation
    if parameter.param_type_name == "option" and parameter.is_flag:
        return ""
    return PLACEHOLDERS.get(parameter.name) or OF_TYPES.get(kind, "TEXT")


def _describe(parameter: Any) -> None:
    if parameter.param_type_name == "argument":  # its placeholder is its name, beside which typer shows a type
        parameter.metavar = PLACEHOLDERS.get(parameter.name, parameter.name.upper())
        parameter.display_type_rich = lambda ctx: None
    else:
        parameter.metavar = placeholder(parameter)
        if parameter.default == float("inf"):  # no limit: nothing to show
            parameter.show_default = False


class Command(TyperCommand):
    """A command whose --help says what its options take. It has the group's `SHARED` options, too."""

    SHARED = ("verbose",)

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's parameters, and those that it shares with the group."""
        above = [] if ctx.parent is None else [p for p in ctx.parent.command.params if p.name in self.SHARED]
        own = super().get_params(ctx)
        parameters = [*own, *(p for p in above if p not in own)]
        for parameter in parameters:
            _describe(parameter)
        return parameters


class Group(TyperGroup):
    """The group of all commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters of `rankopt` itself."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            _describe(parameter)
        return parameters


class Application(typer.Typer):
    """A Typer application whose commands are `Command`s."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """Register a command, as `typer.Typer.command` does."""
        return super().command(name, **{"cls": Command, **options})


# --- completion --------------------------------------------------------------------------------------


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    """The names that a value may go on with; in a list with commas, its last item."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in names if name.startswith(last)]


def complete_task(incomplete: str) -> list[str]:
    """Built-in tasks; without any that fits, shells complete files."""
    from rankopt.experiments.tasks import BUILT_IN

    return _starting(BUILT_IN, incomplete)


def complete_strategy(incomplete: str) -> list[str]:
    """Strategies, of which `benchmark` takes several."""
    from rankopt.strategies.registry import STRATEGIES

    return _starting(STRATEGIES, incomplete)


def complete_family(incomplete: str) -> list[str]:
    """Decompositions, of which several can be given."""
    from rankopt.decompositions.registry import DECOMPOSITIONS

    return _starting(DECOMPOSITIONS, incomplete)


def complete_space(incomplete: str) -> list[str]:
    """Search spaces by name."""
    from rankopt.candidates.search_space import space_names

    return _starting(space_names(), incomplete)
