"""Tables for the terminal, at most 100 columns wide."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from rankopt.core.budget import amount
from rankopt.core.records import RECONSTRUCTED, SAME

WIDTH = 100


def render(*parts: RenderableType) -> str:
    """Rich renderables as plain text."""
    console = Console(
        width=WIDTH, file=io.StringIO(), force_terminal=False, color_system=None, markup=False, emoji=False
    )
    console.print(*parts, sep="\n")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def rank_text(rank: Sequence[int]) -> str:
    return " × ".join(map(str, rank)) or "–"


def method_text(row: Mapping[str, Any]) -> str:
    """A layer's method, and its form and precision where these are not the usual ones."""
    form, precision = row.get("form"), row.get("precision", SAME)  # earlier runs name none
    return ", ".join([row["method"], *[RECONSTRUCTED] * (form == RECONSTRUCTED), *[precision] * (precision != SAME)])


def before_after(info: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, dense, compressed, change) of a result.json."""
    rows = []
    dense, small = info["score"]["dense"], info["score"]["compressed"]
    for part in ("validation", "test"):
        if dense[part] is not None or small[part] is not None:
            change = "–" if None in (dense[part], small[part]) else f"{100 * (small[part] - dense[part]):+.2f} points"
            before, after = (with_interval(s[part], _interval(info, k, part)) for k, s in info["score"].items())
            rows.append((f"score, {part}", before, after, change))
    units = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
    for metric, unit in units.items():
        a, b = info["cost"]["dense"][metric], info["cost"]["compressed"][metric]
        rows.append((unit, f"{a:,}", f"{b:,}", f"{percent(b / a, 1)} of dense" if a else "–"))
    a, b = info["milliseconds"]["dense"], info["milliseconds"]["compressed"]
    rows.append(("one forward pass here", f"{a:.2f} ms", f"{b:.2f} ms", speed(a, b)))
    return rows


def _interval(info: dict[str, Any], which: str, part: str) -> Sequence[float] | None:
    return info.get("intervals", {}).get(which, {}).get(part)  # runs of earlier versions have none


def with_interval(score: float | None, interval: Sequence[float] | None) -> str:
    """A score with its 95 % interval, if it has one."""
    return percent(score) + (f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else "")


def speed(dense: float, small: float) -> str:
    """Plain words for the ratio of two times."""
    if small > 1.05 * dense:
        return f"{small / dense:.2f} × SLOWER"
    return f"{dense / small:.2f} × faster" if small < 0.95 * dense else "as fast"


def summary(info: dict[str, Any]) -> str:
    """A result.json as text: before and after, the budget, every layer."""
    head = Table(title=f"{info['task'] or 'model'}: {info['strategy']}, seed {info['seed']}", title_justify="left")
    for column, side in (("", "left"), ("dense", "right"), ("compressed", "right"), ("change", "right")):
        head.add_column(column, justify=side)  # type: ignore[arg-type]
    for row in before_after(info):
        head.add_row(*row)
    notes = [f"{'WARNING ' * warns}{text}" for text, warns in honesty(info)]
    asked = [text] if (text := question(info)) else []
    front = [front_table(info)] if info.get("front") else []
    before = [*asked, budget_line(info), *latency(info), *energy(info), *changes(info)]
    return render(head, *before, *notes, *front, layer_table(info["layers"]))


def front_table(info: dict[str, Any]) -> Table:
    """The trials that no other beats in both objectives; which to take is the reader's choice."""
    metric = info["options"]["also"]
    table = Table(title=f"front: for one of these plans, search again with --budget {metric}=N", title_justify="left")
    for column in ("trial", "objective", metric, "of dense"):
        table.add_column(column, justify="right")
    for row in info["front"]:
        share = percent(row[metric] / info["cost"]["dense"][metric], 1)
        table.add_row(str(row["trial"]), f"{row['objective']:.4g}", f"{row[metric]:,}", share)
    return table


