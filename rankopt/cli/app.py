"""The Typer application, with the options and helpers that several commands share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankopt.cli.parameters import Application, Group, complete_space, complete_task
from rankopt.core.errors import RankoptError
from rankopt.core.signals import discard_output, exit_status
from rankopt.core.text import printable
from rankopt.search.progress import console

if TYPE_CHECKING:
    from rankopt.core.records import Task

app = Application(
    cls=Group,
    help="Choose a tensor decomposition and its rank for every layer of a PyTorch model, under one budget.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankopt {installed_version('rankopt')}")
        raise typer.Exit


def _be_verbose(wanted: bool) -> None:
    if wanted:
        log.setLevel(logging.DEBUG)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[  # Command gives it to every command
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="show what each stage took, and tracebacks of errors",
            callback=_be_verbose,
            expose_value=False,
        ),
    ] = False,
) -> None:
    """Choose a tensor decomposition and its rank for every layer of a PyTorch model, under one budget."""


log = logging.getLogger("rankopt")


# Panels of `rankopt --help`
COMPRESS, FINISHED, COMPARE, EXPERIMENTS = "Compress a model", "Use a finished run", "Compare", "Experiments"


TaskName = Annotated[
    str,
    typer.Argument(
        help="a built-in task (digits), FILE.py:function or package.module:function; the file is run",
        autocompletion=complete_task,
    ),
]


SpaceName = Annotated[
    str,
    typer.Option("--space", help="a search space by name, or a .toml file", autocompletion=complete_space),
]


EFFORT = "how much of the space to fit: quick, normal or thorough (all of it)"


Effort = Annotated[str | None, typer.Option(help=EFFORT, show_default="normal for knapsack, else thorough")]


Device = Annotated[
    str | None,
    typer.Option(help="where the model is: cpu, cuda or cuda:1", show_default="where the task puts it"),
]


CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", help="where candidates are kept", show_default="RANKOPT_CACHE, or ~/.cache/rankopt"),
]


RAY = "Ray Tune"  # a panel of a command's --help


Workers = Annotated[
    int, typer.Option(help="evaluate with this many Ray Tune workers; 0: in this process", rich_help_panel=RAY)
]


RayAddress = Annotated[str | None, typer.Option(help="a running Ray cluster, or auto", rich_help_panel=RAY)]


GpusPerTrial = Annotated[float, typer.Option(help="GPUs of one Ray trial, may be a fraction", rich_help_panel=RAY)]


CpusPerTrial = Annotated[float, typer.Option(help="CPUs of one Ray trial", rich_help_panel=RAY)]


def loaded(name: str, device: str | None) -> Task:
    """Load a task, and say it if the model is on the CPU of a machine with a GPU.

    Args:
        name: The task.
        device: Where its model is moved to; None: nowhere.
    """
    import torch

    from rankopt.experiments.tasks import load_task
    from rankopt.model.forward import device_of

    task = load_task(name, device)
    if device is None and torch.cuda.is_available() and device_of(task.model).type == "cpu":
        console.print("the model is on the CPU, and there is a GPU: --device cuda uses it", markup=False)
    return task


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
        log.debug("the error's traceback:", exc_info=error)
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


def default_folder(task: str, what: str) -> Path:
    """Return the folder that results go to without --out, as runs/digits-knapsack or runs/my_task-my_cnn-knapsack.

    Args:
        task: Name of the task, of whose file or module the last part of the name is taken.
        what: What the results are of: a strategy or a command.
    """
    file, _, function = task.rpartition(":")
    module = Path(file).stem if file.endswith(".py") else file.rpartition(".")[2]
    parts = [part for part in (module, function, what) if part]
    return Path("runs") / re.sub(r"[^\w.-]+", "-", "-".join(parts))


def echo(text: str) -> None:
    """Print results on standard output; what goes on while they are made is printed on standard error.

    Control characters are written as escapes.

    Where nobody reads any more, as after `| head`, the command still does its work.

    Args:
        text: One or more lines.
    """
    try:
        typer.echo(printable(text))
    except BrokenPipeError:
        discard_output(1)
