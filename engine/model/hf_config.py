"""config.json of a checkpoint folder, read into the decoder's own configuration.

It is read by hand: transformers' configurations fill in what a file lacks, and do not say so.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import ModelError
from engine.files.fields import MAX_POSITIONS, MAX_VOCABULARY, ROPE_THETA, Fields
from engine.files.reading import ADAPTER, read_json
from engine.model.config import DecoderConfig, RopeSpec
from engine.model.uniform import Names, read_sizes, uniform_config
from engine.text.end_tokens import end_token_ids, read_end_tokens

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}
_NAMES = Names(
    hidden_size="hidden_size",
    intermediate_size="intermediate_size",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads",
    head_dim="head_dim",
    norm_eps="rms_norm_eps",
    max_positions="max_position_embeddings",
)
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
    is_llama, is_qwen3 = architecture == "LlamaForCausalLM", architecture == "Qwen3ForCausalLM"
    sizes = read_sizes(raw, _NAMES, _QWEN3_HEAD_DIM if is_qwen3 else None)
    attention_bias = raw.flag("attention_bias", False) and (is_llama or is_qwen3)
    vocab_size = raw.whole("vocab_size", 1, MAX_VOCABULARY)
    return uniform_config(
        sizes,
        rope=_rope(raw, sizes.max_positions),
        windows=_windows(architecture, raw, sizes.num_layers),
        qk_norm=is_qwen3,
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=raw.flag("mlp_bias", False) and is_llama,
        architecture=architecture,
        vocab_size=vocab_size,
        tie_embeddings=raw.flag("tie_word_embeddings", False),
        bos_token_id=raw.token_id("bos_token_id", vocab_size),
        eos_token_ids=eos_token_ids,
    )


def _rope(raw: Fields, max_positions: int) -> RopeSpec:
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
        return RopeSpec(theta=theta)
    original = given.whole(
        "original_max_position_embeddings",
        1,
        MAX_POSITIONS,
        raw.whole("original_max_position_embeddings", 1, MAX_POSITIONS, max_positions),
    )
    scaling["original_max_position_embeddings"] = original
    if scaling.get("factor", 1.0) is None:
        scaling["factor"] = max_positions / original
    return RopeSpec(theta=theta, scaling=scaling)


def _windows(architecture: str, raw: Fields, num_layers: int) -> list[int | None]:
    """How far each layer sees; empty where all layers see everything."""
    if architecture == "LlamaForCausalLM":
        return []
    if architecture == "MistralForCausalLM":
        return [_window(raw) if "sliding_window" in raw.values else _MISTRAL_WINDOW] * num_layers
    if raw.values.get("layer_types") is None:
        first = raw.whole("max_window_layers", 0, MAX_POSITIONS, 0)
        slides = raw.flag("use_sliding_window", False)
        sliding = [slides and layer >= first for layer in range(num_layers)]
    else:
        kinds = raw.strings("layer_types")
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ModelError(f"attention of type {min(unknown)!r} is not supported")
        if len(kinds) != num_layers:
            raise raw.error("layer_types", f"one for each of {num_layers} layers")
        sliding = [kind == "sliding_attention" for kind in kinds]
    if not any(sliding):
        return []
    if (window := _window(raw)) is None:
        raise ModelError("config.json has sliding attention layers but no sliding_window")
    return [window if slides else None for slides in sliding]


def _window(raw: Fields) -> int | None:
    return None if raw.values.get("sliding_window") is None else raw.whole("sliding_window", 2, MAX_POSITIONS)
