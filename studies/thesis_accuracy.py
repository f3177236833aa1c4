"""The thesis's accuracies beside those that studies/thesis_accuracy.toml measured, as a table and a picture.

    .venv/bin/python studies/thesis_accuracy.py                # from runs/thesis_accuracy
    .venv/bin/python studies/thesis_accuracy.py --runs FOLDER  # from the study's folder elsewhere

Writes studies/results/thesis_accuracy/accuracy.{md,png}. What is printed is in printed.csv beside them (Tables 7.2 to
7.13 and A.1 to A.6, read from the thesis's text). A case that was not run has no measured value.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rankopt.core.files import write_beside
from rankopt.experiments.cases import CaseRow, read_rows
from rankopt.report import pictures

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "thesis_accuracy"
FAMILIES = ("cp", "tucker2", "tt", "rankopt")
NAMES = {"dense": "dense", "cp": "CP", "tucker2": "Tucker", "tt": "TT", "rankopt": "rankopt's choice"}
TRAININGS = {
    "scratch": "from scratch",
    "pretrained": "pretrained, not fine-tuned",
    "fine-tuned": "pretrained, fine-tuned",
}


class Row(NamedTuple):
    """One accuracy: printed, measured, or both; params: the measured model's share of the dense one's."""

    network: str
    training: str
    family: str
    percent: int
    printed: float | None
    measured: float | None
    params: float | None


def printed() -> dict[tuple[str, str, str, int], float]:
    """(network, training, family, percent) -> the accuracy that the thesis prints."""
    with (RESULTS / "printed.csv").open(newline="") as file:
        return {
            (r["network"], r["training"], r["family"], int(r["percent"])): float(r["accuracy"])
            for r in csv.DictReader(file)
        }


def measured(cases: Mapping[str, CaseRow], key: tuple[str, str, str, int]) -> tuple[float | None, float | None]:
    """Accuracy and share of the parameters that a case measured."""
    network, training, family, percent = key
    if family == "dense":
        case = cases.get(f"{network}-dense")
    else:
        case = cases.get(f"{network}-{percent}%-{family}-{'scratch' if training == 'scratch' else 'pretrained'}")
    if case is None:
        return None, None
    return case["untrained" if training == "pretrained" and family != "dense" else "score"], case["params"]


def rows(cases: Mapping[str, CaseRow]) -> list[Row]:
    """All rows of the thesis's tables, and rankopt's, in the order of the tables."""
    known = printed()
    found = []
    for network, training in dict.fromkeys(key[:2] for key in known):
        keys = [key for key in known if key[:2] == (network, training)]
        if training != "scratch":
            percents = dict.fromkeys(key[3] for key in keys if key[2] != "dense")
            keys += [(network, training, "rankopt", percent) for percent in percents]
        found += [Row(*key, known.get(key), *measured(cases, key)) for key in keys]
    return found


def table(found: Sequence[Row], cases: Mapping[str, CaseRow]) -> str:
    """The rows as Markdown."""
    total, done = len(found), sum(row.measured is not None for row in found)
    machines = sorted({f"{row['machine']}, {row['date']}" for row in cases.values()})
    lines = [
        "# The thesis's accuracies, printed and measured",
        "",
        "Made by `python studies/thesis_accuracy.py` from the cases of `rankopt run studies/thesis_accuracy.toml`;",
        "printed are Tables 7.2 to 7.13 and A.1 to A.6. One seed; test images, read once a training. Parameters are",
        "the measured model's. rankopt chooses family and rank of every layer within CP's parameters.",
        "",
        f"{done} of {total} rows are measured{': ' + '; '.join(machines) if machines else ''}.",
    ]
    for network, training in dict.fromkeys(row[:2] for row in found):
        lines += [
            "",
            f"## {network}, {TRAININGS[training]}",
            "",
            "| method | % | parameters | printed | measured | measured, above dense |",
            "|---|---|---|---|---|---|",
        ]
        group = [row for row in found if row[:2] == (network, training)]
        dense = next(row.measured for row in group if row.family == "dense")
        for row in group:
            change = None if None in (row.measured, dense) else 100 * (row.measured - dense)  # type: ignore[operator]
            cells = [NAMES[row.family], str(row.percent), _percent(row.params, 1), _percent(row.printed)]
            cells += [_percent(row.measured), "–" if change is None else f"{change:+.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def paint(figure: Any, found: Sequence[Row]) -> None:
    """Accuracy over the share of the parameters, as the thesis draws it: hollow as printed, filled as measured."""
    networks = list(dict.fromkeys(row.network for row in found))
    colours = dict(zip(FAMILIES, pictures.COLOURS, strict=False))
    axes = figure.subplots(len(networks), len(TRAININGS), sharex=True, sharey=True, squeeze=False)
    for network, line in zip(networks, axes, strict=True):
        for training, ax in zip(TRAININGS, line, strict=True):
            group = [row for row in found if row[:2] == (network, training)]
            _lines(ax, group, colours)
            ax.set_title(f"{network}, {TRAININGS[training]}", fontsize=9)
    for ax in axes[-1]:
        ax.set(xlabel="% of a layer's parameters", xticks=[10, 20, 50, 80])
    for line in axes:
        line[0].set_ylabel("test accuracy, %")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=4)


def _lines(ax: Any, group: Sequence[Row], colours: Mapping[str, str]) -> None:
    for what, style in (("printed", {"ls": ":", "mfc": "white"}), ("measured", {"ls": "-"})):
        for family in FAMILIES:
            points = [(r.percent, 100 * v) for r in group if r.family == family and (v := getattr(r, what)) is not None]
            if points:
                label = f"{NAMES[family]}, {what}"
                ax.plot(*zip(*points, strict=True), marker="o", ms=4, color=colours[family], label=label, **style)
        for row in group:
            if row.family == "dense" and (value := getattr(row, what)) is not None:
                ax.axhline(100 * value, color=pictures.FAINT, lw=1, ls=style["ls"], label=f"dense, {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/thesis_accuracy"), help="the study's folder")
    cases = read_rows(parser.parse_args().runs)
    found = rows(cases)
    text = table(found, cases)
    write_beside(RESULTS / "accuracy.md", lambda p: p.write_text(text))
    write_beside(RESULTS / "accuracy.png", lambda p: pictures.png(p, paint, found, (9.0, 15.0)))
    print(text)


if __name__ == "__main__":
    main()
