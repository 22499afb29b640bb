"""A KV cache in fp8: half the bytes, the same places, an error that is known, speculation without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.answering import EngineMode
from engine.backends.kv_cache import FP8, KVCache, bytes_per_token
from engine.backends.torch.attention import PagedAttention
from engine.batch import RequestState
from engine.build import build
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import load_decoder
from engine.runner.layout import build_rows
from evaluation.exactness import compare_answers
from heads.checkpoint import save_heads
from tests.engine.families import full
from tests.engine.helpers import params
from tests.engine.runner.test_heads_drafter import hydra
from tests.engine.tiny import CONFIG, CPU

C = CONFIG
SHAPE = (C.num_kv_heads, C.head_dim)


def fp8_cache(dtype: torch.dtype = torch.float32, num_blocks: int = 8) -> KVCache:
    return KVCache(CONFIG, num_blocks, 4, dtype, CPU, stored=FP8)


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448, 448).to(FP8).to(values.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_written_is_read_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = fp8_cache(dtype)
    k, v = (torch.randn(12, *SHAPE).mul(10).to(dtype) for _ in range(2))
    slots = torch.randperm(12)
    for layer in range(C.num_layers):
        cache.write(layer, slots, k + layer, v - layer)
    for layer in range(C.num_layers):
        for read_k, read_v in (
            cache.read(layer, torch.tensor([[0, 1, 2]])),
            cache.read_run(layer, 0, 3),
        ):
            assert read_k.dtype == read_v.dtype == dtype and read_k.shape == (1, SHAPE[0], 12, SHAPE[1])
            assert torch.equal(read_k[0][:, slots].transpose(0, 1), rounded(k + layer))
            assert torch.equal(read_v[0][:, slots].transpose(0, 1), rounded(v - layer))
    swapped = cache.read(1, torch.tensor([[2, 0], [1, 1]]))[0]
    assert torch.equal(swapped[0, :, :4], cache.read_run(1, 2, 1)[0][0])
    assert torch.equal(swapped[1, :, 4:], cache.read_run(1, 1, 1)[0][0])


def test_large_numbers_are_cut_off_and_make_no_nan() -> None:
    cache = fp8_cache()
    values = torch.tensor([1e-12, 449.0, 1e6, -1e30, float("inf"), -float("inf")])
    k = torch.zeros(1, *SHAPE)
    k[0, 0, : len(values)] = values
    cache.write(0, torch.tensor([3]), k, -k)
    read_k, read_v = cache.read_run(0, 0, 1)
    assert read_k[0, 0, 3, : len(values)].tolist() == [0.0, 448.0, 448.0, -448.0, 448.0, -448.0]
    assert torch.equal(read_v, -read_k)


def test_moves_read_before_they_write() -> None:
    cache = fp8_cache()
    k = torch.arange(32.0).view(32, 1, 1).expand(32, *SHAPE)
    for layer in range(C.num_layers):
        cache.write(layer, torch.arange(32), rounded(k), rounded(k))
    before = cache.read_run(1, 0, 8)[0].clone()
    cache.move(torch.tensor([5, 6, 4]), torch.tensor([4, 5, 9]))
    after = cache.read_run(1, 0, 8)[1]
    before[:, :, [4, 5, 9]] = before[:, :, [5, 6, 4]]
    assert torch.equal(after, before)


def test_a_token_takes_half_the_bytes() -> None:
    assert 2 * bytes_per_token(CONFIG, FP8, 1) == bytes_per_token(CONFIG, torch.bfloat16, 1)
    cache = fp8_cache(num_blocks=3)
    assert cache.k.nbytes + cache.v.nbytes == 12 * bytes_per_token(CONFIG, FP8)


@torch.inference_mode()
def test_attention_changes_by_a_few_per_cent() -> None:
    """Relative to their own size, read-outs change by what 3 bits of mantissa leave open (0.026 of a value,
    root mean square) and by what that does to the weights of the softmax."""
    torch.manual_seed(0)
    length = 200
    blocks = list(range(50))
    request = RequestState("r", [0] * length, length, params(), 0, block_table=blocks, seat=0)
    rows = build_rows([request], [0], [length], 4, CPU)
    q = torch.randn(length, C.num_heads, C.head_dim)
    k, v = torch.randn(2, length, *SHAPE).unbind()
    reads = []
    for stored in (None, FP8):
        cache = KVCache(CONFIG, 50, 4, torch.float32, CPU, stored=stored)
        reads.append(PagedAttention(rows, cache, C.num_heads)(0, q, k, v))
    error = float((reads[1] - reads[0]).norm() / reads[0].norm())
    assert 0.005 < error < 0.05


def make_engine(model_dir: Path, drafts: int, heads_dir: Path | None, dtype: str) -> Engine:
    return build(
        EngineConfig(
            model_dir=str(model_dir),
            heads_dir=None if heads_dir is None else str(heads_dir),
            device="cpu",
            dtype=dtype,  # type: ignore[arg-type]
            kv_cache_dtype="fp8",
            kv_cache_memory=1 << 20,
            max_num_seqs=4,
            block_size=4,
        ),
        fixed_drafts=drafts,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_leaves_the_text_as_it_is(tiny_model_dir: Path, dtype: str) -> None:
    """Every key is rounded before it is read, the ones of the pass itself too: on and off see one cache."""
    prompts = [[(11 * i + 3 * p) % 128 for p in range(n)] for i, n in enumerate((3, 20, 40))]
    off, on = make_engine(tiny_model_dir, 0, None, dtype), make_engine(tiny_model_dir, 8, None, dtype)
    assert on.info.kv_cache_dtype == "float8_e4m3fn"
    token_bytes = bytes_per_token(CONFIG, FP8)
    assert on.info.num_blocks == (1 << 20) // (4 * token_bytes)
    expected = EngineMode("off", off).run_many(prompts, 40, concurrency=3)
    found = EngineMode("on", on).run_many(prompts, 40, concurrency=3)
    assert sum(found.accepted_by_depth) > 0
    for index, prompt in enumerate(prompts):
        difference = compare_answers(
            off, prompt, expected.outputs[index], found.outputs[index], temperature=0.0, seed=0
        )
        assert difference is None or difference.near_tie


def test_heads_with_a_prefix_layer_keep_it_in_fp8_too(
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on a machine with kernels for it.
    monkeypatch.setattr("engine.backends.native.backend.takes_model", lambda place: True)
    save_heads(tmp_path, hydra(), "tiny", load_decoder(tiny_model_dir, torch.float32, CPU).embedding)
    full(12, 3, 2).save(tmp_path / "tree.json")
    with caplog.at_level("INFO"):
        engine = make_engine(tiny_model_dir, 8, tmp_path, "bfloat16")
    assert "our own kernels do not read" in caplog.text
    answer = EngineMode("on", engine).run_many([[5, 6, 7, 8, 9]], 20, concurrency=1)
    assert len(answer.outputs[0]) == 20
    assert engine.info.num_blocks == (1 << 20) // (4 * bytes_per_token(CONFIG, FP8, 1))
