"""Whatever is wrong with a foreign checkpoint is named, file and key: nothing is dropped in silence."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from heads.errors import HeadsError
from heads.formats.load import load_foreign
from tests.heads.formats.checkpoints import (
    HEADS,
    HIDDEN,
    TOKEN_MAP,
    VOCAB,
    Edit,
    base_lm_head,
    drop,
    medusa_tensors,
    put,
    raw_heads,
    tensorrt_tensors,
    vllm_config,
    vllm_tensors,
    write,
)

SPARSE = torch.eye(HIDDEN).to_sparse()
ALL_BIASES = [f"{i}.{j}.linear.bias" for i in range(HEADS) for j in range(2)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("2.1.linear.bias"), r"medusa_lm_head\.safetensors: '2\.1\.linear\.bias' is missing"),
        (drop(*ALL_BIASES), r"'0\.0\.linear\.bias' is missing"),
        (drop("1.0.linear.weight"), r"'1\.0\.linear\.weight' is missing"),
        (drop("3.2.weight"), r"'3\.2\.weight' is missing"),
        (put("3.2.bias", torch.zeros(VOCAB)), r"'3\.2\.bias' is not used"),
        (put("3.3.weight", torch.zeros(VOCAB, HIDDEN)), r"'3\.3\.weight' is not used"),
        (put("5.2.weight", torch.zeros(VOCAB, HIDDEN)), r"'5\.2\.weight' is not used"),
        (put("6.0.linear.weight", torch.zeros(HIDDEN, HIDDEN)), r"'5\.0\.linear\.weight' is missing"),
        (put("model.norm.weight", torch.zeros(HIDDEN)), r"'model\.norm\.weight' is not used"),
        (put("0.0.linear.bias", torch.zeros(HIDDEN + 1)), r"'0\.0\.linear\.bias' has shape \(17,\)"),
        (put("0.2.weight", torch.zeros(VOCAB + 8, HIDDEN)), r"'0\.2\.weight' has shape \(48, 16\).*--model"),
        (put("4.1.linear.weight", torch.full((HIDDEN, HIDDEN), torch.nan)), r"'4\.1\.linear\.weight' must"),
        (put("4.1.linear.weight", torch.zeros(HIDDEN, HIDDEN, dtype=torch.int8)), "floating-point"),
    ],
)
def test_medusa_tensors_at_fault_are_named(tmp_path: Path, edit: Edit, message: str) -> None:
    tensors = medusa_tensors(raw_heads())
    edit(tensors)
    folder = write(tmp_path, "medusa_lm_head.safetensors", tensors)
    with pytest.raises(HeadsError, match=message):
        load_foreign(folder, base_lm_head())


def test_an_unknown_key_beside_a_merged_base_is_named(tmp_path: Path) -> None:
    tensors = medusa_tensors(raw_heads(), prefix="medusa_head.")
    tensors |= {"model.norm.weight": torch.zeros(HIDDEN), "sequential_head.weight": torch.zeros(1)}
    folder = write(tmp_path, "model.safetensors", tensors)
    with pytest.raises(HeadsError, match=r"model\.safetensors: 'sequential_head\.weight' is not used"):
        load_foreign(folder, base_lm_head())


VLLM_BIASES = [f"blocks.{i}.layers.{j}.bias" for i in range(HEADS) for j in range(2)]


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (drop("blocks.1.layers.0.bias"), {}, r"'blocks\.1\.layers\.0\.bias' is missing"),
        (
            drop("blocks.1.layers.0.bias"),
            {"medusa_fc_bias": False},
            r"blocks\.1\.layers\.0\.bias' is missing",
        ),
        (drop(*VLLM_BIASES), {}, r"'blocks\.0\.layers\.0\.bias' is missing"),
        (drop("lm_heads.4.weight"), {}, r"'lm_heads\.4\.weight' is missing"),
        (drop(), {"original_lm_head": True}, r"'lm_heads\.1\.weight' is not used"),
        (drop(), {"num_heads": 3}, "num_heads 3, but the weights hold 5"),
        (drop(), {"num_hidden_layers": 1}, "num_hidden_layers 1, but the weights hold 2"),
        (drop(), {"hidden_size": 32}, "hidden_size 32, but the base model's is 16"),
        (drop(), {"truncated_vocab_size": 6}, "'token_map' is missing"),
        (put("token_map", TOKEN_MAP), {"truncated_vocab_size": 7}, "holds 6 tokens, but .* 7"),
        (put("token_map", TOKEN_MAP + 20), {}, "'token_map' names tokens outside the vocabulary of 40"),
        (put("token_map", TOKEN_MAP[[0, 1, 1]]), {}, "'token_map' names a token twice"),
        (drop(), {"num_heads": None, "medusa_num_heads": 2}, "num_heads None"),
        (put("token_map", TOKEN_MAP.float()), {}, "'token_map' must be a row"),
        (put("lm_head.weight", torch.zeros(VOCAB, HIDDEN)), {}, "are the same tensor"),
        (put("embed.weight", torch.zeros(1)), {}, r"'embed\.weight' is not used"),
    ],
)
def test_vllm_checkpoints_at_fault(tmp_path: Path, edit: Edit, changes: dict[str, Any], message: str) -> None:
    tensors = vllm_tensors(raw_heads())
    edit(tensors)
    folder = write(tmp_path, "model.safetensors", tensors, vllm_config(**changes))
    with pytest.raises(HeadsError, match=message):
        load_foreign(folder, base_lm_head())


@pytest.mark.parametrize(
    ("lm_head", "message"),
    [
        (torch.zeros(VOCAB + 24, HIDDEN), r"a projection of \(64, 16\); this model's is \(40, 16\)"),
        (-base_lm_head(), r"another model's projection; this one's agrees to -1\.00.*--model"),
    ],
)
def test_another_base_beside_the_heads(tmp_path: Path, lm_head: Tensor, message: str) -> None:
    for file, tensors in (
        ("model.safetensors", medusa_tensors(raw_heads(), prefix="medusa_head.")),
        ("rank0.safetensors", tensorrt_tensors(raw_heads())),
    ):
        folder = write(tmp_path / file, file, {**tensors, "lm_head.weight": lm_head})
        with pytest.raises(HeadsError, match=message):
            load_foreign(folder, base_lm_head())


def test_tensorrt_scales_of_quantized_heads_are_not_dropped(tmp_path: Path) -> None:
    tensors = tensorrt_tensors(raw_heads())
    name = "medusa_heads.0.medusa_layers.0.linear.per_channel_scale"
    tensors[name] = torch.ones(HIDDEN)
    with pytest.raises(HeadsError, match="per_channel_scale' is not used"):
        load_foreign(write(tmp_path, "rank0.safetensors", tensors), base_lm_head())


def test_tensorrt_heads_split_over_devices(tmp_path: Path) -> None:
    write(tmp_path, "rank0.safetensors", tensorrt_tensors(raw_heads()))
    write(tmp_path, "rank1.safetensors", tensorrt_tensors(raw_heads()))
    with pytest.raises(HeadsError, match=r"rank1\.safetensors.*--tp_size 1"):
        load_foreign(tmp_path, base_lm_head())


def test_another_hidden_size_says_which_base_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path, "medusa_lm_head.pt", medusa_tensors(raw_heads()))
    message = r"'0\.0\.linear\.weight' has shape \(16, 16\), but this base model needs \(24, 24\).*--model"
    with pytest.raises(HeadsError, match=message):
        load_foreign(folder, torch.randn(VOCAB, 24))


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 50, -100])
def test_a_truncated_file(tmp_path: Path, file: str, kept: int) -> None:
    path = write(tmp_path, file, medusa_tensors(raw_heads())) / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(HeadsError, match=rf"{file} is damaged"):
        load_foreign(tmp_path, base_lm_head())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt", "legacy.pt"])
def test_no_damage_whatever_is_a_traceback(tmp_path: Path, file: str) -> None:
    """Bytes are overwritten where names and shapes stand; what no longer opens says so in our own words."""
    path, random = tmp_path / file, Random(0)
    write(tmp_path, file, medusa_tensors(raw_heads(layers=1)))
    if file == "legacy.pt":
        torch.save(medusa_tensors(raw_heads()), path, _use_new_zipfile_serialization=False)
    whole, refused = path.read_bytes(), 0
    for _ in range(120):
        damaged = bytearray(whole)
        for place in random.sample(range(1500), 3):
            damaged[place] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            load_foreign(path, base_lm_head())
        except HeadsError as error:
            assert file in str(error)
            refused += 1
    assert refused > 30


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path, zipped: bool) -> None:
    bomb = {**medusa_tensors(raw_heads()), "bomb": Bomb(tmp_path / "went-off")}
    if zipped:
        torch.save(bomb, tmp_path / "medusa_lm_head.pt")
    else:
        (tmp_path / "medusa_lm_head.pt").write_bytes(pickle.dumps({"bomb": bomb["bomb"]}, 2))
    with pytest.raises(HeadsError, match=r"medusa_lm_head\.pt .*code that opening it would run"):
        load_foreign(tmp_path, base_lm_head())
    assert not (tmp_path / "went-off").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"0.0.linear.weight": 3.0, "0.0.linear.bias": 0.0}, r"'0\.0\.linear\.weight' is a float"),
        ({"0.0.linear.weight": SPARSE, "0.0.linear.bias": 0.0}, r"weight' is a Tensor, but no dense tensor"),
        ({"0.0.linear.weight": SPARSE.to("meta"), "0.0.linear.bias": 0.0}, r"but no dense tensor"),
    ],
)
def test_a_pickle_of_other_things(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(HeadsError, match=message):
        load_foreign(tmp_path, base_lm_head())


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="no file and no folder"):
        load_foreign(tmp_path / "nowhere", base_lm_head())
    with pytest.raises(HeadsError, match=r"none of medusa_lm_head\.safetensors"):
        load_foreign(tmp_path, base_lm_head())
    (tmp_path / "heads.safetensors").touch()
    with pytest.raises(HeadsError, match="a head set of ours already"):
        load_foreign(tmp_path, base_lm_head())


def test_keys_of_no_known_layout(tmp_path: Path) -> None:
    folder = write(tmp_path, "model.safetensors", {"fc.weight": torch.zeros(1)})
    with pytest.raises(HeadsError, match=r"no heads of a known layout .*vLLM.*'fc\.weight'"):
        load_foreign(folder, base_lm_head())


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, "medusa_lm_head.pt", medusa_tensors(raw_heads()))
    (folder / "config.json").write_text(text)
    with pytest.raises(HeadsError, match=r"config\.json"):
        load_foreign(folder, base_lm_head())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(HeadsError, match=r"model-1\.safetensors is missing"):
        load_foreign(tmp_path, base_lm_head())
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(HeadsError, match="'weight_map' is missing"):
        load_foreign(tmp_path, base_lm_head())
