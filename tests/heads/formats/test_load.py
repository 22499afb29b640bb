"""Every layout in the wild loads by its keys and answers what its raw tensors say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from heads.checkpoint import load_heads, save_heads
from heads.formats.load import ForeignHeads, load_foreign
from heads.medusa import MedusaHeads
from tests.heads.formats.checkpoints import (
    HEADS,
    HIDDEN,
    LAYERS,
    TOKEN_MAP,
    VOCAB,
    RawHeads,
    base_lm_head,
    medusa_tensors,
    raw_heads,
    tensorrt_tensors,
    vllm_config,
    vllm_tensors,
    write,
)


def check(foreign: ForeignHeads, raw: RawHeads, tmp_path: Path, own: bool) -> None:
    """The heads answer like the raw tensors, as read and after a trip through our own format."""
    module, lm_head = foreign.module, base_lm_head()
    assert (module.num_heads, module.num_layers) == (HEADS, len(raw.weights[0]))
    assert (module.projection is not None) == own
    save_heads(tmp_path / "ours", module, "base", lm_head, foreign.dtype)
    reloaded = load_heads(tmp_path / "ours").bind(lm_head, lm_head)
    module.bind(lm_head, lm_head)
    hidden, roots = torch.randn(7, HIDDEN), torch.arange(7)
    expected = raw.logits(hidden)
    for heads in (module, reloaded):
        assert isinstance(heads, MedusaHeads)
        torch.testing.assert_close(heads.logits(hidden, roots, HEADS), expected)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_medusa_v01_counts_from_the_weights(tmp_path: Path, file: str) -> None:
    config = {"base_model_name_or_path": "base", "medusa_num_heads": 2, "medusa_num_layers": LAYERS}
    folder = write(tmp_path / "v01", file, medusa_tensors(raw_heads()), config)
    foreign = load_foreign(folder, base_lm_head())
    check(foreign, raw_heads(), tmp_path, own=True)
    [warning] = foreign.warnings
    assert "medusa_num_heads 2, but the weights hold 5" in warning


def test_an_honest_config_is_no_warning(tmp_path: Path) -> None:
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": LAYERS}
    folder = write(tmp_path, "medusa_lm_head.pt", medusa_tensors(raw_heads()), config)
    assert load_foreign(folder, base_lm_head()).warnings == ()


def test_a_file_without_a_config(tmp_path: Path) -> None:
    write(tmp_path, "heads.pt", medusa_tensors(raw_heads()))
    check(load_foreign(tmp_path / "heads.pt", base_lm_head()), raw_heads(), tmp_path, own=True)


def test_medusa_v10_merged_with_its_base_leaves_the_base(tmp_path: Path) -> None:
    """In shards with an index, as transformers saves a model; blocks lie in one, projections in another."""
    tensors = medusa_tensors(raw_heads(), prefix="medusa_head.")
    tensors["lm_head.weight"] = base_lm_head()
    tensors["model.embed_tokens.weight"] = base_lm_head()
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    shards: dict[str, dict[str, Tensor]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    weight_map = {}
    for key, tensor in tensors.items():
        weight_map[key] = "model-1.safetensors" if "linear" in key else "model-2.safetensors"
        shards[weight_map[key]][key] = tensor.clone()
    for name, shard in shards.items():
        save_file(shard, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": LAYERS, "num_hidden_layers": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    foreign = load_foreign(tmp_path, base_lm_head())
    check(foreign, raw_heads(), tmp_path, own=True)
    assert "trained together with the heads" in foreign.warnings[0]


@pytest.mark.parametrize("layers", [1, 3])
def test_medusa_version_2_and_tgi_v2_share_the_projection(tmp_path: Path, layers: int) -> None:
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": layers, "version": "2"}
    raw = raw_heads(layers, base_lm_head())
    folder = write(tmp_path, "medusa_lm_head.safetensors", medusa_tensors(raw, projections=False), config)
    check(load_foreign(folder, base_lm_head()), raw, tmp_path, own=False)


def test_a_projection_that_is_the_bases_is_shared(tmp_path: Path) -> None:
    raw = raw_heads(projection=base_lm_head())
    folder = write(tmp_path, "medusa_lm_head.safetensors", medusa_tensors(raw))
    check(load_foreign(folder, base_lm_head()), raw, tmp_path, own=False)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_vllm(tmp_path: Path, prefix: str) -> None:
    folder = write(tmp_path, "model.safetensors", vllm_tensors(raw_heads(), prefix=prefix), vllm_config())
    check(load_foreign(folder, base_lm_head()), raw_heads(), tmp_path, own=True)


@pytest.mark.parametrize("changes", [{}, {"medusa_fc_bias": False}])
def test_vllm_without_biases_means_zero(tmp_path: Path, changes: dict[str, bool]) -> None:
    config = vllm_config()
    del config["medusa_fc_bias"]
    tensors = vllm_tensors(raw_heads(), biases=False)
    folder = write(tmp_path, "model.safetensors", tensors, {**config, **changes})
    check(load_foreign(folder, base_lm_head()), raw_heads(biases=False), tmp_path, own=True)


def test_vllm_biases_count_where_the_config_forgets_them(tmp_path: Path) -> None:
    config = vllm_config(medusa_fc_bias=False)
    foreign = load_foreign(
        write(tmp_path, "model.safetensors", vllm_tensors(raw_heads()), config), base_lm_head()
    )
    check(foreign, raw_heads(), tmp_path, own=True)
    assert "medusa_fc_bias" in foreign.warnings[0]


@pytest.mark.parametrize("whole", [False, True])
def test_vllm_token_map(tmp_path: Path, whole: bool) -> None:
    """The projections in the file may be cut already; vLLM cuts them when it loads them otherwise."""
    raw = raw_heads(tokens=VOCAB if whole else len(TOKEN_MAP))
    tensors = {**vllm_tensors(raw), "token_map": TOKEN_MAP.clone()}
    config = vllm_config(truncated_vocab_size=len(TOKEN_MAP))
    foreign = load_foreign(write(tmp_path, "model.safetensors", tensors, config), base_lm_head())
    if whole:
        raw = RawHeads(raw.weights, raw.biases, [rows[TOKEN_MAP] for rows in raw.projections])
    check(foreign, raw, tmp_path, own=True)
    assert torch.equal(foreign.module.token_map, TOKEN_MAP)


@pytest.mark.parametrize("token_map", [None, TOKEN_MAP])
@pytest.mark.parametrize("projections", [0, 1])
def test_vllm_original_lm_head_of_the_base_is_shared(
    tmp_path: Path, token_map: Tensor | None, projections: int
) -> None:
    cut = base_lm_head() if token_map is None else base_lm_head()[token_map]
    raw = raw_heads(projection=cut)
    tensors = vllm_tensors(raw, projections=projections)
    if token_map is not None:
        tensors["token_map"] = token_map.clone()
    config = vllm_config(original_lm_head=True, truncated_vocab_size=len(cut))
    folder = write(tmp_path, "model.safetensors", tensors, config)
    check(load_foreign(folder, base_lm_head()), raw, tmp_path, own=False)


@pytest.mark.parametrize("name", ["lm_heads.0.weight", "lm_head.weight"])
def test_vllm_one_projection_that_is_not_the_bases_serves_all_heads(tmp_path: Path, name: str) -> None:
    raw = raw_heads(projection=torch.randn(VOCAB, HIDDEN))
    tensors = {**vllm_tensors(raw, projections=0), name: raw.projections[0].clone()}
    folder = write(tmp_path, "model.safetensors", tensors, vllm_config(original_lm_head=True))
    check(load_foreign(folder, base_lm_head()), raw, tmp_path, own=True)


def test_tensorrt_llm(tmp_path: Path) -> None:
    tensors = {
        **tensorrt_tensors(raw_heads()),
        "transformer.vocab_embedding.weight": base_lm_head(),
        "transformer.layers.0.mlp.fc.weight": torch.zeros(2, 2),
        "lm_head.weight": base_lm_head(),
    }
    config = {"num_medusa_heads": HEADS, "num_medusa_layers": LAYERS}
    folder = write(tmp_path, "rank0.safetensors", tensors, config)
    check(load_foreign(folder, base_lm_head()), raw_heads(), tmp_path, own=True)


def test_half_precision_stays_as_it_was_stored(tmp_path: Path) -> None:
    tensors = {key: tensor.half() for key, tensor in medusa_tensors(raw_heads()).items()}
    foreign = load_foreign(write(tmp_path, "medusa_lm_head.pt", tensors), base_lm_head())
    assert foreign.dtype == torch.float16
    assert torch.equal(foreign.module.weights[1][2], tensors["2.1.linear.weight"])
