"""Who reads how much of a prompt: nobody starves, short ones are not held, and drafts keep a place."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.costs import CostModel
from engine.scheduling.pacing import TimedPacing
from engine.scheduling.prompts import PromptShare
from engine.speculation.policy import FixedSpeculation
from tests.engine.helpers import FakeRunner, continuation, make_scheduler, params, run_all, run_step

COST = CostModel(passes=((1, 0.01), (64, 0.02), (128, 0.04)), next_key=1e-6)


def prompt(length: int, first: int = 3) -> list[int]:
    return [first, *(3 + position % 7 for position in range(length - 1))]


@given(
    num_tokens=st.integers(0, 600),
    seconds=st.floats(0.0, 1.0),
    asked=st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 8000), st.sampled_from([0.5, 1.0]))),
)
def test_what_is_taken_is_there(
    num_tokens: int, seconds: float, asked: Sequence[tuple[int, int, float]]
) -> None:
    pacing = TimedPacing(COST, longest=seconds / 0.85 or 1e-12)
    share = PromptShare(pacing, num_tokens, [])
    taken, spent = 0, 0.0
    for count, (num_left, context, part) in enumerate(asked):
        if not share.is_left:
            break
        tokens = share.take(num_left, context, part)
        assert 1 <= tokens <= num_left
        if count >= 2:  # all but the first two stop where the time is over
            assert spent < seconds
        spent += pacing.added_seconds(tokens, context, taken)
        taken += tokens
        if tokens > 4:  # the last of a prompt may take a quarter more
            assert spent <= seconds * (1.25 if tokens == num_left else 1.0) * (1 + 1e-9)
    assert taken <= num_tokens


@given(
    seconds=st.floats(1e-6, 10.0),
    context=st.integers(0, 100_000),
    beside=st.integers(0, 200),
    most=st.integers(0, 2000),
)
def test_affordable_tokens_take_the_time_there_is(
    seconds: float, context: int, beside: int, most: int
) -> None:
    pacing = TimedPacing(COST)
    tokens = pacing.affordable(seconds, context, beside, most)
    assert 0 <= tokens <= most
    assert tokens == 0 or pacing.added_seconds(tokens, context, beside) <= seconds
    assert tokens == most or pacing.added_seconds(tokens + 1, context, beside) > seconds


@settings(max_examples=60, deadline=None)
@given(
    longs=st.lists(st.tuples(st.integers(30, 120), st.integers(0, 8)), min_size=1, max_size=3),
    short=st.integers(1, 12),
    max_num_seqs=st.integers(2, 6),
    budget=st.integers(6, 40),
    paced=st.booleans(),
    spare_blocks=st.integers(0, 20),
)
def test_nobody_starves_however_many_short_prompts_keep_coming(
    longs: list[tuple[int, int]], short: int, max_num_seqs: int, budget: int, paced: bool, spare_blocks: int
) -> None:
    scheduler = make_scheduler(
        num_blocks=40 + spare_blocks,
        max_model_len=160,
        max_num_seqs=max_num_seqs,
        budget=budget,
        policy=FixedSpeculation(2),
        pacing=TimedPacing(COST) if paced else None,
    )
    runner = FakeRunner(scheduler)
    tokens: dict[str, list[int]] = {}
    for step in range(600):
        for index, (length, arrives) in enumerate(longs):
            if step == arrives:
                scheduler.add(f"long-{index}", prompt(length, 20 + index), params(3, ignore_eos=True))
        scheduler.add(f"short-{step}", prompt(short, 30 + step % 19), params(1))
        _, outputs = run_step(scheduler, runner)
        for output in outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if all(f"long-{index}" not in scheduler for index in range(len(longs))) and step > 8:
            break
    for index, (length, _) in enumerate(longs):
        expected = continuation(prompt(length, 20 + index), params(3, ignore_eos=True), 160)
        assert tokens[f"long-{index}"] == expected


def test_a_short_prompt_overtakes_long_ones_that_run_and_that_wait() -> None:
    scheduler = make_scheduler(num_blocks=400, max_model_len=500, budget=32)
    runner = FakeRunner(scheduler)
    for index in range(3):
        scheduler.add(f"long-{index}", prompt(400, 20 + index), params(1))
    run_step(scheduler, runner)
    scheduler.add("short", prompt(10, 40), params(1))
    batch, outputs = run_step(scheduler, runner)
    assert [output.request_id for output in outputs] == ["short"]
    assert {s.request.request_id: s.num_tokens for s in batch.scheduled} == {"long-0": 22, "short": 10}


def test_a_long_prompt_that_blocks_are_short_for_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=16, block_size=4, max_model_len=64)
    runner = FakeRunner(scheduler)
    scheduler.add("runs", prompt(30), params(10, ignore_eos=True))
    run_step(scheduler, runner)
    scheduler.add("large", prompt(50, 20), params(1))
    scheduler.add("small", prompt(4, 30), params(1))
    started: list[str] = []
    while scheduler.has_work():
        batch, _ = run_step(scheduler, runner)
        started += [s.request.request_id for s in batch.scheduled if s.request.request_id not in started]
    assert started == ["runs", "large", "small"]


def test_what_several_prompts_have_in_common_is_read_once() -> None:
    scheduler = make_scheduler(num_blocks=400, max_model_len=200, budget=32)
    runner = FakeRunner(scheduler)
    for index in range(4):
        scheduler.add(str(index), [*prompt(100), *prompt(6 - index, 20 + index)], params(1))
    tokens, batches = run_all(scheduler, runner)
    assert len(tokens) == 4
    assert sum(s.num_tokens for batch in batches for s in batch.scheduled) < 140


def test_drafts_keep_a_place_beside_a_prompt_that_could_fill_the_budget() -> None:
    scheduler = make_scheduler(
        num_blocks=500, max_model_len=1600, budget=64, policy=FixedSpeculation(8), max_drafts=63
    )
    runner = FakeRunner(scheduler)
    scheduler.add("stream", prompt(5), params(60, ignore_eos=True))
    run_step(scheduler, runner)
    scheduler.add("long", prompt(1500, 20), params(1))
    batch, _ = run_step(scheduler, runner)
    shares = {s.request.request_id: (s.num_tokens, s.num_drafts) for s in batch.scheduled}
    assert shares == {"stream": (1, 8), "long": (55, 0)}


def test_prompts_go_on_where_drafts_would_fill_the_budget() -> None:
    scheduler = make_scheduler(
        num_blocks=500, max_model_len=300, budget=64, policy=FixedSpeculation(63), max_drafts=63
    )
    runner = FakeRunner(scheduler)
    scheduler.add("stream", prompt(5), params(60, ignore_eos=True))
    run_step(scheduler, runner)
    scheduler.add("long", prompt(200, 20), params(1))
    batch, _ = run_step(scheduler, runner)
    assert {s.request.request_id: s.num_tokens for s in batch.scheduled} == {"stream": 1, "long": 16}
    assert batch.num_tokens == 64


def test_blocks_go_to_prompts_before_drafts() -> None:
    scheduler = make_scheduler(num_blocks=16, block_size=4, max_model_len=64, policy=FixedSpeculation(8))
    runner = FakeRunner(scheduler)
    scheduler.add("stream", prompt(8), params(20, ignore_eos=True))
    run_step(scheduler, runner)
    scheduler.add("large", prompt(50, 20), params(1))  # thirteen blocks; the stream has three
    batch, _ = run_step(scheduler, runner)
    assert {s.request.request_id: s.num_drafts for s in batch.scheduled} == {"stream": 3, "large": 0}
    run_all(scheduler, runner)
