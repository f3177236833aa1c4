"""Bonds: spectra against algebra written out, channels against masked layers, and the page in a browser."""

from __future__ import annotations

import html
import json
import math
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankopt.candidates.search_space import SearchSpace
from rankopt.core.records import Layer
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import Bond
from rankopt.report.bond_analysis import LayerBonds, inspect_bonds, subject_of_run, subject_of_space
from rankopt.report.bond_channels import (
    IMAGES,
    Channel,
    Watch,
    as_images,
    channel_shares,
    find_channels,
    first_channels,
)
from rankopt.report.bond_latents import Effort, analyse
from rankopt.report.bond_spectra import BondSpectrum, effective_rank, inner_moment, spectra
from rankopt.report.bonds_page import page, table, verdict
from rankopt.report.bonds_page import spectra as draw_spectra
from rankopt.report.pictures import Figure
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from tests.helpers.browser import PHONE, Page, measure
from tests.helpers.command import run
from tests.helpers.layers import PAIRS, SAMPLED, build, make

NETWORKS = {"ttn", "augmented_ttn", "mera", "brick_wall"}


def found(family, case, rank, *, calibrated=True):
    module, fit = build(family, case, rank, steps=20)
    statistics = (case.moment, case.metric) if calibrated else (None, None)
    return spectra(case.layer, family, rank, case.module.weight, module.weight, *statistics), module, fit


# --- spectra -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_effective_rank_is_between_1_and_their_number_whatever_their_scale(values, scale):
    rank = effective_rank(values)
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    assert effective_rank([scale * v for v in values]) == pytest.approx(rank)
    assert effective_rank([scale] * len(values)) == pytest.approx(len(values))
    assert effective_rank([*values, 0.0]) == pytest.approx(rank) and effective_rank([0.0]) == 0


