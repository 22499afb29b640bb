"""A card that cannot be read or written is named: the report before it took hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.answers import EvaluateError
from evaluation.card import CARD, update_card

DOCUMENT = {
    "heads": "mine",
    "device": "cpu",
    "cpu": "some",
    "prompts": 1,
    "prompt_file": "p.jsonl",
    "turns": 1,
    "max_tokens": 8,
    "dtype": "float32",
    "gorgon": "0",
    "date": "2026-01-01T00:00:00",
    "baselines": {},
    "figures": [],
}


def test_a_card_that_is_no_text_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"\xff")
    with pytest.raises(EvaluateError, match=r"README\.md cannot be read"):
        update_card(tmp_path, DOCUMENT)
    assert (tmp_path / CARD).read_bytes() == b"\xff"


def test_a_card_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match=r"README\.md cannot be written: No such file or directory"):
        update_card(tmp_path / "gone", DOCUMENT)
