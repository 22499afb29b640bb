"""The step benchmark runs real steps of the sizes asked for and counts the bytes that each must read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.bandwidth import Bandwidth
from bench.steps import Kind, StepBenchError, measure_steps
from cli.main import main
from engine.backends.torch.packing import pack_linears
from engine.build import build
from engine.config import EngineConfig
from engine.model.decoder import Decoder
from engine.model.footprint import weight_bytes
from tests.engine.tiny import CONFIG, tiny_decoder
from tests.evaluation.tiny import save_head_set, save_model


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bandwidth._BYTES", 2**20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    model, heads = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("heads")
    save_model(model)
    save_head_set(heads, model)
    return model, heads


def bench(model: Path, *more: str) -> int:
    argv = ["bench", "step", "--model", str(model), "--dtype", "float32", "--steps", "4", "--context", "20"]
    return main([*argv, "--kv-cache-memory", "1M", *more])


def test_plain_steps_and_trees(folders: tuple[Path, Path], capsys: Any) -> None:
    model, heads = folders
    assert bench(model, "--heads", str(heads), "--requests", "1", "3", "--trees", "4", "8") == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    steps = document["steps"]
    assert [(s["kind"], s["requests"], s["tokens"]) for s in steps] == [
        ("plain", 1, 1.0),
        ("plain", 3, 3.0),
        ("tree of 4", 1, 4.0),
        ("tree of 8", 1, 8.0),
    ]
    c = CONFIG
    kv = 20 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4
    assert steps[1]["bytes"] - steps[0]["bytes"] == 2 * kv
    assert steps[0]["bytes"] == steps[2]["bytes"] == kv + weight_bytes(tiny_decoder())
    bandwidth = max(document["read_bytes_per_second"], document["copy_bytes_per_second"])
    for step in steps:
        assert 0 < step["ms_best"] <= step["ms_median"]
        limit = 1000 * step["bytes"] / bandwidth
        assert step["limit_ms"] == pytest.approx(limit, abs=1e-3)
        assert step["share_of_limit"] == pytest.approx(limit / step["ms_median"], rel=0.05, abs=1e-3)
    assert "of the limit" in out and "GB/s" in out


def test_an_fp8_cache_is_counted_as_what_it_is(folders: tuple[Path, Path], capsys: Any) -> None:
    flags = ["--heads", "none", "--requests", "1", "--trees", "--kv-cache-dtype", "fp8"]
    assert bench(folders[0], *flags) == 0
    [step] = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    kv = 20 * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim
    assert step["bytes"] == kv + weight_bytes(tiny_decoder())


def test_nothing_to_draft_with_means_no_trees(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        "bench.step.build", lambda config, **_: build(replace(config, speculation="off"), ngrams=False)
    )
    assert bench(folders[0], "--heads", "none", "--requests", "2", "--trees", "4", "8") == 0
    steps = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    assert [row["kind"] for row in steps] == ["plain"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--requests", "65"], "--requests: must be at most 64, --max-num-seqs"),
        (["--trees", "1"], "--trees: must be at least 2 nodes"),
        (["--trees", "9", "--max-tree-nodes", "8"], "--trees: must be at most 8, --max-tree-nodes"),
        (["--steps", "0"], "--steps: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said_first(more: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "step", "--model", "no such model", *more]) == 2
    assert message in capsys.readouterr().err


def test_too_little_cache_is_no_measurement(folders: tuple[Path, Path]) -> None:
    config = EngineConfig(
        model_dir=str(folders[0]),
        dtype="float32",
        device="cpu",
        kv_cache_memory=40 * 512,
        block_size=4,
        max_model_len=40,
    )
    with pytest.raises(StepBenchError, match="requests decoded in a step"):
        measure_steps(build(config), Kind(2, 1, context=12), num_steps=20)


def test_trees_have_as_many_nodes_as_asked_for(folders: tuple[Path, Path]) -> None:
    model, heads = folders
    config = EngineConfig(
        model_dir=str(model), heads_dir=str(heads), dtype="float32", device="cpu", kv_cache_memory=2**20
    )
    engine = build(config, fixed_drafts=63)
    for nodes in (64, 5, 2):
        assert measure_steps(engine, Kind(1, nodes, context=10), num_steps=2).num_tokens == nodes
    assert not engine.has_work()


def test_a_pass_reads_what_it_multiplies() -> None:
    decoder = Decoder(CONFIG)
    c = CONFIG
    layer = c.hidden_size * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layer += 3 * c.hidden_size * c.layers[0].feed_forward.width + 2 * c.hidden_size
    total = 4 * (c.num_layers * layer + c.hidden_size + c.vocab_size * c.hidden_size)
    assert weight_bytes(decoder) == total
    pack_linears(decoder)
    assert weight_bytes(decoder) == total  # packed weights are no parameters, and are read all the same


def test_the_best_of_all_measurements_counts() -> None:
    bandwidth = Bandwidth(torch.device("cpu"))
    bandwidth.measure()
    first = bandwidth.best
    assert first == max(bandwidth.read, bandwidth.copy) > 1e6
    bandwidth.read = 1e15
    bandwidth.measure()
    assert bandwidth.best == 1e15
