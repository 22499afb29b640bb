"""Packed weights are kept for the next start: the same to the last bit, or not used at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch

from engine.backends.native import kept as kept_module
from engine.backends.native.decoder import NativeDecoder
from engine.backends.native.kept import KeptWeights
from engine.backends.native.library import kernels
from engine.backends.native.matrix import NativeLinear
from engine.backends.native.precision import take_over
from engine.model.config import DecoderConfig
from tests.engine.backends.native.decoders import WIDE, random_decoder, wide_config

pytestmark = pytest.mark.skipif(kernels() is None, reason="no AVX-512 VNNI and BF16, or no C compiler")
BIASED = wide_config(qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kernels()  # compiled in the usual place
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept_module, "_LEAST_BYTES", 0)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def first_start(model_dir: Path, config: DecoderConfig = WIDE) -> NativeDecoder:
    return take_over(random_decoder(config), "auto", KeptWeights(model_dir, "auto"))[0]


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "packed").glob("*.weights"))


@pytest.mark.parametrize(
    "config", [WIDE, BIASED, wide_config(tie_embeddings=True)], ids=["plain", "biased", "tied"]
)
def test_the_next_start_has_the_same_weights_mapped_from_the_file(
    model_dir: Path, tmp_path: Path, config: DecoderConfig
) -> None:
    first = first_start(model_dir, config)
    found = KeptWeights(model_dir, "auto").load(config)
    assert found is not None
    second, _ = take_over(found, "auto")
    hidden = torch.randn(3, config.hidden_size).bfloat16()
    assert torch.equal(second.logits(hidden), first.logits(hidden))
    assert torch.equal(second.embedding, first.embedding)
    pairs = list(zip(first.layers, second.layers, strict=True))
    assert len(pairs) == 4 * config.num_layers
    for before, after in pairs:
        assert isinstance(before, NativeLinear) and isinstance(after, NativeLinear)
        assert before.kind == after.kind and torch.equal(before.blocks, after.blocks)
        assert after.blocks.data_ptr() % 64 == 0
        assert (before.bias is None) == (after.bias is None)
        assert before.bias is None or torch.equal(before.bias, after.bias)
    assert all(torch.equal(a, b) for a, b in zip(first._kept, second._kept, strict=True))  # norms, rotation
    [entry] = entries(tmp_path)
    assert str(entry) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("place", [0, 0.5, -200, -16, -1])
def test_a_flipped_bit_is_noticed_and_the_weights_are_made_again(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: float
) -> None:
    first_start(model_dir)
    [entry] = entries(tmp_path)
    whole = entry.read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(whole)) if place == 0.5 else int(place)] ^= 1
    entry.write_bytes(damaged)
    assert KeptWeights(model_dir, "auto").load(WIDE) is None
    assert "cannot be used" in caplog.text
    first_start(model_dir)
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_no_file(model_dir: Path, tmp_path: Path, share: float) -> None:
    first_start(model_dir)
    [entry] = entries(tmp_path)
    entry.write_bytes(entry.read_bytes()[: int(share * entry.stat().st_size)])
    assert KeptWeights(model_dir, "auto").load(WIDE) is None


def test_what_was_packed_for_other_shapes_is_not_used(model_dir: Path) -> None:
    first_start(model_dir)
    for other in (wide_config(num_layers=3), wide_config(num_layers=1), wide_config(hidden_size=128)):
        assert KeptWeights(model_dir, "auto").load(other) is None


def test_another_file_or_format_has_an_entry_of_its_own(model_dir: Path, tmp_path: Path) -> None:
    first_start(model_dir)
    assert KeptWeights(model_dir, "int4").load(WIDE) is None
    os.utime(model_dir / "model.safetensors", ns=(1, 1))
    assert KeptWeights(model_dir, "auto").load(WIDE) is None
    (model_dir / "model.safetensors").write_bytes(b"longer weights")
    assert KeptWeights(model_dir, "auto").load(WIDE) is None
    assert len(entries(tmp_path)) == 1


def test_entries_are_bounded_and_what_a_killed_writer_left_is_removed(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_module, "_MOST_OF_ONE", 2)
    first_start(model_dir)
    left = tmp_path / "home" / "packed" / "x.weights.partial"
    for age in range(4, 1, -1):
        left.write_bytes(b"half")
        os.utime(model_dir / "model.safetensors", ns=(age, age))
        first_start(model_dir)
        assert len(entries(tmp_path)) == 2 and not left.exists()
    monkeypatch.setattr(kept_module, "_MOST_BYTES", 1)
    os.utime(model_dir / "model.safetensors", ns=(1, 1))
    first_start(model_dir)
    assert len(entries(tmp_path)) == 1 and KeptWeights(model_dir, "auto").load(WIDE) is not None


def test_two_writers_do_not_meet(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "packed"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first_start(model_dir)
    assert not entries(tmp_path)
    first_start(model_dir)
    assert len(entries(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_is_only_told_of(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "packed").write_text("no folder")
    first_start(model_dir)
    assert "cannot be kept" in caplog.text


def test_small_models_and_full_disks_are_left_alone(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_module, "_FREE_SHARE", 1e18)
    first_start(model_dir)
    monkeypatch.undo()
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "home"))
    first_start(model_dir)
    assert not entries(tmp_path)