def question(info: dict[str, Any]) -> str | None:
    """What a run of `--max-drop` asked, and its answer."""
    q = info.get("question")
    if not q:
        return None
    text = (
        f"asked   the least {q['minimize']} that loses at most {100 * q['max_drop']:g} points of validation score\n"
        f"answer  {q['minimize']}={q['target']:,}: {100 * q['drop']:.2f} points lost; {q['evaluations']} plans were "
        f"evaluated, in steps of {q['step']:.0%}"
    )
    if q["interval"] is None:
        return text
    low, high = (100 * x for x in q["interval"])
    sure = "surely within" if q["interval"][1] <= q["max_drop"] else "not surely within"
    return f"{text}\n        95 % interval of the loss {low:.2f} to {high:.2f} points: {sure} what was asked"


PAIRS = {
    "predicted_objective": ("predicted losses", "measured objectives", "allocations rest on the former"),
    "objective_score": ("objectives", "validation scores", "searches minimise the former"),
}


def honesty(info: dict[str, Any]) -> list[tuple[str, bool]]:
    """How far the run's numbers can be trusted: sentences, and whether each is a warning."""
    notes = []
    for key, (first, second, meaning) in PAIRS.items():
        if found := (info.get("proxy") or {}).get(key):
            text = f"rank correlation of {first} and {second}: {correlation_text(found)}"
            warns = found["verdict"] == "poor"
            notes.append((f"{text}; {meaning}" if warns else text, warns))
    if tie := info.get("tie"):
        notes.append(_tie_text(tie, info["examples"]["validation"]))
    elif info["score"]["compressed"]["validation"] is not None and not (info.get("examples") or {}).get("validation"):
        notes.append(("the noise of the scores is unknown: Task(examples=...) says how many they average over", False))
    return [*notes, *((text, False) for text in fidelities(info))]


def fidelities(info: dict[str, Any]) -> list[str]:
    """What each fidelity below the full one stopped, and how well it ranked what it let go on."""
    lines = []
    for row in info.get("fidelities") or []:
        text = f"fidelity {row['name']!r}: {row['measured']} trials measured, {len(row['stopped'])} stopped"
        if row["stopped"]:
            text += f" ({', '.join(map(str, row['stopped'][:30]))}{', ...' * (len(row['stopped']) > 30)})"
        if row["agreement"] is not None:
            found = correlation_text(row["correlation"])
            text += f"; it ordered {row['agreement']:.0%} of the pairs that went on as the objective did, {found}"
        lines.append(text)
    return lines


def correlation_text(found: dict[str, Any]) -> str:
    """A rank correlation (see `uncertainty.correlation`) in words."""
    n = f"{found['n']} plan{'s' * (found['n'] != 1)}"
    if found["verdict"] == "too few":
        return f"too few trials to tell ({n})"
    if found["verdict"] == "constant":
        return f"none, one of the two is the same for all {n}"
    text = f"Spearman {found['spearman']:.2f} (95 % interval {found['low']:.2f} to {found['high']:.2f}, {n})"
    return text + {"poor": ", poor", "unclear": ", may be poor", "good": ""}[found["verdict"]]


def _tie_text(tie: dict[str, Any], examples: int) -> tuple[str, bool]:
    gap = f"{100 * tie['low']:+.2f} to {100 * tie['high']:+.2f} points (95 %)"
    runner_up = f"the runner-up (trial {tie['runner_up']}, score {percent(tie['score'])})"
    within = f"{tie['tied']} of the {tie['others']} other plans score within the noise of {examples:,} examples"
    if tie["verdict"] == "tie":
        return f"the chosen plan and {runner_up} are a tie, {gap} apart; {within}", False
    if tie["verdict"] == "worse":
        return f"the chosen plan has the least objective, but scores below {runner_up}: {gap}; {within}", True
    return f"the chosen plan scores above {runner_up}: {gap}; {within}", False


def changes(info: dict[str, Any]) -> list[str]:
    """What was done to the chosen plan's model afterwards, and whether it helped."""
    what = {
        "refinement": "refitting layer after layer (the layers' errors below are from before)",
        "batch_norm": "moving batch norms to what they now see",
    }
    lines = []
    for key, text in what.items():
        if change := info.get(key):
            kept = "kept" if change["kept"] else "not kept"
            lines.append(f"{text}: objective {change['before']:.4g} -> {change['after']:.4g}, {kept}")
    return lines


