"""Times the engine's decoding steps, by their requests, trees and contexts, beside the memory limit.

A pass has to read every weight once, and the keys and values of every request's context. At the bandwidth
that is measured between the passes, this takes a time that no engine can go below. Steps are whole ones:
schedule, execute and update, drafting included.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.bandwidth import Bandwidth
from bench.device_profile import DeviceProfile, profile_device
from bench.report import print_table
from engine.engine import Engine
from engine.errors import GorgonError
from engine.messages import AddRequest, SamplingParams, SpeculationParams, StepStats

WARM_UP_STEPS = 3
_LISTED_KERNELS = 8  # kernels with the most time, in the JSON


class StepBenchError(GorgonError):
    """The engine did not run the steps that were asked for."""


@dataclass(frozen=True)
class Kind:
    """Steps of one kind: all requests decode. `nodes`: of each request's tree, root included; 1 is plain
    decoding. `context`: tokens behind each request."""

    requests: int
    nodes: int
    context: int

    @property
    def name(self) -> str:
        return "plain" if self.nodes == 1 else f"tree of {self.nodes}"


@dataclass(frozen=True)
class Measured:
    """What steps of one kind took. `num_tokens`: tokens in the pass, the mean where steps differ."""

    kind: Kind
    num_tokens: float
    seconds: tuple[float, ...]
    weight_bytes: int
    profile: DeviceProfile | None  # of the same number of steps; None without a GPU


def measure(
    engine: Engine, kinds: Iterable[Kind], num_steps: int, bandwidth: Bandwidth
) -> Iterator[Measured]:
    """Time one kind after the other, and measure the bandwidth in between. Raises as `measure_steps` does."""
    for kind in kinds:
        bandwidth.measure()
        yield measure_steps(engine, kind, num_steps)


def measure_steps(engine: Engine, kind: Kind, num_steps: int) -> Measured:
    """Time steps; their answers are thrown away.

    Raises StepBenchError where requests end, are preempted or do not all run at once, and RequestError where
    the model cannot have that much context.
    """
    with _decoding(engine, kind, num_steps) as step:
        stats = [step() for _ in range(num_steps)]
    device, profile = torch.device(engine.info.device), None
    if device.type == "cuda":
        with _decoding(engine, kind, num_steps) as step:
            profile = profile_device(device, lambda: [step() for _ in range(num_steps)])
    tokens = sum(s.num_tokens for s in stats)
    seconds = tuple(s.duration for s in stats)
    return Measured(kind, tokens / num_steps, seconds, engine.weight_bytes(), profile)


@contextmanager
def _decoding(engine: Engine, kind: Kind, num_steps: int) -> Iterator[Callable[[], StepStats]]:
    """Gives a step function, for `num_steps` calls at most. Its requests are warmed up and all decode."""
    generator = random.Random(0)  # prompts of their own, so that no two requests share blocks
    # An accepted tree takes many tokens a step, and no request may end before the steps are counted.
    max_tokens = min(64 * (num_steps + WARM_UP_STEPS), engine.info.max_model_len - kind.context)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        speculation=SpeculationParams(max_draft_tokens=max(1, kind.nodes - 1)),
    )
    names = [f"{kind.name}-{index}" for index in range(kind.requests)]
    for name in names:
        prompt = [generator.randrange(engine.info.vocab_size) for _ in range(kind.context)]
        engine.add_request(AddRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    started: set[str] = set()
    while len(started) < kind.requests:
        started |= {output.request_id for output in engine.step().outputs if output.token_ids}

    def step() -> StepStats:
        stats = engine.step().stats
        if stats.num_running != kind.requests or len(stats.committed_tokens) != kind.requests:
            raise StepBenchError(
                f"{len(stats.committed_tokens)} of {kind.requests} requests decoded in a step; raise "
                "--kv-cache-memory, or ask for fewer --requests, fewer --steps or a shorter --context"
            )
        return stats

    try:
        for _ in range(WARM_UP_STEPS):
            step()
        yield step
    finally:
        for name in names:
            engine.abort(name)


def figures_of(measured: Measured, token_bytes: int, bandwidth: float) -> dict[str, Any]:
    """Times beside the memory limit, and what the device did. token_bytes: of the cache, for each position;
    bandwidth: bytes per second."""
    kind, profile = measured.kind, measured.profile
    read = measured.weight_bytes + kind.requests * kind.context * token_bytes
    median, num_steps = statistics.median(measured.seconds), len(measured.seconds)
    figures = {
        "kind": kind.name,
        "requests": kind.requests,
        "nodes": kind.nodes,
        "context": kind.context,
        "tokens": round(measured.num_tokens, 2),
        "ms_median": round(1000 * median, 3),
        "ms_best": round(1000 * min(measured.seconds), 3),
        "bytes": read,
        "limit_ms": round(1000 * read / bandwidth, 3),
        "share_of_limit": round(read / bandwidth / median, 4),
        "tokens_per_second": round(measured.num_tokens / median, 2),
    }
    if profile is not None:
        longest = profile.by_kernel.most_common(_LISTED_KERNELS)
        figures["idle_share"] = round(max(0.0, 1 - profile.busy / num_steps / median), 4)
        figures["ms_by_kernel"] = {name: round(1000 * s / num_steps, 4) for name, s in longest}
    return figures


def compare(rows: list[dict[str, Any]]) -> None:
    """Put each step of trees beside the plain one of the same model and load: the ratio of their times."""
    plain = {_load(row): row["ms_median"] for row in rows if row["nodes"] == 1}
    for row in rows:
        if row["nodes"] > 1 and _load(row) in plain:
            row["over_plain"] = round(row["ms_median"] / plain[_load(row)], 3)


def _load(row: dict[str, Any]) -> tuple[str | None, int, int]:
    return row.get("model"), row["requests"], row["context"]


def print_steps(rows: list[dict[str, Any]]) -> None:
    columns = {
        "step": "kind", "requests": "requests", "context": "context", "tokens": "tokens", "ms": "ms_median",
        "best ms": "ms_best", "limit ms": "limit_ms", "of the limit": "share_of_limit",
        "tokens/s": "tokens_per_second", "over plain": "over_plain", "device waits": "idle_share",
    }  # fmt: skip
    if any("model" in row for row in rows):
        columns = {"model": "model", **columns}
    print_table(list(columns), [[row.get(key) for key in columns.values()] for row in rows])
