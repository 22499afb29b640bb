"""What a GGUF file says of a Llama-family decoder: its configuration, and its tensors under the names and in
the order of the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.model.config import DecoderConfig
from engine.model.gguf import GGUFFile

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # end an answer in chat templates, though they need not be EOS


def read_gguf_config(file: GGUFFile) -> DecoderConfig:
    """Raises ModelError where the metadata are incomplete or describe an unknown decoder."""
    try:
        return _decoder_config(file)
    except KeyError as missing:
        raise ModelError(f"{file.path.name} lacks {missing}") from missing


def gguf_tensors(file: GGUFFile, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight as (name in the original checkpoint, float32 tensor), dequantized as it is asked for."""
    permuted = file.metadata["general.architecture"] == "llama"
    for name in file.tensors:
        if name == _ROPE_DIVISORS:  # part of the configuration
            continue
        tensor = torch.from_numpy(file.tensor(name))
        if permuted and ".attn_q." in name:
            tensor = _unpermute(tensor, config.num_heads)
        elif permuted and ".attn_k." in name:
            tensor = _unpermute(tensor, config.num_kv_heads)
        yield _original_name(name), tensor


def _decoder_config(file: GGUFFile) -> DecoderConfig:
    meta, tensors = file.metadata, file.tensors
    arch = str(meta["general.architecture"])
    if arch not in _ARCHITECTURES or meta.get(f"{arch}.expert_count"):
        kind = f"{arch} with experts" if arch in _ARCHITECTURES else arch
        raise ModelError(
            f"GGUF architecture {kind} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    num_heads = int(meta[f"{arch}.attention.head_count"])
    hidden_size = int(meta[f"{arch}.embedding_length"])
    head_dim = int(meta.get(f"{arch}.attention.key_length") or hidden_size // num_heads)
    if int(meta.get(f"{arch}.rope.dimension_count") or head_dim) != head_dim:
        raise ModelError(
            "partial rotary embedding (rope.dimension_count below the head size) is not supported"
        )
    max_positions = int(meta[f"{arch}.context_length"])
    window = meta.get(f"{arch}.attention.sliding_window")
    return DecoderConfig(
        architecture=_ARCHITECTURES[arch],
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=int(meta[f"{arch}.feed_forward_length"]),
        num_layers=int(meta[f"{arch}.block_count"]),
        num_heads=num_heads,
        num_kv_heads=int(meta.get(f"{arch}.attention.head_count_kv") or num_heads),
        head_dim=head_dim,
        norm_eps=float(meta[f"{arch}.attention.layer_norm_rms_epsilon"]),
        rope_theta=float(meta.get(f"{arch}.rope.freq_base") or 10_000.0),
        rope_scaling=_rope_scaling(file, arch, max_positions),
        max_positions=min(max_positions, int(window)) if window else max_positions,
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=arch == "qwen3",
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_eos_token_ids(meta),
    )


def _rope_scaling(file: GGUFFile, arch: str, max_positions: int) -> dict[str, Any] | None:
    if _ROPE_DIVISORS in file.tensors:
        return {"rope_type": "divisors", "divisors": file.tensor(_ROPE_DIVISORS).tolist()}
    prefix = f"{arch}.rope.scaling."
    scaling = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    kind = scaling.get("type", "none")
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": scaling.get("factor", 1.0),
        "original_max_position_embeddings": scaling.get("original_context_length", max_positions),
    }


def _eos_token_ids(meta: dict[str, Any]) -> tuple[int, ...]:
    ids = [meta.get("tokenizer.ggml.eos_token_id"), meta.get("tokenizer.ggml.eot_token_id")]
    tokens, template = meta.get("tokenizer.ggml.tokens", []), meta.get("tokenizer.chat_template", "")
    ids += [tokens.index(end) for end in _TURN_ENDS if end in template and end in tokens]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def _original_name(name: str) -> str:
    """token_embd.weight -> model.embed_tokens.weight; an unknown name stays, to be refused by the loader."""
    stem, _, suffix = name.rpartition(".")
    if stem in _MODEL_NAMES:
        return f"{_MODEL_NAMES[stem]}.{suffix}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{_LAYER_NAMES[part]}.{suffix}" if part in _LAYER_NAMES else name


def _unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of each head's rows, [heads, half, 2] back to [heads, 2, half]."""
    rows = tensor.shape[0]
    split = tensor.view(num_heads, rows // num_heads // 2, 2, -1)
    return split.transpose(1, 2).reshape(tensor.shape)