def budget_line(info: dict[str, Any]) -> str:
    parts = [
        f"{metric}: {amount(metric, b['achieved'])} of {amount(metric, b['target'])} allowed "
        f"({b['achieved'] / b['target']:.2%} used)"
        for metric, b in info["budget"].items()
    ]
    t, s = info["trials"], info["seconds"]
    stopped = f", {t['stopped']} stopped at a low fidelity" if t.get("stopped") else ""
    stopped += ", interrupted" if t.get("interrupted") else ""
    return (
        f"budget  {'; '.join(parts)}\n"
        f"search  {evaluated(info)} plans, {t['failed']} failed{stopped}; optimality gap of the predicted loss "
        f"{info['optimality_gap']:.2%}\n"
        f"seconds {', '.join(f'{k} {v:.1f}' for k, v in s.items())}"
    )


def evaluated(info: dict[str, Any]) -> int:
    """How many plans, those included that missed a latency budget when it was measured."""
    return info["trials"]["distinct"] + info["trials"].get("outside", 0)


def latency(info: dict[str, Any]) -> list[str]:
    """What a latency budget came to: sentences on the promise, on layers left dense and on how costs were found."""
    found = info.get("latency")
    if not found:
        return []
    where = f"on {found['conditions']} ({found['machine']})"
    if "met" in found:
        ms = {k: amount("latency", found[k]) for k in ("dense", "latency", "low", "high", "predicted")}
        # Of a fraction, times are shares of the dense model's in the table, whatever the processor's clock is now.
        fraction = info["budget"]["latency"]["requested"] <= 1
        whole = info["cost"]["dense"]["latency"] if fraction else found["dense"]
        lines = [
            f"latency measured on the rebuilt model: {ms['latency']} (95 %: {ms['low']} to {ms['high']}), "
            f"{percent(found['latency'] / whole, 1)} of the dense model's {amount('latency', whole)}; {found['rounds']} "
            f"passes in turn with the dense model, which took {ms['dense']} there; predicted {ms['predicted']}; "
            f"attempts: {found['attempts']}; {where}"
        ]
    else:
        lines = [f"latency from a table measured {where}: it was not measured here"]
    if n := len(found["none_faster"]):
        lines.append(
            f"{n} layer{'s' * (n != 1)} stayed dense: factorised they would be slower ({_few(found['none_faster'])})"
        )
    fit = f"a candidate costs {found['slope']:.2f} times its own time, fitted to {found['plans']} whole models"
    gap = found["interpolation"]
    between = "" if gap is None else f"; times between measured ranks: typically {gap:.1%} off"
    return [*lines, f"{fit}, the worst {found['residual']:.1%} of the dense model off{between}"]


def energy(info: dict[str, Any]) -> list[str]:
    """Joules and grams of CO₂ per inference, or why there are none."""
    found = info.get("energy")
    if not found:
        return []
    if found["dense"] is None:
        return [str(found["source"])]
    return [
        f"energy of one inference: {found['compressed']:.3g} J, {found['compressed_grams']:.2g} g CO₂ (dense "
        f"{found['dense']:.3g} J, {found['dense_grams']:.2g} g); {found['source']}"
    ]


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def layer_table(layers: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="layers", title_justify="left")
    for name, side in (("layer", "left"), ("method", "left"), ("rank", "right"), ("params", "right")):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    table.add_column("of dense", justify="right")
    table.add_column("error", justify="right")
    table.add_column("reason", overflow="fold", ratio=1)
    for x in layers:
        share = f"{x['params'] / x['dense_params']:.0%}" if x["dense_params"] else "–"
        error = f"{x['error']:.3g}" if x["error"] else "0"
        texts = str(x["name"]), method_text(x), rank_text(x["rank"]), f"{x['params']:,}", share, error, str(x["reason"])
        table.add_row(*texts)
    return table
