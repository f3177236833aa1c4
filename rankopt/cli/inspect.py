"""`rankopt inspect`: a task's layers, or the bonds of a compressed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.table import Table

from rankopt.cli.app import COMPRESS, CacheFolder, SpaceName, app, default_folder, echo, readable_errors
from rankopt.cli.progress import show_progress
from rankopt.core.errors import RankoptError
from rankopt.core.records import Cost, Layer


@app.command(rich_help_panel=COMPRESS)
def inspect(
    task: Annotated[str, typer.Argument(help="a task as for search; with --bonds also a run folder")],
    space: SpaceName = "default",
    bonds: Annotated[
        bool, typer.Option("--bonds", help="show spectra, effective ranks and images of factorised layers")
    ] = False,
    run_task: Annotated[
        str | None, typer.Option("--task", help="with a run folder: the task whose model it was; its file is run")
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
        from rankopt.candidates.pareto import dense_candidate
        from rankopt.candidates.prepare import mark_dense
        from rankopt.candidates.quantize import in_each_precision
        from rankopt.candidates.search_space import load_space
        from rankopt.experiments.tasks import load_task
        from rankopt.model.counting import count
        from rankopt.model.inventory import inventory, unfolded

        if bonds:
            _inspect_bonds(task, run_task, space, out, cache)
            return
        if run_task or out:
            raise RankoptError("--task and --out go with --bonds")
        found, allowed = load_task(task), load_space(space)
        layers = mark_dense(
            inventory(unfolded(found.model, found.example_input, allowed.split_qkv), found.example_input), allowed
        )
        free = [x for x in layers if x.reason is None]
        options = {x.name: [f for f in allowed.families if allowed.ranks(f, x)] for x in free}
        for x in free:
            options[x.name] += [c.precision for c in in_each_precision(x, dense_candidate(x), allowed.precisions)]
        screen = Console(width=max(100, Console().width), markup=False, emoji=False)
        with screen.capture() as printed:
            screen.print(inspection(layers, count(found.model, found.example_input), options))
        echo(printed.get().removesuffix("\n"))


def _inspect_bonds(what: str, task: str | None, space: str, out: Path | None, cache: Path | None) -> None:
    """`rankopt inspect --bonds` of a run folder, or of a task."""
    from rankopt.candidates.search_space import load_space
    from rankopt.experiments.tasks import load_task
    from rankopt.report.bond_analysis import bonds_of_run, bonds_of_space
    from rankopt.report.bonds_page import FILE, table, write_bonds

    if Path(what).is_dir():
        if task is None:
            raise RankoptError(f"{what} is a run folder: give the task whose model it was with --task")
        rows, folder = bonds_of_run(Path(what), load_task(task), show_progress), Path(what)
    else:
        if task is not None:
            raise RankoptError(f"--task goes with a run folder, and there is no folder {what}")
        rows, folder = (
            bonds_of_space(load_task(what), load_space(space), cache, show_progress),
            default_folder(what, "bonds"),
        )
    echo(table(rows))
    echo(f"page: {write_bonds(out or folder / FILE, what, rows)}")


def inspection(layers: Sequence[Layer], dense: Cost, options: Mapping[str, Sequence[str]]) -> Group:
    """Make what `rankopt inspect` prints: a table of the layers and a line on the whole model.

    Args:
        layers: The model's layers; those with a reason stay dense.
        dense: Cost of the model.
        options: Name of a layer -> decompositions and precisions that have a cheaper candidate for it.
    """
    table = Table()
    for name, side in (
        ("layer", "left"),
        ("kind", "left"),
        ("weight", "right"),
        ("params", "right"),
        ("MACs", "right"),
    ):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    table.add_column("may become, or why not", overflow="fold", ratio=1)
    for x in layers:
        may = ", ".join(options.get(x.name, [])) if x.reason is None else f"dense: {x.reason}"
        shape = "×".join(map(str, x.own_shape)) + (f" g{x.groups}" if x.groups > 1 else "")
        name = x.name + (f" (also {', '.join(x.aliases)})" if x.aliases else "")
        table.add_row(name or "(the model)", x.kind, shape, f"{x.cost.params:,}", f"{x.cost.macs:,}", may)
    free = [x for x in layers if x.reason is None]
    share = sum(x.cost.params for x in free) / max(dense.params, 1)
    return Group(
        table,
        f"whole model: {dense.params:,} parameters, {dense.macs:,} MACs for one example, {dense.bytes:,} bytes; "
        f"{len(free)} of {len(layers)} layers ({share:.1%} of the parameters) may be factorised",
    )
