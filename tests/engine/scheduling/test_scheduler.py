"""What a step is made of: budget, chunks, prefix reuse, preemption, drafts and the places they may take."""

from __future__ import annotations

import time

import pytest

from engine.batch import Batch, PassResult
from engine.costs import CostModel
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.speculation.adaptive import AdaptiveSpeculation
from engine.speculation.policy import FixedSpeculation
from tests.engine.families import full
from tests.engine.helpers import FakeRunner, continuation, make_scheduler, params, run_all, run_step


def prompt(length: int, first: int = 3) -> list[int]:
    return [first + position % 7 for position in range(length)]


def by_id(batch: Batch) -> dict[str, tuple[int, int]]:
    """(known tokens, draft tokens) of each scheduled request."""
    return {s.request.request_id: (s.num_tokens, s.num_drafts) for s in batch.scheduled}


def request_of(scheduler: Scheduler, request_id: str) -> Request:
    return scheduler._requests[request_id]


class TestChunks:
    def test_prompt_longer_than_the_budget_comes_in_chunks_and_only_the_last_one_commits(self) -> None:
        scheduler = make_scheduler(budget=8)
        scheduler.add("a", prompt(20), params(1))
        runner = FakeRunner(scheduler)
        sizes, committed = [], []
        while scheduler.has_work():
            batch, outputs = run_step(scheduler, runner)
            sizes.append(by_id(batch)["a"][0])
            committed.append(sum(len(output.token_ids) for output in outputs))
        assert sizes == [8, 8, 4]
        assert committed == [0, 0, 1]

    def test_running_requests_come_before_prompts_and_the_rest_of_the_budget_goes_to_chunks(self) -> None:
        scheduler = make_scheduler(budget=8)
        runner = FakeRunner(scheduler)
        scheduler.add("a", prompt(4), params(8))
        run_step(scheduler, runner)
        scheduler.add("b", prompt(12, first=20), params(8))
        batch, _ = run_step(scheduler, runner)
        assert by_id(batch) == {"a": (1, 0), "b": (7, 0)}
        batch, _ = run_step(scheduler, runner)
        assert by_id(batch) == {"a": (1, 0), "b": (5, 0)}

    def test_several_prompts_share_one_pass(self) -> None:
        scheduler = make_scheduler(budget=16)
        for name in "abc":
            scheduler.add(name, prompt(5, first=ord(name) - 90), params(4))
        batch, outputs = run_step(scheduler, FakeRunner(scheduler))
        assert by_id(batch) == {"a": (5, 0), "b": (5, 0), "c": (5, 0)}
        assert {output.request_id for output in outputs} == {"a", "b", "c"}

    def test_no_more_requests_run_than_there_are_places(self) -> None:
        scheduler = make_scheduler(max_num_seqs=2)
        for name in "abc":
            scheduler.add(name, prompt(4), params(2))
        runner = FakeRunner(scheduler)
        batch, _ = run_step(scheduler, runner)
        assert set(by_id(batch)) == {"a", "b"}
        assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
        tokens, batches = run_all(scheduler, runner)
        assert set(by_id(batches[1])) == {"c"}
        assert len(tokens["c"]) == 2


