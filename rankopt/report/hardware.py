"""The table that `rankopt hardware` prints: latencies or energies of layers and of their candidates."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from rankopt.candidates.latency import MeasuredCosts
from rankopt.core.budget import amount
from rankopt.core.records import DENSE, Layer
from rankopt.search.summary import percent, render


def table(layers: Sequence[Layer], found: MeasuredCosts) -> str:
    """For each layer its cost, how many candidates were measured, how many are cheaper, and the cheapest.

    Args:
        layers: The layers timed.
        found: Their costs and those of their candidates.
    """
    time = found.metric == "latency"
    own = "time" if time else "energy"
    rows = Table(title=f"{found.metric} on {found.conditions} ({found.machine})", title_justify="left")
    names = ("layer", "dense", *(("timed", "faster", "the fastest") if time else ("measured", "less", "the least")))
    for name in (*names, "of dense"):
        rows.add_column(name, justify="left" if name in (names[0], names[-1]) else "right", overflow="fold")
    for layer in layers:
        times = found.entries[layer.name]
        others = {k: ns for k, ns in times.items() if k != DENSE}
        faster = [k for k, ns in others.items() if ns < times[DENSE]]
        best = min(others, key=lambda k: others[k], default=DENSE)
        shown = best if faster else "none"
        share = percent(times[best] / times[DENSE], 0) if faster else "–"
        rows.add_row(layer.name, amount(found.metric, times[DENSE]), str(len(others)), str(len(faster)), shown, share)
    return render(
        rows,
        f"whole model {amount(found.metric, found.dense)}; a layer's {own} counts {found.slope:.2f} times in it, "
        f"fitted to {found.plans} plans, the worst {found.residual:.1%} of the dense model off",
    )
