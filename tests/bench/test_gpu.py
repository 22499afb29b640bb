"""The GPU benchmark, on a machine without a GPU: rows, limits, what was not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.bandwidth import elapsed_seconds
from bench.device_profile import covered, profile_device
from bench.shapes import SHAPES, random_decoder
from bench.steps import compare
from cli.main import main as gorgon
from engine.backends.kv_cache import FP8, bytes_per_token
from engine.model.decoder import Decoder
from engine.model.footprint import weight_bytes

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shapes", "tiny", "--steps", "2"]


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bandwidth._BYTES", 2**20)
    monkeypatch.setattr("engine.runner.profile._TIME_LIMIT", 0.2)


def run(capsys: Any, *more: str) -> dict[str, Any]:
    assert gorgon(["bench", "gpu", *TINY, *more]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_every_combination_has_a_row(capsys: Any) -> None:
    flags = "--dtype float32 --requests 3 1 --nodes 1 2 64 --contexts 20 40"
    document = run(capsys, *flags.split())
    rows = document["steps"]
    found = [(r["kind"], r["requests"], r["context"], r["nodes"], r["tokens"]) for r in rows]
    plain = [("plain", n, context, 1, n) for context in (20, 40) for n in (1, 3)]
    trees = [(f"tree of {k}", n, context, k, k * n) for context in (20, 40) for n in (1, 3) for k in (2, 64)]
    assert found == [*plain, *trees]
    kv = bytes_per_token(SHAPES["tiny"], torch.float32)
    with torch.device("meta"):
        weights = weight_bytes(Decoder(SHAPES["tiny"]))
    for row in rows:
        assert row["bytes"] == weights + row["requests"] * row["context"] * kv
        limit = 1000 * row["bytes"] / max(document[f"{way}_bytes_per_second"] for way in ("read", "copy"))
        assert row["limit_ms"] == pytest.approx(limit, abs=1e-3)
        assert 0 < row["ms_best"] <= row["ms_median"]
        if row["nodes"] > 1:
            [alone] = [r for r in rows if r["kind"] == "plain" and r["requests"] == row["requests"]
                       and r["context"] == row["context"]]  # fmt: skip
            assert row["over_plain"] == pytest.approx(row["ms_median"] / alone["ms_median"], abs=1e-3)
    assert document["not_measured"] == {}
    assert all(row.get("idle_share") is None for row in rows)  # the host is the device


@pytest.mark.parametrize("more", [["--kv-cache-dtype", "fp8"], ["--dtype", "bfloat16"]], ids=" ".join)
def test_number_formats(more: list[str], capsys: Any) -> None:
    document = run(capsys, "--requests", "2", "--nodes", "1", "8", "--contexts", "30", *more)
    assert len(document["steps"]) == 2
    keys = bytes_per_token(SHAPES["tiny"], FP8 if "fp8" in more else torch.bfloat16)
    with torch.device("meta"):
        weights = weight_bytes(Decoder(SHAPES["tiny"]).bfloat16())
    if "bfloat16" in more:
        assert [row["bytes"] for row in document["steps"]] == [weights + 2 * 30 * keys] * 2


def test_a_model_that_cannot_be_had_does_not_stop_the_others(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr("bench.shapes.allocate", fail)
    assert gorgon(["bench", "gpu", *TINY]) == 1
    out, err = capsys.readouterr()
    assert "tiny was not measured to the end: --shapes: cpu has no memory for the weights of tiny" in err
    assert "tiny" in json.loads(out.splitlines()[-1])["not_measured"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "65"], "--nodes: must be at most 64"),
        (["--requests", "0"], "must be at least 1"),
        (["--steps", "0"], "must be at least 1"),
        (["--device", "cuda"], "--device: no CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_said_first(flags: list[str], message: str, capsys: Any) -> None:
    if torch.cuda.is_available() and "cuda" in flags:
        pytest.skip("there is a CUDA device")
    assert gorgon(["bench", "gpu", *TINY, *flags]) == 2
    assert message in capsys.readouterr().err


def test_trees_are_put_beside_the_plain_step_of_the_same_load() -> None:
    def row(nodes: int, requests: int, **figures: float) -> dict[str, Any]:
        return {"model": "8b", "nodes": nodes, "requests": requests, "context": 128, **figures}

    rows = [
        row(1, 1, ms_median=10.0),
        row(1, 64, ms_median=50.0),
        row(64, 1, ms_median=11.0),
    ]
    compare(rows)
    assert rows[2]["over_plain"] == 1.1
    assert "over_plain" not in rows[0] and "over_plain" not in rows[1]


def test_published_shapes_have_their_sizes() -> None:
    billions = {}
    for name, config in SHAPES.items():
        with torch.device("meta"):
            decoder = Decoder(replace(config, max_positions=16))
        billions[name] = sum(p.numel() for p in decoder.parameters()) / 1e9
    # As the model cards have it: 1.23B, 3.21B and 8.03B.
    assert [round(billions[name], 2) for name in ("1b", "3b", "8b")] == [1.24, 3.21, 8.03]


def test_random_weights_are_the_same_every_time() -> None:
    first, second = (random_decoder("tiny", torch.float32, CPU) for _ in range(2))
    assert torch.equal(first.embedding, second.embedding)
    assert first.embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((first.norm.weight == 1).all()) and first.lm_head.weight is first.embedding


def test_time_is_counted_once_where_work_overlaps() -> None:
    assert covered([]) == 0.0
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (6.0, 6.5)]) == 5.0


def test_busy_time_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CUDA device, with a profile made by hand."""
    ran: list[int] = []

    def event(kind: str, name: str, start: float, end: float) -> Any:
        return SimpleNamespace(
            name=name,
            device_type=SimpleNamespace(name=kind),
            time_range=SimpleNamespace(start=start, end=end),
        )

    class Profile:
        def __init__(self, activities: object) -> None: ...

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *error: object) -> None: ...

        def events(self) -> list[Any]:
            return [
                event("CUDA", "attend", 100, 300),
                event("CPU", "launch", 0, 1000),
                event("CUDA", "merge", 250, 400),
            ]

    monkeypatch.setattr("torch.profiler.profile", Profile)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    profile = profile_device(torch.device("cuda"), lambda: ran.append(2))
    assert profile.busy == pytest.approx(300e-6)
    assert profile.by_kernel == pytest.approx({"attend": 200e-6, "merge": 150e-6})
    assert ran == [2]
    assert elapsed_seconds(CPU, lambda: ran.append(3)) > 0 and ran == [2, 3]
