"""A sentence encoder and a speaker encoder with their published weights, on real text and real speech."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import rankopt
from rankopt import count, inventory, load
from rankopt.candidates.search_space import SearchSpace
from rankopt.model.inventory import unfolded
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "studies" / "tasks"))

import minilm
import speaker

SPACE = SearchSpace(name="svd", families=("svd_out",), points=8, steps=10)


@pytest.fixture(scope="module")
def voice():
    return speaker.speaker()


def test_the_sentence_encoder_is_the_published_one():
    """The similarities in the Sentence Transformers documentation (Quickstart)."""
    model = minilm.pretrained()
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    with torch.inference_mode():
        e = model(**minilm.batch(sentences))
    published = torch.tensor([[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]])
    torch.testing.assert_close(e @ e.T, published, atol=1e-4, rtol=0)


def test_the_sentence_encoder_unfolds():
    model, x = minilm.pretrained(), minilm.batch(minilm.texts("validation")[:8])
    other = unfolded(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(other(**x), model(**x), atol=1e-6, rtol=0)
    assert count(other, x) == count(model, x)
    free = [layer.name for layer in inventory(other, x) if layer.reason is None and layer.kind == "Linear"]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "linear1", "linear2")
    assert free == [f"encoder.layers.layers.{i}.{part}" for i in range(6) for part in parts]


def test_the_speaker_encoder_unfolds_and_tells_speakers_apart(voice):
    other = unfolded(voice.model, voice.example_input)
    found = speaker.utterances()
    with torch.inference_mode():
        x = speaker.partials(found[:3])
        torch.testing.assert_close(other(x), voice.model(x), atol=1e-6, rtol=0)
        e = torch.stack([voice.model(speaker.partials([x])).mean(0) for x in found])
    e = nn.functional.normalize(e, dim=1)
    same = (e[-5:] @ e[-5:].T)[~torch.eye(5, dtype=torch.bool)]  # the five read by one person from a novel
    assert same.min() > (e[-5:] @ e[:-5].T).max(), "one person's utterances are the more alike"
    weights = sum(p.numel() for n, p in voice.model.lstm.named_parameters() if n.startswith("weight"))
    assert count(voice.model, voice.example_input).macs == 160 * weights + 256 * 256


@pytest.mark.slow
@pytest.mark.parametrize(("make", "least"), [(speaker.speaker, 0.8), (minilm.minilm, 0.8)])
def test_at_half_the_parameters(make, least, tmp_path):
    task = make()
    allowed = count(task.model, task.example_input).params // 2
    scores = {}
    for strategy in ("uniform", "knapsack"):
        made = rankopt.compress(
            task.model,
            task.calibration,
            {"params": 0.5},
            task.score,
            example_input=task.example_input,
            objective=task.objective,
            strategy=strategy,
            space=SPACE,
            cache=tmp_path / "cache",
        )
        assert made.info["budget"]["params"]["achieved"] <= allowed
        scores[strategy] = made.info["score"]["compressed"]["validation"]
    assert scores["knapsack"] > least and scores["knapsack"] > scores["uniform"], scores
    made.save(tmp_path / "run")
    assert task.score(load(task.model, tmp_path / "run").eval()) == pytest.approx(scores["knapsack"], abs=1e-6)
