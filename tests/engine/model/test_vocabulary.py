"""Embedding and projection alone are those of the whole model, whatever file they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.model.loader import load_decoder, load_vocabulary


def test_safetensors(tiny_model_dir: Path) -> None:
    decoder = load_decoder(tiny_model_dir, torch.float32, torch.device("cpu"))
    embedding, projection = load_vocabulary(tiny_model_dir)
    assert torch.equal(embedding, decoder.embedding)
    assert torch.equal(projection, decoder.lm_head.weight)
    assert not torch.equal(embedding, projection)


def test_gguf_with_a_tied_projection(default_model_dir: Path) -> None:
    embedding, projection = load_vocabulary(default_model_dir)
    assert projection is embedding
    assert embedding.shape == (49152, 576)


@pytest.mark.parametrize(
    ("change", "message"), [("shape", "of shape"), ("missing", "lm_head.weight is missing")]
)
def test_what_does_not_fit_is_named(tiny_model_dir: Path, tmp_path: Path, change: str, message: str) -> None:
    tensors = load_file(tiny_model_dir / "model.safetensors")
    config = json.loads((tiny_model_dir / "config.json").read_text())
    if change == "missing":
        del tensors["lm_head.weight"]
    else:
        config["vocab_size"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_vocabulary(tmp_path)