class TestPrefixCache:
    def test_second_request_reuses_full_blocks_of_the_first_but_computes_its_root(self) -> None:
        scheduler = make_scheduler(block_size=4)
        runner = FakeRunner(scheduler)
        shared = prompt(12)
        scheduler.add("a", shared, params(1))
        run_all(scheduler, runner)
        scheduler.add("b", shared, params(1))
        batch, outputs = run_step(scheduler, runner)
        # The third block holds the root and is computed anew.
        assert by_id(batch) == {"b": (4, 0)}
        assert (batch.prefix_queries, batch.prefix_hits) == (12, 8)
        assert outputs[0].usage.cached_tokens == 8

    def test_blocks_of_a_running_request_are_shared(self) -> None:
        scheduler = make_scheduler(block_size=4)
        runner = FakeRunner(scheduler)
        scheduler.add("a", prompt(9), params(20))
        run_step(scheduler, runner)
        scheduler.add("b", [*prompt(8), 40, 41], params(20))
        run_step(scheduler, runner)
        a, b = (request_of(scheduler, name).block_table for name in "ab")
        assert a[:2] == b[:2] and a[2] != b[2]

    def test_generated_tokens_are_reused_by_the_next_turn(self) -> None:
        scheduler = make_scheduler(block_size=4)
        runner = FakeRunner(scheduler)
        first = prompt(6)
        scheduler.add("a", first, params(7))
        tokens, _ = run_all(scheduler, runner)
        # The last token's KV was never computed.
        scheduler.add("b", [*first, *tokens["a"], 30], params(1))
        batch, _ = run_step(scheduler, runner)
        assert batch.prefix_hits == 12

    def test_least_recently_used_blocks_are_evicted_first(self) -> None:
        scheduler = make_scheduler(num_blocks=6, block_size=4, max_model_len=20)
        runner = FakeRunner(scheduler)
        old, new = prompt(8, first=3), prompt(8, first=20)
        for name, tokens in (("old", old), ("new", new), ("old again", old)):
            scheduler.add(name, tokens, params(1))
            run_all(scheduler, runner)
        scheduler.add("big", prompt(19, first=35), params(1))
        run_all(scheduler, runner)
        scheduler.add("check", old, params(1))
        batch, _ = run_step(scheduler, runner)
        assert batch.prefix_hits == 4
        run_all(scheduler, runner)
        scheduler.add("check", new, params(1))
        batch, _ = run_step(scheduler, runner)
        assert batch.prefix_hits == 0

    def test_drafted_tokens_are_never_taken_for_known_ones(self) -> None:
        scheduler = make_scheduler(block_size=2, policy=FixedSpeculation(8))
        runner = FakeRunner(scheduler, accept=lambda num_drafts: 0)
        scheduler.add("a", prompt(5), params(6))
        tokens, _ = run_all(scheduler, runner)
        known = [*prompt(5), *tokens["a"]]
        scheduler.add("b", [*known, 30, 31, 32, 33], params(1))
        batch, _ = run_step(scheduler, runner)
        assert batch.prefix_hits == (len(known) - 1) // 2 * 2


class TestPreemption:
    def full_house(self, policy: FixedSpeculation | None = None) -> tuple[Scheduler, FakeRunner]:
        """Three requests that fit when they start, and do not when they grow."""
        scheduler = make_scheduler(num_blocks=8, block_size=4, max_model_len=32, policy=policy)
        for name in "abc":
            scheduler.add(name, prompt(7, first=ord(name) - 90), params(20))
        return scheduler, FakeRunner(scheduler)

    def test_youngest_goes_first_and_the_oldest_keeps_its_blocks(self) -> None:
        scheduler, runner = self.full_house()
        run_step(scheduler, runner)
        oldest = request_of(scheduler, "a")
        preempted = 0
        while scheduler.has_work():
            before = list(oldest.block_table)
            running = [r.request_id for r in scheduler._running]
            batch, _ = run_step(scheduler, runner)
            preempted += batch.num_preemptions
            if "a" in scheduler:
                assert list(oldest.block_table[: len(before)]) == before
            if batch.num_preemptions:
                left = [r.request_id for r in scheduler._running if r.request_id in running]
                assert left == running[: len(left)]
        assert preempted > 0

    @pytest.mark.parametrize("drafts", [0, 3])
    def test_preempted_requests_resume_and_give_the_same_tokens(self, drafts: int) -> None:
        scheduler, runner = self.full_house(FixedSpeculation(drafts))
        tokens, batches = run_all(scheduler, runner)
        assert sum(batch.num_preemptions for batch in batches) > 0
        for name in "abc":
            assert tokens[name] == continuation(prompt(7, first=ord(name) - 90), params(20), 32)

    def test_blocks_that_past_drafts_left_empty_are_taken_back_for_who_needs_them(self) -> None:
        policy = FixedSpeculation(8)
        scheduler = make_scheduler(num_blocks=8, block_size=4, max_model_len=32, max_drafts=8, policy=policy)
        runner = FakeRunner(scheduler)
        scheduler.add("a", prompt(1), params(20))
        for _ in range(5):
            run_step(scheduler, runner)
        request = request_of(scheduler, "a")
        assert (len(request.token_ids), len(request.block_table)) == (6, 4)
        # Two blocks hold what is known of "a", six are what "b" needs.
        scheduler.add("b", prompt(23, first=40), params(1))
        batch, _ = run_step(scheduler, runner)
        assert set(by_id(batch)) == {"a", "b"} and not batch.num_preemptions

    def test_preempted_request_comes_back_before_later_ones(self) -> None:
        scheduler, runner = self.full_house()
        while not run_step(scheduler, runner)[0].num_preemptions:
            pass
        scheduler.add("late", prompt(4, first=40), params(2))
        starts: list[str] = []
        while scheduler.has_work():
            batch, _ = run_step(scheduler, runner)
            starts += [name for name in by_id(batch) if name not in starts]
        assert starts.index("c") < starts.index("late")

    def test_cached_tokens_in_usage_are_those_of_the_first_start(self) -> None:
        scheduler, runner = self.full_house()
        last = {}
        while scheduler.has_work():
            _, outputs = run_step(scheduler, runner)
            last.update({output.request_id: output.usage.cached_tokens for output in outputs})
        assert last == {"a": 0, "b": 0, "c": 0}


