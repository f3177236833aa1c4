"""Results are open: tables, pictures and pages of a search in Python."""

from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from torch import nn

import rankopt
from tests.helpers.spaces import QUICK

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result():
    mpl.use("Agg")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    return rankopt.compress(
        model, [X], {"params": 0.5}, lambda m: 0.75, strategy="random", trials=3, space=QUICK, progress=False
    )


def test_a_result_is_short_in_print_and_a_table_in_notebooks(result):
    assert repr(result).startswith("<Result: params ") and "score 75.00% (dense 75.00%)" in repr(result)
    page = result._repr_html_()
    assert page.count("<table>") == 2 and "parameters" in page and "of 2 layers replaced" in page


def test_text_is_text_where_rich_sees_a_notebook():
    code = "from rich import console; console._is_jupyter = lambda: True; from rankopt.search.summary import render"
    command = [sys.executable, "-c", f"{code}; print(render('a text'))"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "a text"


def test_frames(result):
    trials, layers = result.trials_dataframe(), result.to_pandas()
    assert list(trials["number"]) == [0, 1, 2] and trials["params"].max() <= result.limits[0].target
    assert list(layers["name"]) == ["0", "2"] and layers["params"].notna().all()


def test_frames_without_pandas_say_what_to_install(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(rankopt.RankoptError, match="pip install pandas"):
        result.to_pandas()


def test_frontiers_and_sensitivities(result):
    frontier = result.frontier("0")
    assert [c.cost.params for c in frontier] == sorted(c.cost.params for c in frontier)
    assert [c.loss for c in frontier] == sorted((c.loss for c in frontier), reverse=True)
    assert all(error > 0 for error, _ in result.sensitivities["0"])
    with pytest.raises(rankopt.RankoptError, match="there is no layer 'conv': choose from '0', '2'"):
        result.frontier("conv")


def test_plots_return_axes_that_users_go_on_with(result, tmp_path):
    for ax in (result.plot_tradeoff(), result.plot_ranks(), result.plot_trials(), result.plot_frontier("0")):
        ax.set_title("mine")
        ax.figure.savefig(tmp_path / "plot.png")
        pyplot.close(ax.figure)
    _, own = pyplot.subplots(1, 2)
    assert result.plot_trials(own[0]) is own[0] and result.plot_frontier("0", ax=own[1]) is own[1]
    pyplot.close("all")


def test_a_report_is_one_file(result, tmp_path):
    page = result.report(tmp_path / "pages" / "report.html").read_text()
    assert "best so far" in page and "<script src" not in page


def test_inspect_shows_layers_as_a_table():
    found = rankopt.inspect(nn.Linear(32, 32), torch.zeros(1, 32), QUICK)
    assert found.options[""] == ["svd_out"] and "1,056" in repr(found) and "(the model)" in found._repr_html_()
