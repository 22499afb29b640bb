"""`gorgon bench host`: what a step costs before and after the device, with every request drafting.

The scheduler runs on made-up results, so that only schedule and update are timed. The cost model is one on
which full trees always pay: the most draft tokens, the most work.
"""

from __future__ import annotations

import random
import time

from bench.facts import machine_facts
from bench.report import print_json, print_table, quartiles
from engine.batch import Batch, BatchLimits, PassResult
from engine.costs import CostModel
from engine.messages import SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.scheduler import Scheduler
from engine.speculation.adaptive import AdaptiveSpeculation
from trees.family import MAX_DRAFT_NODES, TreeFamily

PROMPT_TOKENS = 256
BLOCK_SIZE = 16
VOCABULARY = 40  # few token ids, so that n-grams match at every step: the most work possible
DEPTH = 4
WARM_UP_STEPS = 20


def run(num_requests: int, num_steps: int) -> int:
    seconds, drafts = measure(num_requests, num_steps)
    milliseconds = [1000 * s for s in seconds]
    figures = {
        **quartiles(milliseconds),
        "mean": round(sum(milliseconds) / len(milliseconds), 3),
        "p99": round(sorted(milliseconds)[int(0.99 * (len(milliseconds) - 1))], 3),
    }
    print_table(["ms per step", *figures], [["schedule + update", *figures.values()]])
    print_json(
        {
            "bench": "host",
            **machine_facts(),
            "requests": num_requests,
            "steps": num_steps,
            "drafts_per_step": round(drafts / num_steps, 1),
            "ms_per_step": figures,
        }
    )
    return 0


def measure(num_requests: int, num_steps: int) -> tuple[list[float], int]:
    """Seconds of schedule and update of each step, and how many draft tokens there were in all."""
    generator = random.Random(0)
    scheduler = make_scheduler(num_requests, num_steps)
    for index in range(num_requests):
        prompt = [generator.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]
        scheduler.add(f"bench-{index}", prompt, SamplingParams(max_tokens=10**6, temperature=0.0))
    seconds = []
    drafts = 0
    for step in range(WARM_UP_STEPS + num_steps):
        start = time.perf_counter()
        batch = scheduler.schedule()
        scheduled = time.perf_counter()
        results = make_results(batch, generator)
        received = time.perf_counter()
        scheduler.update(batch, results)
        if step >= WARM_UP_STEPS:
            seconds.append(scheduled - start + time.perf_counter() - received)
            drafts += sum(s.num_drafts for s in batch.scheduled)
    return seconds, drafts


def make_scheduler(num_requests: int, num_steps: int) -> Scheduler:
    """A scheduler in which all requests fit for all steps, with the widest tree of depth 4."""
    length = PROMPT_TOKENS + (WARM_UP_STEPS + num_steps + 1) * (DEPTH + 1) + MAX_DRAFT_NODES
    limits = BatchLimits(
        max_num_seqs=num_requests,
        max_num_batched_tokens=num_requests * (PROMPT_TOKENS + MAX_DRAFT_NODES),
        max_model_len=length,
        max_drafts=MAX_DRAFT_NODES,
    )
    chain = tuple((0,) * depth for depth in range(1, DEPTH + 1))
    siblings = tuple((rank,) for rank in range(1, MAX_DRAFT_NODES - DEPTH + 1))
    paths = chain + siblings
    family = TreeFamily(paths, tuple(0.5 * 0.9**i for i in range(len(paths))))
    cost = CostModel(
        passes=((1, 0.01), (64 * num_requests, 0.0101)), first_level=((1, 0.0001),), all_levels=((1, 0.0001),)
    )
    pool = BlockPool(num_requests * -(-length // BLOCK_SIZE), BLOCK_SIZE)
    return Scheduler(limits, pool, AdaptiveSpeculation(family, cost), eos_token_ids=(), ngrams=True)


def make_results(batch: Batch, generator: random.Random) -> list[PassResult]:
    """As if a random number of draft tokens along the chain had been accepted."""
    results = []
    for scheduled in batch.scheduled:
        count = 1 + generator.randint(0, min(DEPTH, scheduled.num_drafts)) if scheduled.commits else 0
        results.append(PassResult([generator.randrange(VOCABULARY) for _ in range(count)]))
    return results