class TestAbort:
    def test_waiting_running_preempted_and_unknown_requests(self) -> None:
        scheduler = make_scheduler(num_blocks=8, block_size=4, max_model_len=32, max_num_seqs=3)
        runner = FakeRunner(scheduler)
        for name in "abcd":
            scheduler.add(name, prompt(7, first=ord(name) - 90), params(20))
        scheduler.abort("nobody")
        run_step(scheduler, runner)
        scheduler.abort("d")  # waits
        while not run_step(scheduler, runner)[0].num_preemptions:
            pass
        assert request_of(scheduler, "c").seat is None
        scheduler.abort("c")  # preempted
        scheduler.check_integrity()
        scheduler.abort("a")  # runs
        scheduler.check_integrity()
        assert "a" not in scheduler and "b" in scheduler
        tokens, _ = run_all(scheduler, runner)
        assert set(tokens) == {"b"}

    def test_result_of_a_request_aborted_while_its_pass_ran_is_dropped(self) -> None:
        scheduler = make_scheduler()
        scheduler.add("a", prompt(4), params(8))
        scheduler.add("b", prompt(4, first=20), params(8))
        batch = scheduler.schedule()
        results = FakeRunner(scheduler).execute(batch)
        scheduler.abort("a")
        outputs = scheduler.update(batch, results)
        scheduler.check_integrity()
        assert [output.request_id for output in outputs] == ["b"]

    def test_its_place_and_blocks_are_free_for_the_next_step(self) -> None:
        scheduler = make_scheduler(max_num_seqs=1)
        runner = FakeRunner(scheduler)
        scheduler.add("a", prompt(4), params(8))
        scheduler.add("b", prompt(4), params(8))
        run_step(scheduler, runner)
        scheduler.abort("a")
        batch, _ = run_step(scheduler, runner)
        assert set(by_id(batch)) == {"b"}


