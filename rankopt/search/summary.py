"""A result as text for the terminal, at most 80 columns wide. Pages and tables of `rankopt.report` share the parts."""

from __future__ import annotations

import io
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.table import Table

from rankopt.candidates.effort import NORMAL, THOROUGH
from rankopt.candidates.search_space import load_space, space_names
from rankopt.core.budget import EQUAL, amount
from rankopt.core.names import groups, labels
from rankopt.core.records import BUDGETS, RECONSTRUCTED, SAME
from rankopt.core.result_record import (
    MEASURED_KEYS,
    PARTS,
    Bounds,
    BudgetEntry,
    CorrelationEntry,
    LayerRow,
    MeasuredEntry,
    Metric,
    MillisecondsEntry,
    ResultInfo,
    TieEntry,
)
from rankopt.core.text import few, shortened
from rankopt.strategies.knapsack import Knapsack

WIDTH = 80
"""Columns of a terminal that a result is written for."""


WIDEST = 100
"""Columns of tables that compare many results."""


LONGEST_METHODS = 22
"""Characters of the methods of a module's layers."""


FUSED = "{device},fused=yes"
"""Conditions of the advice where a smaller model is slower."""


SHORTEST_LABEL = 12
"""Characters of a name that are left where the numbers take the rest of the line."""


UNITS: Mapping[Metric, str] = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
"""What a counted metric is called in a table."""


# --- numbers as text ---------------------------------------------------------------------------------


