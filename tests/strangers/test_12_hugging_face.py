"""Models of transformers: their own layers, tied weights, and checkpoints that must not come back as another model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import rankopt
from rankopt.decompositions.plan import multiplied_out
from tests.strangers.models import SPACE, reasons

TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2(**options: Any) -> GPT2LMHeadModel:
    """A small GPT-2, the same every time."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TOKENS, n_embd=32, n_layer=1, n_head=4, n_positions=32, **options)).eval()


def llama() -> LlamaForCausalLM:
    """A small Llama with grouped queries."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**TOKENS, **sizes, num_key_value_heads=2)).eval()


def t5() -> T5ForConditionalGeneration:
    """A small T5."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**TOKENS, **sizes, decoder_start_token_id=0)).eval()


def tokens() -> dict[str, Tensor]:
    """32 sentences of ten tokens."""
    ids = torch.randint(3, 60, (32, 10), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compressed(model: nn.Module, space: rankopt.SearchSpace = SPACE, **budget: float) -> rankopt.Result:
    """A language model within 80 % of its parameters, or another budget."""
    batch = tokens()
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :6]
    return rankopt.compress(model, [batch], budget or {"params": 0.8}, space=space)


@pytest.fixture(scope="module")
def small() -> rankopt.Result:
    """A compressed GPT-2."""
    return compressed(gpt2())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """What a language model predicts."""
    return model(**tokens()).logits


# --- Conv1D ------------------------------------------------------------------------------------------


def test_every_conv1d_may_be_factorised() -> None:
    model = gpt2()
    layers = {x.name: x for x in rankopt.inventory(model, tokens())}
    conv1d = {n for n, m in model.named_modules() if isinstance(m, Conv1D)}
    assert {n for n, x in layers.items() if x.kind == "Conv1D"} == conv1d
    assert all(layers[n].reason is None and layers[n].shape == (layers[n].own_shape[::-1]) for n in conv1d)
    parts = {x.name for x in rankopt.inventory(rankopt.unfolded(model, tokens()), tokens())}
    assert {f"transformer.h.0.attn.c_attn.{part}" for part in "qkv"} <= parts


def test_a_factorised_conv1d_reads_as_the_layer_that_it_replaced(small: rankopt.Result) -> None:
    dense = gpt2()
    replaced = {c.name: c for c in small.plan.choices if c.kind == "Conv1D" and c.method != "dense"}
    assert replaced and any(c.method != "dense" and ".c_attn." in c.name for c in small.plan.choices)
    for name, module in dense.named_modules():
        if isinstance(module, Conv1D):
            new = small.model.get_submodule(name)
            assert (new.nx, new.nf, new.weight.shape) == (module.nx, module.nf, module.weight.shape), name
    torch.testing.assert_close(logits(multiplied_out(dense, small.model)), logits(small.model), rtol=1e-4, atol=1e-4)


def test_whole_query_key_value_maps_and_other_precisions() -> None:
    space = rankopt.SearchSpace(families=("svd_out",), points=4, steps=0, split_qkv=False, precisions=("same", "int8"))
    result = compressed(gpt2(), space, bytes=0.5)
    assert "transformer.h.0.attn.c_attn" in reasons(result)
    torch.testing.assert_close(logits(multiplied_out(gpt2(), result.model)), logits(result.model), rtol=1e-4, atol=1e-4)


# --- tied weights ------------------------------------------------------------------------------------


def test_tied_weights_stay_dense_and_the_reason_names_both_layers(small: rankopt.Result) -> None:
    said = reasons(small)
    for name in ("transformer.wte", "lm_head"):
        assert "transformer.wte.weight, lm_head.weight" in said[name] and "untie" in said[name]
    assert small.model.lm_head.weight is small.model.transformer.wte.weight
    assert small.plan.dense.params == gpt2().num_parameters(), "the tied weight counts once"


def test_untied_weights_are_factorised_each() -> None:
    said = reasons(compressed(gpt2(tie_word_embeddings=False), params=0.5))
    assert "shared" not in said["transformer.wte"] + said["lm_head"]


