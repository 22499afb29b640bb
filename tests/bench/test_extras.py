"""A benchmark that lacks a library says so before it loads or fetches anything."""

from __future__ import annotations

import sys

import pytest

from bench import extras
from cli.main import main


@pytest.mark.parametrize("command", [["peers"], ["engine", "--transformers"]], ids=" ".join)
def test_what_is_missing_is_said_first(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    monkeypatch.setattr("engine.folders.resolve_model", lambda name: pytest.fail("a model was looked for"))
    assert main(["bench", *command]) == 1
    assert (
        f"needs accelerate, by which transformers loads models: {sys.executable}" in capsys.readouterr().err
    )
