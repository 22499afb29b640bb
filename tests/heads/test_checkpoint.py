"""Head sets on disk: they come back as they were, and whatever is wrong with one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heads.base import DraftHeads, ProjectionKind
from heads.checkpoint import describe, load_heads, save_heads
from heads.errors import HeadsError
from heads.hydra import HydraHeads
from heads.medusa import MedusaHeads
from heads.prefix import PrefixLayer

HEADS, LAYERS, HIDDEN, VOCAB, RANK = 3, 2, 16, 40, 5


@pytest.fixture
def embedding() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def directory(tmp_path: Path, embedding: Tensor) -> Path:
    """A good head set with a token map and a shared projection."""
    save_heads(tmp_path / "set", _random(torch.tensor([1, 4, 9])), "base", embedding, torch.float32)
    return tmp_path / "set"


def _random(
    token_map: Tensor | None = None,
    projection: ProjectionKind = "shared",
    root_input: bool = False,
    architecture: str = "medusa",
) -> DraftHeads:
    heads: DraftHeads
    if architecture == "medusa":
        heads = MedusaHeads(HEADS, LAYERS, HIDDEN, VOCAB, token_map, projection, RANK, root_input)
    else:
        prefix = PrefixLayer(HIDDEN, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=20)
        heads = HydraHeads(HEADS, VOCAB, prefix, token_map, projection, RANK)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "heads.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("projection", ["shared", "own", "low_rank"])
@pytest.mark.parametrize("token_map", [None, torch.tensor([1, 4, 9])])
@pytest.mark.parametrize("root_input", [False, True])
@pytest.mark.parametrize("architecture", ["medusa", "hydra"])
def test_a_head_set_comes_back_as_it_was(
    tmp_path: Path,
    embedding: Tensor,
    projection: ProjectionKind,
    token_map: Tensor | None,
    root_input: bool,
    architecture: str,
) -> None:
    saved = _random(token_map, projection, root_input, architecture)
    save_heads(tmp_path / "mine", saved, "base", embedding, torch.float32)
    heads = load_heads(tmp_path / "mine")
    assert (heads.name, heads.base_model, heads.module.kind) == ("mine", "base", saved.kind)
    saved.bind(embedding, embedding)
    loaded = heads.bind(embedding, embedding)
    hidden, rows = torch.randn(2, 7, HIDDEN), torch.randn(2, 7, HIDDEN)
    features = [m.sequence_features(hidden, rows, torch.tensor([0, 2, 9])) for m in (saved, loaded)]
    for head in range(HEADS):
        torch.testing.assert_close(
            loaded.head_logits(head, features[1][head]), saved.head_logits(head, features[0][head])
        )


def test_description_counts_from_the_weights(directory: Path) -> None:
    facts = describe(directory)
    assert (facts["num_heads"], facts["num_layers"], facts["tokens"]) == (HEADS, LAYERS, 3)
    assert facts["projection"] == "shared"
    assert "3 Medusa heads x 2 layers" in load_heads(directory).kind


def test_a_quantized_copy_of_the_base_passes(directory: Path, embedding: Tensor) -> None:
    step = embedding.abs().amax(dim=1, keepdim=True) / 7  # four bits a weight
    load_heads(directory).bind((embedding / step).round() * step, embedding)


def test_another_base_model_is_an_error_that_says_so(directory: Path, embedding: Tensor) -> None:
    with pytest.raises(HeadsError, match="trained for base; this is another model"):
        load_heads(directory).bind(torch.randn(VOCAB, HIDDEN), embedding)
    with pytest.raises(HeadsError, match="another model"):
        load_heads(directory).bind(torch.full((VOCAB, HIDDEN), float("nan")), embedding)
    with pytest.raises(HeadsError, match=r"\(40, 16\); this model's are \(41, 16\)"):
        load_heads(directory).bind(torch.randn(VOCAB + 1, HIDDEN), embedding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 2}, "hold num_heads 3, but config.json says 2"),
        ({"num_layers": 5}, "hold num_layers 2, but config.json says 5"),
        ({"projection": "own"}, "hold projection shared, but config.json says own"),
        ({"hidden_size": 32}, "'fingerprint.rows' has shape"),
        ({"vocab_size": 5}, "'token_map' names tokens outside the vocabulary of 5"),
        ({"vocab_size": "40"}, "'vocab_size' must be a whole number"),
        ({"num_heads": True}, "'num_heads' must be a whole number"),
        ({"root_input": 0}, "'root_input' must be true or false, not 0"),
        ({"base_model": ["base"]}, "'base_model' must be a text"),
        ({"base_model": None}, "'base_model' must be a text"),
        ({"architecture": "eagle"}, "'eagle'"),
        ({"format_version": 9}, "format version 9"),
        ({"speed": "fast"}, "'speed' is not a known key"),
    ],
)
def test_a_config_that_disagrees_with_the_weights_is_an_error(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    _edit_config(directory, **changes)
    with pytest.raises(HeadsError, match=message):
        load_heads(directory)


def _drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop("biases.1"), "'biases.1' is missing"),
        (_drop("weights.0"), "hold num_heads 0"),
        (_drop("fingerprint.rows"), "'fingerprint.rows' is missing"),
        (_put("extra", torch.zeros(1)), "'extra' is not used"),
        (_put("biases.0", torch.zeros(HEADS, HIDDEN + 1)), "'biases.0' has shape"),
        (_put("weights.1", torch.zeros(HEADS + 1, HIDDEN, HIDDEN)), "'weights.1' has shape"),
        (_put("weights.1", torch.full((HEADS, HIDDEN, HIDDEN), torch.nan)), "'weights.1' holds values"),
        (_put("token_map", torch.tensor([-1])), "'token_map' names tokens outside"),
        (_put("token_map", torch.tensor([1.0])), "'token_map' must be"),
        (_put("fingerprint.tokens", torch.full((8,), VOCAB)), "'fingerprint.tokens' lie outside"),
    ],
)
def test_wrong_tensors_are_named(
    directory: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    _edit_tensors(directory, edit)
    with pytest.raises(HeadsError, match=message):
        load_heads(directory)


def test_a_truncated_file_is_an_error(directory: Path) -> None:
    path = directory / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HeadsError, match="damaged or truncated"):
        load_heads(directory)


@pytest.mark.parametrize("name", ["config.json", "heads.safetensors"])
def test_a_missing_file_is_an_error(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(HeadsError, match=name):
        load_heads(directory)


def test_a_config_without_a_key_or_of_no_json_is_an_error(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["base_model"]
    path.write_text(json.dumps(config))
    with pytest.raises(HeadsError, match="'base_model' is missing"):
        load_heads(directory)
    path.write_text("{")
    with pytest.raises(HeadsError, match="is not JSON"):
        load_heads(directory)
