"""Parts of the pictures: labels that differ, and ticks that lie apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from rankopt.core.names import LONGEST_NAME, labels
from rankopt.report.pictures import layers


def rows(*sizes: int) -> list[dict[str, object]]:
    """Layers of these sizes, as result.json has them."""
    return [
        {"name": f"fc{i}", "method": "dense", "rank": [], "params": size, "dense_params": size}
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("most", [3, 7, 40, 99, 999, 1234, 18_432, 38_218, 524_288, 2_359_296, 10**9])
@pytest.mark.parametrize("ratio", [2, 100])
def test_ticks_lie_apart(most, ratio):
    """Not 0, 4k, 8k, 10k, 20k."""
    ax = Figure(figsize=(4.2, 3)).subplots()
    layers(ax, rows(most, max(1, most // ratio)))
    low, high = ax.get_xlim()
    ticks = [t for t in ax.get_xticks() if low <= t <= high]
    place = ax.transAxes.inverted().transform(ax.transData.transform([(t, 0) for t in ticks]))[:, 0]
    assert len(ticks) >= 2
    assert np.diff(place).min() > 0.1
    if ax.get_xscale() == "linear":
        np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])
    for tick in ticks[1:]:
        digits = tick / 10 ** math.floor(math.log10(tick))
        assert round(digits * 100) % 25 == 0, ticks


BERT = [
    f"bert.encoder.layer.{i}.{part}"
    for i in (0, 11)
    for part in ("attention.self.query", "attention.self.key", "attention.output.dense", "output.dense")
]


def test_labels_of_a_long_model_differ_and_keep_what_tells_them_apart():
    assert labels(BERT)[:4] == ["0.a.self.query", "0.a.self.key", "0.a.output.dense", "0.output.dense"]
    found = labels(["bert.pooler.dense", *BERT])
    assert found[:2] == ["pooler.dense", "e.l.0.a.self.query"]
    assert "e.l.11.a.self.query" in found
    assert len(set(found)) == len(found)
    assert max(map(len, found)) <= LONGEST_NAME


def test_short_names_stay():
    assert labels(["conv1", "layer1.0.conv1", ""]) == ["conv1", "layer1.0.conv1", "(the model)"]
    assert labels(["layer1.0.conv1"]) == ["layer1.0.conv1"]
    assert labels(["net.0", "net.2"]) == ["0", "2"]


def test_names_that_are_cut_to_the_same_are_numbered():
    one, other = labels(["first_" + "x" * 30, "other_" + "x" * 30])
    assert one != other
    found = labels([f"denseblock{i}.denselayer{j}.convolution_of_it" for i in (1, 2) for j in (1, 2)])
    assert len(set(found)) == 4
