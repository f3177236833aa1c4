"""Architectures that people bring, made from a config with random weights at small sizes: the zoo.

`ZOO` maps a name to a function that returns (model in eval mode, a batch of inputs). timm and transformers are needed;
timm asks for torchvision at import, and there is no CPU build of it everywhere, so `without_torchvision` puts empty
modules in its place.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 8
Made = tuple[nn.Module, Any]


class _Stub(types.ModuleType):
    """A module whose every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012  # what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        numbers = {mode: i for i, mode in enumerate(("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING"))}
        return type(name, (), {"__init__": lambda self, *args, **options: None, **numbers})


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Inside, `import timm` works where there is no torchvision: what it imports from there is never used by a model.

    Afterwards the empty modules are gone again, since transformers would take them for the real ones.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    parts = ("ops", "ops.misc", "transforms", "transforms.functional", "utils", "models", "models.feature_extraction")
    names = ("torchvision", *(f"torchvision.{part}" for part in (*parts, "datasets")))
    for name in names:
        module = _Stub(name)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _timm(name: str, size: int = 64, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        with without_torchvision():
            import timm

        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return model.eval(), torch.randn(BATCH, 3, size, size)

    return make


def _text(vocabulary: int = 120, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(5, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _hf(
    model: str, config: str, inputs: Callable[[], Any] = _text, *, parts: dict[str, Any] | None = None, **options: Any
) -> Callable[[], Made]:
    """A transformers model of a class and a config class, by name."""

    def make() -> Made:
        import transformers

        torch.manual_seed(0)
        nested = {k: v() if callable(v) else v for k, v in (parts or {}).items()}
        made = getattr(transformers, model)(getattr(transformers, config)(**options, **nested))
        return made.eval(), inputs()

    return make


SMALL = {"vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA = {**BERT, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
T5 = {**SMALL, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **SMALL,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def _sequences() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": _text(length=6)["input_ids"]}


def _speech() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 2000)}


def _mel() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 16, 40), "decoder_input_ids": _text(length=6)["input_ids"]}


def _pairs() -> dict[str, Tensor]:
    return {**_text(), **_images()}


class UNet(nn.Module):
    """A small U-Net with transposed convolutions and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, 3, h, w)."""
        a = self.down1(x).relu()
        b = self.middle(self.down2(a).relu())
        return self.out(torch.cat([a, self.up(b)], 1))


class Recurrent(nn.Module):
    """An LSTM over tokens, with a classifier."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embed = nn.Embedding(120, 24)
        self.rnn = kind(24, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, length) -> (b, 10)."""
        return self.head(self.rnn(self.embed(ids))[0].mean(1))


class Transformer(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(b, s, 32) and (b, t, 32) -> (b, t, 10)."""
        return self.head(self.core(source, target))


def _own(model: Callable[[], nn.Module], inputs: Callable[[], Any]) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        return model().eval(), inputs()

    return make


ZOO: dict[str, Callable[[], Made]] = {
    # Convolutional networks, of timm
    "timm resnet10t": _timm("resnet10t", channels=(16, 24, 32, 48)),
    "timm resnet18": _timm("resnet18", 32, channels=(16, 24, 32, 48)),
    "timm resnet26t, bottlenecks": _timm("resnet26t", channels=(16, 24, 32, 48)),
    "timm convnext_atto": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    "timm convnextv2_atto": _timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    "timm mobilenetv3_small_050": _timm("mobilenetv3_small_050"),
    "timm mobilenetv2_035": _timm("mobilenetv2_035"),
    "timm efficientnet_lite0": _timm("efficientnet_lite0"),
    "timm tinynet_e": _timm("tinynet_e"),
    "timm regnety_002": _timm("regnety_002"),
    "timm densenet121": _timm("densenet121", block_config=(2, 2, 2, 2), growth_rate=8),
    "timm ghostnet_050": _timm("ghostnet_050"),
    "timm edgenext_xx_small": _timm("edgenext_xx_small"),
    "timm mnasnet_small": _timm("mnasnet_small"),
    # Attention, of timm
    "timm vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", 32, img_size=32, embed_dim=48, depth=2),
    "timm deit_tiny_distilled": _timm("deit_tiny_distilled_patch16_224", 32, img_size=32, embed_dim=48, depth=2),
    "timm swin_tiny": _timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=24, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8)
    ),
    "timm mobilevit_xxs": _timm("mobilevit_xxs"),
    "timm xcit_nano": _timm("xcit_nano_12_p16_224", 32, img_size=32, embed_dim=32, depth=2, num_heads=2),
    "timm lcnet_035": _timm("lcnet_035"),
    # Text, of transformers
    "hf BERT classifier": _hf("BertForSequenceClassification", "BertConfig", **BERT),
    "hf BERT encoder": _hf("BertModel", "BertConfig", **BERT),
    "hf DistilBERT": _hf(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        **SMALL,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
    ),
    "hf ALBERT": _hf("AlbertForSequenceClassification", "AlbertConfig", **BERT, embedding_size=16),
    "hf RoBERTa": _hf("RobertaForMaskedLM", "RobertaConfig", **BERT),
    "hf GPT-2": _hf("GPT2LMHeadModel", "GPT2Config", **SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "hf GPT-NeoX": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT),
    "hf OPT": _hf(
        "OPTForCausalLM",
        "OPTConfig",
        **SMALL,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "hf Llama, GQA": _hf("LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "hf Mistral": _hf("MistralForCausalLM", "MistralConfig", **LLAMA),
    "hf Qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    "hf T5": _hf("T5ForConditionalGeneration", "T5Config", _sequences, **T5),
    "hf BART": _hf("BartForConditionalGeneration", "BartConfig", _sequences, **BART),
    # Images, speech and both, of transformers
    "hf ViT": _hf("ViTForImageClassification", "ViTConfig", _images, **VISION),
    "hf ConvNeXt": _hf(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        _images,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
    ),
    "hf SegFormer": _hf(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        _images,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
    ),
    "hf YOLOS, a DETR": _hf("YolosForObjectDetection", "YolosConfig", _images, **{**VISION, "image_size": [32, 32]}),
    "hf Whisper": _hf(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _mel,
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=16,
        decoder_start_token_id=1,
    ),
    "hf wav2vec2": _hf(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        _speech,
        **{**BERT, "vocab_size": 32},
        conv_dim=[16] * 3,
        conv_kernel=[10, 3, 3],
        conv_stride=[5, 2, 2],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    "hf CLIP": _hf(
        "CLIPModel",
        "CLIPConfig",
        _pairs,
        text_config={**BERT, "projection_dim": 16},
        vision_config={**VISION, "projection_dim": 16},
        projection_dim=16,
    ),
    # torch's own
    "torch LSTM": _own(Recurrent, lambda: _text()["input_ids"]),
    "torch GRU": _own(lambda: Recurrent(nn.GRU), lambda: _text()["input_ids"]),
    "torch Transformer": _own(Transformer, lambda: (torch.randn(BATCH, 9, 32), torch.randn(BATCH, 5, 32))),
    "torch TransformerEncoder": _own(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        lambda: torch.randn(BATCH, 9, 32),
    ),
    "U-Net": _own(UNet, lambda: torch.randn(BATCH, 3, 16, 16)),
}
