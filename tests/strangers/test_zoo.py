"""Architectures of timm, transformers and torch, made from a config: what `studies/zoo.py` asks of each of them."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).parents[2] / "studies"
ZOO = runpy.run_path(str(STUDIES / "zoo.py"))

FAST = ("timm convnext_atto", "hf ALBERT", "torch LSTM")
"""Those of `make test`; tests/strangers/test_12_hugging_face.py has others. `make slow` has all."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ZOO["ZOO"]]
)
def test_both_budgets_are_met_counted_again_saved_and_loaded(name: str) -> None:
    if name.startswith("timm") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is missing: tests/install_models.sh installs it")
    row: dict[str, Any] = ZOO["visit"](name)
    assert "error" not in row, row
    assert (row["budget params"], row["budget macs"]) == ("met", "met"), row
    assert row["factorised"] > 0 and all(row["dense"]), "every layer that stays dense says why"
