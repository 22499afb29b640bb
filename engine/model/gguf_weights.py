"""What a GGUF file says of a decoder: its configuration, and its tensors as the original checkpoint has them.

Names and the order of rows are those of the original checkpoint.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.files.fields import MAX_HEAD_DIM, MAX_POSITIONS, MAX_VOCABULARY, ROPE_THETA, Fields
from engine.files.gguf import GGUFFile
from engine.model.config import DecoderConfig, RopeSpec
from engine.model.uniform import Names, Sizes, read_sizes, uniform_config
from engine.text.end_tokens import END_TOKENS, end_token_ids

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
_NAMES = Names(  # each behind the architecture's name
    hidden_size="embedding_length",
    intermediate_size="feed_forward_length",
    num_layers="block_count",
    num_heads="attention.head_count",
    num_kv_heads="attention.head_count_kv",
    head_dim="attention.key_length",
    norm_eps="attention.layer_norm_rms_epsilon",
    max_positions="context_length",
)
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
_WHOLE = (3, 4)  # types of tokens that are never split: control and user-defined


def read_gguf_config(file: GGUFFile) -> DecoderConfig:
    """Raises ModelError where the metadata are incomplete, out of bounds or describe an unknown decoder."""
    name = file.path.name
    arch = Fields(name, file.metadata).text("general.architecture")
    meta = Fields(name, {**file.metadata, **_same_in_all_layers(name, file.metadata, arch)})
    if arch not in _ARCHITECTURES or meta.values.get(f"{arch}.expert_count"):
        kind = f"{arch} with experts" if arch in _ARCHITECTURES else arch
        raise ModelError(
            f"GGUF architecture {kind} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    sizes = read_sizes(meta, Names(*(f"{arch}.{key}" for key in _NAMES)))
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if meta.whole(key, 1, MAX_HEAD_DIM, default=sizes.head_dim) != sizes.head_dim:
            raise meta.error(key, f"{sizes.head_dim}, the size of a head; anything else is not supported")
    vocab_size = _vocab_size(file, sizes.hidden_size)
    return uniform_config(
        sizes,
        rope=RopeSpec(
            theta=meta.real(f"{arch}.rope.freq_base", *ROPE_THETA, default=10_000.0),
            scaling=_rope_scaling(file, meta, arch, sizes.max_positions),
        ),
        windows=_windows(meta, arch, sizes),
        qk_norm=arch == "qwen3",
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        architecture=_ARCHITECTURES[arch],
        vocab_size=vocab_size,
        tie_embeddings="output.weight" not in file.tensors,
        bos_token_id=meta.token_id("tokenizer.ggml.bos_token_id", vocab_size),
        eos_token_ids=_eos_token_ids(meta, vocab_size),
    )


def gguf_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by their name in the original checkpoint."""
    return {_original_name(name): entry.shape for name, entry in file.tensors.items()}


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


def _same_in_all_layers(name: str, metadata: dict[str, Any], arch: str) -> dict[str, Any]:
    """The fields that a file may give for each layer, as one number each."""
    single = {}
    for key in (f"{arch}.{suffix}" for suffix in _PER_LAYER):
        value = metadata.get(key)
        if isinstance(value, list):
            if any(item != value[0] for item in value):
                raise ModelError(f"{name}: {key} differs from layer to layer, which is not supported")
            single[key] = value[0] if value else None
    return single


def _vocab_size(file: GGUFFile, hidden_size: int) -> int:
    """The rows of the embedding; there may be more than the tokenizer has tokens."""
    entry = file.tensors.get("token_embd.weight")
    if entry is None or len(entry.shape) != 2 or not 0 < entry.shape[0] <= MAX_VOCABULARY:
        shape = "missing" if entry is None else f"of shape {reprlib.repr(list(entry.shape))}"
        raise ModelError(f"{file.path.name}: tensor token_embd.weight is {shape}")
    if entry.shape[1] != hidden_size:
        raise ModelError(
            f"{file.path.name}: embedding_length is {hidden_size}, but token_embd.weight has rows of "
            f"{entry.shape[1]}"
        )
    return entry.shape[0]


def _windows(meta: Fields, arch: str, sizes: Sizes) -> list[int | None]:
    """How far each layer sees; empty where all layers see everything."""
    key = f"{arch}.attention.sliding_window"
    window = meta.whole(key, 0, MAX_POSITIONS, default=0)
    if window == 1:
        raise meta.error(key, "0 for none, or above 1")
    return [window] * sizes.num_layers if window else []


def _rope_scaling(file: GGUFFile, meta: Fields, arch: str, max_positions: int) -> dict[str, Any] | None:
    if _ROPE_DIVISORS in file.tensors:
        return {"rope_type": "divisors", "divisors": file.tensor(_ROPE_DIVISORS).tolist()}
    prefix = f"{arch}.rope.scaling."
    kind = meta.text(f"{prefix}type", "none")
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": meta.real(f"{prefix}factor", 1e-3, 1e6, default=1.0),
        "original_max_position_embeddings": meta.whole(
            f"{prefix}original_context_length", 1, MAX_POSITIONS, default=max_positions
        ),
    }


def _eos_token_ids(meta: Fields, vocab_size: int) -> tuple[int, ...]:
    """The ids the file names, and tokens that end something by their text: control tokens, and those that
    the chat template writes."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    named = [meta.token_id(key, vocab_size) for key in keys]
    tokens = meta.strings("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in meta.values else []
    kinds = meta.numbers("tokenizer.ggml.token_type") if "tokenizer.ggml.token_type" in meta.values else []
    template = meta.text("tokenizer.chat_template", "")
    controls = {
        token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind in _WHOLE
    }
    written = {end: tokens.index(end) for end in END_TOKENS if end in template and end in tokens}
    return end_token_ids([i for i in named if i is not None], {**written, **controls}, vocab_size)


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
