"""Cached prefixes are shared within a scope and never between two: nobody learns what others have sent."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.block_pool import hash_block, hash_scope
from engine.scheduling.scheduler import Scheduler
from tests.engine.helpers import (
    FakeRunner,
    continuation,
    make_scheduler,
    params,
    random_accept,
    run_all,
    run_step,
)

SCOPES = ("", "a", "b")
PROMPT = list(range(5, 18))


def cached_tokens(scheduler: Scheduler, runner: FakeRunner, name: str, scope: str) -> int:
    scheduler.add(name, PROMPT, params(3), scope)
    _, outputs = run_step(scheduler, runner)
    run_all(scheduler, runner)
    return outputs[0].usage.cached_tokens


def test_a_prefix_is_found_again_in_its_own_scope_alone() -> None:
    scheduler = make_scheduler(block_size=4)
    runner = FakeRunner(scheduler)
    first = [cached_tokens(scheduler, runner, f"first {scope}", scope) for scope in SCOPES]
    again = [cached_tokens(scheduler, runner, f"again {scope}", scope) for scope in SCOPES]
    assert (first, again) == ([0, 0, 0], [12, 12, 12])


def test_no_scope_can_be_chosen_to_spell_the_blocks_of_another() -> None:
    tokens = [65, 66, 67, 68]
    spelled = b"".join(token.to_bytes(4, "little") for token in tokens).decode()
    assert hash_scope(spelled) != hash_block(b"", tokens)
    assert len({hash_scope(scope) for scope in (*SCOPES, "ab", "a\0")}) == 5


arrivals = st.lists(
    st.tuples(
        st.sampled_from(SCOPES),
        st.integers(0, 16),  # tokens of a beginning that all share
        st.lists(st.integers(3, 5), min_size=1, max_size=4),
        st.integers(1, 12),  # tokens to generate
        st.integers(0, 12),  # step at which it comes
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(1, 5), st.integers(0, 10), st.integers(0, 1000))
def test_no_block_is_ever_shared_between_scopes(
    arrivals: list[tuple[str, int, list[int], int, int]], block_size: int, spare_blocks: int, seed: int
) -> None:
    scheduler = make_scheduler(
        num_blocks=-(-32 // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=4,
        budget=12,
        max_model_len=32,
    )
    runner = FakeRunner(scheduler, random_accept(seed))
    written_by: dict[int, str] = {}  # the scope whose keys and values a block holds
    tokens: dict[str, list[int]] = {}
    step = 0
    while scheduler.has_work() or step <= 12:
        for name, (scope, head, tail, length, comes) in enumerate(arrivals):
            if comes == step:
                scheduler.add(str(name), PROMPT[:head] + tail, params(length), scope)
        batch = scheduler.schedule()
        scheduler.check_integrity()
        for scheduled in batch.scheduled:
            request = scheduled.request
            final = request.num_computed // block_size
            assert {written_by[block] for block in request.block_table[:final]} <= {request.cache_scope}
            written_by |= dict.fromkeys(request.block_table[final:], request.cache_scope)
        for output in scheduler.update(batch, runner.execute(batch)):
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        scheduler.check_integrity()
        step += 1
    for name, (_, head, tail, length, _) in enumerate(arrivals):
        assert tokens[str(name)] == continuation(PROMPT[:head] + tail, params(length), 32)
