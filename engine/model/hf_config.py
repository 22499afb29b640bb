"""config.json of a checkpoint folder, read into the decoder's own configuration.

Read by hand and not by transformers, whose configurations fill in what a file lacks without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.model.config import DecoderConfig
from engine.model.end_tokens import end_token_ids, read_end_tokens
from engine.model.fields import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    NORM_EPS,
    ROPE_THETA,
    Fields,
)
from engine.model.files import ADAPTER, read_json

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}
_MISTRAL_WINDOW = 4096  # what transformers takes where a Mistral config.json does not say
_QWEN3_HEAD_DIM = 128  # likewise
_SILU = ("silu", "swish")  # two names of one function


def read_hf_config(model_dir: Path) -> DecoderConfig:
    """Raises ModelError where config.json is missing, incomplete, out of bounds or of an unknown decoder."""
    path = model_dir / "config.json"
    if not path.exists():
        raise ModelError(_no_model(model_dir))
    raw = Fields(str(path), read_json(path))
    generation = Fields("generation_config.json", read_json(model_dir / "generation_config.json"))
    architecture = _architecture(raw)
    if quantization := raw.nested("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise ModelError(
            f"weights quantized with {method} are not supported; take the unquantized checkpoint"
        )
    if (activation := raw.text("hidden_act", "silu")) not in _SILU:
        raise ModelError(f"activation {activation!r} is not supported; the decoder has silu")
    vocab_size = raw.whole("vocab_size", 1, MAX_VOCABULARY)
    eos = generation.token_ids("eos_token_id", vocab_size) or raw.token_ids("eos_token_id", vocab_size)
    named, controls = read_end_tokens(model_dir)
    return _decoder_config(architecture, raw, end_token_ids([*eos, *named], controls, vocab_size))


def _no_model(model_dir: Path) -> str:
    if (model_dir / "adapter_config.json").exists():
        return f"{model_dir} {ADAPTER}"
    return f"{model_dir} is no model folder: it has neither a config.json nor a GGUF file"


def _architecture(raw: Fields) -> str:
    """From `architectures`, or from `model_type` in files that lack it."""
    names = raw.values.get("architectures")
    if not names:
        kind = raw.text("model_type", "none")
        if kind not in _MODEL_TYPES:
            raise ModelError(
                f"{raw.source} names no architectures, and model_type {kind!r} is not supported; supported "
                f"are {', '.join(_MODEL_TYPES)}"
            )
        return _MODEL_TYPES[kind]
    name = names[0] if isinstance(names, list) else names
    if name not in ARCHITECTURES:
        raise ModelError(f"architecture {name} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return str(name)


def _decoder_config(architecture: str, raw: Fields, eos_token_ids: tuple[int, ...]) -> DecoderConfig:
    hidden_size = raw.whole("hidden_size", 1, MAX_WIDTH)
    num_heads = raw.whole("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = raw.whole("num_key_value_heads", 1, num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise raw.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    attention_bias = raw.flag("attention_bias", False) and architecture in (
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
    )
    max_positions = raw.whole("max_position_embeddings", 2, MAX_POSITIONS)
    theta, scaling = _rope(raw, max_positions)
    window = _sliding_window(architecture, raw)
    vocab_size = raw.whole("vocab_size", 1, MAX_VOCABULARY)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=raw.whole("intermediate_size", 1, MAX_WIDTH),
        num_layers=raw.whole("num_hidden_layers", 1, MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(architecture, raw, hidden_size, num_heads),
        norm_eps=raw.real("rms_norm_eps", *NORM_EPS),
        rope_theta=theta,
        rope_scaling=scaling,
        # Inside the window sliding attention and full attention are the same.
        max_positions=max_positions if window is None else min(max_positions, window),
        tie_embeddings=raw.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=raw.flag("mlp_bias", False) and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        bos_token_id=raw.token_id("bos_token_id", vocab_size),
        eos_token_ids=eos_token_ids,
    )


def _head_dim(architecture: str, raw: Fields, hidden_size: int, num_heads: int) -> int:
    default = _QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
    if raw.values.get("head_dim") is None and architecture != "Qwen3ForCausalLM" and hidden_size % num_heads:
        raise raw.error("num_attention_heads", f"a divisor of hidden_size, {hidden_size}, without a head_dim")
    head_dim = raw.whole("head_dim", 2, MAX_HEAD_DIM, default=default)
    if head_dim % 2:
        raise ModelError(f"{raw.source}: heads of size {head_dim} cannot be rotated; it must be even")
    return head_dim


def _rope(raw: Fields, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    scaling = dict(raw.nested("rope_parameters") or raw.nested("rope_scaling"))
    given = Fields(f"{raw.source}, rope parameters", scaling)
    theta = given.real(
        "rope_theta", *ROPE_THETA, default=raw.real("rope_theta", *ROPE_THETA, default=10_000.0)
    )
    scaling.pop("rope_theta", None)
    for kind, value in scaling.items():
        if isinstance(value, dict):
            raise ModelError(f"rope parameters per kind of layer ({kind!r}) are not supported")
    turned = given.real("partial_rotary_factor", 0.0, 1.0, raw.real("partial_rotary_factor", 0.0, 1.0, 1.0))
    if turned != 1.0:
        raise ModelError("partial rotary embedding (partial_rotary_factor below 1) is not supported")
    scaling.pop("partial_rotary_factor", None)
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return theta, None
    original = given.whole(
        "original_max_position_embeddings",
        1,
        MAX_POSITIONS,
        raw.whole("original_max_position_embeddings", 1, MAX_POSITIONS, max_positions),
    )
    scaling["original_max_position_embeddings"] = original
    if scaling.get("factor", 1.0) is None:
        scaling["factor"] = max_positions / original
    return theta, scaling


def _sliding_window(architecture: str, raw: Fields) -> int | None:
    """The narrowest window any layer looks through, or None where all see everything."""
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        given = "sliding_window" in raw.values
        return _window(raw) if given else _MISTRAL_WINDOW
    kinds = raw.values.get("layer_types")
    if kinds is None:
        first = raw.whole("max_window_layers", 0, MAX_POSITIONS, 0)
        layers = raw.whole("num_hidden_layers", 1, MAX_LAYERS)
        sliding = raw.flag("use_sliding_window", False) and first < layers
    else:
        unknown = set(raw.strings("layer_types")) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ModelError(f"attention of type {min(unknown)!r} is not supported")
        sliding = "sliding_attention" in kinds
    if not sliding:
        return None
    if (window := _window(raw)) is None:
        raise ModelError("config.json has sliding attention layers but no sliding_window")
    return window


def _window(raw: Fields) -> int | None:
    return None if raw.values.get("sliding_window") is None else raw.whole("sliding_window", 2, MAX_POSITIONS)
