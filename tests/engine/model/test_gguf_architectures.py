"""Each architecture in a GGUF file written as llama.cpp's converter does gives transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from engine.errors import ModelError
from engine.files.gguf import open_gguf
from engine.model.loader import load_config, load_decoder
from tests.fakes import DenseCausalAttention

CPU = torch.device("cpu")
VOCAB, HIDDEN, HEADS, KV_HEADS, LENGTH = 100, 64, 4, 2, 120
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def build(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        **{"head_dim": HIDDEN // HEADS, **settings},
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model


def gguf_name(name: str) -> str:
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        if name.startswith(theirs):
            return name.replace(theirs, ours)
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp's rotation: the two halves of a head alternate."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, arch: str, model: Any, extra: dict[str, np.ndarray] | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(7)
    writer.add_eot_token_id(8)
    writer.add_token_list([*(f"t{i}" for i in range(VOCAB - 1)), "<|im_end|>"])
    writer.add_chat_template("{{ messages[0].content }}<|im_end|>")
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            values = interleave(values, HEADS)
        if arch == "llama" and "k_proj" in name:
            values = interleave(values, KV_HEADS)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_logits(model: Any, model_dir: Path) -> None:
    decoder = load_decoder(model_dir, torch.float32, CPU)
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model(ids[None]).logits[0]
        hidden = decoder(ids, torch.arange(LENGTH), DenseCausalAttention(decoder.config))
        torch.testing.assert_close(decoder.logits(hidden), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "family", "settings"),
    [
        ("llama", "Llama", {}),
        ("llama", "Llama", {"attention_bias": True}),
        ("llama", "Mistral", {"head_dim": 32, "sliding_window": None}),
        ("qwen2", "Qwen2", {}),
        ("qwen3", "Qwen3", {"head_dim": 32}),
    ],
    ids=["llama", "llama-biases", "mistral-head-dim", "qwen2", "qwen3"],
)
def test_logits_equal_transformers(tmp_path: Path, arch: str, family: str, settings: dict[str, Any]) -> None:
    model = build(family, **settings)
    write_gguf(tmp_path / "model.gguf", arch, model)
    assert_same_logits(model, tmp_path)
    assert load_config(tmp_path).eos_token_ids == (7, 8, VOCAB - 1)  # EOS, EOT, the template's end of turn


def test_llama3_rope_scaling_travels_as_a_tensor(tmp_path: Path) -> None:
    model = build("Llama", rope_parameters=LLAMA3_ROPE)
    half = HIDDEN // HEADS // 2
    plain = 1.0 / 500_000.0 ** (np.arange(half, dtype=np.float64) / half)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == pytest.approx(8.0)
    write_gguf(tmp_path / "model.gguf", "llama", model, {"rope_freqs.weight": divisors})
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "Q6_K"])
def test_quantized_tensors(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    quantization = gguf.GGMLQuantizationType[kind]
    try:
        packed = gguf.quants.quantize(values, quantization)
    except NotImplementedError:  # the package reads K-quants but does not write them
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        packed = np.random.default_rng(0).integers(0, 60, (4, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("some.weight", packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(packed, quantization)
    np.testing.assert_array_equal(open_gguf(tmp_path / "model.gguf").tensor("some.weight"), expected)


def test_unknown_architecture_and_unknown_tensor_are_refused(tmp_path: Path) -> None:
    model = build("Llama")
    write_gguf(tmp_path / "model.gguf", "gemma", model)
    with pytest.raises(ModelError, match="gemma is not supported; supported are llama, qwen2, qwen3"):
        load_config(tmp_path)
    write_gguf(tmp_path / "model.gguf", "llama", model, {"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    with pytest.raises(ModelError, match=r"attn_sinks\.weight has no place"):
        load_decoder(tmp_path, torch.float32, CPU)
