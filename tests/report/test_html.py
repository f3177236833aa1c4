"""The HTML report of a real run, as a parser and as a browser see it."""

from __future__ import annotations

import copy
import dataclasses
import html
import json
import re
import shutil
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len

from rankopt.candidates.prepare import Prepared
from rankopt.core.errors import StudyError
from rankopt.core.records import METRICS
from rankopt.core.run_folder import read_frontiers, read_result
from rankopt.report import training
from rankopt.report.html import render, verdict, write_report
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.local import read_trials
from rankopt.search.summary import comparison_rows, faster_command, summary
from rankopt.training.recipe import Recipe
from tests.helpers.browser import PHONE, Page, measure

EVIL = "<script>alert('x')</script><img src=http://example.com/x.png>$\\frac{"
HEADINGS = ("Before and after", "Budget", "The search", "The layers", "Rebuilding the model", "Where the time went")


@pytest.fixture(scope="module")
def run(digits: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of three evaluated plans."""
    folder = tmp_path_factory.mktemp("runs") / "digits-random"
    folder.mkdir()
    run_search(digits, digits.problem({"params": 0.4}), SearchSettings("random", trials=3), folder)
    return folder


@pytest.fixture
def info(run: Path) -> dict[str, Any]:
    return read_result(run)


@pytest.fixture
def trials(run: Path) -> list[dict[str, Any]]:
    return read_trials(run)


def big(info: dict[str, Any], n: int = 64) -> dict[str, Any]:
    """The result as if of a model of many layers with long names, whose sizes lie far apart."""
    info = copy.deepcopy(info)
    methods = ["dense", "svd_out", "cp_merged", "tt", "a_new_family"]
    info["layers"] = [
        {
            **info["layers"][i % len(info["layers"])],
            "name": f"features.denseblock{i // 16}.denselayer{i % 16}.convolution{i}",
            "method": methods[i % 5],
            "rank": [64] * (i % 5 and 3),
            "dense_params": 10 ** (i % 7) * 10,
            "params": 10 ** (i % 7) * (10 if i % 5 == 0 else 4),
        }
        for i in range(n)
    ]
    info["task"] = "/somewhere/" + "a_long_folder_name/" * 6 + "task.py:function"
    return info


# --- the page ----------------------------------------------------------------------------------------


def test_it_is_one_file_that_loads_nothing(run: Path) -> None:
    path = write_report(run)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert path == run / "report.html"
    assert "http://" not in source and "https://" not in source
    assert all(x.startswith(("#", "data:")) for x in page.loads)
    assert "default-src 'none'" in source
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)  # the page's own, and no other may run
    assert b64encode(sha256(script.encode()).digest()).decode() in source.split("<style>")[0]
    assert len(page.ids) == len(set(page.ids)), "pictures share ids"
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | {x[1:] for x in page.loads if x.startswith("#")}
    assert used <= set(page.ids)
    assert not list(run.glob(".*.part"))


def test_it_answers_a_readers_questions(run: Path, info: dict[str, Any]) -> None:
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    share = info["cost"]["compressed"]["params"] / info["cost"]["dense"]["params"]
    assert f"{100 * share:.1f} % of the parameters" in text
    assert "budget met" in text
    assert f"test score {100 * info['score']['compressed']['test']:.2f} %" in text
    positions = [text.index(heading) for heading in HEADINGS]
    assert positions == sorted(positions)
    for metric in METRICS:
        assert f"{info['cost']['compressed'][metric]:,}" in text
    for layer in info["layers"]:
        assert layer["name"] in text and layer["reason"] in text
    assert f"rankopt apply {run} --task digits --check" in text
    assert f"rankopt.load(model, '{run}')" in text
    assert "3 plans were evaluated on cpu, 0 failed" in text


def test_the_slower_note_is_there_if_the_smaller_model_is_slower(info: dict[str, Any]) -> None:
    info.pop("batch_milliseconds", None)
    for ratio, slower in ((0.5, False), (1.0, False), (2.5, True)):
        info["milliseconds"]["compressed"] = ratio * info["milliseconds"]["dense"]
        info["milliseconds"]["ratio"] = [0.98 * ratio, 1.02 * ratio]
        source = render(info, [], "run")
        assert ('id="slower"' in source) == slower
        assert ("2.50 × slower" in source) == slower
    assert "The budget was on parameters, not on time" in " ".join(source.split())


def test_text_of_others_is_escaped(info: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    plain = Page(render(info, trials, "run"))
    info["task"] = EVIL
    info["layers"][0] |= {"name": EVIL, "reason": EVIL, "kind": EVIL}
    info["layers"][1]["method"] = EVIL
    info["layers"][2]["name"] = "\ud800 層"  # half a character, and a script without a font
    trials[2] |= {"state": "failed", "objective": None, "score": None, "error": EVIL}
    page = Page(render(info, trials, EVIL))
    assert page.tags - plain.tags <= {"wbr"}
    assert all(x.startswith(("#", "data:")) for x in page.loads)
    assert page.text.count(EVIL) >= 5
    assert "Failed trials" in page.text and "Failed trials" not in plain.text


def test_it_draws_a_picture_for_each_result(info: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    def figures(source: str) -> int:
        return source.count("<svg")

    assert figures(render(info, trials, "run")) == 4
    assert figures(render(info, trials[:1], "run")) == 2
    assert figures(render(info, [], "run")) == 2  # a result that was saved without a study
    failed = [trials[0], *({**t, "state": "failed", "objective": None, "score": None} for t in trials[1:])]
    assert figures(render(info, failed, "run")) == 2


def test_it_says_how_far_its_numbers_can_be_trusted(info: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    low, high = info["intervals"]["compressed"]["test"]
    assert low < info["score"]["compressed"]["test"] < high
    for text in (Page(render(info, trials, "run")).text, " ".join(summary(info).split())):
        assert f"({100 * low:.1f}–{100 * high:.1f})" in text
        assert "redicted losses and measured objectives: too few trials to tell (3 plans)" in text
        assert f"other plans score within the noise of {info['examples']['validation']} examples" in text
    poor = {"n": 30, "spearman": 0.12, "low": -0.25, "high": 0.46, "verdict": "poor"}
    info["proxy"]["predicted_objective"] = poor
    source = render(info, trials, "run")
    assert "Spearman 0.12 (95 % interval -0.25 to 0.46, 30 plans), poor" in Page(source).text
    assert source.count('<aside class="note"><strong>Rank correlation of predicted') == 1
    assert "WARNING rank correlation of predicted" in summary(info)
    for key in ("intervals", "examples", "proxy", "tie"):  # a run of an earlier version
        del info[key]
    assert "rank correlation" not in Page(render(info, trials, "run")).text + summary(info)


@pytest.mark.parametrize("scores", ["none", "compressed only", "bad ones", "negative objectives"])
def test_any_scores_and_objectives_will_do(info: dict[str, Any], trials: list[dict[str, Any]], scores: str) -> None:
    if scores != "bad ones":
        info["score"]["dense"] = {"validation": None, "test": None}
    if scores == "none":
        info["score"]["compressed"] = info["score"]["dense"]
        trials = [{**t, "score": None} for t in trials]
    if scores == "bad ones":
        trials = [{**t, "score": s} for t, s in zip(trials, (0.1, float("nan"), 0.99), strict=True)]
    if scores == "negative objectives":
        trials = [{**t, "objective": -t["objective"], "predicted": None} for t in trials]
    text = Page(render(info, trials, "run")).text
    assert ("The task gives no score" in text) == (scores == "none")
    assert ("1 trial below" in text) == (scores == "bad ones")


def test_every_budget_is_shown_as_it_was_asked_for(info: dict[str, Any]) -> None:
    dense, small = info["cost"]["dense"], info["cost"]["compressed"]
    requested = {"params": 0.4, "macs": float(dense["macs"]), "bytes": 1.0}
    info["budget"] = {
        m: {"requested": r, "target": dense[m], "achieved": small[m], "dense": dense[m]} for m, r in requested.items()
    }
    text = Page(render(info, [], "run")).text
    assert f"requested 40.0 % of dense {dense['macs']:,} 100.0 % of dense" in text


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"there is no .*result\.json"):
        write_report(tmp_path)


@pytest.fixture
def frontiers(run: Path) -> Any:
    return read_frontiers(run)


def test_a_layers_candidates_are_a_click_away(info, trials, frontiers):
    source = render(info, trials, "run", frontiers)
    assert source.count("<svg") == render(info, trials, "run").count("<svg") + len(frontiers["layers"])
    for row in info["layers"]:
        points = frontiers["layers"][row["name"]]
        chosen = [p for p in points if (p["method"], p["rank"]) == (row["method"], row["rank"])]
        assert chosen and f"chosen: {row['method']}" in source
        assert [p["cost"] for p in points] == sorted(p["cost"] for p in points)
    assert source.count("<title>chosen: ") == len(info["layers"])


def test_candidates_that_lose_nothing_and_single_ones_are_drawn(info, trials, frontiers):
    name = info["layers"][0]["name"]
    point = frontiers["layers"][name][-1] | {"loss": 0.0, "cost": 0}
    for points in ([point], [point, point | {"cost": 1, "loss": 1.0}]):
        frontiers["layers"][name] = points
        assert f"{len(points)} candidates" in render(info, trials, "run", frontiers)


def test_a_run_folder_without_frontiers_or_with_damaged_ones(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "frontiers.json").write_text('{"metric": "params", "layers": {"conv1": [{"cost": "much"}]}}')
    with pytest.raises(StudyError, match=r"frontiers\.json is damaged"):
        write_report(folder)
    (folder / "frontiers.json").unlink()
    assert "conv1" in write_report(folder).read_text()


def test_the_page_says_how_it_was_made(info, trials):
    text = Page(render(info, trials, "run")).text
    for value in (info["environment"]["date"], torch.__version__, info["environment"]["processor"], "families"):
        assert value in text
    assert f"search space: points {info['space']['points']}" in text and "Glossary" in text
    del info["environment"]  # of an earlier version
    assert "How it was made" not in Page(render(info, trials, "run")).text


def test_a_long_model_is_grouped_by_its_modules(info, trials):
    info = big(info, 64)
    source = render(info, trials, "run")
    assert re.findall(r"<button.*?><b>(.*?)</b> (\d+ layers)", source) == [
        (f"features.denseblock{i}", "16 layers") for i in range(4)
    ]
    text = summary(info)
    assert [line.split()[0] for line in text.splitlines() if "denseblock" in line] == [
        f"denseblock{i}" for i in range(4)
    ]
    assert "Each of the 64 layers is in report.html" in text


@pytest.mark.parametrize("layers", [5, 30, 64])
def test_text_is_80_columns_wide_and_breaks_no_word(info, layers):
    info = info if layers == 5 else big(info, layers)
    info["task"] = "digits"
    lines = summary(info).splitlines()
    assert max(map(cell_len, lines)) <= 80
    words = " ".join(lines).split()
    for row in info["layers"] if layers <= 40 else []:
        assert set(row["reason"].split()) <= set(words)


def test_where_the_smaller_model_is_slower_one_command_asks_for_another(info):
    info.pop("batch_milliseconds", None)
    info["milliseconds"] |= {"dense": 1.0, "compressed": 1.5, "ratio": [1.25, 1.75]}
    command = (
        "rankopt search digits --budget params=0.4 --budget latency=100% --latency-on cpu,fused=yes --strategy random "
        "--trials 3 --space quick.toml --out runs/as-fast"
    )
    assert faster_command(info) == command
    assert command in Page(render(info, [], "run")).text
    assert command in " ".join(summary(info).replace("\\\n", "").split())
    changed = {"name": "default", "families": ["cp", "tt"], "keep_dense": ["conv1"], "effort": "quick"}
    on_gpu = info | {"space": changed, "environment": {"device": "cuda:0 (NVIDIA H100)"}}
    words = faster_command(on_gpu)
    assert "--families cp,tt --keep-dense conv1 --effort quick" in words and "--latency-on cuda,fused=yes" in words
    info["milliseconds"] |= {"compressed": 1.0, "ratio": [0.9, 1.1]}
    info["batch_milliseconds"] = info["milliseconds"] | {"examples": 32, "compressed": 3.0, "ratio": [2.9, 3.1]}
    assert "one forward pass is as fast, a batch of 32 is 3.00\u00a0×\u00a0slower (2.90–3.10) here" in verdict(info)
    assert "--latency-on" in summary(info)
    del info["batch_milliseconds"]
    assert "--latency-on" not in summary(info)
    info["milliseconds"] |= {"compressed": 1.4, "ratio": [0.9, 1.6]}
    assert "1.40\u00a0×\u00a0the time, not settled (0.90–1.60)" in verdict(info) and "--latency-on" not in summary(info)


# --- in a browser ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [5, 64])
@pytest.mark.parametrize("width", [PHONE, 1280])
def test_no_page_is_wider_than_the_screen(
    info: dict[str, Any], trials: list[dict[str, Any]], chromium: Any, tmp_path: Path, layers: int, width: int
) -> None:
    info = info if layers == 5 else big(info, layers)
    trials[1] |= {"state": "failed", "objective": None, "error": "RuntimeError: " + "x" * 300}
    page = measure(render(info, trials, "runs/" + "long" * 40), width, tmp_path)
    dom = chromium(page, "--dump-dom", "--window-size=1400,900", "--virtual-time-budget=10000")
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title and title[1], "the page did not load"
    seen = json.loads(html.unescape(title[1]))
    assert seen["inner"] == width and seen["scroll"] <= width
    assert not seen["out"]
    assert seen["rows"] == layers
    assert seen["smallest"] >= 9, "a picture's text is too small to read"


def test_layers_are_sorted_filtered_and_folded(info, trials, chromium, tmp_path):
    """The script runs under the page's own policy; what was done is written into the page's title."""
    page = render(big(info, 64), trials, "run")
    done = """
      const all = () => [...document.querySelectorAll("tr.layer")];
      const seen = () => all().filter(row => row.offsetParent).map(row => Number(row.dataset.params));
      const found = { folded: seen().length };
      document.querySelector("tr.group button").click(); found.opened = seen().length;
      const filter = document.querySelector(".tools input"), order = document.querySelector(".tools select");
      filter.value = "denselayer1 CP_merged"; filter.dispatchEvent(new Event("input")); found.filtered = seen().length;
      filter.value = ""; order.value = "params"; order.dispatchEvent(new Event("change")); found.sorted = seen();
      document.title = JSON.stringify(found);
    """
    policy = re.search(r"script-src [^;]+", page)
    assert policy
    digest = b64encode(sha256(done.encode()).digest()).decode()
    page = page.replace(policy[0], f"{policy[0]} 'sha256-{digest}'")
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{done}</script></body>"))
    title = re.search(r"<title>(\{.*?)</title>", chromium(path, "--dump-dom"), re.S)
    assert title
    found = json.loads(html.unescape(title[1]))
    assert (found["folded"], found["opened"]) == (0, 16)
    assert 0 < found["filtered"] < 16
    assert len(found["sorted"]) == 64 and found["sorted"] == sorted(found["sorted"], reverse=True)


def test_a_browser_shows_headings_rows_and_pictures(
    run: Path, chromium: Any, tmp_path: Path, info: dict[str, Any]
) -> None:
    report = write_report(run)
    page = Page(chromium(report, "--dump-dom"))
    assert all(heading in page.text for heading in HEADINGS)
    assert all(layer["name"] in page.text for layer in info["layers"])
    assert {"svg", "table", "figure"} <= page.tags
    picture = tmp_path / "page.png"
    chromium(report, f"--screenshot={picture}", f"--window-size={PHONE},2000")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


# --- sentences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["svd_out", "dense", "dense"], "1 of 3 layers is factorised"),
        (["svd_out", "svd_out", "dense"], "2 of 3 layers are factorised"),
        (["dense"] * 3, "0 of 3 layers are factorised"),
        (["svd_out"], "1 of 1 layer is factorised"),
    ],
)
def test_one_layer_is_and_two_are(info, methods, said):
    info["layers"] = [{**info["layers"][0], "method": m, "name": f"a{i}"} for i, m in enumerate(methods)]
    assert said in render(info, [], "runs/x")


def test_one_plan_is_no_plans(info):
    info["trials"] |= {"distinct": 1, "outside": 0}
    assert "search  1 plan, " in summary(info)


def test_without_a_score_the_headline_says_what_happened_to_the_objective(info):
    assert "validation score" in verdict(info) or "test score" in verdict(info)
    info["score"] = {part: {"validation": None, "test": None} for part in ("dense", "compressed")}
    info["objective"] |= {"best": 0.01234, "dense": 0.0}
    assert "the parameters, objective 0.0123 (dense 0), budget met" in verdict(info)
    del info["objective"]["dense"]  # of an earlier version
    assert "the parameters, objective 0.0123, budget met" in verdict(info)


def test_the_run_notes_the_dense_models_objective(info):
    assert info["objective"]["dense"] == 0  # the default: the divergence from itself


@pytest.mark.parametrize(("batch_norms", "advised"), [(3, True), (0, False), (None, False)])
def test_advice_on_batch_norms_only_where_there_are_some(info, batch_norms, advised):
    recipe = dataclasses.asdict(Recipe())
    source = {"teacher": None, "from_scratch": False, "run": "runs/x", "test_before": None}
    info["training"] = {"recipe": recipe, "before": 0.99, "seconds": 1.0, **source}
    info["training"] |= {} if batch_norms is None else {"batch_norms": batch_norms}
    info["score"]["compressed"]["validation"] = 0.9
    said = " ".join(training.lines(info))
    assert "less than before; try a lower rate" in said
    assert ("batch norms" in said) is advised


def test_a_ratio_of_times_has_its_interval(info):
    low, high = info["milliseconds"]["ratio"]
    measured = info["milliseconds"]["compressed"] / info["milliseconds"]["dense"]
    assert 0 < low <= high and 0.5 * low < measured < 2 * high
    info.pop("batch_milliseconds", None)
    info["milliseconds"] |= {"dense": 1.0, "compressed": 1.5, "ratio": [1.25, 1.75]}
    assert "1.50 × SLOWER (1.25–1.75)" in comparison_rows(info)[-1]
    assert "one forward pass is 1.50\u00a0×\u00a0slower (1.25–1.75) here" in verdict(info)
    info["milliseconds"] |= {"compressed": 0.5, "ratio": [0.4, 0.8]}
    assert "2.00 × faster (1.25–2.50)" in comparison_rows(info)[-1]
    del info["milliseconds"]["ratio"]  # of an earlier version
    assert "2.00 × faster" in comparison_rows(info)[-1]
