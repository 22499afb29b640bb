"""The comparison of attention: every backend reads what it should, and one that does not is not timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import attention as comparison
from bench.attention import compare_attention
from bench.attention_backends import BACKENDS, FlashInfer, MissingBackendError, import_flashinfer
from bench.attention_passes import Case, Problem, cases, fill, num_blocks, pass_of
from bench.bandwidth import Bandwidth
from bench.gpu_model import profile_family
from bench.gpu_options import GpuBenchOptions
from bench.shapes import SHAPES
from cli.main import main
from engine.backends.kv_cache import KVCache
from engine.backends.torch.attention import visibility
from engine.model.decoder import Attention

CPU = torch.device("cpu")
CONFIG = SHAPES["tiny"]
EVERYWHERE = [name for name in BACKENDS if name != "FlashInfer"]


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bandwidth._BYTES", 2**20)


def options(**changes: Any) -> GpuBenchOptions:
    given = GpuBenchOptions(
        shapes=("tiny",),
        parts=("attention",),
        requests=(1, 3),
        nodes=(1, 4, 13),
        contexts=(9, 50),
        steps=2,
        device="cpu",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="auto",
    )
    return replace(given, **changes)


def cache_for(given: GpuBenchOptions) -> KVCache:
    return KVCache(CONFIG, num_blocks(given, 16), 16, torch.float32, CPU)


def measure(given: GpuBenchOptions) -> list[dict[str, Any]]:
    found = compare_attention(CONFIG, cache_for(given), given, profile_family(), Bandwidth(CPU))
    return [one.row(1e9) for one in found]


def problem_of(case: Case) -> Problem:
    cache = KVCache(CONFIG, case.requests * 6, 16, torch.float32, CPU)
    fill(cache)
    return Problem(pass_of(case, cache, profile_family()), cache, CONFIG.num_heads, CONFIG.num_kv_heads)


def test_every_backend_is_right_about_every_pass() -> None:
    rows = measure(options(requests=(3,)))
    passes = ["plain", "tree 13"] * 2 + ["tree 13, prompt of 50"]
    assert [row["pass"] for row in rows] == [name for name in passes for _ in BACKENDS]
    for row in rows:
        if row["kernel"] == "FlashInfer":
            assert row["note"] and "ms_median" not in row
            continue
        assert row["note"] is None and row["off_by"] < 1e-5
        assert 0 < row["ms_best"] <= row["ms_median"] and not row["graph"]
        keys = row["context"] - 1 + row["nodes"]
        assert row["bytes"] == row["requests"] * keys * 2 * 2 * 2 * 16 * 4
    own = [row for row in rows if row["kernel"] == "gorgon"]
    assert all(row["over_own"] == 1 for row in own)
    assert [(row["requests"], row["tokens"]) for row in own[-2:]] == [(3, 39), (4, 3 * 13 + 50)]


def test_trees_and_prompts_see_what_they_should() -> None:
    step = problem_of(Case(3, 30, 5, chunk=7)).step
    family = profile_family()
    assert step.starts.tolist() == [0, 5, 10, 17] and step.context_lens.tolist() == [34] * 3
    seen = visibility(torch.from_numpy(step.prefix_len), step.ancestors, 34)
    for first in (0, 5):
        for node, path in enumerate(family.path_nodes[:5]):
            expected = {*range(29), *(29 + ancestor for ancestor in path)}
            assert set(seen[first + node].nonzero().flatten().tolist()) == expected
    assert seen[10:].sum(dim=1).tolist() == [28, 29, 30, 31, 32, 33, 34]
    blocks = [block for table in step.block_tables for block in table]
    assert len(set(blocks)) == len(blocks) == 9 and blocks != sorted(blocks)


def test_a_chunk_is_no_longer_than_its_context() -> None:
    assert cases(options())[-1] == Case(4, 50, 13, chunk=50)
    assert cases(options(contexts=(1000,), nodes=(1,)))[-1] == Case(4, 1000, 1, chunk=256)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_keys_and_values_are_stored(name: str) -> None:
    problem = problem_of(Case(2, 20, 3))
    before = problem.cache.k.clone()
    q, k, v = (torch.randn(6, heads, 16) for heads in (4, 2, 2))
    with torch.inference_mode():
        BACKENDS[name](problem)(1, q, k, v)
    slots = problem.step.slots
    assert torch.equal(problem.cache.k[1][:, slots], k.transpose(0, 1))
    assert torch.equal(problem.cache.v[1][:, slots], v.transpose(0, 1))
    before[1][:, slots] = k.transpose(0, 1)
    assert torch.equal(problem.cache.k, before)


class Wrong:
    """Attention of which one row saw one key too many."""

    def __init__(self, problem: Problem) -> None:
        step = problem.step
        prefix_len = step.prefix_len.copy()
        prefix_len[0] += 2
        self._attention = BACKENDS["gorgon"](replace(problem, step=replace(step, prefix_len=prefix_len)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attention(layer, q, k, v)


def nothing(problem: Problem) -> Attention:
    return lambda layer, q, k, v: torch.full((len(q), 64), float("nan"))


def breaks(problem: Problem) -> Attention:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("backend", "note"),
    [(Wrong, "wrong: off by"), (nothing, "wrong: off by nan"), (breaks, "RuntimeError: no such kernel")],
)
def test_what_is_wrong_or_breaks_is_said_and_not_timed(
    backend: Callable[[Problem], Attention], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "BACKENDS", {"theirs": backend, "gorgon": BACKENDS["gorgon"]})
    rows = measure(options(requests=(2,), nodes=(13,), contexts=(50,)))
    assert [row["kernel"] for row in rows] == ["theirs", "gorgon"] * 2
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert theirs["note"].startswith(note) and "ms_median" not in theirs
        assert ours["ms_median"] > 0 and ours["note"] is None


def test_backends_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def named(name: str) -> Callable[[Problem], Attention]:
        def make(problem: Problem) -> Attention:
            attention = BACKENDS["gorgon"](problem)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                timed.append(name)
                return attention(layer, q, k, v)

            return attend

        return make

    monkeypatch.setattr(comparison, "BACKENDS", {name: named(name) for name in "ab"})
    rows = measure(options(requests=(1,), nodes=(1,), contexts=(9,), steps=3))
    assert len(rows) == 4
    # Of one pass: each is checked in one layer and run once in both, then both layers three times by turns.
    assert "".join(timed[: len(timed) // 2]) == "aaa" + "bbb" + "aabb" * 3


def test_flashinfer_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, note in ((None, "not installed"), (SimpleNamespace(), "needs a GPU")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        with pytest.raises(MissingBackendError, match=note):
            import_flashinfer(CPU)


class Pages:
    """FlashInfer's wrappers as its documentation has them, in plain torch. `has_mask`: that of prompts."""

    def __init__(
        self, has_mask: bool, workspace: Tensor, kv_layout: str, use_tensor_cores: bool = False
    ) -> None:
        assert kv_layout == "HND" and workspace.dtype == torch.uint8
        self.has_mask = has_mask

    def plan(self, *arguments: Any, q_data_type: Any, kv_data_type: Any, custom_mask: Any = None) -> None:
        if self.has_mask:
            self.starts, *arguments = arguments
        self.ends, self.pages, self.last_page_len, self.heads, self.kv_heads, _, self.page_size = arguments
        if not self.has_mask:
            self.starts = torch.arange(len(self.ends))
        assert {x.dtype for x in arguments[:3]} == {torch.int32} and q_data_type == kv_data_type
        self.mask = custom_mask

    def run(self, q: Tensor, paged: tuple[Tensor, Tensor]) -> Tensor:
        out, seen = torch.empty_like(q), 0
        for i in range(len(self.ends) - 1):
            rows = slice(int(self.starts[i]), int(self.starts[i + 1]))
            pages = self.pages[self.ends[i] : self.ends[i + 1]].long()
            length = (len(pages) - 1) * self.page_size + int(self.last_page_len[i])
            k, v = (x[pages].transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1) for x in paged)
            mask = None
            if self.mask is not None:
                count = (rows.stop - rows.start) * length
                mask = self.mask[seen : seen + count].view(-1, length)
                seen += count
            out[rows] = torch.nn.functional.scaled_dot_product_attention(
                q[rows].transpose(0, 1), k, v, mask, enable_gqa=True
            ).transpose(0, 1)
        assert self.mask is None or seen == len(self.mask)
        return out


