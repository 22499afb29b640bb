"""The default model, read from its GGUF file, is the model transformers reads from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ModelError
from engine.model.decoder import Decoder
from engine.model.loader import load_config, load_decoder
from engine.text.tokenizer import load_chat_tokenizer
from tests.fakes import DenseCausalAttention

CPU = torch.device("cpu")
TEXT = (
    "The tide tables of 1904 list three harbours. def area(r): return 3.14159 * r ** 2\n"
    "Pourquoi le ciel est-il bleu ? 天空为什么是蓝色的。 🌊 "
)


@pytest.fixture(scope="module")
def decoder(default_model_dir: Path) -> Decoder:
    return load_decoder(default_model_dir, torch.float32, CPU)


def test_configuration_of_the_default_model(default_model_dir: Path) -> None:
    config = load_config(default_model_dir)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.head_dim, config.max_positions) == (49_152, 64, 8192)
    assert config.tie_embeddings
    assert config.eos_token_ids == (2, 0)  # <|im_end|>, which the file names, and <|endoftext|>


def test_weights_equal_transformers(decoder: Decoder, reference_model: Any) -> None:
    theirs = reference_model.state_dict()
    layer: Any = decoder.layers[17]
    prefix = "model.layers.17."
    qkv = torch.cat([theirs[f"{prefix}self_attn.{n}_proj.weight"] for n in "qkv"])
    gate_up = torch.cat([theirs[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up")])
    assert torch.equal(decoder.embedding, theirs["model.embed_tokens.weight"])
    assert torch.equal(layer.qkv.weight, qkv)
    assert torch.equal(layer.gate_up.weight, gate_up)
    assert torch.equal(layer.down.weight, theirs[f"{prefix}mlp.down_proj.weight"])


def test_logits_equal_transformers(decoder: Decoder, reference_model: Any, default_model_dir: Path) -> None:
    ids = torch.tensor(load_chat_tokenizer(default_model_dir).encode(TEXT, add_special_tokens=True))
    with torch.inference_mode():
        theirs = reference_model(ids[None]).logits[0]
        hidden = decoder(ids, torch.arange(len(ids)), DenseCausalAttention(decoder.config))
        ours = decoder.logits(hidden)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_weights_are_frozen_tied_and_of_the_asked_dtype(default_model_dir: Path) -> None:
    decoder = load_decoder(default_model_dir, torch.bfloat16, CPU)
    assert decoder.lm_head.weight is decoder.embedding
    assert {(p.dtype, p.requires_grad) for p in decoder.parameters()} == {(torch.bfloat16, False)}
    [rope] = decoder.ropes
    assert rope.cos.dtype == rope.sin.dtype == torch.float32


def test_a_damaged_file_is_refused(default_model_dir: Path, tmp_path: Path) -> None:
    [gguf] = default_model_dir.glob("*.gguf")
    with gguf.open("rb") as file:
        head = file.read(200_000)
    (tmp_path / "cut.gguf").write_bytes(head)
    with pytest.raises(ModelError, match=r"cut\.gguf is not a readable GGUF file"):
        load_config(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(b"PK\x03\x04" + head)
    with pytest.raises(ModelError, match="magic"):
        load_config(tmp_path)


def test_two_gguf_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match="more than one GGUF file"):
        load_config(tmp_path)