# --- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["rankopt", "transformers"])
def test_one_folder_serves_rankopt_and_save_pretrained_in_any_order(
    small: rankopt.Result, tmp_path: Path, first: str
) -> None:
    steps: list[Callable[[Path], Any]] = [small.save, small.model.save_pretrained]
    for step in steps if first == "rankopt" else reversed(steps):
        step(tmp_path)
    assert torch.equal(logits(rankopt.load(gpt2, tmp_path)), logits(small.model))
    with pytest.raises(RuntimeError, match="mismatch"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):  # a part of the model, of another class
        transformers.AutoModel.from_pretrained(tmp_path)


def test_the_dense_checkpoint_in_the_same_folder_stays_as_it_was(small: rankopt.Result, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    small.save(tmp_path)
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path)), logits(gpt2()))
    again = rankopt.load(lambda: GPT2LMHeadModel.from_pretrained(tmp_path), tmp_path)
    assert torch.equal(logits(again), logits(small.model))


def loaded(small: rankopt.Result, folder: Path) -> nn.Module:
    small.save(folder)
    return rankopt.load(gpt2, folder)


@pytest.mark.parametrize(
    "made",
    [
        loaded,
        lambda small, _: copy.deepcopy(small.model),
        lambda small, _: pickle.loads(pickle.dumps(small.model)),
        lambda small, _: small.model.transformer,
        lambda _, __: compressed(compressed(gpt2()).model, params=0.9).model,
    ],
    ids=["loaded", "copied", "pickled", "a part", "compressed twice"],
)
def test_copies_and_parts_are_refused_too(small: rankopt.Result, tmp_path: Path, made: Callable[..., Any]) -> None:
    model = made(small, tmp_path)
    state = model.state_dict()
    for options in ({}, {"state_dict": model.state_dict()}):
        model.save_pretrained(tmp_path / "hf", **options)
        with pytest.raises(RuntimeError, match="mismatch"):
            type(model).from_pretrained(tmp_path / "hf")
        found = load_file(tmp_path / "hf" / "model.safetensors")
        assert "compressed by rankopt, load it with rankopt.load" in found
    assert model.state_dict().keys() == state.keys(), "the model's own state dict is as it was"


def test_quantized_weights_are_refused_too(tmp_path: Path) -> None:
    space = rankopt.SearchSpace(families=("svd_out",), points=1, steps=0, precisions=("same", "int8"))
    result = compressed(llama(), space, bytes=0.5)
    assert any((c.method, c.precision) == ("dense", "int8") for c in result.plan.choices)
    result.model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_models_of_the_hub_mixin_are_refused_too(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Mine(nn.Sequential, hub.PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    result = rankopt.compress(Mine().eval(), [torch.randn(64, 32)], {"params": 0.5}, space=SPACE)
    result.save(tmp_path)
    result.model.save_pretrained(tmp_path)
    assert torch.equal(rankopt.load(Mine, tmp_path)(torch.ones(1, 32)), result.model(torch.ones(1, 32)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Mine.from_pretrained(tmp_path)


def test_run_folders_of_earlier_versions_load(small: rankopt.Result, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "rankopt.safetensors").rename(tmp_path / "model.safetensors")
    assert torch.equal(logits(rankopt.load(gpt2, tmp_path)), logits(small.model))


# --- what else people do with such a model -----------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, llama, t5])
def test_a_compressed_model_generates_trains_and_answers_as_before(build: Callable[[], Any]) -> None:
    dense = build()
    settings = copy.deepcopy(dense.config.to_dict())
    model: Any = compressed(dense).model
    assert settings == dense.config.to_dict() == model.config.to_dict()
    assert (model.dtype, model.device) == (dense.dtype, dense.device)
    names = {n for n, m in dense.named_modules() if not isinstance(m, (nn.Linear, Conv1D, nn.Embedding))}
    assert names <= {n for n, _ in model.named_modules()}

    said = model.generate(**tokens(), max_new_tokens=4, do_sample=False)
    assert said.shape[0] == 32 and said.shape[1] > 1
    assert torch.equal(said, model.generate(**tokens(), max_new_tokens=4, do_sample=False, use_cache=False))

    model.gradient_checkpointing_enable()
    model.train()
    model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.half().dtype == torch.float16
