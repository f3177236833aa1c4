"""A training as text and pictures."""

from __future__ import annotations

from typing import Any

from rankopt.core.result_record import ExecutionEntry, Part, ResultInfo, TrainingEntry
from rankopt.report.pictures import ACCENT, FAINT, INK, POINT, objective_axis
from rankopt.search.summary import percent
from rankopt.training.recipe import Recipe


def lines(info: ResultInfo) -> list[str]:
    """The training of a result in words.

    Args:
        info: The content of result.json.

    Returns:
        Sentences without a full stop; none if the result was not trained.
    """
    t = info.get("training")
    if not t:
        return []
    recipe, after = Recipe(**t["recipe"]), info["score"]["compressed"]
    parts = []
    if recipe.layerwise:
        parts.append(f"{recipe.layerwise} steps towards the dense model's outputs, {recipe.units} apart")
    if recipe.epochs:
        parts.append(f"{recipe.epochs:g} epochs of {recipe.optimizer}, rate {recipe.rate:g} ({recipe.schedule})")
    if t["teacher"]:
        parts.append(f"teacher {t['teacher']}")
    if not t.get("labels", True):
        parts.append("from predictions alone, as the task has no train and loss")
    start = "from scratch" if t["from_scratch"] else f"from {t['run']}"
    found = [f"trained {start}: {'; '.join(parts)}; {t['seconds']:.0f} s"]
    scores: tuple[tuple[Part, float | None], ...] = (("validation", t["before"]), ("test", t["test_before"]))
    for part, before in scores:
        if (now := after[part]) is not None:
            found.append(f"{part} score {'' if before is None else percent(before) + ' -> '}{percent(now)}")
            if part == "validation" and before is not None and now < before:
                found[-1] += f": less than before; try {_gentler(recipe, t.get('batch_norms', 0))}"
    if execution := t.get("execution"):
        found.append(_execution(execution))
    if changed := {k: v for k, v in recipe.changed().items() if k not in ("epochs", "rate", "layerwise")}:
        found.append(f"other settings: {', '.join(f'{k}={v}' for k, v in changed.items())}")
    return found


def _execution(e: ExecutionEntry) -> str:
    """How the steps were computed."""
    parts = [f"{e['steps_per_second']:.4g} steps a second on {e['device']} in {e['precision']}"]
    if e["channels_last"]:
        parts.append("channels last")
    if e["graphs"]:
        parts.append("each one CUDA graph")
    if e["not_recorded"]:
        parts.append(f"kernel by kernel ({e['not_recorded']})")
    if e["milliseconds"]:
        parts.append("tried: " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in e["milliseconds"].items()))
    return "; ".join(parts)


def _gentler(recipe: Recipe, batch_norms: int) -> str:
    """Settings to try where a training lowered the score."""
    if not recipe.epochs:
        return "a lower layerwise_rate, or fewer steps"
    keep = ", or eval_mode=true, which keeps batch norms as they are" if batch_norms and not recipe.eval_mode else ""
    return f"a lower rate{keep}"


def losses(ax: Any, training: TrainingEntry) -> None:
    """Draw the training loss of each stage over its steps.

    Args:
        ax: Matplotlib axes.
        training: The entry of result.json.
    """
    colours = {"layerwise": ACCENT, "whole": POINT}
    for name, points in training["losses"].items():
        steps, values = zip(*points, strict=True)
        ax.plot(steps, values, color=colours[name], lw=1.5, label="layer by layer" if name == "layerwise" else "whole")
    objective_axis(ax, "y", [v for points in training["losses"].values() for _, v in points])
    ax.set(xlabel="step", ylabel="training loss")
    ax.figure.legend(loc="outside upper left", ncols=2)


def scores(ax: Any, training: TrainingEntry, dense: float | None) -> None:
    """Draw the validation score before the training and after each epoch.

    Args:
        ax: Matplotlib axes.
        training: The entry of result.json.
        dense: Validation score of the dense model.
    """
    before = [] if training["before"] is None else [(0.0, training["before"])]
    rows = [*before, *((e["epoch"], e["score"]) for e in training["epochs"] if e["score"] is not None)]
    ax.plot(*zip(*rows, strict=True), color=POINT, lw=1.5, marker="o", ms=4, label="compressed")
    if dense is not None:
        ax.axhline(dense, color=INK, lw=1, ls=":", label="dense")
    ax.tick_params(colors=FAINT, labelcolor=INK)
    ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.4g} %")
    ax.set(xlabel="epoch", ylabel="validation score")
    ax.figure.legend(loc="outside upper left", ncols=2)
