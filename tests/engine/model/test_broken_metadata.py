"""Whatever a model file says of itself: either the configuration works, or an error names the key."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ModelError
from engine.files.gguf import GGUFFile, open_gguf
from engine.model.config import DecoderConfig
from engine.model.gguf_weights import read_gguf_config
from engine.model.hf_config import read_hf_config
from engine.model.loader import load_config, load_decoder
from engine.model.rope import rope_frequencies
from engine.text.gguf_tokenizer import build_gguf_tokenizer
from engine.text.tokenizer import load_chat_tokenizer
from tests.engine.model.small_gguf import METADATA, NONE, write

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2],
    "quantization_config": None,
}
SCALING = ("type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
HOSTILE = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 3, 2**16, NONE, 2**63 - 1, -(2**63), 10**400, 0.0, -0.5, 1.5, 1e-40]
    ),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e300, "", "x", "yarn", "gpt2", "linear"]),
    st.sampled_from(
        [[], [0], [1, 2], [None], ["a", "b"], ["a"] * 300, [[1]], {}, {"factor": {}}, "\x00" * 99]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 300), max_size=3),
)


def assert_works(config: DecoderConfig) -> None:
    """What the engine will compute with it makes sense."""
    widths = {layer.feed_forward.width for layer in config.layers}
    sizes = (config.vocab_size, config.hidden_size, *widths, config.num_layers)
    assert all(0 < size < 2**23 for size in (*sizes, config.num_heads, config.num_kv_heads, config.head_dim))
    assert config.num_heads % config.num_kv_heads == 0 and config.head_dim % 2 == 0
    assert 2 <= config.max_positions < 2**23
    assert 0 < config.final_norm.eps <= 1
    [rope] = config.ropes
    frequencies, factor = rope_frequencies(rope, config.head_dim)
    assert frequencies.isfinite().all() and 0 < factor < float("inf")
    assert all(0 <= i < config.vocab_size for i in config.eos_token_ids)
    assert config.bos_token_id is None or 0 <= config.bos_token_id < config.vocab_size


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return open_gguf(write(tmp_path_factory.mktemp("gguf") / "model.gguf"))


@given(st.dictionaries(st.sampled_from(list(METADATA)), HOSTILE, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_gguf_metadata_of_any_kind(whole: GGUFFile, changes: dict[str, Any]) -> None:
    metadata = {k: v for k, v in {**METADATA, **changes}.items() if v is not None}
    with contextlib.suppress(ModelError):
        assert_works(read_gguf_config(replace(whole, metadata=metadata)))
    with contextlib.suppress(ModelError):
        build_gguf_tokenizer(metadata).encode("hello")


@given(
    st.dictionaries(st.sampled_from(list(CONFIG)), HOSTILE, max_size=3),
    st.dictionaries(st.sampled_from(SCALING), HOSTILE, max_size=2),
    st.sampled_from(
        [*("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"), None]
    ),
)
@settings(max_examples=150, deadline=None)
def test_config_json_of_any_kind(
    tmp_path_factory: pytest.TempPathFactory,
    changes: dict[str, Any],
    scaling: dict[str, Any],
    architecture: str | None,
) -> None:
    content = {**CONFIG, "architectures": [architecture], **changes}
    if isinstance(content["rope_scaling"], dict):
        content["rope_scaling"] = {**content["rope_scaling"], **scaling}
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    try:
        config = load_config(folder)
    except ModelError:
        return
    assert_works(config)


LLAMA = "llama."
ATTENTION = "llama.attention."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (LLAMA + "block_count", NONE),
        (LLAMA + "block_count", 0),
        (LLAMA + "context_length", 0),
        (LLAMA + "context_length", 1),
        (LLAMA + "embedding_length", 0),
        (LLAMA + "feed_forward_length", NONE),
        (LLAMA + "rope.freq_base", float("nan")),
        (LLAMA + "rope.freq_base", -1.0),
        (LLAMA + "rope.dimension_count", 0),
        (LLAMA + "rope.scaling.factor", 0.0),
        (LLAMA + "rope.scaling.factor", float("inf")),
        (ATTENTION + "head_count", 0),
        (ATTENTION + "head_count", [4, 2]),
        (ATTENTION + "head_count_kv", 0),
        (ATTENTION + "head_count_kv", 3),
        (ATTENTION + "key_length", 0),
        (ATTENTION + "key_length", 3),
        (ATTENTION + "value_length", 0),
        (ATTENTION + "layer_norm_rms_epsilon", float("nan")),
        (ATTENTION + "layer_norm_rms_epsilon", 0.0),
        (ATTENTION + "sliding_window", 1),
    ],
)
def test_the_key_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path / "model.gguf", {**METADATA, key: value})
    with pytest.raises(ModelError, match=key.removeprefix(LLAMA)):
        load_config(tmp_path)


def test_heads_that_do_not_divide_the_hidden_size(tmp_path: Path) -> None:
    lengths = {ATTENTION + "key_length": None, ATTENTION + "value_length": None}
    write(tmp_path / "model.gguf", {**METADATA, **lengths, ATTENTION + "head_count": 6})
    with pytest.raises(ModelError, match=r"head_count is 6; it must be a divisor of embedding_length, 16"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", NONE),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("hidden_size", -1),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("max_position_embeddings", 1),
        ("vocab_size", "128"),
        ("head_dim", 15),
        ("tie_word_embeddings", "no"),
        ("rope_scaling", "yarn"),
    ],
)
def test_the_key_of_config_json_is_named(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    with pytest.raises(ModelError, match="15" if key == "head_dim" else key):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {LLAMA + "feed_forward_length": 2**20},
        {LLAMA + "block_count": 1000},
        {ATTENTION + "head_count": 1024, ATTENTION + "head_count_kv": 1024},
    ],
    ids=["wide", "deep", "many heads"],
)
def test_sizes_that_the_tensors_do_not_have_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def allocate(*_: Any) -> None:
        raise AssertionError("memory is taken")

    monkeypatch.setattr("engine.model.loader.allocate", allocate)
    write(tmp_path / "model.gguf", {**METADATA, **changes})
    with pytest.raises(ModelError, match="the configuration asks for"):
        load_decoder(tmp_path, torch.float32, torch.device("cpu"))


def test_special_ids_outside_of_the_vocabulary_are_none(tmp_path: Path) -> None:
    keys = ("bos", "eos", "padding", "eot", "unknown")
    ids = {f"tokenizer.ggml.{key}_token_id": NONE for key in keys}
    write(tmp_path / "model.gguf", {**METADATA, **ids})
    config = load_config(tmp_path)
    assert config.bos_token_id is None
    assert config.eos_token_ids == (2,)  # </s>, by its text
    tokenizer = load_chat_tokenizer(tmp_path)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.encode("hello", add_special_tokens=True) == [1, 3 + 256 + 9]  # the usual BOS


def test_a_file_without_ids_and_with_too_few_types(tmp_path: Path) -> None:
    missing = {f"tokenizer.ggml.{key}_token_id": None for key in ("bos", "eos", "unknown", "padding")}
    for types in ([2, 3, 3], None):
        write(tmp_path / "model.gguf", {**METADATA, **missing, "tokenizer.ggml.token_type": types})
        ids = load_chat_tokenizer(tmp_path).encode("hello", add_special_tokens=True)
        assert ids == [*([] if types is None else [1]), 3 + 256 + 9]
