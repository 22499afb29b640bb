"""config.json of a checkpoint folder, read into the decoder's own configuration.

Read by hand and not by transformers, whose configurations fill in what a file lacks without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.model.config import DecoderConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_MISTRAL_WINDOW = 4096  # what transformers takes where a Mistral config.json does not say
_QWEN3_HEAD_DIM = 128  # likewise


def read_hf_config(model_dir: Path) -> DecoderConfig:
    """Raises ModelError where config.json is missing, incomplete or describes an unknown decoder."""
    raw = _read_json(model_dir / "config.json")
    generation_file = model_dir / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    names = raw.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(
            f"architecture {names[0]} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"weights quantized with {method} are not supported; take the unquantized checkpoint"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {raw['hidden_act']!r} is not supported; the decoder has silu")
    try:
        return _decoder_config(names[0], raw, generation)
    except KeyError as missing:
        raise ModelError(f"config.json in {model_dir} lacks {missing}") from missing


def _decoder_config(architecture: str, raw: dict[str, Any], generation: dict[str, Any]) -> DecoderConfig:
    num_heads = int(raw["num_attention_heads"])
    default_head_dim = (
        _QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else int(raw["hidden_size"]) // num_heads
    )
    attention_bias = bool(raw.get("attention_bias", False)) and architecture in (
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
    )
    max_positions = int(raw["max_position_embeddings"])
    theta, scaling = _rope(raw, max_positions)
    window = _sliding_window(architecture, raw)
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = raw.get("eos_token_id")
    return DecoderConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or default_head_dim),
        norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        # Inside the window sliding attention and full attention are the same.
        max_positions=max_positions if window is None else min(max_positions, window),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def _rope(raw: dict[str, Any], max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0)
    for kind, value in scaling.items():
        if isinstance(value, dict):
            raise ModelError(f"rope parameters per kind of layer ({kind!r}) are not supported")
    if float(scaling.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial rotary embedding (partial_rotary_factor below 1) is not supported")
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return theta, None
    original = raw.get("original_max_position_embeddings", max_positions)
    scaling.setdefault("original_max_position_embeddings", original)
    if scaling.get("factor", 1.0) is None:
        scaling["factor"] = max_positions / scaling["original_max_position_embeddings"]
    return theta, scaling


def _sliding_window(architecture: str, raw: dict[str, Any]) -> int | None:
    """The narrowest window any layer looks through, or None where all see everything."""
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        window = raw.get("sliding_window", _MISTRAL_WINDOW)
        return None if window is None else int(window)
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", 0))
        sliding = bool(raw.get("use_sliding_window", False)) and first < int(raw["num_hidden_layers"])
    else:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ModelError(f"attention of type {min(unknown)!r} is not supported")
        sliding = "sliding_attention" in kinds
    window = raw.get("sliding_window")
    if sliding and window is None:
        raise ModelError("config.json has sliding attention layers but no sliding_window")
    return int(window) if sliding and window is not None else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} is no model folder: it has neither a config.json nor a GGUF file"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content
