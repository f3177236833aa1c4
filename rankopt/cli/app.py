"""The Typer application, with the options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rankopt.cli.progress import console
from rankopt.core.errors import RankoptError

app = typer.Typer(
    help="Choose a tensor decomposition and its rank for every layer of a PyTorch model, under one budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


TaskName = Annotated[str, typer.Argument(help="a built-in task (digits) or FILE.py:function; the file is run")]


SpaceName = Annotated[str, typer.Option("--space", help="a search space by name, or a .toml file")]


CacheFolder = Annotated[Path | None, typer.Option("--cache", help="where candidates are kept [RANKOPT_CACHE]")]


@contextmanager
def clear_errors(kept: str = "every finished trial is kept: go on with --resume") -> Iterator[None]:
    """One line for what a user can mend, exit code 2; Ctrl-C says how to go on."""
    try:
        yield
    except RankoptError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(f"stopped; {kept}", markup=False)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno is None:
            raise
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def write_page(out: Path, html: bool) -> None:
    if html:
        from rankopt.report.html import write_report

        echo(f"report: {write_report(out)}")


def latency_conditions(latency_on: str | None, budget: Any) -> Any:
    from rankopt.candidates.latency_table import Conditions
    from rankopt.core.budget import limited_metrics

    if latency_on and "latency" not in limited_metrics(budget):
        raise RankoptError("--latency-on goes with --budget latency=...")
    return Conditions.parse(latency_on) if latency_on else None


def default_folder(task: str, what: str) -> Path:
    return Path("runs") / f"{Path(task.rpartition(':')[0] or task).stem}-{what}"


def echo(text: str) -> None:
    typer.echo(text)
