"""The notebooks of the documentation run from top to bottom, and show what a reader expects."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = "".join(str(output.get("data", {}).get("text/html", "")) for output in shown)
    assert "of 3 layers replaced" in pages and "fitting layers: " in pages and "trial 0: objective" in pages
    assert sum("image/png" in output.get("data", {}) for output in shown) == 4
    said = [output.text for output in shown if output.output_type == "stream" and output.name == "stderr"]
    assert not [text for text in said if "TqdmWarning" not in text], "tqdm, which Optuna loads, misses ipywidgets"
    assert (tmp_path / "report.html").is_file() and (tmp_path / "runs" / "small" / "plan.json").is_file()
