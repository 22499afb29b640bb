"""Model folders as people have them: split, cut off, from other tools, half downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.files.gguf import find_gguf, open_gguf
from engine.model.loader import load_config, load_decoder
from engine.text.tokenizer import load_chat_tokenizer
from tests.engine.model.small_gguf import METADATA, TOKENS, tensors, write, write_split

CPU = torch.device("cpu")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
Edit = Callable[..., Path]


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A safetensors checkpoint of its own for each test."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**kept, **changes}))


def shard(folder: Path, count: int) -> None:
    """Cut the weights into numbered files without an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for n in range(count):
        part = {name: weights[name] for name in sorted(weights)[n::count]}
        save_file(part, folder / f"model-{n + 1:05d}-of-{count:05d}.safetensors")


class TestSafetensors:
    def test_shards_without_an_index_are_loaded(self, folder: Path) -> None:
        whole = load_decoder(folder, torch.float32, CPU)
        shard(folder, 3)
        parts = load_decoder(folder, torch.float32, CPU)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))

    def test_a_missing_shard_is_told(self, folder: Path) -> None:
        shard(folder, 3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(ModelError, match="2 of 3 safetensors files; fetch the rest"):
            load_decoder(folder, torch.float32, CPU)

    @pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
    def test_without_architectures_the_type_says_it(self, folder: Path, kind: str) -> None:
        edit_config(folder, drop=("architectures",), model_type=kind)
        assert load_config(folder).architecture.lower() == f"{kind}forcausallm"

    def test_without_architectures_an_unknown_type_is_refused(self, folder: Path) -> None:
        edit_config(folder, drop=("architectures",), model_type="mamba")
        with pytest.raises(ModelError, match="model_type 'mamba' is not supported; supported are llama"):
            load_config(folder)

    def test_swish_is_silu(self, folder: Path) -> None:
        before = load_config(folder)
        edit_config(folder, hidden_act="swish")
        assert load_config(folder) == before

    def test_a_byte_order_mark_is_no_damage(self, folder: Path) -> None:
        before = load_config(folder)
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
        assert load_config(folder) == before

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "model.gguf"]
    )
    def test_a_pointer_of_git_lfs_is_named(self, folder: Path, name: str) -> None:
        if name == "model.gguf":
            (folder / "model.safetensors").unlink()
        (folder / name).write_text(POINTER)
        with pytest.raises(ModelError, match=f"{name} is a Git LFS pointer.*run git lfs pull"):
            load_chat_tokenizer(folder) if "tokenizer" in name else load_decoder(folder, torch.float32, CPU)

    def test_an_adapter_is_to_be_merged(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({**weights, name: torch.ones(4, 4)}, folder / "model.safetensors")
        with pytest.raises(ModelError, match="is an adapter, no whole model; merge it"):
            load_decoder(folder, torch.float32, CPU)

        (folder / "adapter_config.json").write_text("{}")
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="merge_and_unload"):
            load_decoder(folder, torch.float32, CPU)
        (folder / "config.json").unlink()
        with pytest.raises(ModelError, match="merge_and_unload"):
            load_config(folder)

    def test_of_a_gguf_file_beside_them_safetensors_are_served(self, folder: Path) -> None:
        write(folder / "a.gguf")
        write(folder / "b.gguf")
        assert find_gguf(folder) is None
        (folder / "model.safetensors").unlink()
        (folder / "b.gguf").unlink()
        assert find_gguf(folder) == folder / "a.gguf"  # config.json alone is no model
        assert load_config(folder).vocab_size == len(TOKENS)


class TestSplitGGUF:
    def test_all_parts_are_one_model(self, tmp_path: Path) -> None:
        parts = write_split(tmp_path)
        assert find_gguf(tmp_path) == parts[0]
        file = open_gguf(parts[0])
        expected = tensors()
        assert set(file.tensors) == set(expected)
        assert all((file.tensor(name) == tensor).all() for name, tensor in expected.items())
        load_decoder(tmp_path, torch.float32, CPU)
        assert load_chat_tokenizer(tmp_path).eos_token == "</s>"

    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_a_missing_part_is_named(self, tmp_path: Path, missing: int) -> None:
        part = write_split(tmp_path)[missing]
        part.unlink()
        with pytest.raises(ModelError, match=f"are missing: {part.name}"):
            load_config(tmp_path)

    def test_a_part_of_another_model_is_noticed(self, tmp_path: Path) -> None:
        parts = write_split(tmp_path)
        write(parts[2], {}, {"blk.0.attn_q.weight": tensors()["blk.0.attn_q.weight"]})
        with pytest.raises(ModelError, match="tensors, not"):
            load_config(tmp_path)

    def test_another_file_beside_the_parts_is_not_guessed_about(self, tmp_path: Path) -> None:
        write_split(tmp_path)
        write(tmp_path / "other.gguf")
        with pytest.raises(ModelError, match="more than one GGUF file"):
            load_config(tmp_path)


class TestEndTokens:
    @pytest.mark.parametrize("end", ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"])
    @pytest.mark.parametrize(("kind", "ends"), [(3, True), (4, True), (1, False)])
    def test_of_a_gguf_file_by_text_where_they_are_control_tokens(
        self, tmp_path: Path, end: str, kind: int, ends: bool
    ) -> None:
        types = [*METADATA["tokenizer.ggml.token_type"][:-1], kind]
        named = {"tokenizer.ggml.tokens": [*TOKENS[:-1], end], "tokenizer.ggml.token_type": types}
        write(tmp_path / "model.gguf", {**METADATA, **named})
        assert load_config(tmp_path).eos_token_ids == ((2, len(TOKENS) - 1) if ends else (2,))

    @pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>"}])
    @pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
    def test_one_that_only_the_tokenizer_names(self, folder: Path, place: str, eos: Any) -> None:
        (folder / place).write_text(json.dumps({"eos_token": eos}))
        assert load_config(folder).eos_token_ids == (2,)  # there is no such token
        self.add_tokens(folder, {"id": 100, "content": "<stop>", "special": True})
        assert load_config(folder).eos_token_ids == (2, 100)
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<stop>": 101}}}))
        assert load_config(folder).eos_token_ids == (2, 101)

    def test_by_text_where_they_are_control_tokens(self, folder: Path) -> None:
        ends = [("<|end|>", 7, True), ("<|im_end|>", 9, False), ("<|eot_id|>", 8, True), ("</s>", 500, True)]
        tokens = [{"id": i, "content": text, "special": special} for text, i, special in ends]
        self.add_tokens(folder, *tokens)
        assert load_config(folder).eos_token_ids == (2, 8, 7)  # 500 is no id of this model
        (folder / "tokenizer.json").unlink()
        decoder = {str(token["id"]): token for token in tokens}
        config = {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_config(folder).eos_token_ids == (2, 9, 8, 7)

    @staticmethod
    def add_tokens(folder: Path, *tokens: dict[str, Any]) -> None:
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
