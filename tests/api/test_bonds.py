"""`rankopt.bonds`: the public object, on a trained network, on planted features and for what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from rankopt.api.result import Result
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from studies.bonds import planted, recovered


@pytest.fixture(scope="module")
def result(digits):
    return Result.of(run_search(digits, digits.problem({"params": 0.4}), SearchSettings()))


@pytest.fixture(scope="module")
def found(result):
    return rankopt.bonds(result, examples=96, measured=10, classes=[f"digit {i}" for i in range(10)], progress=False)


def test_on_a_trained_network_predicted_and_measured_ablation_agree_and_the_controls_do_not(found):
    for way in ("ablated", "patched"):
        entry = found.agreement(way=way)
        assert entry["n"] >= 30 and entry["spearman"] >= 0.9
    assert found.agreement(within=True)["spearman"] >= 0.85
    for control in ("rotated", "random"):
        assert abs(found.agreement(control, within=True)["spearman"]) < 0.5


def test_channels_come_as_a_table(found):
    table = found.to_pandas()
    bonds = found.latents.bonds
    assert len(table) == sum(b.effects.count for b in bonds) and set(table["layer"]) == {b.layer for b in bonds}
    assert table["predicted"].notna().all() and table["measured"].notna().sum() == sum(len(b.measured) for b in bonds)
    sums = table.groupby(["layer", "bond"])["share"].sum()
    assert sums.tolist() == pytest.approx([1] * len(sums)) and table["share"].max() <= 1
    assert table["selectivity"].between(0, 1).all() and set(table["top_class"]) <= {f"digit {i}" for i in range(10)}
    effects = found.class_effects(bonds[0].layer)
    assert effects.shape == (bonds[0].effects.count, 10) and list(effects) == [f"digit {i}" for i in range(10)]
    assert "Spearman" in repr(found) and bonds[0].layer in found._repr_html_()


def test_what_drives_a_channel_and_where_it_leads(found):
    layer = found.latents.bonds[0].layer
    responses = found.responses(layer)
    examples = found.top_examples(layer, 0, n=3)
    assert [abs(e.response) for e in examples] == sorted(responses[:, 0].abs().tolist(), reverse=True)[:3]
    assert all(responses[e.number, 0].item() == e.response and e.token is None for e in examples)
    steps = found.follow(layer, 0)
    assert [s.layer for s in steps] == [b.layer for b in found.latents.bonds if b.layer != layer]
    assert all(0 <= abs(s.correlation) <= 1 and 0 <= s.chance <= 1 for s in steps)


def test_plots_have_labelled_axes(found):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    layer = found.latents.bonds[0].layer
    for ax in (
        found.plot_agreement(),
        found.plot_effects(layer),
        found.plot_classes(layer),
        found.plot_flow(layer, 0),
        found.plot_spectra(layer),
    ):
        assert ax.get_xlabel() and ax.get_ylabel()
        pyplot.close(ax.figure)


def test_the_page_is_written(found, tmp_path):
    page = found.report(tmp_path / "new" / "bonds.html")
    text = page.read_text()
    assert "What the channels do" in text and "digit 3" in text and "control: rotated bonds" in text


def test_planted_features_are_recovered_and_no_control_does():
    model, x, present = planted(0, inputs=24, hidden=16, classes=4, examples=384)
    small = rankopt.compress(
        model, x.split(128), {"params": 0.95}, families=["svd_out"], ranks={"0": [8]}, keep_dense=["2"], progress=False
    )
    bond = rankopt.bonds(small, examples=384, measured=2, progress=False).bond("0")
    assert min(recovered(bond.effects.responses, present)) >= 0.95
    assert all(min(recovered(control.responses, present)) < 0.9 for control in bond.controls.values())


class Reader(nn.Module):
    """Says whether token 7 is in a text."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(30, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        with torch.no_grad():
            self.table.weight.mul_(0.1)
            self.table.weight[7, 0] = 5.0

    def forward(self, tokens):
        return self.out(self.inner(self.table(tokens)).amax(1))


def test_tokens_that_drive_a_channel_are_decoded():
    torch.manual_seed(0)
    tokens = torch.randint(30, (64, 8))
    result = rankopt.compress(
        Reader().eval(), [tokens], {"params": 0.95}, families=["svd_out"], ranks={"inner": [3]},
        keep_dense=["table", "out"], progress=False,
    )  # fmt: skip
    words = [f"word{i}" for i in range(30)]
    found = rankopt.bonds(result, decode=words.__getitem__, controls=False, progress=False)
    strongest = int(found.bond("inner").shares.argmax())
    assert {e.token for e in found.top_examples("inner", strongest)} == {"word7"}


def test_a_model_alone_a_run_folder_and_layers_by_pattern(result, found, digits, tmp_path):
    names = list(dict.fromkeys(b.layer for b in found.latents.bonds))
    one = rankopt.bonds(
        result.model, dense=result.dense, calibration=result.inputs, layers=names[-1], examples=32, measured=1,
        controls=False, progress=False,
    )  # fmt: skip
    assert {b.layer for b in one.latents.bonds} == {names[-1]}
    assert next(row for row in one.layers if row.name == names[0]).note == "left out of the analysis"
    result.save(tmp_path)
    run = rankopt.load_run(result.dense, tmp_path)
    with pytest.raises(rankopt.TaskError, match="dense="):
        rankopt.bonds(run)
    again = rankopt.bonds(
        run, result.inputs, dense=result.dense, layers=names[-1], examples=32, measured=1, controls=False,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(again.bond(names[-1]).effects.predicted, one.bond(names[-1]).effects.predicted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": "nothing*"}, "no factorised layer's name fits 'nothing\\*'"),
        ({"measured": 0}, "measured is 0"),
        ({"examples": -1}, "examples is -1"),
        ({"classes": ["a"]}, "1 names for 10 classes"),
        ({"calibration": []}, "empty"),
    ],
)
def test_what_cannot_be_analysed_is_refused_in_a_sentence(result, given, message):
    with pytest.raises(rankopt.RankoptError, match=message):
        rankopt.bonds(result, **{"progress": False, "controls": False, "measured": 1} | given)


def test_names_that_do_not_exist_are_refused_in_a_sentence(found):
    layer = found.latents.bonds[0].layer
    for call, message in [
        (lambda: found.bond("conv9"), "no bond in a layer 'conv9': choose from"),
        (lambda: found.bond(layer, 9), "has no bond 9"),
        (lambda: found.follow(layer, 999), "there is no 999"),
        (lambda: found.agreement("wrong"), "of is 'channels', 'rotated', 'random'"),
        (lambda: found.plot_flow(found.latents.bonds[-1].layer, 0), "no later one"),
    ]:
        with pytest.raises(rankopt.RankoptError, match=message):
            call()
    with pytest.raises(rankopt.TaskError, match="result is a int"):
        rankopt.bonds(3)
