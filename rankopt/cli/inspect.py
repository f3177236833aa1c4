"""`rankopt inspect`: a task's layers, or the bonds of a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli.app import COMPRESS, CacheFolder, SpaceName, app, default_folder, echo, readable_errors
from rankopt.cli.parameters import complete_task
from rankopt.core.errors import RankoptError
from rankopt.search.progress import show_progress


@app.command(rich_help_panel=COMPRESS)
def inspect(
    task: Annotated[str, typer.Argument(help="a task as for search; with --bonds also a run folder")],
    space: SpaceName = "default",
    bonds: Annotated[
        bool, typer.Option("--bonds", help="show spectra, effective ranks and images of factorised layers")
    ] = False,
    run_task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="with a run folder: the task whose model it was; its file is run",
            autocompletion=complete_task,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="the page that --bonds writes", show_default="bonds.html in the run's folder"),
    ] = None,
    cache: CacheFolder = None,
) -> None:
    """Show a task's layers: shape, parameters, MACs, what each may become, what stays dense and why.

    With --bonds: what the bonds of a run's layers hold, or of each layer's most accurate candidate in the space.
    """
    with readable_errors():
        from rankopt.api.inspection import inspect as inspect_model
        from rankopt.experiments.tasks import load_task

        if bonds:
            _inspect_bonds(task, run_task, space, out, cache)
            return
        if run_task or out:
            raise RankoptError("--task and --out go with --bonds")
        found = load_task(task)
        echo(repr(inspect_model(found.model, found.example_input, space)))


def _inspect_bonds(what: str, task: str | None, space: str, out: Path | None, cache: Path | None) -> None:
    """`rankopt inspect --bonds` of a run folder, or of a task."""
    from rankopt.api.bonds import Bonds
    from rankopt.candidates.search_space import load_space
    from rankopt.experiments.tasks import load_task
    from rankopt.report.bond_analysis import subject_of_run, subject_of_space
    from rankopt.report.bond_latents import Effort
    from rankopt.report.bonds_page import FILE, table

    if Path(what).is_dir():
        if task is None:
            raise RankoptError(f"{what} is a run folder: give the task whose model it was with --task")
        subject, folder = subject_of_run(Path(what), load_task(task), show_progress), Path(what)
    else:
        if task is not None:
            raise RankoptError(f"--task goes with a run folder, and there is no folder {what}")
        subject = subject_of_space(load_task(what), load_space(space), cache, show_progress)
        folder = default_folder(what, "bonds")
    found = Bonds.of(subject, Effort(), show_progress, what)
    echo(table(found.layers))
    if found.latents.bonds:
        echo(repr(found)[1:-1])
    echo(f"page: {found.report(out or folder / FILE)}")
