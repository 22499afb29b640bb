"""Every supported architecture gives transformers' logits, from a checkpoint transformers saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.model.loader import load_config, load_decoder
from tests.fakes import DenseCausalAttention

CPU = torch.device("cpu")
VOCAB, LENGTH = 101, 150
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

Save = Callable[..., Any]

CASES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 6}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "yarn-rope": ("Llama", {"rope_parameters": YARN_ROPE}),
    "dynamic-rope": ("Llama", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": LENGTH}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-head-dim": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("Mistral", {"sliding_window": LENGTH}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases-tied": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(family, max_shard_size="5GB", **settings): a random model, saved to tmp_path, in eval mode."""

    def build(family: str, max_shard_size: str = "5GB", **settings: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**SHAPE, **settings})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        return model

    return build


@pytest.fixture
def edit_config(tmp_path: Path) -> Callable[..., None]:
    """edit_config(drop=(...), **changes): rewrites config.json."""

    def edit(drop: tuple[str, ...] = (), **changes: Any) -> None:
        path = tmp_path / "config.json"
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
        path.write_text(json.dumps({**kept, **changes}))

    return edit


def assert_same_logits(model: Any, model_dir: Path) -> None:
    decoder = load_decoder(model_dir, torch.float32, CPU)
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model(ids[None]).logits[0]
        hidden = decoder(ids, torch.arange(LENGTH), DenseCausalAttention(decoder.config))
        ours = decoder.logits(hidden)
    assert theirs.std() > 0.5  # a model whose logits say something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(save: Save, tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    assert_same_logits(save(family, **settings), tmp_path)


def test_sharded_checkpoint(save: Save, tmp_path: Path) -> None:
    model = save("Llama", max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_logits(model, tmp_path)


def test_rope_settings_in_the_form_before_transformers_5(
    save: Save, tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    model = save("Llama", rope_parameters=LLAMA3_ROPE)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit_config(drop=("rope_parameters",), rope_theta=500_000.0, rope_scaling=scaling)
    assert_same_logits(model, tmp_path)


def test_a_repeated_lm_head_of_a_tied_checkpoint_is_accepted_where_equal(save: Save, tmp_path: Path) -> None:
    model = save("Llama", tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_logits(model, tmp_path)

    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="differs from the embedding"):
        load_decoder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize(
    ("family", "settings", "max_positions"),
    [
        ("Mistral", {"sliding_window": 100}, 100),
        ("Mistral", {"sliding_window": None}, 256),
        ("Mistral", {"sliding_window": 1000}, 256),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 100}, 256),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}, 100),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3}, 256),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2}, 100),
    ],
)
def test_a_sliding_window_bounds_the_context(
    save: Save, tmp_path: Path, family: str, settings: dict[str, Any], max_positions: int
) -> None:
    save(family, **settings)
    assert load_config(tmp_path).max_positions == max_positions


def test_dynamic_rope_scaling_is_served_as_far_as_it_does_not_stretch(
    save: Save, tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    """Beyond that transformers turns keys by one set of frequencies and later queries by another."""
    save("Llama", rope_parameters=DYNAMIC_ROPE)
    assert load_config(tmp_path).max_positions == 256
    edit_config(drop=("rope_parameters",), rope_scaling={"type": "dynamic", "factor": 2.0})
    assert load_config(tmp_path).max_positions == 256


def test_eos_comes_from_the_generation_config(save: Save, tmp_path: Path) -> None:
    save("Llama")
    (tmp_path / "generation_config.json").unlink()
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_config(tmp_path).eos_token_ids == (5, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load_config(tmp_path).eos_token_ids == (2,)


class TestRefusals:
    def test_unknown_architecture_lists_the_known(
        self, save: Save, tmp_path: Path, edit_config: Callable[..., None]
    ) -> None:
        save("Llama")
        edit_config(architectures=["GPT2LMHeadModel"])
        with pytest.raises(ModelError, match=r"GPT2LMHeadModel is not supported.*LlamaForCausalLM.*Qwen3"):
            load_config(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
                "'longrope' is not supported",
            ),
            ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantized with awq"),
            ({"hidden_act": "gelu"}, "activation 'gelu'"),
            ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ],
    )
    def test_what_the_decoder_cannot_do(
        self,
        save: Save,
        tmp_path: Path,
        edit_config: Callable[..., None],
        changes: dict[str, Any],
        message: str,
    ) -> None:
        save("Llama")
        edit_config(**changes)
        with pytest.raises(ModelError, match=message):
            load_decoder(tmp_path, torch.float32, CPU)

    def test_incomplete_config(self, save: Save, tmp_path: Path, edit_config: Callable[..., None]) -> None:
        save("Llama")
        edit_config(drop=("rms_norm_eps",))
        with pytest.raises(ModelError, match="lacks 'rms_norm_eps'"):
            load_config(tmp_path)

    def test_missing_tensor(self, save: Save, tmp_path: Path) -> None:
        self.rewrite(save, tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
            load_decoder(tmp_path, torch.float32, CPU)

    def test_extra_tensor(self, save: Save, tmp_path: Path) -> None:
        name = "model.layers.1.self_attn.q_proj.bias"
        self.rewrite(save, tmp_path, lambda weights: weights.update({name: torch.ones(48)}))
        with pytest.raises(ModelError, match=r"q_proj\.bias has no place in a LlamaForCausalLM"):
            load_decoder(tmp_path, torch.float32, CPU)

    def test_wrong_shape(self, save: Save, tmp_path: Path) -> None:
        self.rewrite(save, tmp_path, lambda weights: weights.update({"model.norm.weight": torch.ones(47)}))
        with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[47\].*\[48\]"):
            load_decoder(tmp_path, torch.float32, CPU)

    def test_damaged_shard(self, save: Save, tmp_path: Path) -> None:
        save("Llama")
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ModelError, match="cannot be read"):
            load_decoder(tmp_path, torch.float32, CPU)

    def test_no_weights_and_no_model(self, save: Save, tmp_path: Path) -> None:
        save("Llama")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"no model\.safetensors"):
            load_decoder(tmp_path, torch.float32, CPU)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ModelError, match="neither a config"):
            load_config(tmp_path)

    @staticmethod
    def rewrite(save: Save, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        save("Llama")
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors")
