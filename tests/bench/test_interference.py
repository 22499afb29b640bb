"""The interference benchmark does the same work with and without a bound, and takes all its measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.interference import InterferenceOptions, Measured, figures_of, measure
from cli.main import main
from engine.build import build
from engine.config import EngineConfig
from tests.evaluation.tiny import save_model

CHATS = [[5, 6, 7, 8], [9, 10, 11, 12, 13]]


@pytest.mark.parametrize("bound", [None, 1e9])
def test_every_measure_is_taken(tmp_path: Path, bound: float | None) -> None:
    save_model(tmp_path)
    config = EngineConfig(
        model_dir=str(tmp_path),
        dtype="float32",
        device="cpu",
        kv_cache_memory=2**20,
        block_size=8,
        max_inter_token_ms=bound,
        speculation="off",
    )
    options = InterferenceOptions(
        model="",
        heads="",
        config=config,
        streams=2,
        answers=2,
        max_tokens=24,
        long_prompts=2,
        prompt_tokens=80,
        rounds=1,
    )
    engine, measured = build(config), Measured()
    measure(engine, CHATS, options, 0, measured)
    assert not engine.has_work()
    num_gaps = len(measured.quiet_gaps) + len(measured.gaps)
    assert 0 < num_gaps <= 2 * 2 * 23
    assert measured.gaps
    assert len(measured.total) == len(measured.short_alone) == len(measured.short_behind) == 1
    figures = figures_of(measured)
    assert figures["worst_over_usual"] >= figures["p99_over_usual"] > 0


def test_what_cannot_be_measured_is_said_first(capsys: Any) -> None:
    assert main(["bench", "interference", "--model", "no such model", "--streams", "0"]) == 2
    assert "--streams: must be at least 1" in capsys.readouterr().err
    assert main(["bench", "interference", "--model", "no such model", "--max-inter-token-ms", "0"]) == 2
    assert "--max-inter-token-ms: must be above 0" in capsys.readouterr().err