def render(*parts: RenderableType, width: int = WIDEST) -> str:
    """Render to plain text, without colours.

    Args:
        parts: Rich renderables, one below the other.
        width: Columns.
    """
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=False,
        force_jupyter=False,  # in a notebook rich would display the text and write nothing to the file
        color_system=None,
        markup=False,
        emoji=False,
    )
    console.print(*parts, sep="\n")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def counted(n: int, thing: str) -> str:
    """A number of things: "1 plan", "2 plans".

    Args:
        n: How many.
        thing: One of them.
    """
    return f"{n} {thing}{'s' * (n != 1)}"


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction in per cent.

    Args:
        value: The fraction; None gives a dash.
        digits: Digits after the point.
    """
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def unbroken(text: str) -> str:
    """A text with no-break spaces between numbers and their units.

    Args:
        text: The text.
    """
    return re.sub(r" (?=[%×])|(?<=×) ", "\u00a0", text)


def with_interval(score: float | None, interval: Bounds | None) -> str:
    """A score with its interval, in per cent.

    Args:
        score: The score; None gives a dash.
        interval: Its 95 % interval, if there is one.
    """
    return percent(score) + (f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else "")


def speed_text(found: MillisecondsEntry) -> str:
    """The ratio of the models' times in words, with its interval; within 5 % they count as equal.

    Where the interval holds 1, the measurement was too noisy to say which model is faster.

    Args:
        found: The times.
    """
    dense, compressed, ratio = found["dense"], found["compressed"], found.get("ratio")
    if ratio and ratio[0] < 1 < ratio[1] and abs(compressed / dense - 1) > EQUAL:
        return f"{compressed / dense:.2f} × the time, not settled ({ratio[0]:.2f}–{ratio[1]:.2f})"
    if compressed > (1 + EQUAL) * dense:
        return f"{compressed / dense:.2f} × SLOWER" + (f" ({ratio[0]:.2f}–{ratio[1]:.2f})" if ratio else "")
    if compressed < (1 - EQUAL) * dense:
        return f"{dense / compressed:.2f} × faster" + (f" ({1 / ratio[1]:.2f}–{1 / ratio[0]:.2f})" if ratio else "")
    return "as fast"


def rank_text(rank: Sequence[int]) -> str:
    """A rank as "8 × 16"; an empty one gives a dash.

    Args:
        rank: The numbers of the rank.
    """
    return " × ".join(map(str, rank)) or "–"


def method_text(row: LayerRow) -> str:
    """A layer's method, and its form and precision where these are not the usual ones.

    Args:
        row: The layer.
    """
    form, precision = row.get("form"), row.get("precision", SAME)  # absent in files of earlier versions
    return ", ".join([row["method"], *[RECONSTRUCTED] * (form == RECONSTRUCTED), *[precision] * (precision != SAME)])


def correlation_text(found: CorrelationEntry) -> str:
    """A rank correlation in words.

    Args:
        found: The correlation, as `rankopt.core.statistics.correlation` returns it.
    """
    n = counted(found["n"], "plan")
    if found["verdict"] == "too few":
        return f"too few trials to tell ({n})"
    if found["verdict"] == "constant":
        return f"none, one of the two is the same for all {n}"
    text = f"Spearman {found['spearman']:.2f} (95 % interval {found['low']:.2f} to {found['high']:.2f}, {n})"
    return text + {"poor": ", poor", "unclear": ", may be poor", "good": ""}[found["verdict"]]


# --- the whole ---------------------------------------------------------------------------------------


def summary(info: ResultInfo) -> str:
    """A result as text: before and after, the budget, how reliable the numbers are, and every layer.

    Args:
        info: The content of result.json.
    """
    head = Table(title=f"{info['task'] or 'model'}: {info['strategy']}, seed {info['seed']}", title_justify="left")
    head.add_column("")
    for column in ("dense", "compressed", "change"):
        head.add_column(column, justify="right")
    for row in comparison_rows(info):
        head.add_row(*row)
    advice = slower(info)
    facts = [
        *(text.splitlines() if (text := max_drop_text(info)) else []),
        *([f"slower  {advice}" + ("" if "as_fast" in info else "; for a model that is not:")] if advice else []),
        *([_continued(faster_command(info))] if advice and "as_fast" not in info else []),
        *as_fast_lines(info),
        *budget_text(info).splitlines(),
        *fitting_lines(info),
        *measured_lines(info),
        *energy_lines(info),
        *change_lines(info),
        *(f"{'WARNING ' * warns}{text}" for text, warns in reliability_notes(info)),
    ]
    return render(
        head,
        *("\n".join(map(wrapped, line.split("\n"))) for line in facts),
        *([front_table(info)] if info.get("front") else []),
        "\nlayers",
        layer_text(info["layers"]),
        width=WIDTH,
    )


def wrapped(text: str, indent: int = 8) -> str:
    """A line broken between words. What follows stands beneath the first words of a line such as "budget  params".

    Args:
        text: The line.
        indent: By how much what follows is indented.
    """
    style = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    lines = style.wrap(unbroken(text))
    return "\n".join(lines).replace("\u00a0", " ")


def _continued(command: str) -> str:
    """A command in lines that a shell reads as one."""
    lines = textwrap.wrap(command, WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(f"        {line}" for line in lines)


def comparison_rows(info: ResultInfo) -> list[tuple[str, str, str, str]]:
    """The dense and the compressed model side by side.

    Args:
        info: The content of result.json.

    Returns:
        Rows (what, dense, compressed, change) of scores, costs and time.
    """
    rows = []
    before, after, intervals = info["score"]["dense"], info["score"]["compressed"], info.get("intervals")
    for part in PARTS:
        a, b = before[part], after[part]
        if a is None and b is None:
            continue
        change = "–" if a is None or b is None else f"{100 * (b - a):+.2f} points"
        dense = with_interval(a, intervals["dense"][part] if intervals else None)
        compressed = with_interval(b, intervals["compressed"][part] if intervals else None)
        rows.append((f"score, {part}", dense, compressed, change))
    for metric, unit in UNITS.items():
        whole, cost = info["cost"]["dense"][metric], info["cost"]["compressed"][metric]
        rows.append((unit, f"{whole:,}", f"{cost:,}", f"{percent(cost / whole, 1)} of dense" if whole else "–"))
    for what, found in speeds(info):
        rows.append((what, f"{found['dense']:.2f} ms", f"{found['compressed']:.2f} ms", speed_text(found)))
    return rows


def speeds(info: ResultInfo) -> list[tuple[str, MillisecondsEntry]]:
    """The times of forward passes that were measured on the machine of the search.

    Args:
        info: The content of result.json.

    Returns:
        What was timed, and the times of both models: of one example, of a batch that fills the device, and under the
        conditions of a latency budget.
    """
    found = [("one forward pass", info["milliseconds"])]
    if batch := info.get("batch_milliseconds"):
        found.append((f"a batch of {batch.get('examples', 1)}", batch))
    if (checked := info.get("latency")) and "latency" in checked:
        dense = info["budget"]["latency"]["dense"] if info["budget"]["latency"]["requested"] <= 1 else checked["dense"]
        entry: MillisecondsEntry = {
            "dense": dense / 1e6,
            "compressed": checked["latency"] / 1e6,
            "ratio": [checked["low"] / dense, checked["high"] / dense],
            "repeats": checked["rounds"],
            "threads": 1,
        }
        found.append(("one pass, fused" if "fused=yes" in checked["conditions"] else "one pass, as asked", entry))
    return found


def slower(info: ResultInfo) -> str | None:
    """What is slower in the compressed model than in the dense one; None where the budget was on time.

    Args:
        info: The content of result.json.

    Returns:
        Text such as "one forward pass is 2.50 × slower"; None if nothing is.
    """
    if "latency" in info["budget"]:
        return None
    found = ((what, speed_text(times).lower()) for what, times in speeds(info))
    return ", ".join(f"{what} is {text}" for what, text in found if "slower" in text) or None


def faster_command(info: ResultInfo) -> str:
    """The same search for a model that is not slower than dense, as a command, or as Python where there was no task.

    Args:
        info: The content of result.json.
    """
    limits = {metric: _asked(b) for metric, b in info["budget"].items()}
    device = info["environment"]["device"].partition(":")[0] if "environment" in info else "cpu"
    conditions = FUSED.format(device=device)
    if not info["task"]:
        return f"rankopt.compress(model, calibration, {limits | {'latency': '100%'}}, latency_on='{conditions}')"
    words = ["rankopt", "search", info["task"]]
    for metric, value in {**limits, "latency": "100%"}.items():
        words += ["--budget", f"{metric}={value}"]
    words += ["--latency-on", conditions]
    if info["strategy"] != "knapsack":
        words += ["--strategy", info["strategy"]]
    for key, value in info.get("options", {}).items():
        words += ["--option", f"{key}={value}"]
    if trials := info.get("settings", {}).get("trials"):
        words += ["--trials", trials]
    if info["seed"]:
        words += ["--seed", str(info["seed"])]
    return shlex.join([*words, *_space_words(info.get("space", {}), info["strategy"]), "--out", "runs/as-fast"])


def _space_words(space: Mapping[str, Any], strategy: str) -> list[str]:
    """The options that ask for a search space: its name, and what was changed in one that rankopt brings.

    Args:
        space: The search space, as in result.json.
        strategy: The name of the strategy. Its class is not looked up: that would import what a run folder names.
    """
    if (name := space.get("name", "default")) not in space_names():
        return ["--space", f"{name}.toml"]
    words, base = [] if name == "default" else ["--space", str(name)], load_space(name)
    if (families := space.get("families", base.families)) and list(families) != list(base.families):
        words += ["--families", ",".join(families)]
    for pattern in space.get("keep_dense", ()):
        if pattern not in base.keep_dense:
            words += ["--keep-dense", pattern]
    if space.get("minutes"):
        return [*words, "--minutes", f"{space['minutes']:g}"]
    usual = NORMAL if strategy == Knapsack.name else THOROUGH
    if (effort := space.get("effort", THOROUGH)) != base.with_effort(usual).effort:  # once it was always thorough
        words += ["--effort", effort]
    return words


def _asked(b: BudgetEntry) -> float | int:
    """A limit as a budget takes it: a fraction, or an absolute number."""
    return b["requested"] if b["requested"] <= 1 else round(b["requested"])


def as_fast_lines(info: ResultInfo) -> list[str]:
    """What the second search, for a model that is not slower than dense, came to.

    Args:
        info: The content of result.json.

    Returns:
        Sentences without a full stop; none where it was not asked for.
    """
    found = info.get("as_fast")
    if not found:
        return []
    if "refused" in found:
        return [
            "no model of this search space is within the budget and not slower than the dense one, both fused "
            f"({found['conditions']}): {found['refused']}"
        ]
    if "failed" in found:
        return [f"the second search, for a model that is not slower than the dense one, did not end: {found['failed']}"]
    cost, dense, score = found["cost"], info["cost"]["dense"], found["score"]
    kept = ", ".join(f"{percent(cost[m] / dense[m], 1)} of the {UNITS[m]}" for m in UNITS if m in info["budget"])
    scores = "".join(f", {part} score {percent(score[part])}" for part in PARTS if score[part] is not None)
    low, high = found["interval"]
    lines = [
        f"smaller and as fast: a second plan ({found['run']}/ in the run folder) has {kept}{scores}, and takes "
        f"{found['ratio']:.2f} ({low:.2f}–{high:.2f}) of the dense model's time, both fused ({found['conditions']})"
    ]
    if n := found["reconstructed"]:
        lines.append(
            f"it stores {counted(n, 'layer')} as factors and runs each as one dense operation: that is smaller in "
            "files and on the way to a device, and not in memory once it runs"
        )
    return lines


# --- what was asked, and how it was met --------------------------------------------------------------


def max_drop_text(info: ResultInfo) -> str | None:
    """What a run of `--max-drop` asked, and its answer.

    Args:
        info: The content of result.json.

    Returns:
        Two or three lines; None for other runs.
    """
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


def budget_text(info: ResultInfo) -> str:
    """Three lines on the budget, the trials, and where the time went.

    Args:
        info: The content of result.json.
    """
    parts = [
        f"{metric}: {amount(metric, b['achieved'])} of {amount(metric, b['target'])} allowed "
        f"({b['achieved'] / b['target']:.2%} used)"
        for metric, b in info["budget"].items()
    ]
    trials = info["trials"]
    stopped = f", {trials['stopped']} stopped at a low fidelity" if trials.get("stopped") else ""
    if trials.get("interrupted"):
        stopped += ", interrupted"
    elif n_evaluated(info) < (limit := trials.get("limit", 0)):
        stopped += f" (of {limit}: the strategy proposed no further plan)"
    gap = info["optimality_gap"]
    bound = "ranks learnt in training" if gap is None else f"optimality gap of the predicted loss {gap:.2%}"
    return (
        f"budget  {'; '.join(parts)}\n"
        f"search  {counted(n_evaluated(info), 'plan')}, {trials['failed']} failed{stopped}; {bound}\n"
        f"seconds {', '.join(f'{k} {v:.1f}' for k, v in info['seconds'].items())}"
    )


def fitting_lines(info: ResultInfo) -> list[str]:
    """What was fitted, and what more effort would be worth.

    Args:
        info: The content of result.json.

    Returns:
        A sentence without a full stop; none where everything was fitted.
    """
    found = info.get("fitting")
    if not found:
        return []
    cut, more = ("", "") if found["settled"] else (", cut short", " or more")
    return [
        f"fitted  {found['first']:,} of {found['candidates']:,} candidates in few steps or closed form, "
        f"{found['final']:,} to the end for this budget (effort {info['effort']}{cut}); all of them could lower the "
        f"predicted loss by about {found['gain']:.1%}{more}"
    ]


def n_evaluated(info: ResultInfo) -> int:
    """The number of plans evaluated, including those that a tightened limit on latency left out later.

    Args:
        info: The content of result.json.
    """
    return info["trials"]["distinct"] + info["trials"].get("outside", 0)


def measured_lines(info: ResultInfo) -> list[str]:
    """What budgets on latency and energy came to: the measurement, layers that stayed dense, and how costs were found.

    Args:
        info: The content of result.json.

    Returns:
        Sentences without a full stop; none without such a budget.
    """
    return [line for metric in MEASURED_KEYS for line in _lines_of(metric, info)]


def _lines_of(metric: Metric, info: ResultInfo) -> list[str]:
    found = cast(MeasuredEntry | None, info.get(MEASURED_KEYS[metric]))
    if not found:
        return []
    times, slower = ("times", "be slower") if metric == "latency" else ("energies", "take more energy")
    if "met" in found:
        lines = [_check_line(metric, info, found)]
    else:
        lines = [f"{metric} from a table measured {_conditions(found)}: it was not measured here"]
    if n := len(found["none_faster"]):
        names = few(found["none_faster"], 6)
        lines.append(f"{counted(n, 'layer')} stayed dense: factorised they would {slower} ({names})")
    own = "time" if metric == "latency" else "energy"
    fit = f"a candidate costs {found['slope']:.2f} times its own {own}, fitted to {found['plans']} whole models"
    gap = found["interpolation"]
    between = "" if gap is None else f"; {times} between measured ranks: typically {gap:.1%} off"
    return [*lines, f"{fit}, the worst {found['residual']:.1%} of the dense model off{between}"]


def _check_line(metric: Metric, info: ResultInfo, found: MeasuredEntry) -> str:
    def text(value: int) -> str:
        return amount(metric, value)

    # For a budget given as a fraction, numbers are relative to the dense model's in the table.
    fraction = info["budget"][metric]["requested"] <= 1
    whole = info["budget"][metric]["dense"] if fraction else found["dense"]
    value = info["budget"][metric]["achieved"]
    each = "" if metric == "latency" else " for one example"
    return (
        f"{metric} measured on the rebuilt model: {text(value)}{each} (95 %: {text(found['low'])} to "
        f"{text(found['high'])}), {percent(value / whole, 1)} of the dense model's {text(whole)}; "
        f"{found['rounds']} passes in turn with the dense model, which took {text(found['dense'])} there; "
        f"predicted {text(found['predicted'])}; attempts: {found['attempts']}; {_conditions(found)}"
    )


def _conditions(found: MeasuredEntry) -> str:
    return f"on {found['conditions']} ({found['machine']})"


def energy_lines(info: ResultInfo) -> list[str]:
    """Joules and grams of CO₂ per inference, or why there are none.

    Args:
        info: The content of result.json.

    Returns:
        One sentence; none for files of earlier versions.
    """
    found = info.get("energy")
    if not found:
        return []
    if found["dense"] is None:
        return [str(found["source"])]
    return [
        f"energy of one inference: {found['compressed']:.3g} J, {found['compressed_grams']:.2g} g CO₂ (dense "
        f"{found['dense']:.3g} J, {found['dense_grams']:.2g} g); {found['source']}"
    ]


def change_lines(info: ResultInfo) -> list[str]:
    """What was done to the chosen plan's model after the search, and whether it helped.

    Args:
        info: The content of result.json.
    """
    steps = (
        ("refitting layer after layer (the layers' errors below are from before)", info.get("refinement")),
        ("moving batch norms to what they now see", info.get("batch_norm")),
    )
    return [
        f"{text}: objective {change['before']:.4g} -> {change['after']:.4g}, {'kept' if change['kept'] else 'not kept'}"
        for text, change in steps
        if change
    ]


# --- how far to trust it -----------------------------------------------------------------------------


def reliability_notes(info: ResultInfo) -> list[tuple[str, bool]]:
    """How far the numbers of a run can be trusted.

    Args:
        info: The content of result.json.

    Returns:
        Sentences without a full stop, and whether each is a warning.
    """
    notes = _correlation_notes(info)
    examples = info.get("examples")
    if (tie := info.get("tie")) and examples and examples["validation"]:
        notes.append(_tie_note(tie, examples["validation"]))
    elif info["score"]["compressed"]["validation"] is not None and not (examples and examples["validation"]):
        notes.append(("the noise of the scores is unknown: Task(examples=...) says how many they average over", False))
    said = [(text, True) for text in info.get("warnings", [])]
    return [*notes, *said, *((text, False) for text in fidelity_lines(info))]


def _correlation_notes(info: ResultInfo) -> list[tuple[str, bool]]:
    proxy, notes = info.get("proxy"), []
    if not proxy:
        return []
    for found, what, meaning in (
        (
            proxy.get("predicted_objective"),
            "predicted losses and measured objectives",
            "allocations rest on the former",
        ),
        (proxy.get("objective_score"), "objectives and validation scores", "searches minimise the former"),
    ):
        if found:
            text, warns = f"rank correlation of {what}: {correlation_text(found)}", found["verdict"] == "poor"
            notes.append((f"{text}; {meaning}" if warns else text, warns))
    return notes


def _tie_note(tie: TieEntry, examples: int) -> tuple[str, bool]:
    gap = f"{100 * tie['low']:+.2f} to {100 * tie['high']:+.2f} points (95 %)"
    runner_up = f"the runner-up (trial {tie['runner_up']}, score {percent(tie['score'])})"
    within = f"{tie['tied']} of the {tie['others']} other plans score within the noise of {examples:,} examples"
    if tie["verdict"] == "tie":
        return f"the chosen plan and {runner_up} are a tie, {gap} apart; {within}", False
    if tie["verdict"] == "worse":
        return f"the chosen plan has the least objective, but scores below {runner_up}: {gap}; {within}", True
    return f"the chosen plan scores above {runner_up}: {gap}; {within}", False


def fidelity_lines(info: ResultInfo) -> list[str]:
    """How many trials each fidelity below the full one stopped, and how well it ranked the others.

    Args:
        info: The content of result.json.
    """
    lines = []
    for row in info.get("fidelities") or []:
        text = f"fidelity {row['name']!r}: {counted(row['measured'], 'trial')} measured, {len(row['stopped'])} stopped"
        if row["stopped"]:
            text += f" ({', '.join(map(str, row['stopped'][:30]))}{', ...' * (len(row['stopped']) > 30)})"
        if row["agreement"] is not None and row["correlation"] is not None:
            found = correlation_text(row["correlation"])
            text += f"; it ordered {row['agreement']:.0%} of the pairs that went on as the objective did, {found}"
        lines.append(text)
    return lines


# --- tables ------------------------------------------------------------------------------------------


def front_table(info: ResultInfo) -> Table:
    """The trials that no other beats in both objective and cost; which of them to use is the reader's choice.

    Args:
        info: The content of result.json of a search with the option `objectives`.
    """
    metrics: list[Metric] = [m for m in BUDGETS if m in info["front"][0]]
    budgets = " ".join(f"--budget {m}=N" for m in metrics)
    table = Table(title=f"front: for one of these plans, search again with {budgets}", title_justify="left")
    for column in ("trial", "objective", *(x for m in metrics for x in (m, "of dense"))):
        table.add_column(column, justify="right")
    for row in info["front"]:
        dense = info["cost"]["dense"]
        costs = [x for m in metrics for x in (f"{row[m]:,}", percent(row[m] / dense[m], 1))]
        table.add_row(str(row["trial"]), f"{row['objective']:.4g}", *costs)
    return table


def layer_text(layers: Sequence[LayerRow]) -> str:
    """Every layer with its method, rank, parameters and error, and below it the reason; a long model by its modules.

    Args:
        layers: The rows of result.json.
    """
    found = groups([x["name"] for x in layers])
    if len(found) == 1:
        rows = [(x["method"], rank_text(x["rank"]), *_sizes([x])) for x in layers]
        return columns(
            ("layer", "method", "rank", "params", "of dense", "error"),
            [x["name"] for x in layers],
            rows,
            ["; ".join([*method_text(x).split(", ")[1:], str(x["reason"])]) for x in layers],
        )
    rows = []
    for group in found:
        members = [layers[i] for i in group.members]
        methods = ", ".join(f"{n} {method}" for method, n in Counter(x["method"] for x in members).most_common())
        rows.append((shortened(methods, LONGEST_METHODS), str(len(members)), *_sizes(members)))
    head = ("module", "methods", "layers", "params", "of dense", "error ≤")
    text = columns(head, [group.name for group in found], rows)
    end = f"Each of the {len(layers)} layers is in report.html, in result.json and in result.to_pandas()."
    return f"{text}\n{wrapped(end, 0)}"


def _sizes(layers: Sequence[LayerRow]) -> tuple[str, str, str]:
    """Parameters of some layers together, their share of the dense ones, and the largest error."""
    params, dense = sum(x["params"] for x in layers), sum(x["dense_params"] for x in layers)
    error = max(x["error"] for x in layers)
    return f"{params:,}", f"{params / dense:.0%}" if dense else "–", f"{error:.3g}" if error else "0"


def columns(head: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str] = ()) -> str:
    """Write a table of names, a column of text and columns of numbers, with a paragraph below each row.

    Args:
        head: What the columns are called.
        names: The names, which are shortened where the line would be too long.
        rows: The other columns.
        below: The paragraphs; empty for none.
    """
    widths = [max(map(cell_len, column)) for column in zip(head[1:], *rows, strict=True)]
    shown = labels(names, max(SHORTEST_LABEL, WIDTH - sum(widths) - 2 * len(widths)))
    lines = []
    width = max(map(cell_len, [head[0], *shown]))
    for name, row, text in zip([head[0], *shown], [head[1:], *rows], ["", *(below or [""] * len(rows))], strict=True):
        numbers = (" " * (w - cell_len(x)) + x for x, w in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([set_cell_size(name, width), set_cell_size(row[0], widths[0]), *numbers]).rstrip())
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)
