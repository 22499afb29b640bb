"""Weights never lie in memory twice: not while a checkpoint is read, and not while layers are repacked."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.backends.torch import packing, precision
from engine.backends.torch.packing import pack_linears
from engine.backends.torch.precision import quantize_linears
from engine.model import loader
from engine.model.decoder import Decoder
from engine.model.layers import Linear
from engine.model.loader import load_decoder
from tests.engine.tiny import CONFIG, CPU

ENOUGH = 1 << 30


def tracked(tensors: Iterator[tuple[str, Tensor]], alive: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; `alive` gets how many of them there still are when each is asked for."""
    seen: list[weakref.ref[Tensor]] = []
    for name, tensor in tensors:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(tensor))
        yield name, tensor


@pytest.fixture
def sharded(tiny_model_dir: Path, tmp_path: Path) -> Path:
    import transformers

    transformers.LlamaForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(
        tmp_path, max_shard_size="60KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_and_shards_are_read_one_by_one(
    sharded: Path, tiny_model_dir: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    opened: list[int] = []
    read, opens = loader._safetensors, loader.safe_open

    class Counting:
        def __init__(self, *args: Any, **settings: Any) -> None:
            self._file = opens(*args, **settings)

        def __enter__(self) -> Any:
            opened.append(1)
            return self._file.__enter__()

        def __exit__(self, *error: Any) -> None:
            opened.append(-1)
            self._file.__exit__(*error)

    monkeypatch.setattr(loader, "safe_open", Counting)
    monkeypatch.setattr(loader, "_safetensors", lambda folder: tracked(read(folder), alive))
    decoder = load_decoder(sharded, dtype, CPU)
    assert len(alive) == 2 + 1 + 9 * CONFIG.num_layers  # every tensor of the checkpoint
    assert max(alive) <= 1
    assert opened == [1, -1] * (len(opened) // 2) and len(opened) > 6
    whole = load_decoder(tiny_model_dir, dtype, CPU)
    for found, expected in zip(decoder.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def plain_weights(decoder: Decoder) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(m.weight) for m in decoder.modules() if isinstance(m, Linear)]


@pytest.mark.parametrize("choice", ["none", "int4"])
def test_plain_weights_go_as_they_are_repacked(choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(CONFIG).to(torch.bfloat16)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter)
    del parameter
    weights = plain_weights(decoder)
    alive: list[int] = []

    class Counting(packing.PackedLinear):
        def __init__(self, *args: Any) -> None:
            alive.append(sum(ref() is not None for ref in weights))
            super().__init__(*args)

    monkeypatch.setattr(packing, "PackedLinear", Counting)
    monkeypatch.setattr(precision, "PackedLinear", Counting)
    monkeypatch.setattr("engine.backends.torch.quantization.PackedLinear", Counting)
    if choice == "none":
        pack_linears(decoder)
    else:
        quantize_linears(decoder, choice, ENOUGH)
    assert len(alive) == len(weights) == 1 + 4 * CONFIG.num_layers
    assert alive == list(range(len(weights), 0, -1))
    assert not any(ref() is not None for ref in weights)
