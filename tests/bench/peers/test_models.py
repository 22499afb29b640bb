"""Peers get the weights in the form they read, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers import models
from bench.peers.environment import PeerError
from bench.peers.models import forms_of


def test_safetensors_are_used_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    forms = forms_of(str(folder), tmp_path / "cache")
    assert (forms.name, forms.gguf, forms.safetensors) == (str(folder), None, folder)


def test_a_gguf_is_dequantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    written = []

    def write(gguf: Path, folder: Path) -> None:
        written.append(gguf)
        folder.mkdir(parents=True)

    monkeypatch.setattr(models, "_dequantize", write)
    first = forms_of(str(tmp_path), tmp_path / "cache")
    assert forms_of(str(tmp_path), tmp_path / "cache") == first
    assert written == [first.gguf] == [tmp_path / "m.gguf"]
    assert first.safetensors.parent == tmp_path / "cache" and first.safetensors.name.startswith("m-bfloat16")


def test_a_gguf_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(PeerError, match=r"m\.gguf cannot be written as safetensors"):
        forms_of(str(tmp_path), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
