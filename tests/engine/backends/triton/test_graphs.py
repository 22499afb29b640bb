"""Decoding in buckets with the GPU kernels: a plan that stays in place, padding, compaction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.backends.triton.fixed import TritonAttentions
from engine.backends.triton.plan import AttentionPlan
from engine.batch import BatchLimits
from engine.runner.bucket import Bucket
from engine.runner.capture import default_buckets, make_graphs
from engine.runner.graph_memory import kept_bytes
from tests.engine.backends.triton.cases import DEVICE, TritonBackend
from tests.engine.drafters import ScriptedDrafter
from tests.engine.families import full
from tests.engine.graphs import Repeating
from tests.engine.helpers import params
from tests.engine.runner.test_draft_graphs import Observed
from tests.engine.runner.test_heads_drafter import bound, hydra
from tests.engine.tiny import Arrival, TinyEngine, greedy, place

LENGTH = 8
PROMPTS = [tuple((11 * i + 3 * p) % 128 for p in range(length)) for i, length in enumerate((1, 19, 45))]


pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="the tiny engine runs on the CPU, so only interpreted kernels do"
)


def attentions_of(engine: TinyEngine) -> TritonAttentions:
    return TritonAttentions(engine.runner.cache, engine.scheduler.limits.max_model_len)


def test_greedy_answers_by_buckets_with_padding() -> None:
    def script(request_id: str) -> tuple[int, ...]:
        prompt = PROMPTS[int(request_id)]
        return prompt + greedy(prompt, LENGTH)

    drafter = ScriptedDrafter(script, 0.7, 3)
    engine = TinyEngine(full(5), drafter, block_size=16, budget=70, make_backend=TritonBackend)
    runner, capture = engine.runner, Repeating()
    buckets = [Bucket.of(1, 6, 6), Bucket.of(4, 20, 6)]
    runner.use_graphs(make_graphs(runner, buckets, attentions_of(engine).make, capture))
    arrivals = [
        Arrival(str(i), prompt, params(LENGTH, ignore_eos=True), step=i) for i, prompt in enumerate(PROMPTS)
    ]
    results = engine.run(arrivals)
    for i, prompt in enumerate(PROMPTS):
        assert tuple(results[str(i)].tokens) == greedy(prompt, LENGTH)
    assert engine.num_accepted > 5
    assert capture.num_replays > 6


def test_plans_share_their_scratch_and_what_they_keep_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AttentionPlan] = []
    reserve = AttentionPlan.reserve

    def noting(*arguments: Any, **named: Any) -> AttentionPlan:
        made.append(reserve(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(AttentionPlan, "reserve", noting)
    runner = TinyEngine(full(9), block_size=16, num_blocks=64).runner
    limits = BatchLimits(max_num_seqs=5, max_num_batched_tokens=100, max_model_len=100, max_drafts=9)
    buckets = sorted(default_buckets(limits, 256), reverse=True)
    attentions = TritonAttentions(runner.cache, limits.max_model_len)
    for bucket in buckets:
        slots = torch.zeros(bucket.num_tokens, dtype=torch.int64)
        attentions.make(bucket, runner.decoder.config.num_heads, slots, slots)
    plans = list(made)
    storages = {plan.partials.untyped_storage() for plan in plans}
    largest = max(plan.partials.numel() + plan.shares.numel() for plan in plans)
    assert len(plans) == len(buckets) > 5 and len({s.data_ptr() for s in storages}) == 1
    for plan in plans:
        ends = [x.storage_offset() + x.numel() for x in (plan.partials, plan.shares)]
        assert plan.shares.storage_offset() == ends[0] and ends[1] <= largest
    hidden = sum(bucket.num_tokens for bucket in buckets) * runner.decoder.config.hidden_size * 4
    assert kept_bytes(runner, limits, attentions) == hidden + 4 * largest + sum(plan.nbytes for plan in plans)


def test_heads_guess_and_passes_are_prepared_by_kernels_that_were_told_of_the_longest_outcome() -> None:
    drafter = Observed(bound(hydra()), TritonBackend(place()))
    engine = TinyEngine(full(5), drafter, block_size=16, budget=70, make_backend=TritonBackend)
    runner, capture = engine.runner, Repeating()
    runner.use_graphs(make_graphs(runner, [Bucket.of(3, 18, 6)], attentions_of(engine).make, capture))
    for i, prompt in enumerate(PROMPTS):
        engine.scheduler.add(str(i), list(prompt), params(LENGTH, ignore_eos=True))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    ahead, num_prepared = None, 0
    while engine.scheduler.has_work():
        confirmed = ahead is not None and engine.scheduler.confirm(ahead)
        batch = ahead if ahead is not None and confirmed else engine.scheduler.schedule()
        num_prepared += runner._prepared is not None and runner._prepared.scheduled is batch.scheduled
        collect = runner.launch(batch)
        ahead = engine.scheduler.plan_ahead(batch)
        if ahead is not None:
            runner.prepare(ahead)
        for output in engine.scheduler.update(batch, collect()):
            tokens[output.request_id] += output.token_ids
    for i, prompt in enumerate(PROMPTS):
        assert tuple(tokens[str(i)]) == greedy(prompt, LENGTH)
    assert num_prepared > 1