@pytest.mark.parametrize(("family", "name"), SAMPLED)
def test_a_bond_bounds_the_rank_across_it(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    rank = (decomposition.ranks(case.layer, [0.4]) or [decomposition.full_rank(case.layer)])[0]
    bonds, _, _ = found(family, case, rank)
    assert bool(bonds) == (family not in NETWORKS)
    padded = family.startswith("tt_") and math.prod(decomposition.modes(case.layer)) > case.layer.weights
    for s in bonds:
        assert padded or all(v < 1e-6 * s.small[0] for v in s.small[s.size :]), s.bond
        assert len(s.small) == len(s.dense) and (padded or s.effective <= s.size + 1e-9)


@pytest.mark.parametrize("family", ["svd_out", "svd_grouped", "cp_merged", "tucker2"])
def test_at_the_last_bond_the_energy_lost_is_the_error(family):
    """Where the output factor is solved exactly, what is left out is orthogonal to what is kept."""
    case = make("conv3x3")
    bonds, _, fit = found(family, case, DECOMPOSITIONS[family].ranks(case.layer, [0.4])[0])
    assert bonds[-1].bond == "C h w | T" and bonds[-1].metric == "output"
    assert 1 - bonds[-1].kept == pytest.approx(fit.error, rel=1e-3)
    root = [np.real(scipy.linalg.sqrtm(m[0].numpy())) for m in (case.metric, case.moment)]
    values = np.linalg.svd(root[0] @ case.module.weight.detach().numpy().reshape(12, -1) @ root[1], compute_uv=False)
    np.testing.assert_allclose(bonds[-1].dense, values, rtol=1e-6, atol=1e-9)


def test_spectra_are_those_of_the_unfolded_weight():
    case = make("conv3x3")
    bonds, module, _ = found("cp", case, (9,), calibrated=False)
    w = module.weight.detach().numpy()  # (T, C, h, w)
    for s, order, inner in zip(bonds, [(0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 2, 3)], [8, 24, 72], strict=True):
        values = np.linalg.svd(w.transpose(order).reshape(-1, inner), compute_uv=False)
        np.testing.assert_allclose(s.small, values, atol=1e-9)
    assert [s.bond for s in bonds] == ["C | T h w", "C h | T w", "C h w | T"]
    linear = make("linear")  # 12 = 3 4, 20 = 4 5
    bonds, module, _ = found("ht", linear, (2, 3, 5, 3, 4))
    w = module.weight.detach().numpy().reshape(4, 5, 3, 4)  # T1, T2, C1, C2
    values = np.linalg.svd(w.transpose(1, 3, 2, 0).reshape(-1, 4), compute_uv=False)
    np.testing.assert_allclose(bonds[3].small, values, atol=1e-9)
    assert bonds[3].bond == "C1 C2 T2 | T1" and [s.metric for s in bonds] == ["plain"] * 2 + ["output"] + ["plain"] * 2


def test_a_bonds_input_moment_is_averaged_over_the_kernel_positions_beyond_it():
    layer = Layer("", "Conv2d", (4, 2, 3, 2))
    x = torch.randn(1, 12, 40, dtype=torch.float64)
    moment, patches = x @ x.mT / 40, x.view(2, 3, 2, 40)
    rows = [patches[:, :, j].reshape(6, 40) for j in range(2)]
    expected = sum(r @ r.mT for r in rows) / 80
    torch.testing.assert_close(inner_moment(layer, Bond(1, ("C", "h")), moment)[0], expected)
    torch.testing.assert_close(inner_moment(layer, Bond(1, ("C", "h", "w")), moment), moment)


def test_no_share_is_above_the_whole():
    """A compressed layer may have more energy than the dense one, and a cropped train more directions than its bond."""
    bond = BondSpectrum("C | T", 2, "plain", (1.0, 0.5, 0.1), (3.0, 2.9, 2.8, 2.7), 9.0)
    assert bond.effective > bond.size and bond.used == 1 and bond.kept == 0
    assert "below 100 % of the possible" in verdict([LayerBonds("a", "tt_matrix", (2,), (bond,))])
    figure = Figure()
    draw_spectra(figure.add_subplot(), [bond])
    drawn = [y for line in figure.axes[0].lines for y in line.get_ydata() if len(line.get_ydata()) > 2]
    assert len(drawn) == 4 and max(drawn) <= 1


# --- channels ----------------------------------------------------------------------------------------


CHAINS = [
    (f, n)
    for f, n in PAIRS
    if n in {"conv3x3", "grouped same reflect"}
    and f not in NETWORKS | {"svd_out", "svd_spatial", "svd_grouped", "tt_conv"}
]


@pytest.mark.parametrize(("family", "name"), CHAINS)
def test_a_channels_share_is_the_energy_of_the_layer_without_the_others(family, name):
    case = make(name)
    rank = DECOMPOSITIONS[family].ranks(case.layer, [0.4])[0]
    module, fit = build(family, case, rank, steps=5)
    assert first_channels(case.layer, family, rank)
    shares = channel_shares(case.layer, family, fit.factors, None, case.metric)
    g, first = case.layer.groups, module[0].weight

    def energy():
        w = module.weight.detach().reshape(g, case.layer.out_channels, -1)
        return ((case.metric @ w) * w).sum()

    before, alone = first.detach().clone(), []
    for k in range(shares.numel()):
        first.data = torch.zeros_like(before)
        first.data[k] = before[k]
        alone.append(energy().detach())
    torch.testing.assert_close(shares.flatten(), torch.stack(alone) / sum(alone))


def test_channels_that_cancel_have_no_share_above_the_whole():
    """Two channels of the same direction and opposite sign make almost nothing; each alone makes a lot."""
    layer = Layer("", "Conv2d", (1, 1, 1, 1))
    factors = (torch.ones(2, 1, 1, 1), torch.tensor([1.0, -0.99]).reshape(1, 2, 1, 1))
    shares = channel_shares(layer, "svd_out", factors, None, None)
    assert shares.sum().item() == pytest.approx(1)
    assert shares.flatten().tolist() == pytest.approx([1 / (1 + 0.99**2), 0.99**2 / (1 + 0.99**2)])


def test_the_image_and_the_place_that_a_channel_answers_to_are_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1)).eval()
    layer = Layer("2", "Conv2d", (8, 4, 3, 3))
    images = 0.01 * torch.randn(20, 1, 24, 24)
    images[7, :, 5:8, 15:18] += 5
    watch = Watch(layer, torch.ones(2, 4, 1, 1), torch.tensor([[0.2, 0.7]]))
    (strongest, other) = find_channels(model, {"2": watch}, images)["2"]
    assert (strongest.number, strongest.share, other.number) == (1, pytest.approx(0.7), 0)
    shown = (images[7] - images.min()) / (images.max() - images.min())
    torch.testing.assert_close(strongest.images[0], shown)
    top, bottom, left, right = strongest.boxes[0]
    assert 4 <= top <= bottom <= 8 and 14 <= left <= right <= 18
    assert strongest.responses[0] > 3 * strongest.responses[1] and len(strongest.images) == 2 * IMAGES
    assert list(strongest.responses[IMAGES:]) == sorted(strongest.responses[IMAGES:])
    folded = nn.Sequential(nn.Unflatten(2, (2, 12)), nn.Flatten(1, 2), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 1)))
    assert find_channels(nn.Sequential(*folded, nn.Identity(), model), {"5.2": watch}, images) == {}  # halves of images
    assert as_images([images, images]).shape == (40, 1, 24, 24)
    assert as_images([images, images[..., :3]]) is None and as_images([torch.zeros(2, 5)]) is None


