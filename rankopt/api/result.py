"""The result of a compression, as Python users have it: open to inspection, tables and pictures."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.api.errors import in_python_words
from rankopt.core.errors import RankoptError
from rankopt.core.files import write_beside
from rankopt.core.records import BUDGETS, Candidate, Trial
from rankopt.core.result_record import TrialRow
from rankopt.search import result as search_result
from rankopt.search.front import Front, searched_metrics

if TYPE_CHECKING:
    from pandas import DataFrame

    from rankopt.report.pictures import Axes


class Result(search_result.Result):
    """What a compression returns.

    Attributes:
        model: The compressed model, an ordinary `nn.Module`.
        plan: The decision for every layer.
        limits: The budget in absolute numbers.
        info: The content of [result.json](result-json.md).
        trials: The plans that were evaluated, in the order in which they ended.
        sensitivities: Layer name -> measured (relative error, rise of the objective), one layer at a time.
        dense: The model that was compressed; None where it is not known, as in a run folder.
        inputs: The calibration batches, as the model takes them; None where they are not known.
        as_fast: The result within the same budget whose model is not slower than dense, if `as_fast` asked for it and
            there is one; `info["as_fast"]` says why there is none.
    """

    @classmethod
    def of(cls, found: search_result.Result) -> Result:
        """Open up the result of a search.

        Args:
            found: The result.
        """
        fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
        return cls(**fields | {"as_fast": None if found.as_fast is None else cls.of(found.as_fast)})

    # --- as text ---

    def __repr__(self) -> str:
        replaced = sum(not c.unchanged for c in self.plan.choices)
        parts = [f"{metric} {b['achieved'] / b['dense']:.1%} of dense" for metric, b in self.info["budget"].items()]
        score = self.info["score"]
        before, after = score["dense"]["validation"], score["compressed"]["validation"]
        if before is not None and after is not None:
            parts.append(f"score {after:.2%} (dense {before:.2%})")
        return f"<Result: {', '.join(parts)}, {replaced} of {len(self.plan.choices)} layers replaced>"

    def _repr_html_(self) -> str:
        from rankopt.search.summary import comparison_rows, method_text, percent, rank_text

        rows = [
            (x["name"] or "(the model)", method_text(x), rank_text(x["rank"]), f"{x['params']:,}",
             percent(x["params"] / x["dense_params"], 0) if x["dense_params"] else "–")
            for x in self.info["layers"]
        ]  # fmt: skip
        layers = _html_table(("layer", "method", "rank", "parameters", "of dense"), rows, left=2)
        head = _html_table(("", "dense", "compressed", "change"), comparison_rows(self.info), left=1)
        replaced = sum(not c.unchanged for c in self.plan.choices)
        title = html.escape(f"{replaced} of {len(self.plan.choices)} layers replaced")
        return f"<div>{head}<details><summary>{title}</summary>{layers}</details></div>"

    @in_python_words
    def report(self, path: str | Path) -> Path:
        """Write the result as one HTML page that needs nothing else.

        Args:
            path: The file, "report.html" for example; its folder is made if it is missing.

        Returns:
            The file.

        Raises:
            RankoptError: If it cannot be written.
        """
        from rankopt.report.html import render

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = None if self.problem is None else search_result.frontiers(self.problem, self.plan)
        page = render(self.info, self._rows(), str(path.parent), found)
        write_beside(path, lambda p: p.write_text(page, encoding="utf-8", errors="replace"))
        return path

    # --- as data ---

    def frontier(self, layer: str) -> tuple[Candidate, ...]:
        """The candidates of a layer that no other beats in both loss and cost, cheapest first.

        Args:
            layer: The layer's name.

        Raises:
            RankoptError: There is no such layer, it had to stay dense, or the frontiers are not known, as in a run
                folder.
        """
        if self.problem is None:
            raise RankoptError("run folders do not hold frontiers: take rankopt.prepare(model, ...).frontier(layer)")
        if (frontier := self.problem.frontier(layer)) is not None:
            return frontier
        kept = {c.name: c.reason for c in self.plan.choices}
        if layer in kept:
            raise RankoptError(f"layer {layer!r} has no frontier, it stays dense: {kept[layer]}")
        raise RankoptError(f"there is no layer {layer!r}: choose from {', '.join(map(repr, kept))}")

    @property
    def best_trial(self) -> Trial:
        """The trial whose plan is the result; RankoptError if the trials are not known."""
        number = self.info["objective"].get("trial")
        found = next((t for t in self.trials if t.number == number), None)
        if found is None:
            raise RankoptError("this result holds no trials: it was not made by a search here")
        return found

    def front(self, *metrics: str) -> Front:
        """The trials that no other beats in the objective and in these metrics.

        Args:
            metrics: Such as "macs", "latency". Default: the metrics among the search's `objectives`, else those of the
                budget.

        Raises:
            RankoptError: There is no such metric.
        """
        return Front.of(self.trials, metrics or searched_metrics(self.info["options"]) or list(self.info["budget"]))

    def to_pandas(self) -> DataFrame:
        """The layers as a pandas DataFrame: name, kind, method, rank, costs, error and reason.

        Raises:
            RankoptError: If pandas is not installed.
        """
        return import_pandas().DataFrame([dict(row) for row in self.info["layers"]])

    def trials_dataframe(self) -> DataFrame:
        """The trials as a pandas DataFrame: number, state, objective, score, prediction, seconds, costs and error.

        Raises:
            RankoptError: If pandas is not installed.
        """
        rows = []
        for t in self.trials:
            row = [(k, getattr(t, k)) for k in ("number", "state", "objective", "score", "predicted", "seconds")]
            costs = [(m, t.cost[m]) for m in BUDGETS if t.cost[m]]
            rows.append(dict([*row, *costs, ("error", t.error)]))
        return import_pandas().DataFrame(rows)

    # --- as pictures ---

    def plot_tradeoff(self, ax: Axes | None = None) -> Axes:
        """Plot the score (or the objective) of dense model, trials and result against the budget's first metric.

        Args:
            ax: Matplotlib axes. Default: new ones.
        """
        from rankopt.report import pictures

        return pictures.on_axes(ax, pictures.size, self.info, self._rows())

    def plot_ranks(self, ax: Axes | None = None) -> Axes:
        """Plot what every layer keeps, with its rank.

        Args:
            ax: Matplotlib axes. Default: new ones.
        """
        from rankopt.report import pictures

        rows = self.info["layers"]
        return pictures.on_axes(ax, pictures.layers_with_methods, rows, height=0.4 + pictures.layers_height(rows))

    def plot_trials(self, ax: Axes | None = None) -> Axes:
        """Plot the objective over the trials.

        Args:
            ax: Matplotlib axes. Default: new ones.

        Raises:
            RankoptError: No trial has an objective.
        """
        from rankopt.report import pictures

        if not pictures.finished(self._rows(), "objective"):
            raise RankoptError("there is no finished trial to plot")
        return pictures.on_axes(ax, pictures.progress, self.info, self._rows())

    def plot_frontier(self, layer: str, ax: Axes | None = None) -> Axes:
        """Plot a layer's frontier: what its candidates cost, and what they are predicted to lose.

        Args:
            layer: The layer's name.
            ax: Matplotlib axes. Default: new ones.

        Raises:
            RankoptError: As `frontier`.
        """
        from rankopt.report import pictures

        candidates = self.frontier(layer)
        metric = self.limits[0].metric
        choice = next(c for c in self.plan.choices if c.name == layer)
        chosen = next(c for c in candidates if (c.method, c.rank, c.form, c.precision)
                      == (choice.method, choice.rank, choice.form, choice.precision))  # fmt: skip
        return pictures.on_axes(ax, pictures.frontier, layer, metric, candidates, chosen)

    def _rows(self) -> list[TrialRow]:
        """The trials as reports read them."""
        return [t.row for t in self.trials]


def import_pandas() -> Any:
    """The pandas module.

    Raises:
        RankoptError: If it is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise RankoptError("this needs pandas, which is not installed: pip install pandas") from None
    return pandas


def _html_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int) -> str:
    """A table; the first columns are text, the others numbers."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        sides = ("left" if i < left else "right" for i in range(len(cells)))
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag}>'
            for text, side in zip(cells, sides, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
