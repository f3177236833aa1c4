"""The table that `rankopt hardware` prints: latencies of layers and of their candidates."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from rankopt.candidates.latency import Latencies
from rankopt.core.budget import amount
from rankopt.core.records import DENSE, Layer
from rankopt.search.summary import percent, render


def table(layers: Sequence[Layer], found: Latencies) -> str:
    """For each layer its latency, how many candidates were timed, how many are faster, and the fastest.

    Args:
        layers: The layers timed.
        found: Their latencies and those of their candidates.
    """
    rows = Table(title=f"on {found.conditions} ({found.machine})", title_justify="left")
    for name in ("layer", "dense", "timed", "faster", "the fastest", "of dense"):
        rows.add_column(name, justify="left" if name in ("layer", "the fastest") else "right", overflow="fold")
    for layer in layers:
        times = found.entries[layer.name]
        others = {k: ns for k, ns in times.items() if k != DENSE}
        faster = [k for k, ns in others.items() if ns < times[DENSE]]
        best = min(others, key=lambda k: others[k], default=DENSE)
        shown = best if faster else "none"
        share = percent(times[best] / times[DENSE], 0) if faster else "–"
        rows.add_row(layer.name, amount("latency", times[DENSE]), str(len(others)), str(len(faster)), shown, share)
    return render(
        rows,
        f"whole model {amount('latency', found.dense)}; a layer's time counts {found.slope:.2f} times in it, fitted to "
        f"{found.plans} plans, the worst {found.residual:.1%} of the dense model off",
    )
