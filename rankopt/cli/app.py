"""The Typer application, with the options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankopt.cli.progress import console
from rankopt.core.errors import RankoptError
from rankopt.core.signals import discard_output, exit_status

if TYPE_CHECKING:
    from rankopt.candidates.latency_table import Conditions

app = typer.Typer(
    help="Choose a tensor decomposition and its rank for every layer of a PyTorch model, under one budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# Panels of `rankopt --help`
COMPRESS, FINISHED, COMPARE, EXPERIMENTS = "Compress a model", "Use a finished run", "Compare", "Experiments"


TaskName = Annotated[str, typer.Argument(help="a built-in task (digits) or FILE.py:function; the file is run")]


SpaceName = Annotated[str, typer.Option("--space", help="a search space by name, or a .toml file")]


CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", help="where candidates are kept", show_default="RANKOPT_CACHE, or ~/.cache/rankopt"),
]


@contextmanager
def readable_errors(kept: str = "every finished trial is kept: go on with --resume") -> Iterator[None]:
    """Context: errors that a user can mend end the command with one line instead of a traceback.

    Args:
        kept: What Ctrl-C leaves behind and how to continue.

    Raises:
        typer.Exit: With code 2 for a RankoptError or an error of the operating system, 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        yield
    except RankoptError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(f"stopped; {kept}", markup=False)
        raise typer.Exit(exit_status()) from None
    except OSError as error:
        if error.errno is None:  # from a library, not the operating system: a bug, which needs its traceback
            raise
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def write_page(out: Path, html: bool) -> None:
    """Write a run folder's report.html and print its path.

    Args:
        out: The run folder.
        html: Whether a report is wanted.
    """
    if html:
        from rankopt.report.html import write_report

        echo(f"report: {write_report(out)}")


def latency_conditions(latency_on: str | None, budget: Any) -> Conditions | None:
    """Read --latency-on.

    Args:
        latency_on: The option's text; None if it was not given.
        budget: The budget, which must then limit latency.

    Raises:
        RankoptError: If the conditions are invalid or the budget does not limit latency.
    """
    from rankopt.candidates.latency_table import Conditions
    from rankopt.core.budget import limited_metrics

    if latency_on and "latency" not in limited_metrics(budget):
        raise RankoptError("--latency-on goes with --budget latency=...")
    return Conditions.parse(latency_on) if latency_on else None


def default_folder(task: str, what: str) -> Path:
    """Return the folder that results go to without --out, as runs/digits-knapsack.

    Args:
        task: Name of the task, of which the file's name is taken.
        what: What the results are of: a strategy or a command.
    """
    return Path("runs") / f"{Path(task.rpartition(':')[0] or task).stem}-{what}"


def echo(text: str) -> None:
    """Print results on standard output; what goes on while they are made is printed on standard error.

    Where nobody reads any more, as after `| head`, the command still does its work.

    Args:
        text: One or more lines.
    """
    try:
        typer.echo(text)
    except BrokenPipeError:
        discard_output(1)
