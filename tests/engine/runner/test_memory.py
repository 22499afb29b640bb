"""How large the KV cache gets: the arithmetic, and the passes whose memory it leaves free."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.attention import FixedAttention, FixedAttentions
from engine.backends.kv_cache import KVCache
from engine.backends.rows import PassSize
from engine.backends.torch.backend import TorchBackend
from engine.batch import Batch, BatchLimits
from engine.build import build
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.runner import memory
from engine.runner.draft_model import DraftModelDrafter, first_layers
from engine.runner.drafter import Drafter
from engine.runner.graph_memory import kept_bytes
from engine.runner.heads_drafter import HeadsDrafter
from engine.runner.memory import cache_memory, first_num_blocks, fit_cache, largest_passes
from tests.engine.families import chain, full
from tests.engine.helpers import params
from tests.engine.processes import config_for
from tests.engine.runner.test_heads_drafter import bound, drafter_of, hydra
from tests.engine.tiny import CPU, POSITIONS, Arrival, TinyEngine, tiny_backend, tiny_decoder

GIB = 2**30
DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "none": lambda: None,
    "hydra": lambda: drafter_of(bound(hydra())),
    "draft model": lambda: DraftModelDrafter(first_layers(tiny_decoder(), 1), tiny_backend()),
}


@pytest.mark.parametrize(
    ("total", "free", "pass_bytes", "utilization", "expected"),
    [
        (80, 64, 4, 0.9, 52),  # 72 may be in use: weights 16, passes 4
        (80, 64, 4, 1.0, 60),
        (80, 64, 0, 0.5, 24),
        (80, 10, 4, 0.9, -2),  # another process has the rest: nothing is left
        (24, 8, 1, 0.875, 4),
    ],
)
def test_the_cache_takes_what_weights_and_passes_leave(
    total: int, free: int, pass_bytes: int, utilization: float, expected: int
) -> None:
    found = cache_memory(total * GIB, free * GIB, pass_bytes * GIB, utilization)
    assert found == pytest.approx(expected * GIB, abs=1)
    # Whatever the sizes, cache and pass together stay within what may be in use.
    assert total * GIB - free * GIB + found + pass_bytes * GIB <= total * GIB * utilization


LIMITS = BatchLimits(max_num_seqs=6, max_num_batched_tokens=300, max_model_len=100, max_drafts=8)


def batches(limits: BatchLimits, block_size: int = 4) -> list[Batch]:
    return list(largest_passes(limits, -(-limits.max_model_len // block_size), block_size))


def test_prompts_fill_the_budget_and_trees_come_from_all_requests() -> None:
    prompts, trees = batches(LIMITS)
    assert prompts.num_tokens == 300
    assert [s.request.num_computed for s in prompts.scheduled] == [0, 0, 0]  # three whole contexts
    assert [s.num_drafts for s in trees.scheduled] == [8] * 6
    for batch in (prompts, trees):
        for scheduled in batch.scheduled:
            last = scheduled.request.num_computed + scheduled.num_tokens + scheduled.num_drafts
            assert last <= 100 <= 4 * len(scheduled.request.block_table)
            assert scheduled.commits


def test_a_chunk_lies_behind_the_longest_context() -> None:
    prompts, trees = batches(BatchLimits(6, 30, 100, 8))
    [chunk] = prompts.scheduled
    assert (chunk.num_tokens, chunk.request.num_computed) == (30, 70)
    assert trees.num_tokens == 30


def test_trees_stop_where_few_hundred_tokens_are_in_the_pass() -> None:
    _, trees = batches(BatchLimits(64, 4096, 1000, 63))
    assert trees.num_tokens == 512
    _, trees = batches(BatchLimits(1, 4096, 1000, 63))
    assert trees.num_tokens == 64
    _, trees = batches(BatchLimits(2, 4096, 5, 63))
    assert trees.num_tokens == 2 * 5


def fake_gpu(monkeypatch: pytest.MonkeyPatch, free: int, peaks: list[int]) -> None:
    """torch.cuda's word on memory, without a device. `peaks`: bytes before the passes, and the most."""
    words: dict[str, Any] = {
        "memory_allocated": lambda device: peaks[0],
        "max_memory_allocated": lambda device: peaks[1],
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (free, 2 * free),
    }
    for name, function in words.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(memory, "on_capture_stream", nullcontext)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_cache_is_fitted_and_whoever_reads_it_sees_it(
    drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[(11 * i + 3 * p) % 128 for p in range(n)] for i, n in enumerate((20, 60, 37))]
    arrivals = [Arrival(str(i), p, params(20, ignore_eos=True)) for i, p in enumerate(prompts)]
    family = full(8, 3, 3) if drafter == "hydra" else chain(4)
    expected = TinyEngine(family, DRAFTERS[drafter](), num_blocks=80, block_size=4).run(arrivals)

    engine = TinyEngine(family, DRAFTERS[drafter](), num_blocks=80, block_size=4)
    engine.runner.resize_cache(POSITIONS // 4)  # what one request takes, as the engine begins
    fake_gpu(monkeypatch, free=10_000, peaks=[500, 1500])
    fit_cache(engine.runner, engine.scheduler.limits, 25, 0.925, captures=True)
    # 20,000 in all, 18,500 may be in use, 10,000 are and a pass takes 1,000: 7,500 for blocks of 4 times 25.
    assert engine.runner.cache.num_blocks == 75
    assert not engine.runner.cache.k.any() and not engine.runner.cache.v.any()
    engine.runner.resize_cache(80)
    found = engine.run(arrivals)
    assert {name: result.tokens for name, result in found.items()} == {
        name: result.tokens for name, result in expected.items()
    }


class Kept(FixedAttentions):
    """Two bytes for every token of every size."""

    def make(self, size: PassSize, num_heads: int, slots: Tensor, ancestors: Tensor) -> FixedAttention:
        raise NotImplementedError

    def kept_bytes(self, sizes: Iterable[tuple[PassSize, int]]) -> int:
        return sum(2 * size.num_tokens for size, _ in sizes)


class Capturing(TorchBackend):
    """A backend whose passes are captured."""

    def fixed_attentions(self, cache: KVCache, max_model_len: int) -> FixedAttentions:
        return Kept()


def capturing_engine() -> TinyEngine:
    drafter = drafter_of(bound(hydra()))
    return TinyEngine(full(8, 3, 3), drafter, num_blocks=80, block_size=4, make_backend=Capturing)


def test_graphs_are_left_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = capturing_engine()
    runner, limits = engine.runner, engine.scheduler.limits
    ran: list[tuple[int, bool, set[float]]] = []

    def execute(batch: Batch) -> None:
        temperatures = {s.request.sampling.temperature for s in batch.scheduled}
        ran.append((batch.num_tokens, isinstance(runner.drafter, HeadsDrafter), temperatures))

    monkeypatch.setattr(runner, "execute", execute)
    kept = kept_bytes(runner, limits, Kept())
    assert kept > 0
    blocks = []
    for captures in (False, True):
        runner.resize_cache(POSITIONS // 4)
        fake_gpu(monkeypatch, free=10 * kept, peaks=[500, 1500])
        fit_cache(runner, limits, 25, 0.9, captures)
        blocks.append(runner.cache.num_blocks)
    assert blocks == [(8 * kept - 1000) // 100, (7 * kept - 2000) // 100]
    assert len(ran) == 4 + 6 and [drafts for _, drafts, _ in ran[:4]] == [True, True, False, False]
    # As many trees as there can be, none smaller for want of guesses, and greedy as graphs are.
    assert ran[-1] == (ran[1][0], False, {0.0})
    assert isinstance(runner.drafter, HeadsDrafter)


def test_workspaces_of_the_captures_stream_are_in_use_before_the_cache_is_sized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = capturing_engine()
    runner, limits = engine.runner, engine.scheduler.limits
    fake_gpu(monkeypatch, free=10 * kept_bytes(runner, limits, Kept()), peaks=[500, 1500])
    happened: list[str] = []

    @contextmanager
    def on_capture_stream() -> Generator[None, None, None]:
        happened.append("to the stream")
        yield
        happened.append("back")

    def noting(what: str, result: object) -> Callable[..., object]:
        return lambda *_: (happened.append(what), result)[1]

    monkeypatch.setattr(memory, "on_capture_stream", on_capture_stream)
    monkeypatch.setattr(runner, "execute", noting("pass", None))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", noting("measure", None))
    monkeypatch.setattr(torch.cuda, "mem_get_info", noting("size", (10_000_000, 20_000_000)))
    fit_cache(runner, limits, 25, 0.9, captures=True)
    # What the first pass leaves on that stream is no part of what the second takes for a while.
    assert happened[-6:] == ["to the stream", "pass", "measure", "pass", "back", "size"]


def test_too_little_is_said_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TinyEngine(num_blocks=POSITIONS // 4, block_size=4)
    fake_gpu(monkeypatch, free=8_000, peaks=[500, 1500])
    with pytest.raises(
        ConfigError, match=r"--gpu-memory-utilization: .*one request of 256 tokens.*--max-model-len"
    ):
        fit_cache(engine.runner, engine.scheduler.limits, 25, 0.9, captures=False)
    monkeypatch.setattr(engine.runner, "execute", lambda batch: torch.empty(1 << 60))
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens: .*passes of 256 tokens"):
        fit_cache(engine.runner, engine.scheduler.limits, 25, 0.9, captures=False)


def test_a_pass_that_fails_otherwise_is_no_matter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TinyEngine(num_blocks=POSITIONS // 4, block_size=4)
    fake_gpu(monkeypatch, free=8_000, peaks=[500, 1500])
    drafter = engine.runner.drafter = drafter_of(bound(hydra()))
    monkeypatch.setattr(engine.runner, "execute", lambda batch: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        fit_cache(engine.runner, engine.scheduler.limits, 25, 0.9, captures=False)
    assert engine.runner.drafter is drafter


def test_sizes_that_are_given_are_taken_on_any_device() -> None:
    cuda = torch.device("cuda")
    given, free = (
        EngineConfig(model_dir="", kv_cache_memory=memory, block_size=16) for memory in (16_000, None)
    )
    for device in (CPU, cuda):
        assert first_num_blocks(given, 10, device, 100) == 100
    assert first_num_blocks(free, 10, cuda, 100) == 7  # one request's, until it is measured
    assert memory.is_fitted(free, cuda)
    assert not memory.is_fitted(given, cuda) and not memory.is_fitted(free, CPU)


def test_an_engine_with_a_measured_cache_serves(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of an engine on a GPU, up to the device itself."""
    monkeypatch.setattr("engine.build.is_fitted", lambda config, device: True)
    fake_gpu(monkeypatch, free=1 << 20, peaks=[0, 1 << 10])
    engine = build(config_for(tiny_model_dir), fixed_drafts=0)
    token_bytes = 2 * 2 * 2 * 16 * 4
    assert engine.info.num_blocks == (int((2 << 20) * 0.9) - (1 << 20) - (1 << 10)) // (4 * token_bytes)
    assert engine.scheduler.pool.num_blocks == engine.info.num_blocks


def test_a_context_that_cannot_be_had_is_named(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("engine.build.is_fitted", lambda config, device: True)
    monkeypatch.setattr("engine.backends.backend.KVCache", fail)
    with pytest.raises(ConfigError, match=r"--max-model-len: this machine has no memory"):
        build(config_for(tiny_model_dir), fixed_drafts=0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_shares_of_memory_are_shares(share: float) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization: must be above 0 and at most 1"):
        EngineConfig(model_dir="", gpu_memory_utilization=share)
