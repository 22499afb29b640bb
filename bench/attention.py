"""The attention part of `gorgon bench gpu`: the engine's and others' over the same passes, by turns.

Timed is the attention of all layers, keys and values stored, on a GPU as a CUDA graph where it can be
captured. The limit is the time to read the keys and values of all positions once; a few megabytes of them may
stay in the processor's own cache and be read faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.attention_backends import BACKENDS, MissingBackendError
from bench.attention_passes import Problem, cases, fill, pass_of
from bench.bandwidth import Bandwidth
from bench.device_time import elapsed_seconds, repeatable
from bench.gpu_options import GpuBenchOptions
from bench.gpu_targets import OWN
from bench.step import Measured, figures_of
from engine.backends.kv_cache import KVCache, bytes_per_token
from engine.backends.torch.attention import PagedAttention
from engine.model.config import DecoderConfig
from engine.model.decoder import Attention
from trees.family import TreeFamily

# Of a row's read-out, by the norm of the difference: what rounding makes of it. One wrong key makes more.
_TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Attended:
    """What one backend took for one pass; `measured` is None where it did not run, or ran wrong."""

    facts: dict[str, Any]
    measured: Measured | None
    kv_bytes: int  # of each request

    def row(self, bandwidth: float) -> dict[str, Any]:
        """bandwidth: bytes per second, as it turned out in the end."""
        figures = {} if self.measured is None else figures_of(self.measured, self.kv_bytes, bandwidth)
        return {**figures, **self.facts}


def compare_attention(
    config: DecoderConfig, cache: KVCache, options: GpuBenchOptions, family: TreeFamily, bandwidth: Bandwidth
) -> Iterator[Attended]:
    """All backends over every pass of a model's heads; the bandwidth in between. Fills the cache."""
    fill(cache)
    kv_bytes = bytes_per_token(config, cache.stored)
    for case in cases(options):
        problem = Problem(pass_of(case, cache, family), cache, config.num_heads, config.num_kv_heads)
        bandwidth.measure()
        facts = {"pass": case.name, "requests": case.requests, "context": case.context, "nodes": case.nodes}
        for one in _compare(problem, config, options.steps):
            yield replace(one, facts={**facts, **one.facts}, kv_bytes=case.keys * kv_bytes)


@torch.inference_mode()
def _compare(problem: Problem, config: DecoderConfig, rounds: int) -> list[Attended]:
    """Each backend is checked, then those that are right take turns."""
    torch.compiler.reset()  # compiled is for one pass, and torch keeps a few such variants only
    qkv = _draw(problem)
    expected = _reference(problem, config, qkv)
    notes: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    seconds: dict[str, list[float]] = {}
    for name, make in BACKENDS.items():
        try:
            attention = make(problem)
            off_by = _off_by(attention(0, *qkv), expected)
            if not off_by <= _TOLERANCES[problem.cache.dtype]:  # NaN is not
                notes[name] = {"note": f"wrong: off by {off_by:.2g} of what it should read"}
                continue
            run, is_graph = repeatable(problem.device, _all_layers(attention, config.num_layers, qkv))
            notes[name] = {"off_by": round(off_by, 6), "graph": is_graph}
            runs[name], seconds[name] = run, []
        except MissingBackendError as error:
            notes[name] = {"note": str(error)}
        except Exception as error:  # compilers and libraries raise what they like; the others still run
            notes[name] = {"note": f"{type(error).__name__}: {error}"}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(elapsed_seconds(problem.device, run))
    return [_attended(problem, name, note, seconds) for name, note in notes.items()]


def _attended(problem: Problem, name: str, note: dict[str, Any], seconds: dict[str, list[float]]) -> Attended:
    facts: dict[str, Any] = {"kind": "attention", "kernel": name, "note": None, **note}
    if name not in seconds:
        return Attended(facts, None, 0)
    if OWN in seconds:
        facts["over_own"] = round(float(np.median(seconds[name]) / np.median(seconds[OWN])), 3)
    num_requests, num_tokens = len(problem.lengths), sum(problem.lengths)
    measured = Measured("attention", num_requests, num_tokens, tuple(seconds[name]), weight_bytes=0)
    return Attended(facts, measured, 0)


def _all_layers(
    attention: Attention, num_layers: int, qkv: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], object]:
    def run() -> None:
        for layer in range(num_layers):
            attention(layer, *qkv)

    return run


def _draw(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a pass. Long queries hang on few keys: one that is wrong is seen."""
    generator = torch.Generator(problem.device).manual_seed(1)
    head_dim = problem.cache.k.shape[-1]
    q, k, v = (
        torch.randn(sum(problem.lengths), num_heads, head_dim, generator=generator, device=problem.device).to(
            problem.cache.dtype
        )
        for num_heads in (problem.num_heads, problem.num_kv_heads, problem.num_kv_heads)
    )
    return 2 * q, k, v


def _reference(problem: Problem, config: DecoderConfig, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What the first layer should read, by plain torch operators in float32."""
    cache, slots = problem.cache, problem.step.slots
    cache.write(0, slots, *qkv[1:])
    one = replace(config, num_layers=1)
    copy = KVCache(one, cache.num_blocks, cache.block_size, torch.float32, problem.device)
    for stored, there in zip(cache.read_run(0, 0, cache.num_blocks), (copy.k, copy.v), strict=True):
        there.copy_(stored)
    # As they are stored, which may be in fewer bits.
    k, v = (x[0].index_select(1, slots).transpose(0, 1) for x in (copy.k, copy.v))
    attention = PagedAttention(problem.step, copy, problem.num_heads, problem.num_kv_heads)
    return attention(0, qkv[0].float(), k, v)


def _off_by(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a row, as a share of the row."""
    difference = (found.float() - expected).norm(dim=1)
    return float((difference / expected.norm(dim=1)).max())