def test_flashinfer_is_told_where_everything_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=partial(Pages, False),
        BatchPrefillWithPagedKVCacheWrapper=partial(Pages, True),
    )
    monkeypatch.setattr("bench.attention_backends.import_flashinfer", lambda device: library)
    monkeypatch.setattr(comparison, "BACKENDS", {"FlashInfer": FlashInfer})
    for row in measure(options(requests=(3,), contexts=(32, 50), steps=1)):
        assert row["note"] is None and row["off_by"] < 1e-5


def test_our_own_kernel_may_not_fail(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = "bench gpu --device cpu --shapes tiny --parts attention --requests 1 --nodes 1 --contexts 9"
    monkeypatch.setattr(comparison, "BACKENDS", {"gorgon": breaks, "theirs": BACKENDS["gorgon"]})
    assert main([*flags.split(), "--steps", "1"]) == 1
    out = capsys.readouterr().out
    assert "Attention of all layers" in out and "RuntimeError: no such kernel" in out
    assert json.loads(out.splitlines()[-1])["not_measured"] == {
        "tiny": "attention, plain: RuntimeError: no such kernel"
    }


@pytest.mark.gpu
def test_on_a_gpu_all_is_captured(capsys: Any) -> None:
    flags = "bench gpu --device cuda --shapes tiny --parts attention --requests 2 --nodes 1 64 --contexts 300"
    assert main([*flags.split(), "--steps", "2"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["attention"]
    for row in rows:
        if row["kernel"] in ("gorgon", "SDPA, gathered"):
            assert row["note"] is None and row["graph"] and row["ms_median"] > 0