class TestDrafts:
    def start(self, drafts: int = 8, max_tokens: int = 20, **settings: object) -> tuple[Scheduler, Batch]:
        """One request that has its first token, and the batch of its second step."""
        sampling = params(max_tokens, speculation=settings.pop("speculation", {}))
        scheduler = make_scheduler(policy=FixedSpeculation(drafts), **settings)  # type: ignore[arg-type]
        scheduler.add("a", prompt(5), sampling)
        run_step(scheduler, FakeRunner(scheduler))
        return scheduler, scheduler.schedule()

    def test_none_before_there_is_a_hidden_row_to_draft_from(self) -> None:
        scheduler = make_scheduler(policy=FixedSpeculation(8))
        scheduler.add("a", prompt(5), params(20))
        assert by_id(scheduler.schedule()) == {"a": (5, 0)}

    def test_as_many_as_the_policy_says(self) -> None:
        assert by_id(self.start(6)[1]) == {"a": (1, 6)}

    def test_never_more_than_the_family_has(self) -> None:
        assert by_id(self.start(8, max_drafts=3)[1]) == {"a": (1, 3)}

    def test_a_request_may_switch_them_off_or_bound_them(self) -> None:
        assert by_id(self.start(speculation={"enabled": False})[1]) == {"a": (1, 0)}
        assert by_id(self.start(speculation={"max_draft_tokens": 2})[1]) == {"a": (1, 2)}
        assert by_id(self.start(speculation={"max_draft_tokens": 0})[1]) == {"a": (1, 0)}

    def test_never_over_the_budget(self) -> None:
        assert by_id(self.start(8, budget=6)[1]) == {"a": (1, 5)}

    def test_none_where_one_token_is_left(self) -> None:
        assert by_id(self.start(max_tokens=2)[1]) == {"a": (1, 0)}

    def test_never_beyond_the_context(self) -> None:
        scheduler, batch = self.start(8, max_model_len=8, max_tokens=3)
        assert by_id(batch) == {"a": (1, 2)}
        assert len(request_of(scheduler, "a").token_ids) + 2 == 8

    def test_they_take_what_room_there_is_and_never_preempt(self) -> None:
        # Each request holds 6 tokens in two blocks; the fifth block alone is not enough for 8 drafts.
        scheduler = make_scheduler(num_blocks=5, block_size=4, max_model_len=20, policy=FixedSpeculation(8))
        runner = FakeRunner(scheduler)
        scheduler.add("a", prompt(5), params(10))
        scheduler.add("b", prompt(5, first=20), params(10))
        run_step(scheduler, runner)
        batch, _ = run_step(scheduler, runner)
        assert by_id(batch) == {"a": (1, 2), "b": (1, 2)}
        assert batch.num_preemptions == 0

    def test_only_drafts_that_were_committed_count_as_accepted(self) -> None:
        scheduler, batch = self.start(8)
        outputs = scheduler.update(batch, [PassResult([10, 11, 2, 12, 13])])
        assert outputs[0].token_ids == [10, 11, 2]
        usage = outputs[0].usage
        assert (usage.drafted_tokens, usage.accepted_tokens, usage.decode_steps) == (8, 3, 2)


def test_host_work_of_64_requests_stays_under_two_milliseconds() -> None:
    family = full()
    guessing = ((1, 0.001), (64, 0.003))
    costs = CostModel(((1, 0.02), (64, 0.03), (1024, 0.1)), guessing, guessing)
    scheduler = make_scheduler(
        num_blocks=4000,
        block_size=16,
        max_num_seqs=64,
        budget=16_384,
        max_model_len=1024,
        max_drafts=len(family.paths),
        policy=AdaptiveSpeculation(family, costs),
    )
    for name in range(64):
        scheduler.add(str(name), [50 + name, *prompt(100 + name)], params(600))
    times = []
    drafting = 0
    for _ in range(60):
        start = time.process_time()
        batch = scheduler.schedule()
        scheduled = time.process_time() - start
        results = [PassResult([10] * (1 + min(5, s.num_drafts))) for s in batch.scheduled]
        start = time.process_time()
        scheduler.update(batch, results)
        times.append(scheduled + time.process_time() - start)
        assert len(batch.scheduled) == 64
        drafting += any(s.num_drafts for s in batch.scheduled)
    assert drafting > 30
    # The best of many: a busy machine makes single steps slow, never fast.
    assert min(times[1:]) < 0.002