def test_large_images_are_drawn_with_few_pixels():
    channel = Channel(
        3, 0.5, torch.rand(2 * IMAGES, 3, 224, 224), ((0, 223, 0, 223),) * 2 * IMAGES, (0.0,) * 2 * IMAGES
    )
    values = (2.0, 1.0)
    row = LayerBonds("a", "svd_in", (2,), (BondSpectrum("C | T h w", 2, "output", values, values),), (channel,) * 4)
    assert len(page("large", [row])) < 600_000


# --- a whole model, on the command line and in a browser ---------------------------------------------


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "bonds"
    path.mkdir()
    run_search(digits, digits.problem({"params": 0.4}), SearchSettings(), path)
    return path


@pytest.fixture(scope="module")
def rows(digits, folder):
    return inspect_bonds(subject_of_run(folder, digits.task))


def test_inspect_shows_the_bonds_of_a_run(folder, rows):
    stdout, _ = run("inspect", folder, "--bonds", "--task", "digits")
    assert max(map(len, stdout.splitlines()[:-1])) <= 100 and f"page: {folder / 'bonds.html'}" in stdout
    assert stdout.startswith(table(rows))
    source = (folder / "bonds.html").read_text()
    seen = Page(source)
    assert "script" not in seen.tags and "default-src 'none'" in source and len(seen.ids) == len(set(seen.ids))
    assert all(x.startswith(("#", "data:")) for x in seen.loads)
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | {x[1:] for x in seen.loads if x.startswith("#")}
    assert used <= set(seen.ids)
    factorised = [row for row in rows if row.spectra]
    assert len(factorised) >= 3 and any(row.channels for row in rows)
    bonds = source.count("what its strongest channels do")
    assert bonds >= len(factorised)
    # The overview, predictions and a followed channel; spectra and images by layer; effects, and those on classes.
    pictures = 3 + 2 * len(factorised) + 2 * bonds
    assert source.count("<svg") == pictures
    for row in rows:
        assert row.name in seen.text and (row.spectra or row.note in seen.text)


def test_inspect_shows_the_bonds_of_a_space_and_what_has_none(digits, tmp_path):
    space = SearchSpace(families=("ttn", "tt_matrix"), points=2, steps=1, keep_dense=("fc2",))
    shown = {row.name: row for row in inspect_bonds(subject_of_space(digits.task, space, tmp_path / "cache"))}
    assert "nonlinear" in shown["conv2"].note and "keeps fc2 dense" in shown["fc2"].note
    assert [s.metric for s in shown["fc1"].spectra] in (["plain", "plain"], [])
    text = table(list(shown.values()))
    assert max(map(len, text.splitlines())) <= 100 and "conv2: ttn generates" in text
    assert "Layers without a bond" in page("digits", list(shown.values()))


def test_options_that_exclude_each_other_are_refused(folder):
    for arguments, message in [
        ((folder, "--bonds"), "give the task whose model it was with --task"),
        (("digits", "--bonds", "--task", "digits"), "there is no folder digits"),
        (("digits", "--out", "x.html"), "go with --bonds"),
    ]:
        _, stderr = run("inspect", *arguments, code=2)
        assert message in " ".join(stderr.split())


@pytest.fixture(scope="module")
def latents(folder, digits):
    subject = subject_of_run(folder, digits.task)
    few = subject._replace(batches=[x[:24] for x in subject.batches[:1]])
    return analyse(*few, Effort(measured=2))


@pytest.mark.parametrize("width", [PHONE, 1280])
def test_the_page_is_not_wider_than_the_screen(rows, latents, chromium, tmp_path, width):
    frame = measure(page("a/" + "long_name" * 12, rows, latents), width, tmp_path)
    dom = chromium(frame, "--dump-dom", "--window-size=1400,900", "--virtual-time-budget=10000")
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title and title[1], "the page did not load"
    seen = json.loads(html.unescape(title[1]))
    assert seen["inner"] == width and seen["scroll"] <= width and not seen["out"]
    assert seen["smallest"] >= 9 and math.isfinite(seen["smallest"])
