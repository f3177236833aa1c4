"""`rankopt cache`: how large the cache of statistics and fits is, and pruning it."""

from __future__ import annotations

from typing import Annotated

import typer

from rankopt.cli.app import EXPERIMENTS, CacheFolder, app, echo, readable_errors


@app.command(rich_help_panel=EXPERIMENTS)
def cache(
    prune: Annotated[
        bool, typer.Option("--prune", help="remove what was used the longest ago; not while a search runs")
    ] = False,
    keep: Annotated[float, typer.Option(min=0, help="with --prune: GB that may stay")] = 20.0,
    folder: CacheFolder = None,
) -> None:
    """Show how large the cache of statistics and fits is, or prune it."""
    with readable_errors("what was removed is computed again when it is needed"):
        from rankopt.candidates.cache import Cache
        from rankopt.core.files import gigabytes

        kept = Cache(folder)
        if prune:
            removed, freed = kept.prune(round(keep * 1e9), spared=0)
            echo(f"removed: {removed:,} entries, {gigabytes(freed)}")
        entries, size = kept.size()
        echo(f"{kept.folder}: {entries:,} entries, {gigabytes(size)}")
